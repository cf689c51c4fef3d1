"""A model whose texts begin with a token: preprocessing, evaluation and generation do as transformers does."""

import contextlib
import io
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
import torch
import transformers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from megatron_ext.config.command_line.parse import parse
from megatron_ext.config.groups.tokenizer_config import TokenizerConfig
from megatron_ext.config.run_config import RunConfig
from megatron_ext.data.corpora.train_tokenizer import train_sentencepiece
from megatron_ext.data.indexed.indexed_files import open_index
from megatron_ext.data.indexed.manifest import read_manifest
from megatron_ext.data.tokenizers import Tokenizer, build_tokenizer
from megatron_ext.inference.load_model import load_model
from megatron_ext.training.checkpoint.checkpointer import read_run_config
from megatron_ext.training.pretrain import pretrain
from tests.unit.interop.hf_models import KINDS, alone
from tools import convert_checkpoint, evaluate, generate, preprocess_data

LENGTH = 16
BOS, EOS = 1, 2
TEXTS = [
    "to be or not to be, that is the question",
    "",
    "whether it is nobler in the mind to suffer the slings and arrows",
    "<s>already begun",
]


def _fast(post_processor: Any = None, **settings: Any) -> Any:
    """A byte-level tokenizer of 320 ids, read by transformers."""
    library = tokenizers.Tokenizer(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<unk>", "<s>", "</s>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    library.train_from_iterator(TEXTS * 3, trainer)
    if post_processor is not None:
        library.post_processor = post_processor
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=library, bos_token="<s>", eos_token="</s>", **settings
    )


BEGIN = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])


def _run(tool: Callable[[], Any], *arguments: str) -> str:
    """Standard output of a tool, called with these arguments."""
    sys.argv = ["tool", *arguments]
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown):
        tool()
    return shown.getvalue()


def _tokenizer(folder: Path | str) -> Tokenizer:
    return build_tokenizer(
        TokenizerConfig(tokenizer_type="HuggingFaceTokenizer", tokenizer_model=str(folder))
    )


def _preprocess(folder: Path, name: str, *flags: str) -> str:
    (folder / "in.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in TEXTS), encoding="utf-8")
    tokenizer = ["--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", str(folder / "hf")]
    out = ["--input", str(folder / "in.jsonl"), "--output-prefix", str(folder / name), "--workers", "1"]
    return _run(preprocess_data.main, *out, *tokenizer, *flags)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`hf`: a Llama, its tokenizer begins texts; `checkpoint`: imported; `plain`, `begun`: data without, with it."""
    path = tmp_path_factory.mktemp("bos")
    kind = KINDS["Llama"]
    changed = {**kind.changes, "vocab_size": 320, "bos_token_id": BOS, "eos_token_id": EOS}
    type(kind)(kind.name, changed).build().save_pretrained(path / "hf")
    _fast(BEGIN).save_pretrained(path / "hf")
    imported = ["import", "--model-dir", f"{path}/hf", "--save", f"{path}/checkpoint"]
    assert alone(convert_checkpoint.main, imported) == 0
    before, argv = sys.stdout, sys.argv
    assert "note: the tokenizer's own configuration puts <s> before a text" in _preprocess(path, "plain")
    assert "note" not in _preprocess(path, "begun", "--prepend-bos", "--append-eod")
    assert sys.stdout is before
    sys.argv = argv
    return path


def _model(folder: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder / "hf").eval()


@torch.no_grad()
def _losses(model: Any, inputs: list[int], labels: list[int]) -> list[float]:
    logits = model(torch.tensor([inputs])).logits[0]
    found = torch.nn.functional.cross_entropy(logits.double(), torch.tensor(labels), reduction="none")
    return [float(loss) for loss in found]


def test_documents_begin_with_the_token_and_the_manifest_says_so(folder: Path) -> None:
    theirs = transformers.AutoTokenizer.from_pretrained(folder / "hf")
    index = open_index(f"{folder}/begun_text_document")
    tokens, lengths = index.tokens(), index.lengths
    found = [part.tolist() for part in np.split(tokens, np.cumsum(lengths)[:-1])]
    assert found == [[*theirs(text).input_ids, EOS] for text in TEXTS if text]
    manifest = read_manifest(f"{folder}/begun_text_document")
    assert manifest is not None and manifest["options"]["prepend_bos"] is True
    assert manifest["tokenizer"]["prepended_bos"] == BOS
    plain = read_manifest(f"{folder}/plain_text_document")
    assert plain is not None and "prepended_bos" not in plain["tokenizer"]


def _evaluated(folder: str, name: str, *flags: str) -> dict[str, float]:
    out = f"{folder}/{name}.json"
    prefix = f"{folder}/{name}_text_document"
    base = ["--load", f"{folder}/checkpoint", "--data-path", prefix, "--seq-length", str(LENGTH)]
    _run(evaluate.main, *base, "--output", out, *flags)
    found: dict[str, float] = json.loads(Path(out).read_text(encoding="utf-8"))[prefix]
    return found


def test_every_window_begins_with_the_token_and_every_token_is_predicted_once(folder: Path) -> None:
    stream = open_index(f"{folder}/plain_text_document").tokens().tolist()
    assert BOS in stream  # spelled out in a text
    model, expected = _model(folder), []
    for start in range(0, len(stream), LENGTH):
        window = stream[start : start + LENGTH]
        losses = _losses(model, [BOS, *window[:-1]], window)
        expected += [loss for loss, label in zip(losses, window, strict=True) if label != BOS]
    found = alone(_evaluated, str(folder), "plain")
    assert found["tokens"] == len(expected) == len(stream) - stream.count(BOS)
    assert found["loss"] == pytest.approx(np.mean(expected), rel=1e-5)


def test_without_it_windows_overlap_by_a_token_and_the_first_token_is_not_predicted(folder: Path) -> None:
    stream = open_index(f"{folder}/plain_text_document").tokens().tolist()
    model, expected = _model(folder), []
    for start in range(0, len(stream) - 1, LENGTH):
        window = stream[start : start + LENGTH + 1]
        expected += _losses(model, window[:-1], window[1:])
    found = alone(_evaluated, str(folder), "plain", "--no-bos")
    assert found["tokens"] == len(expected) == len(stream) - 1
    assert found["loss"] == pytest.approx(np.mean(expected), rel=1e-5)


def test_a_window_that_begins_with_the_datas_own_token_gets_no_second_one(folder: Path) -> None:
    stream = open_index(f"{folder}/begun_text_document").tokens().tolist()
    assert stream[0] == BOS and stream.count(BOS) == 4  # three documents, and one that spells it out
    model, expected = _model(folder), []
    for start in range(0, len(stream), LENGTH):
        window = stream[start : start + LENGTH]
        whole = window if window[0] == BOS else [BOS, *window]
        losses = _losses(model, whole[:-1], whole[1:])
        expected += [loss for loss, label in zip(losses, whole[1:], strict=True) if label != BOS]
    found = alone(_evaluated, str(folder), "begun")
    assert found["tokens"] == len(expected) == len(stream) - 4
    assert found["loss"] == pytest.approx(np.mean(expected), rel=1e-5)


def _generated(folder: str, *flags: str) -> str:
    greedy = ["--temperature", "0", "--max-new-tokens", "12"]
    prompt = ["--prompt", "to be", *flags]
    return _run(generate.main, "--load", f"{folder}/checkpoint", *greedy, *prompt).split("\n" + "-" * 40)[0]


def test_generation_begins_as_transformers_and_stops_where_it_is_told(folder: Path, tmp_path: Path) -> None:
    theirs: Any = transformers.AutoTokenizer.from_pretrained(folder / "hf")
    model, texts = _model(folder), {}
    for begins in (True, False):
        inputs = theirs("to be", return_tensors="pt", add_special_tokens=begins)
        new = model.generate(**inputs, max_new_tokens=12, do_sample=False)[0].tolist()
        texts[begins] = theirs.decode([token for token in new if token not in (BOS, EOS)])
    assert texts[True] != texts[False]
    assert alone(_generated, str(folder)) == texts[True]
    assert alone(_generated, str(folder), "--no-bos") == texts[False]
    new = texts[True].removeprefix("to be")
    for stop in (new[2:4], new[5:6]):
        told = alone(_generated, str(folder), "--stop", "\x00none", "--stop", stop)
        assert told == "to be" + new[: new.index(stop)]
    ids = theirs("to be", return_tensors="pt")
    new_ids = model.generate(**ids, max_new_tokens=12, do_sample=False)[0, ids.input_ids.size(1) :].tolist()
    stops = [319, new_ids[4]]
    flags = [text for stop in stops for text in ("--stop-id", str(stop))]
    kept = new_ids[: new_ids.index(new_ids[4])]
    assert alone(_generated, str(folder), *flags) == "to be" + theirs.decode(kept)
    # An instruct model's own list.
    shutil.copytree(folder / "hf", tmp_path / "hf")
    stopping = json.dumps({"eos_token_id": stops})
    (tmp_path / "hf" / "generation_config.json").write_text(stopping, encoding="utf-8")
    imported = ["import", "--model-dir", f"{tmp_path}/hf", "--save", f"{tmp_path}/checkpoint"]
    assert alone(convert_checkpoint.main, imported) == 0
    assert alone(_generated, str(tmp_path)) == "to be" + theirs.decode(kept)


def test_a_tokenizer_adds_the_token_where_transformers_does(tmp_path: Path) -> None:
    byte_level = processors.ByteLevel(trim_offsets=False)
    both = processors.Sequence([byte_level, BEGIN])
    ends = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", EOS)])
    for number, post_processor in enumerate((None, BEGIN, byte_level, both, ends)):
        for told in (None, True, False):
            path = tmp_path / f"{number}-{told}"
            _fast(post_processor).save_pretrained(path)
            settings = json.loads((path / "tokenizer_config.json").read_text(encoding="utf-8"))
            settings |= {} if told is None else {"add_bos_token": told}
            (path / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
            theirs, ours = transformers.AutoTokenizer.from_pretrained(path), _tokenizer(path)
            wanted = theirs("to be").input_ids[:1] == [BOS]
            assert (ours.bos, ours.adds_bos) == (theirs.bos_token_id, wanted)


def test_a_tokenizer_json_alone_says_what_begins_a_text(tmp_path: Path) -> None:
    _fast(BEGIN).save_pretrained(tmp_path / "whole")
    content = (tmp_path / "whole" / "tokenizer.json").read_text(encoding="utf-8")
    (tmp_path / "tokenizer.json").write_text(content, encoding="utf-8")
    ours = _tokenizer(tmp_path / "tokenizer.json")
    assert ours.begin(ours.tokenize("to be")) == tokenizers.Tokenizer.from_str(content).encode("to be").ids


def test_sentencepiece_begins_by_its_kind_and_the_file_beside_it(tmp_path: Path) -> None:
    train_sentencepiece(iter(TEXTS * 20), str(tmp_path), 320, "bpe", ())
    for kind, told, wanted in (
        ("SentencePieceTokenizer", None, False),
        ("Llama2Tokenizer", None, True),
        ("SentencePieceTokenizer", True, True),
        ("Llama2Tokenizer", False, False),
    ):
        if told is not None:
            settings = json.dumps({"add_bos_token": told})
            (tmp_path / "tokenizer_config.json").write_text(settings, encoding="utf-8")
        config: dict[str, Any] = {"tokenizer_type": kind, "tokenizer_model": f"{tmp_path}/tokenizer.model"}
        ours = build_tokenizer(TokenizerConfig(**config))
        assert (ours.bos, ours.adds_bos) == (1, wanted)
        assert ours.begin([7]) == ([1, 7] if wanted else [7])
        assert ours.begin([1, 7]) == [1, 7]


def _trained(folder: str, name: str) -> tuple[Any, bool]:
    model = "--num-layers 1 --hidden-size 16 --num-attention-heads 2 --seq-length 8 --micro-batch-size 1 --lr 1e-3"
    run = "--global-batch-size 1 --train-iters 1 --eval-iters 0 --num-workers 0 --split 100,0,0"
    tokenizer = f"--tokenizer-type HuggingFaceTokenizer --tokenizer-model {folder}/hf"
    data = f"--data-path {folder}/{name}_text_document --save {folder}/{name}"
    assert pretrain(parse(RunConfig, f"{model} {run} {tokenizer} {data}".split()), lambda *_: []) == 0
    begin = read_run_config(f"{folder}/{name}")["begin_of_documents"]
    return begin, load_model(f"{folder}/{name}", {}).tokenizer.adds_bos


def test_a_model_trained_here_begins_texts_as_its_data_did(folder: Path) -> None:
    assert alone(_trained, str(folder), "begun") == ([BOS], True)
    assert alone(_trained, str(folder), "plain") == ([], False)


def test_what_cannot_be_begun_is_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    common = ["--input", str(folder / "in.jsonl"), "--output-prefix", str(folder / "none"), "--prepend-bos"]
    with pytest.raises(
        ValueError, match="--prepend-bos: the tokenizer's files define no begin-of-text token"
    ):
        _run(preprocess_data.main, *common, "--tokenizer-type", "ByteLevelTokenizer")
    with pytest.raises(SystemExit) as ended:
        _run(generate.main, "--load", str(folder), "--prompt", "x", "--bos", "--no-bos")
    assert ended.value.code == 2
    assert "--bos, --no-bos: give only one of them" in capsys.readouterr().err

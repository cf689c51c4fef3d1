"""Small files beside imported weights come out of an export again: at once, after training, and from under NPT."""

import json
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import transformers

from megatron_ext.config.command_line.parse import parse
from megatron_ext.config.run_config import RunConfig
from megatron_ext.data.tokenizers.sentencepiece import SentencePieceTokenizer
from megatron_ext.interop import export_checkpoint, import_checkpoint
from megatron_ext.npt.modules.npt_module_config import NPTModuleConfig
from megatron_ext.npt.npt_family import NPTFamily
from megatron_ext.testing.tiny_datasets import write_dataset
from megatron_ext.training.checkpoint.base_checkpoint import BaseCheckpoint
from megatron_ext.training.checkpoint.checkpointer import read_run_config
from megatron_ext.training.pretrain import pretrain
from megatron_ext.training.run_options import RunOptions
from tests.unit.interop.hf_models import KINDS, Kind, alone

GENERATION = {
    "bos_token_id": 1,
    "eos_token_id": [3, 5, 9],
    "pad_token_id": 0,
    "do_sample": True,
    "temperature": 0.6,
    "top_p": 0.9,
}
TEMPLATE = "{% for m in messages %}{{ m.content }}</s>{% endfor %}"
CONFIG = {
    "eos_token_id": 3,
    "bos_token_id": 1,
    "pad_token_id": 0,
    "attention_dropout": 0.25,
    "use_cache": False,
    "my_own_key": [1, 2],
    "id2label": {"0": "a", "1": "b", "2": "c"},
}
TEXT = {
    "README.md": "# A model\n",
    "LICENSE": "Free.\n",
    "NOTICE.txt": "Noted.\n",
    "preprocessor_config.json": "{}",
}
RUN = shlex.split(
    "--micro-batch-size 2 --global-batch-size 2 --lr 1e-4 --eval-iters 0 --num-workers 0 "
    "--train-iters 1 --lr-decay-iters 9 --seq-length 32"
)


def _word_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    words = {
        "<pad>": 0,
        "<s>": 1,
        "Ġ": 2,
        "</s>": 3,
        "a": 4,
        "<|end|>": 5,
        "b": 6,
        "c": 7,
        "ab": 8,
        "<|eom|>": 9,
    }
    backend = Tokenizer(models.BPE(vocab=words, merges=[("a", "b")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    fast.chat_template = TEMPLATE
    fast.save_pretrained(folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`hf`, an instruct model with all that stands beside one; `checkpoint`, imported; `export`."""
    path = tmp_path_factory.mktemp("carried")
    Kind("Llama").build().save_pretrained(path / "hf")
    _word_tokenizer(path / "hf")
    file = path / "hf" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **CONFIG}))
    (path / "hf" / "generation_config.json").write_text(json.dumps(GENERATION))
    for name, text in TEXT.items():
        (path / "hf" / name).write_text(text)
    write_dataset(str(path / "data"), [[[4, 6, 7, 8] * 15] for _ in range(20)])
    alone(_round_trip, str(path))
    return path


def _round_trip(path: str) -> None:
    import_checkpoint(f"{path}/hf", f"{path}/checkpoint")
    notes = export_checkpoint(f"{path}/checkpoint", f"{path}/export")
    Path(path, "notes.json").write_text(json.dumps(notes))


def _same_generation(before: Path, after: Path) -> None:
    read = [transformers.GenerationConfig.from_pretrained(path).to_dict() for path in (before, after)]
    assert read[0] == read[1] and read[0]["eos_token_id"] == [3, 5, 9]


def test_the_generation_configuration_and_every_small_file_come_out_as_they_went_in(folder: Path) -> None:
    _same_generation(folder / "hf", folder / "export")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "export")
    assert model.generation_config.eos_token_id == [3, 5, 9] and model.generation_config.temperature == 0.6
    for name, text in TEXT.items():
        assert (folder / "export" / name).read_text() == text
    before, after = ({path.name for path in (folder / name).iterdir()} for name in ("hf", "export"))
    assert before == after
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "export")
    assert tokenizer.apply_chat_template([{"role": "user", "content": "ab"}], tokenize=False) == "ab</s>"
    notes = json.loads((folder / "notes.json").read_text())
    assert "kept as imported: generation_config.json, LICENSE, NOTICE.txt, README.md" in "\n".join(notes)


def test_the_configuration_comes_out_as_it_went_in(folder: Path) -> None:
    before, after = (
        transformers.AutoConfig.from_pretrained(folder / name).to_dict() for name in ("hf", "export")
    )
    changed = {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)}
    assert changed <= {"_name_or_path"}
    assert after["attention_dropout"] == 0.25 and after["my_own_key"] == [1, 2] and after["eos_token_id"] == 3


def test_a_checkpoint_tells_all_ids_that_end_a_generation(folder: Path) -> None:
    section = read_run_config(str(folder / "checkpoint"))["hugging_face"]
    assert section["eos_token_ids"] == [3, 5, 9]
    assert section["generation_config"] == GENERATION


def test_without_a_generation_configuration_the_ids_are_those_of_the_model(
    folder: Path, tmp_path: Path
) -> None:
    from megatron_ext.interop import load_hf

    shutil.copytree(folder / "hf", tmp_path / "hf")
    (tmp_path / "hf" / "generation_config.json").unlink()
    file = tmp_path / "hf" / "config.json"
    content = json.loads(file.read_text())
    for eos, expected in (([4, 6], (4, 6)), (None, ()), (..., (2,))):
        changed = {**content, "eos_token_id": eos}
        file.write_text(json.dumps({name: value for name, value in changed.items() if value is not ...}))
        assert load_hf(tmp_path / "hf").imported.eos_token_ids == expected
        theirs = transformers.GenerationConfig.from_model_config(
            transformers.AutoConfig.from_pretrained(tmp_path / "hf")
        )
        found = theirs.eos_token_id
        assert expected == tuple(found if isinstance(found, list) else [] if found is None else [found])
    (tmp_path / "hf" / "generation_config.json").write_text("{")
    with pytest.raises(ValueError, match=r"generation_config.json: is not JSON"):
        load_hf(tmp_path / "hf")


def _trained(path: str, out: str) -> None:
    flags = ["--config", f"{path}/checkpoint/model.yaml", "--data-path", f"{path}/data", *RUN]
    load = ["--load", f"{path}/checkpoint"]
    assert (
        pretrain(parse(RunConfig, [*flags, *load, "--finetune", "--save", f"{out}/one"]), lambda *_: []) == 0
    )
    more = [*flags, "--load", f"{out}/one", "--save", f"{out}/one", "--train-iters", "2"]
    assert pretrain(parse(RunConfig, more), lambda *_: []) == 0
    export_checkpoint(f"{out}/one", f"{out}/hf-one")
    npt = NPTFamily(NPTModuleConfig(npt_layers="all", np_rank=2))
    options = RunOptions(base=BaseCheckpoint.find(f"{path}/checkpoint"))
    on_base = parse(
        RunConfig, [*flags, "--save", f"{out}/npt", "--hidden-dropout", "0", "--attention-dropout", "0"]
    )
    assert pretrain(on_base, lambda *_: [npt], options) == 0
    export_checkpoint(f"{out}/npt", f"{out}/hf-npt", base_only=True)


def test_what_was_imported_stays_with_the_model_through_training_and_npt(
    folder: Path, tmp_path: Path
) -> None:
    alone(_trained, str(folder), str(tmp_path))
    for name in ("one", "npt"):
        assert read_run_config(str(tmp_path / name))["hugging_face"]["eos_token_ids"] == [3, 5, 9]
        _same_generation(folder / "hf", tmp_path / f"hf-{name}")
        assert {path.name for path in (tmp_path / f"hf-{name}").iterdir()} == {
            path.name for path in (folder / "hf").iterdir()
        }
        config = json.loads((tmp_path / f"hf-{name}" / "config.json").read_text())
        assert config["pad_token_id"] == 0 and config["my_own_key"] == [1, 2]


def _with_another_tokenizer(path: str, out: str) -> None:
    flags = ["--config", f"{path}/checkpoint/model.yaml", "--data-path", f"{path}/data", *RUN]
    other = [
        "--tokenizer-type",
        "NullTokenizer",
        "--vocab-size",
        "95",
        "--load",
        f"{path}/checkpoint",
        "--finetune",
    ]
    assert pretrain(parse(RunConfig, [*flags, *other, "--save", f"{out}/other"]), lambda *_: []) == 0
    export_checkpoint(f"{out}/other", f"{out}/hf")


def test_ids_of_an_imported_tokenizer_do_not_go_with_another_one(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "from"
    shutil.copytree(folder, path)
    for file in path.glob("data*json"):
        file.unlink()  # the manifest, which names the first tokenizer
    alone(_with_another_tokenizer, str(path), str(tmp_path))
    assert "hugging_face" not in read_run_config(str(tmp_path / "other"))
    assert not (tmp_path / "hf" / "generation_config.json").exists()
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["eos_token_id"] is None


def _moved(path: str) -> list[str]:
    return export_checkpoint(f"{path}/moved", f"{path}/out", tokenizer_model=f"{path}/moved/tokenizer")


def test_files_are_found_where_a_checkpoint_was_moved_with_its_tokenizer_or_are_told(
    folder: Path, tmp_path: Path
) -> None:
    shutil.copytree(folder / "checkpoint", tmp_path / "moved")
    (folder / "checkpoint").rename(tmp_path / "away")
    try:
        alone(_moved, str(tmp_path))
        assert (tmp_path / "out" / "README.md").read_text() == TEXT["README.md"]
        shutil.rmtree(tmp_path / "moved" / "hugging_face")
        shutil.rmtree(tmp_path / "out")
        notes = alone(_moved, str(tmp_path))
        assert any("not written, because" in line and "README.md" in line for line in notes), notes
        _same_generation(folder / "hf", tmp_path / "out")
    finally:
        (tmp_path / "away").rename(folder / "checkpoint")


def _sentencepiece(folder: Path) -> None:
    corpus = folder.with_suffix(".txt")
    corpus.write_text("the lead of the band leads a line of men\nleading the way home\n" * 40)
    sentencepiece.SentencePieceTrainer.train(
        input=str(corpus),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=24,
        character_coverage=1.0,
        minloglevel=2,
    )
    (folder / "tokenizer.vocab").unlink()


def _import(path: str) -> tuple[list[str], list[int]]:
    notes: list[str] = []
    found = import_checkpoint(f"{path}/hf", f"{path}/checkpoint", message=notes.append)
    return notes, found.tokenizer.tokenize("the lead")


def test_a_directory_with_a_sentencepiece_model_alone_is_imported_with_it(tmp_path: Path) -> None:
    KINDS["Llama"].build().save_pretrained(tmp_path / "hf")
    _sentencepiece(tmp_path / "hf")
    added = {"24": {"content": "<|im_start|>"}, "25": {"content": "<|im_end|>"}}
    content: dict[str, Any] = {"added_tokens_decoder": added, "chat_template": TEMPLATE}
    (tmp_path / "hf" / "tokenizer_config.json").write_text(json.dumps(content))
    notes, ids = alone(_import, str(tmp_path))
    assert "2 added tokens (<|im_start|>, <|im_end|>, ...) are not in tokenizer.model" in "\n".join(notes)
    stored = read_run_config(str(tmp_path / "checkpoint"))["tokenizer"]
    assert stored["tokenizer_type"] == "SentencePieceTokenizer" and stored["vocab_size"] == 96
    assert stored["tokenizer_model"] == str(tmp_path / "checkpoint" / "tokenizer" / "tokenizer.model")
    processor = sentencepiece.SentencePieceProcessor(model_file=stored["tokenizer_model"])
    assert (
        ids
        == processor.encode("the lead")
        == SentencePieceTokenizer(stored["tokenizer_model"]).tokenize("the lead")
    )


def test_a_tokenizer_model_that_is_no_sentencepiece_model_is_told(tmp_path: Path) -> None:
    KINDS["Llama"].build().save_pretrained(tmp_path / "hf")
    (tmp_path / "hf" / "tokenizer.model").write_text("IQ== 0\n")  # as Llama 3's, which is tiktoken's
    with pytest.raises(ValueError, match="--model-dir .*tokenizer.model: not a SentencePiece model"):
        import_checkpoint(tmp_path / "hf", tmp_path / "checkpoint")
    assert not (tmp_path / "checkpoint").exists()


def test_vocab_json_and_merges_txt_are_converted_once_at_the_import(tmp_path: Path) -> None:
    KINDS["Qwen2"].build().save_pretrained(tmp_path / "hf")
    letters = sorted(set("the lead of Ġ"))
    words = {token: i for i, token in enumerate([*letters, "th", "the", "<|endoftext|>"])}
    (tmp_path / "hf" / "vocab.json").write_text(json.dumps(words))
    (tmp_path / "hf" / "merges.txt").write_text("#version: 0.2\nt h\nth e\n")
    _, ids = alone(_import, str(tmp_path))
    assert ids == transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")("the lead").input_ids
    stored = read_run_config(str(tmp_path / "checkpoint"))["tokenizer"]
    assert stored["tokenizer_type"] == "HuggingFaceTokenizer"
    assert (tmp_path / "checkpoint" / "tokenizer" / "tokenizer.json").is_file()

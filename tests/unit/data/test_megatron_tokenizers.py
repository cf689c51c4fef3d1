"""Tokenizers under Megatron-LM's flags, against megatron-core's classes and the libraries themselves."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import tiktoken
import tokenizers
import transformers
from megatron.core.tokenizers.text import libraries as mcore
from tokenizers import processors
from transformers.convert_slow_tokenizer import bytes_to_unicode

from megatron_ext.config.groups.tokenizer_config import TokenizerConfig
from megatron_ext.config.serialize import group_from_dict, group_to_dict
from megatron_ext.data.preprocess.encoding import Encoder, choose_encoder
from megatron_ext.data.tokenizers import Tokenizer, build_tokenizer
from megatron_ext.interop.formats.tokenizer.tokenizer_conversion import to_library
from tests.unit.data.tokenizer_files import TEXTS as PROBES
from tests.unit.data.tokenizer_files import bpe_dir, sentencepiece_models, tiktoken_file

__all__ = ["bpe_dir", "sentencepiece_models", "tiktoken_file"]  # fixtures

TEXTS = (
    *PROBES,
    "<EOD>",
    "a<EOD> b<CLS><SEP>c </s>",
    "<s>x<MASK>",
    "<new> and<other>x <new>",
    "camelCaseWord\r\n//\n",
)
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


def build(kind: str, **settings: Any) -> Tokenizer:
    return build_tokenizer(TokenizerConfig(tokenizer_type=kind, **settings))  # type: ignore[arg-type]


def written(tokenizer: Tokenizer, texts: tuple[str, ...] = TEXTS) -> list[list[int]]:
    """The ids that preprocessing writes for each text."""
    rows: list[list[int]] = []
    for ids, lengths in Encoder(tokenizer, "reference").encode(list(texts)):
        flat = iter(ids.tolist())
        rows += [[next(flat) for _ in range(length)] for length in lengths]
    return rows


def gpt2_files(directory: Path) -> dict[str, str]:
    return {"vocab_file": str(directory / "vocab.json"), "merge_file": str(directory / "merges.txt")}


def test_legacy_gpt2_reads_a_special_token_as_text_as_tiktoken_does(bpe_dir: Path) -> None:
    to_byte = {letter: byte for byte, letter in bytes_to_unicode().items()}
    vocab = json.loads((bpe_dir / "vocab.json").read_text())
    ranks = {bytes(map(to_byte.get, t)): i for t, i in vocab.items() if "<|" not in t}  # type: ignore[arg-type]
    peer = tiktoken.Encoding("gpt2", pat_str=GPT2_PATTERN, mergeable_ranks=ranks, special_tokens={})
    legacy = build("GPT2BPETokenizer", **gpt2_files(bpe_dir), legacy_tokenizer=True)
    assert written(legacy) == [peer.encode_ordinary(text) for text in TEXTS]
    assert not legacy.reads_special_tokens
    assert legacy.tokenize("<|endoftext|>") != [legacy.eod]
    encoder, choice = choose_encoder(legacy, "auto", [])
    assert choice.encoder == "gigatoken"
    assert [ids.tolist() for ids, _ in encoder.encode(list(TEXTS))] == [
        [i for row in written(legacy) for i in row]
    ]


@pytest.mark.parametrize("kind", ["unigram", "bpe"])
def test_legacy_sentencepiece_knows_eod_and_reads_special_tokens(
    sentencepiece_models: Any, kind: str
) -> None:
    model = sentencepiece.SentencePieceProcessor(model_file=sentencepiece_models[kind])
    size = model.get_piece_size()
    special = {"<CLS>": size, "<SEP>": size + 1, "<EOD>": size + 2, "<MASK>": size + 3, "<PAD>": size + 4}
    assert model.pad_id() == -1  # so <PAD> is a further token
    special |= {"<s>": model.bos_id(), "</s>": model.eos_id()}

    def expected(text: str) -> list[int]:
        pieces = re.split("(" + "|".join(map(re.escape, special)) + ")", text)
        return [
            i for piece in pieces for i in ([special[piece]] if piece in special else model.encode(piece))
        ]

    ours = build("SentencePieceTokenizer", tokenizer_model=sentencepiece_models[kind], legacy_tokenizer=True)
    assert written(ours) == [expected(text) for text in TEXTS]
    assert (ours.vocab_size, ours.eod) == (size + 5, size + 2)
    assert ours.inv_vocab[ours.eod] == "<EOD>"
    assert "<EOD>" in ours.detokenize(ours.tokenize("a<EOD>"))
    with pytest.raises(ValueError, match="--legacy-tokenizer adds"):
        to_library(ours, "--tokenizer-model m")
    same = build(
        "GPTSentencePieceTokenizer", tokenizer_model=sentencepiece_models[kind], legacy_tokenizer=True
    )
    assert written(same) == [model.encode(text) for text in TEXTS]
    assert same.eod == model.eos_id()


def test_legacy_llama_begins_every_text_with_bos_an_empty_one_too(sentencepiece_models: Any) -> None:
    path = sentencepiece_models["bpe"]
    model = sentencepiece.SentencePieceProcessor(model_file=path)
    ours = build("Llama2Tokenizer", tokenizer_model=path, legacy_tokenizer=True)
    assert written(ours) == [[model.bos_id(), *model.encode(text)] for text in TEXTS]
    assert ours.eod == model.eos_id()
    assert ours.fingerprint() == build("Llama2Tokenizer", tokenizer_model=path).fingerprint()


@pytest.fixture(scope="module")
def framed_dir(bpe_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tokenizer whose tokenizer.json puts two tokens before and one after a text."""
    library = tokenizers.Tokenizer.from_file(str(bpe_dir / "tokenizer.json"))
    end, mark = (library.token_to_id(name) for name in ("<|endoftext|>", "<|im_end|>"))
    library.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> <|im_end|> $A <|im_end|>",
        special_tokens=[("<|endoftext|>", end), ("<|im_end|>", mark)],
    )
    directory = tmp_path_factory.mktemp("framed")
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=library, eos_token="<|endoftext|>", bos_token="<|endoftext|>"
    ).save_pretrained(directory)
    return str(directory)


@pytest.mark.parametrize("flag", ["tokenizer_hf_include_special_tokens", "legacy_tokenizer"])
def test_special_tokens_around_a_text_are_those_of_mcore(framed_dir: str, flag: str) -> None:
    ours = build("HuggingFaceTokenizer", tokenizer_model=framed_dir, **{flag: True})
    theirs = mcore.HuggingFaceTokenizer(framed_dir, use_fast=True, include_special_tokens=True)
    assert written(ours) == [theirs.text_to_ids(text) for text in TEXTS]
    plain = mcore.HuggingFaceTokenizer(framed_dir, use_fast=True, include_special_tokens=False)
    assert written(build("HuggingFaceTokenizer", tokenizer_model=framed_dir)) == [
        plain.text_to_ids(text) for text in TEXTS
    ]


def test_gigatoken_puts_the_same_tokens_around_a_text(framed_dir: str) -> None:
    ours = build("HuggingFaceTokenizer", tokenizer_model=framed_dir, tokenizer_hf_include_special_tokens=True)
    encoder, choice = choose_encoder(ours, "gigatoken", [])
    ((ids, lengths),) = encoder.encode(list(TEXTS))
    assert choice.encoder == "gigatoken"
    assert ids.tolist() == [i for row in written(ours) for i in row]
    assert lengths.tolist() == [len(row) for row in written(ours)]


def test_added_special_tokens_have_mcores_ids(bpe_dir: Path) -> None:
    added = ("<new>", "<|im_end|>", "<other>")
    theirs = mcore.HuggingFaceTokenizer(str(bpe_dir), use_fast=True, additional_special_tokens=list(added))
    ours = build("HuggingFaceTokenizer", tokenizer_model=str(bpe_dir), tokenizer_special_tokens=added)
    gpt2 = build("GPT2BPETokenizer", **gpt2_files(bpe_dir), tokenizer_special_tokens=added)
    assert written(ours) == written(gpt2) == [theirs.text_to_ids(text) for text in TEXTS]
    assert (ours.vocab_size, gpt2.vocab_size) == (theirs.vocab_size, theirs.vocab_size)
    assert ours.vocab_size == build("GPT2BPETokenizer", **gpt2_files(bpe_dir)).vocab_size + 2


NAMES = ("<pad>", "<unk>", "<s>", "</s>", "<mask>", "<cls>", "<sep>", "<new>")


@pytest.mark.parametrize("pattern", ["v1", "v2"])
@pytest.mark.parametrize(("count", "names"), [(1000, None), (8, NAMES), (20, NAMES)])
def test_tiktoken_flags_give_mcores_ids(tiktoken_file: str, pattern: Any, count: int, names: Any) -> None:
    settings = {
        "tiktoken_pattern": pattern,
        "tiktoken_num_special_tokens": count,
        "tokenizer_special_tokens": names,
    }
    ours = build("TikTokenizer", tokenizer_model=tiktoken_file, **settings)
    theirs = mcore.TikTokenTokenizer(
        tiktoken_file, list(names) if names else None, count, pattern=pattern, vocab_size=ours.vocab_size
    )
    assert written(ours) == [theirs.text_to_ids(text) for text in TEXTS]
    assert (ours.eod, ours.bos) == (theirs.eod, theirs.bos_id)
    legacy = build("TikTokenizer", tokenizer_model=tiktoken_file, **settings, legacy_tokenizer=True)
    assert written(legacy) == [theirs.tokenizer.encode_ordinary(text) for text in TEXTS]
    exported = to_library(ours, "")
    assert exported is not None
    assert [exported.encode(text).ids for text in TEXTS] == [ours.tokenize(text) for text in TEXTS]


def test_wrong_special_tokens_are_one_line(tiktoken_file: str, sentencepiece_models: Any) -> None:
    with pytest.raises(ValueError, match="must include <mask> <pad> <cls> <sep>"):
        build(
            "TikTokenizer", tokenizer_model=tiktoken_file, tokenizer_special_tokens=("<unk>", "<s>", "</s>")
        )
    with pytest.raises(ValueError, match="--tiktoken-num-special-tokens 7: must be at least 8"):
        build("TikTokenizer", tokenizer_model=tiktoken_file, tokenizer_special_tokens=NAMES,
              tiktoken_num_special_tokens=7)  # fmt: skip
    with pytest.raises(ValueError, match="names a token twice"):
        build("TikTokenizer", tokenizer_model=tiktoken_file, tokenizer_special_tokens=("<s>", "<s>"))
    with pytest.raises(
        ValueError, match=r"got SentencePieceTokenizer, whose special tokens are those of its files"
    ):
        build(
            "SentencePieceTokenizer",
            tokenizer_model=sentencepiece_models["bpe"],
            tokenizer_special_tokens=("<n>",),
        )


def test_flags_on_which_the_ids_depend_are_recorded(tiktoken_file: str, bpe_dir: Path) -> None:
    def described(kind: str, **settings: Any) -> Any:
        return build(kind, **settings).describe().get("flags")

    assert described("GPT2BPETokenizer", **gpt2_files(bpe_dir)) is None
    assert described("GPT2BPETokenizer", **gpt2_files(bpe_dir), legacy_tokenizer=True) == "--legacy-tokenizer"
    tik = {"tokenizer_model": tiktoken_file, "tiktoken_pattern": "v1", "tiktoken_num_special_tokens": 8}
    assert described("TikTokenizer", **tik, tokenizer_special_tokens=NAMES) == (
        "--tiktoken-pattern v1 --tiktoken-num-special-tokens 8 "
        "--tokenizer-special-tokens <pad> <unk> <s> </s> <mask> <cls> <sep> <new>"
    )


def test_the_flags_survive_a_run_configuration(tiktoken_file: str) -> None:
    config = TokenizerConfig(
        tokenizer_type="TikTokenizer",
        tokenizer_model=tiktoken_file,
        tokenizer_special_tokens=NAMES,
        legacy_tokenizer=True,
    )
    assert (
        group_from_dict(TokenizerConfig, json.loads(json.dumps(group_to_dict(config))), "tokenizer") == config
    )

"""Small tokenizers, trained once for the tests of a module."""

import base64
import json
import sys
from typing import Any

import pytest

from megatron_ext.data.corpora.train_tokenizer import train_byte_level_bpe, train_sentencepiece
from megatron_ext.data.tokenizers.tokenizer import PROBE_TEXTS

TEXTS = (*PROBE_TEXTS, "", " ", "x", "\u2028", "a" * 500, "\x00\x01")


def training_texts() -> Any:
    names = ("json.decoder", "argparse", "textwrap", "difflib")
    for name in names:
        __import__(name)
        with open(str(sys.modules[name].__file__), encoding="utf-8") as file:
            yield file.read()
    yield "Größe naïve café Ωμέγα Привет мир 漢字かな 한국어 🙂 " * 20


@pytest.fixture(scope="module")
def bpe_dir(tmp_path_factory: Any) -> Any:
    directory = tmp_path_factory.mktemp("bpe")
    size = train_byte_level_bpe(training_texts(), str(directory), 1000, ("<|endoftext|>", "<|im_end|>"), 2)
    assert size == 1000
    return directory


@pytest.fixture(scope="module")
def sentencepiece_models(tmp_path_factory: Any) -> Any:
    models = {}
    for kind in ("unigram", "bpe"):
        directory = tmp_path_factory.mktemp(kind)
        assert train_sentencepiece(training_texts(), str(directory), 900, kind, ("<|im_end|>",)) == 900
        models[kind] = str(directory / "tokenizer.model")
    return models


@pytest.fixture(scope="module")
def tiktoken_file(bpe_dir: Any) -> Any:
    """The trained BPE's tokens as mcore's list of ranks."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    to_byte = {letter: byte for byte, letter in bytes_to_unicode().items()}
    vocab = json.loads((bpe_dir / "vocab.json").read_text())
    learnt = [t for t, _ in sorted(vocab.items(), key=lambda item: item[1]) if len(t) > 1 and "<|" not in t]
    tokens = [bytes([i]) for i in range(256)] + [bytes(to_byte[letter] for letter in t) for t in learnt]
    path = bpe_dir / "ranks.json"
    entries = [
        {"rank": i, "token_bytes": base64.b64encode(t).decode(), "token_str": t.decode(errors="replace")}
        for i, t in enumerate(tokens)
    ]
    path.write_text(json.dumps(entries))
    return str(path)

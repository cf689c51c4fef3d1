"""Tokenizers based on Hugging Face's `tokenizers` library: GPT-2's byte-level BPE, and any local tokenizer.json.

`GPT2BPETokenizer` reads vocab.json and merges.txt; mcore's class of that name downloads GPT-2's configuration
first, which fails on a machine without internet access. `HuggingFaceTokenizer` reads a tokenizer.json, or a
directory that holds one (or files that `transformers` can convert); it never downloads.
"""

import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from megatron_ext.data.tokenizers.tokenizer import Tokenizer

END_OF_TEXT = "<|endoftext|>"
EOD_CANDIDATES = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>", "<|eos|>", "[EOS]")
"""End-of-document tokens that are tried, in this order, if no configuration file names one."""


class LibraryTokenizer(Tokenizer):
    """Wraps a tokenizer of the library `tokenizers`, so that it has the interface of our `Tokenizer`.

    Args:
        backend: the `tokenizers.Tokenizer`; its padding and truncation are switched off.
        eod_token: the end-of-document token, which must be in the vocabulary.
        source: flag and path that the tokenizer comes from, for error messages.
        bos_token: the begin-of-text token; ignored if the backend's post-processor already prepends a token.
    """

    def __init__(
        self, backend: tokenizers.Tokenizer, eod_token: str, source: str, bos_token: str | None = None
    ) -> None:
        backend.no_truncation()
        backend.no_padding()
        self.backend = backend
        eod = backend.token_to_id(eod_token)
        if eod is None:
            raise ValueError(
                f"{source}: the vocabulary has no {eod_token}, the token that must end a document"
            )
        self.eod = eod
        self.bos = None if bos_token is None else backend.token_to_id(bos_token)
        self.reads_special_tokens = not backend.encode_special_tokens
        before, self._after = _put_around_a_text(backend)
        self._before = before
        self.adds_bos = len(before) == 1
        self.bos = before[0] if self.adds_bos else self.bos
        # An added token may have an id above the number of tokens (a vocabulary with gaps): use the largest id.
        self.vocab_size = max(backend.get_vocab_size(), max(backend.get_vocab().values()) + 1)

    def frame_texts(self) -> None:
        """Makes preprocessing add to every text the special tokens that the tokenizer.json specifies for its
        beginning and end.
        """
        self.text_frame = (self._before, self._after)

    def tokenize(self, text: str) -> list[int]:
        """Returns the ids of a text."""
        ids: list[int] = self.backend.encode(text, add_special_tokens=False).ids
        return ids

    def tokenize_batch(self, texts: list[str]) -> list[list[int]]:
        """Returns the ids of each text, through the library's batch interface without character offsets."""
        return [encoding.ids for encoding in self.backend.encode_batch_fast(texts, add_special_tokens=False)]

    def detokenize(self, ids: list[int]) -> str:
        """Returns the text that token ids stand for, special tokens included."""
        text: str = self.backend.decode(list(map(int, ids)), skip_special_tokens=False)
        return text

    @cached_property
    def vocab(self) -> dict[str, int]:
        """Maps each token, added tokens included, to its id."""
        return dict(self.backend.get_vocab())

    def _further_probes(self) -> list[object]:
        """Returns the added tokens that match only under a rule (such as whole words only), with their rules.

        The ids of `PROBE_TEXTS` might not reveal these rules.
        """
        normalizes = self.backend.normalizer is not None
        return [
            [token_id, token.single_word, token.lstrip, token.rstrip, token.normalized and normalizes]
            for token_id, token in sorted(self.backend.get_added_tokens_decoder().items())
            if token.single_word or token.lstrip or token.rstrip or (token.normalized and normalizes)
        ]

    def gigatoken_source(self) -> str:
        """Returns the text of a tokenizer.json for this tokenizer.

        It lists special tokens only if they are recognized in texts.
        """
        text: str = self.backend.to_str()
        if self.reads_special_tokens:
            return text
        content = json.loads(
            text
        )  # a tokenizer.json cannot express that special tokens in a text are not recognized
        content["added_tokens"] = [token for token in content["added_tokens"] if not token["special"]]
        return json.dumps(content)


class GPT2BPETokenizer(LibraryTokenizer):
    """GPT-2's byte-level BPE, read from its two files.

    Args:
        vocab_file: vocab.json, which maps each token to its id; must contain `<|endoftext|>`.
        merge_file: merges.txt, which lists one pair of tokens to merge per line.
        special_tokens: further special tokens; those that the vocabulary lacks get the ids after it.
        legacy: whether the name of a special token within a text is encoded as ordinary text.

    Raises:
        FileNotFoundError, ValueError: a file is missing or malformed.
    """

    def __init__(
        self,
        vocab_file: str,
        merge_file: str,
        special_tokens: Sequence[str] = (),
        *,
        legacy: bool = False,
    ) -> None:
        require_file("--vocab-file", vocab_file)
        require_file("--merge-file", merge_file)
        vocab = _read_vocab(vocab_file)
        merges = _read_merges(merge_file, vocab)
        backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=merges))
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        if END_OF_TEXT in vocab:
            backend.add_special_tokens([END_OF_TEXT])
        backend.add_special_tokens(list(special_tokens))
        backend.encode_special_tokens = legacy
        bos_token = configured_token(Path(vocab_file).parent, "bos_token")
        super().__init__(backend, END_OF_TEXT, f"--vocab-file {vocab_file}", bos_token)


class HuggingFaceTokenizer(LibraryTokenizer):
    """A tokenizer read from a tokenizer.json, or from a local directory that `save_pretrained` wrote.

    Args:
        tokenizer_model: the file or directory.
        special_tokens: further special tokens; those that the vocabulary lacks get the ids after it.

    Raises:
        FileNotFoundError, ValueError: the path does not exist, or does not hold a readable tokenizer.
    """

    def __init__(self, tokenizer_model: str, special_tokens: Sequence[str] = ()) -> None:
        path = Path(tokenizer_model)
        source = f"--tokenizer-model {tokenizer_model}"
        if not path.exists():
            raise FileNotFoundError(
                f"{source}: no such file or directory (only local paths are read, not a hub)"
            )
        file = path / "tokenizer.json" if path.is_dir() else path
        backend = _read_tokenizer_json(file, source) if file.is_file() else _convert_directory(path, source)
        folder = path if path.is_dir() else path.parent
        eod_token = configured_token(folder, "eos_token") or _first_known_eod(backend)
        if eod_token is None:
            raise ValueError(
                f"{source}: has no end-of-document token; it must have one of {', '.join(EOD_CANDIDATES)}"
            )
        if tokenizer_settings(folder).get("split_special_tokens"):
            backend.encode_special_tokens = True
        backend.add_special_tokens(list(special_tokens))
        super().__init__(backend, eod_token, source, configured_token(folder, "bos_token"))


def require_file(flag: str, path: str) -> None:
    """Raises a `FileNotFoundError` that names the flag if `path` is not a file."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"{flag} {path}: no such file")


def _read_vocab(path: str) -> dict[str, int]:
    try:
        vocab = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"--vocab-file {path}: not a JSON vocabulary ({error})") from None
    if not isinstance(vocab, dict) or not all(isinstance(value, int) for value in vocab.values()):
        raise ValueError(f"--vocab-file {path}: must be a JSON object that maps each token to its id")
    return vocab


def _read_merges(path: str, vocab: dict[str, int]) -> list[tuple[str, str]]:
    merges = []
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").split("\n"), 1):
        if not line or (number == 1 and line.startswith("#version")):
            continue
        pair = line.split(" ")
        if len(pair) != 2 or not all(part in vocab for part in (*pair, "".join(pair))):
            raise ValueError(
                f"--merge-file {path}: line {number} is not a pair of tokens from the vocabulary: {line!r}"
            )
        merges.append((pair[0], pair[1]))
    return merges


def _read_tokenizer_json(file: Path, source: str) -> tokenizers.Tokenizer:
    try:
        return tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises plain Exception
        raise ValueError(f"{source}: {file.name} cannot be read as a tokenizer ({error})") from None


def _convert_directory(path: Path, source: str) -> tokenizers.Tokenizer:
    """Lets `transformers` convert a directory that has no tokenizer.json; reads local files only."""
    try:
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(str(path), local_files_only=True).backend_tokenizer
    except Exception as error:  # whatever transformers raises, the user sees one line
        reason = str(error).strip().split("\n")[0]
        raise ValueError(
            f"{source}: has no tokenizer.json, and transformers cannot convert it ({reason})"
        ) from None


def tokenizer_settings(directory: Path) -> dict[str, Any]:
    """Returns the content of a directory's tokenizer_config.json; empty if there is no such file."""
    return _read_settings(directory / "tokenizer_config.json")


def configured_token(directory: Path, name: str) -> str | None:
    """Returns a special token as given in the configuration files beside a tokenizer; None if they do not give it.

    Args:
        directory: may hold tokenizer_config.json and special_tokens_map.json.
        name: the token's key in these files, `eos_token` or `bos_token`.
    """
    for file in ("tokenizer_config.json", "special_tokens_map.json"):
        token = _read_settings(directory / file).get(name)
        if isinstance(token, dict):
            token = token.get("content")
        if token:
            return str(token)
    return None


def _read_settings(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: is not JSON ({error})") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: must be a JSON object")
    return content


def _put_around_a_text(backend: tokenizers.Tokenizer) -> tuple[list[int], list[int]]:
    """Returns the ids of the special tokens that the post-processor puts before and after the ids of a text."""
    plain = backend.encode("a", add_special_tokens=False).ids
    whole = backend.encode("a", add_special_tokens=True).ids
    starts = range(len(whole) - len(plain) + 1)
    start = next((start for start in starts if whole[start : start + len(plain)] == plain), 0)
    return whole[:start], whole[start + len(plain) :]


def _first_known_eod(backend: tokenizers.Tokenizer) -> str | None:
    return next((token for token in EOD_CANDIDATES if backend.token_to_id(token) is not None), None)

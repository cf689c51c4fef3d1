"""Converts this package's tokenizers to Hugging Face's `tokenizers` library (tokenizer.json) with equal token ids.

Each kind of tokenizer is converted to:

    byte-level BPE, Hugging Face      unchanged, because it is already an object of that library
    SentencePiece                     unigram or BPE over the whole text, as SentencePiece segments it
    tiktoken                          byte-level BPE whose merges are derived from the ranks
    bytes                             byte-level BPE without merges

transformers can convert SentencePiece models too, but it assumes one kind of model and produces different ids for
the others. `tokenizer_readback` compares the tokenizer converted here with the original.
"""

import re
from collections.abc import Iterable, Iterator
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers

from megatron_ext.data.tokenizers import Tokenizer
from megatron_ext.data.tokenizers.bpe import LibraryTokenizer
from megatron_ext.data.tokenizers.byte_and_null import ByteLevelTokenizer
from megatron_ext.data.tokenizers.sentencepiece import LegacySentencePieceTokenizer, SentencePieceTokenizer
from megatron_ext.data.tokenizers.tiktoken import TikTokenizer

_SPACE = "\u2581"
_WAVE_DASH, _NO_CHARACTER = "\uff5e", "\ufdd0"
_UNIGRAM, _BPE = 1, 2
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6


def to_library(tokenizer: Tokenizer, source: str) -> tokenizers.Tokenizer | None:
    """Converts a tokenizer; returns None if the `tokenizers` library has no counterpart for this kind.

    Args:
        tokenizer: the tokenizer to convert.
        source: the command-line flag and the path that name the tokenizer, for error messages.

    Raises:
        ValueError: `tokenizers` cannot express this kind of SentencePiece model, or its additional special tokens.
    """
    if isinstance(tokenizer, LibraryTokenizer):
        return tokenizer.backend
    if isinstance(tokenizer, LegacySentencePieceTokenizer):
        raise ValueError(
            f"{source}: the special tokens that --legacy-tokenizer adds to a SentencePiece model cannot be exported"
        )
    if isinstance(tokenizer, SentencePieceTokenizer):
        return _from_sentencepiece(tokenizer.proto(), source)
    if isinstance(tokenizer, TikTokenizer):
        return _from_ranks(tokenizer)
    return _from_bytes(tokenizer) if isinstance(tokenizer, ByteLevelTokenizer) else None


def _from_sentencepiece(proto: Any, source: str) -> tokenizers.Tokenizer:
    trainer, rules, pieces = proto.trainer_spec, proto.normalizer_spec, list(proto.pieces)
    unsupported = {
        "a model type other than unigram and bpe": trainer.model_type not in (_UNIGRAM, _BPE),
        "escape_whitespaces=false": not rules.escape_whitespaces,
        "treat_whitespace_as_suffix=true": trainer.treat_whitespace_as_suffix,
        "unused pieces": any(piece.type == _UNUSED for piece in pieces),
    }
    for what, is_so in unsupported.items():
        if is_so:
            raise ValueError(
                f"{source}: has {what}, which tokenizer.json cannot express; "
                "use --no-tokenizer to export without the tokenizer"
            )
    symbols = [piece.piece for piece in pieces if piece.type == _USER_DEFINED]
    is_bpe = trainer.model_type == _BPE
    library = tokenizers.Tokenizer(
        _merging_model(pieces, trainer, bool(symbols)) if is_bpe else _unigram_model(pieces, trainer)
    )
    library.normalizer = normalizers.Sequence(list(_normalizers(rules)))
    splits = [re.escape(symbol) for symbol in sorted(symbols, key=len, reverse=True)]
    if is_bpe and symbols:
        splits += _guards(pieces)
    if splits:
        # SentencePiece never divides a user-defined symbol, and no other piece overlaps it.
        library.pre_tokenizer = pre_tokenizers.Split(Regex("|".join(splits)), "isolated")
    steps: list[Any] = [
        decoders.Replace(_SPACE, " "),
        decoders.Replace(trainer.unk_piece, trainer.unk_surface),
    ]
    steps += [decoders.ByteFallback(), decoders.Fuse()]
    if rules.add_dummy_prefix or rules.remove_extra_whitespaces:
        steps.append(decoders.Strip(" ", 1, 0))
    library.decoder = decoders.Sequence(steps)
    # SentencePiece reads a control piece such as `</s>` in a text as ordinary letters.
    library.encode_special_tokens = True
    return library


def _normalizers(rules: Any) -> Iterator[Any]:
    if rules.precompiled_charsmap:
        # `Precompiled` handles a letter with its combining marks only up to five bytes, so NFKC composes them first.
        # NFKC would also replace the wave dash, which SentencePiece keeps, so a noncharacter replaces it during NFKC.
        composed = "nfkc" in rules.name
        if composed:
            yield normalizers.Replace(_WAVE_DASH, _NO_CHARACTER)
            yield normalizers.NFKC()
        yield normalizers.Precompiled(rules.precompiled_charsmap)
        if composed:
            yield normalizers.Replace(_NO_CHARACTER, _WAVE_DASH)
    if rules.remove_extra_whitespaces:
        yield normalizers.Replace(Regex(r"\A +| +\z"), "")
        yield normalizers.Replace(Regex(" {2,}"), " ")
    if rules.add_dummy_prefix:
        yield normalizers.Prepend(_SPACE)
    yield normalizers.Replace(" ", _SPACE)


def _unigram_model(pieces: list[Any], trainer: Any) -> models.Unigram:
    """Returns a unigram model.

    Control and byte pieces get a lower score than the letters they consist of, so that no text is encoded to them.
    """
    score_of = {piece.piece: piece.score for piece in pieces if piece.type in (_NORMAL, _USER_DEFINED)}
    unknown = min(score_of.values(), default=0.0) - 10.0  # SentencePiece's penalty for an unknown letter
    vocab = []
    for piece in pieces:
        spelled = sum(score_of.get(letter, unknown) for letter in piece.piece) - 1.0
        vocab.append((piece.piece, score_of.get(piece.piece, spelled)))
    return models.Unigram(vocab, trainer.unk_id, trainer.byte_fallback)


def _merging_model(pieces: list[Any], trainer: Any, has_symbols: bool) -> models.BPE:
    """Returns a BPE model with one merge for every way to split a piece into two pieces.

    SentencePiece merges any two neighbours that form a piece, best score first; it has no list of merges.
    """
    number = {piece.piece: i for i, piece in enumerate(pieces)}
    normal = {piece.piece for piece in pieces if piece.type == _NORMAL}
    merges: list[tuple[str, str]] = []
    for piece in sorted((piece for piece in pieces if piece.type == _NORMAL), key=lambda piece: -piece.score):
        text = piece.piece
        ways = ((text[:cut], text[cut:]) for cut in range(1, len(text)))
        known = [(left, right) for left, right in ways if left in normal and right in normal]
        merges += sorted(known, key=lambda way: (number[way[0]], number[way[1]]))
    return models.BPE(
        vocab=number,
        merges=merges,
        unk_token=trainer.unk_piece,
        fuse_unk=True,
        byte_fallback=trainer.byte_fallback,
        ignore_merges=has_symbols,  # no merge yields a user-defined symbol, so it must be looked up as a whole
    )


def _guards(pieces: list[Any]) -> Iterator[str]:
    """Yields patterns that split text such as `</s>` or `<0x41>`, so that the text does not become a control or byte
    piece.

    Each pattern splits between two letters that are not adjacent in any normal piece, so no normal piece is split.
    """
    pairs = {
        pair
        for piece in pieces
        if piece.type in (_NORMAL, _USER_DEFINED)
        for pair in zip(piece.piece, piece.piece[1:], strict=False)
    }
    for piece in pieces:
        if piece.type in (_CONTROL, _UNKNOWN, _BYTE):
            text = piece.piece
            cut = next((i for i in range(1, len(text)) if (text[i - 1], text[i]) not in pairs), None)
            if cut is not None:
                yield f"(?<={re.escape(text[:cut])})(?={re.escape(text[cut:])})"


def _from_ranks(tokenizer: TikTokenizer) -> tokenizers.Tokenizer:
    # tiktoken has no list of merges: it merges the pair whose result has the lowest rank. Therefore every way to
    # split a token in two becomes a merge, in the order of the tokens' ranks.
    ranks = tokenizer.mergeable_ranks()
    merges: list[tuple[int, bytes, bytes]] = []
    for token, rank in ranks.items():
        ways = ((token[:cut], token[cut:]) for cut in range(1, len(token)))
        known = [(left, right) for left, right in ways if left in ranks and right in ranks]
        merges += [
            (rank, left, right)
            for left, right in sorted(known, key=lambda way: (ranks[way[0]], ranks[way[1]]))
        ]
    merges.sort(key=lambda merge: merge[0])
    special = tokenizer.special_tokens()
    library = _byte_level(ranks, [(left, right) for _, left, right in merges], tokenizer.pattern, special)
    library.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    library.encode_special_tokens = not tokenizer.reads_special_tokens
    return library


def _from_bytes(tokenizer: ByteLevelTokenizer) -> tokenizers.Tokenizer:
    library = _byte_level({bytes([i]): i for i in range(256)}, [], None, {})
    # The tokenizer reads all text as bytes, even the name of the end-of-document token.
    library.add_special_tokens(
        [AddedToken(tokenizer.inv_vocab[tokenizer.eod], special=True, normalized=False)]
    )
    library.encode_special_tokens = True
    return library


def _byte_level(
    ids: dict[bytes, int], merges: Iterable[tuple[bytes, bytes]], pattern: str | None, special: dict[str, int]
) -> tokenizers.Tokenizer:
    spelled = {token: "".join(_LETTER[byte] for byte in token) for token in ids}
    vocab = {**{spelled[token]: number for token, number in ids.items()}, **special}
    pairs = [(spelled[left], spelled[right]) for left, right in merges]
    library = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=pairs, ignore_merges=True))
    plain = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    splits = [] if pattern is None else [pre_tokenizers.Split(Regex(pattern), "isolated")]
    library.pre_tokenizer = pre_tokenizers.Sequence([*splits, plain])
    library.decoder = decoders.ByteLevel()
    return library


def _letters() -> list[str]:
    """Returns GPT-2's character for each byte: the byte's own character if printable, otherwise the next unused one
    from U+0100.
    """
    printed = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = iter(range(0x100, 0x200))
    return [chr(byte) if byte in printed else chr(next(others)) for byte in range(256)]


_LETTER = _letters()

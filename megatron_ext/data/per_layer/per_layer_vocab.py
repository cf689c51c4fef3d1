"""Per-layer vocabularies, and the table that maps an id of the main tokenizer to a per-layer id.

    per_layer_ids = table[token_ids]          table: [V], V is the size of the main vocabulary

A vocabulary is a flat JSON object that maps text to id: first the special tokens, among them the shape classes, then
the most frequent forms of the corpus. The *form* of a token is its text in lower case, without surrounding white space.
A strategy decides how a vocabulary becomes a table (see docs/per_layer.md):

    syntax_focus        function words, code keywords, punctuation and single digits keep their own id; every
                        other form gets the id of its shape class
    semantic_focus      content forms keep their own id; function words, keywords, punctuation and white space become
                        <|context|>; forms that the vocabulary lacks become <|unk|>
    attention_guidance  the table of syntax_focus, with some ids replaced according to the position: see `per_layer_ids`
    random_subset       a seeded random half of the vocabulary's forms keep their own id, the others become <|unk|>
    identity            the token id itself; needs no vocabulary
    bigram_hash, trigram_hash    rows that the last two or three tokens are hashed to: see `ngrams`; need no vocabulary

Per-layer ids are a function of the token ids, so the two cannot be misaligned. A strategy keeps only a part of
the vocabulary, so the ids that a model and a dataset use are renumbered without gaps: see `per_layer_table`.
"""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from megatron_ext.data.indexed.manifest import write_atomically
from megatron_ext.data.per_layer.strategies import WITHOUT_VOCABULARY, Strategy
from megatron_ext.data.tokenizers import Tokenizer

TableArray = npt.NDArray[np.int32]

SPECIAL_TOKENS = (
    "<|startoftext|>",
    "<|endoftext|>",
    "<|layer_start|>",
    "<|attention|>",
    "<|layer_end|>",
    "<|context|>",
    "<|unk|>",
    "<|word_start|>",
    "<|word_continuation|>",
    "<|number|>",
    "<|symbol|>",
    "<|mixed|>",
    "<|newline|>",
    "<|space|>",
    "<|bytes|>",
)
"""Entries 0 to 14 of every vocabulary. The shape classes are those from `<|word_start|>` on."""

SPECIAL = {token: number for number, token in enumerate(SPECIAL_TOKENS)}


def _words(text: str) -> frozenset[str]:
    """Returns the set of words in a text."""
    return frozenset(text.split())


FUNCTION_WORDS = _words(
    """a about above across after again against all along also although am among an and another any are as at be because
    been before being below between both but by can cannot could did do does doing done down during each either else
    ever every few for from had has have having he her here hers herself him himself his how however i if in into is it
    its itself just may me might mine more most much must my myself near neither no nor not now of off on once one only
    onto or other our ours ourselves out over own per rather same shall she should since so some such than that the
    their theirs them themselves then there therefore these they this those though through thus to too toward towards
    under unless until up upon us very was we well were what whatever when whenever where whereas whether which while
    who whoever whom whose why will with within without would yet you your yours yourself yourselves"""
)
"""English function words: articles, pronouns, prepositions, conjunctions, auxiliaries, particles."""

CODE_KEYWORDS = _words(
    """assert async await bool break case catch char class const continue def default del delete elif enum except
    extends false finally float fn func global goto import int interface lambda let long match mut namespace new nil
    none nonlocal null package pass private protected public raise return self short static str struct super
    switch template this throw true try typedef typeof union unsigned var void volatile yield"""
)
"""Keywords and builtin type names common to Python, the C family, JavaScript, Go and Rust."""

_NUMBER = re.compile(r"[\d.,_]*\d[\d.,_]*")
_PUNCTUATION = re.compile(r"[^\w\s]+|_+")
_WORD_MARKS = ("Ġ", "▁")
_START_OF_TEXT = frozenset({"<|startoftext|>", "<|begin_of_text|>", "<s>", "<bos>", "[BOS]"})


@dataclass(frozen=True)
class TokenForm:
    """The properties of a token of the main tokenizer that the strategies use."""

    form: str
    """Text in lower case, without surrounding white space; "" for white space and special tokens."""

    shape: str
    """The token's shape class, or else `<|endoftext|>`, `<|startoftext|>`, or `<|unk|>` (an id without text)."""

    is_syntax: bool
    """True if the form is a function word, a keyword, punctuation or a single digit."""


def token_forms(tokenizer: Tokenizer) -> list[TokenForm]:
    """Returns the `TokenForm` of every token of the main tokenizer, [V]."""
    pieces = tokenizer.inv_vocab
    forms = []
    for token in range(tokenizer.vocab_size):
        piece = pieces.get(token)
        if token == tokenizer.eod:
            forms.append(TokenForm("", "<|endoftext|>", is_syntax=False))
        elif piece in _START_OF_TEXT:
            forms.append(TokenForm("", "<|startoftext|>", is_syntax=False))
        elif piece is None:  # no token has this id
            forms.append(TokenForm("", "<|unk|>", is_syntax=False))
        else:
            forms.append(form_of(tokenizer.detokenize([token]), starts_word=piece.startswith(_WORD_MARKS)))
    return forms


def form_of(text: str, *, starts_word: bool = False) -> TokenForm:
    """Returns the `TokenForm` of a token's text.

    Args:
        text: the decoded token.
        starts_word: whether the tokenizer marks the token as the start of a word; decoding may drop the leading space.
    """
    starts_word = starts_word or text[:1].isspace()
    form = text.strip().lower()
    if not form:
        shape = "<|newline|>" if "\n" in text else "<|space|>" if starts_word else "<|unk|>"
        return TokenForm("", shape, is_syntax=False)
    if "\ufffd" in form:  # only some of the bytes of a character
        return TokenForm("", "<|bytes|>", is_syntax=False)
    if _NUMBER.fullmatch(form):
        return TokenForm(form, "<|number|>", is_syntax=len(form) == 1)
    if _PUNCTUATION.fullmatch(form):
        return TokenForm(form, "<|symbol|>", is_syntax=True)
    is_syntax = form in FUNCTION_WORDS or form in CODE_KEYWORDS
    if form.isalpha():
        return TokenForm(form, "<|word_start|>" if starts_word else "<|word_continuation|>", is_syntax)
    return TokenForm(form, "<|mixed|>", is_syntax)


def build_vocabulary(
    forms: list[TokenForm], token_counts: npt.NDArray[np.int64], size: int
) -> dict[str, int]:
    """Builds a vocabulary of at most `size` entries: the special tokens, then the most frequent forms of the corpus.

    Args:
        forms: [V] from `token_forms`.
        token_counts: [V] how often each token of the main tokenizer occurs in the corpus.
        size: `--per-layer-vocab-size`. Forms that never occur are left out, so the result can be smaller.

    Raises:
        ValueError: `size` is smaller than the number of special tokens.
    """
    if size < len(SPECIAL_TOKENS):
        raise ValueError(
            f"--per-layer-vocab-size {size} must be at least {len(SPECIAL_TOKENS)}, the number of special tokens"
        )
    counts: Counter[str] = Counter()
    for form, count in zip(forms, token_counts.tolist(), strict=True):
        if form.form and count and form.form not in SPECIAL:
            counts[form.form] += count
    by_frequency = sorted(counts, key=lambda text: (-counts[text], text))
    entries = [*SPECIAL_TOKENS, *by_frequency[: size - len(SPECIAL_TOKENS)]]
    return {text: number for number, text in enumerate(entries)}


def build_table(
    strategy: Strategy, forms: list[TokenForm], vocabulary: Mapping[str, int], *, seed: int = 1234
) -> TableArray:
    """Returns the table, int32 [V], that maps each token id of the main tokenizer to its per-layer id.

    Args:
        strategy: one of `STRATEGIES`; `attention_guidance` has the same table as `syntax_focus`.
        forms: [V] from `token_forms`.
        vocabulary: maps text to id. Not used for a strategy in `WITHOUT_VOCABULARY`, whose table maps each token id to
            itself.
        seed: decides which forms `random_subset` chooses.
    """
    if strategy in WITHOUT_VOCABULARY:
        return np.arange(len(forms), dtype=np.int32)
    return np.array([_per_layer_id(strategy, form, vocabulary, seed) for form in forms], dtype=np.int32)


def _per_layer_id(strategy: Strategy, form: TokenForm, vocabulary: Mapping[str, int], seed: int) -> int:
    """Returns the vocabulary id that a strategy gives to one form."""
    if form.shape in ("<|endoftext|>", "<|startoftext|>"):
        return SPECIAL[form.shape]
    own = vocabulary.get(form.form) if form.form else None
    if strategy in ("syntax_focus", "attention_guidance"):
        return own if own is not None and form.is_syntax else SPECIAL[form.shape]
    if strategy == "semantic_focus":
        is_digit = form.shape == "<|number|>"
        if (form.is_syntax and not is_digit) or form.shape in ("<|newline|>", "<|space|>"):
            return SPECIAL["<|context|>"]
        return SPECIAL["<|unk|>"] if own is None else own
    if own is None or not _is_drawn(form.form, seed):
        return SPECIAL["<|unk|>"]
    return own


def _is_drawn(form: str, seed: int) -> bool:
    """Returns whether `random_subset` keeps a form (probability 1/2); decided by a hash, not by random numbers."""
    return hashlib.sha256(f"{seed}:{form}".encode()).digest()[0] % 2 == 0


def save_vocabulary(path: str, vocabulary: Mapping[str, int]) -> None:
    """Writes a vocabulary as JSON, atomically."""
    with write_atomically(path) as temporary:
        temporary.write_text(json.dumps(vocabulary, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def load_vocabulary(path: str) -> dict[str, int]:
    """Reads a vocabulary and checks it.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not JSON, its ids are not 0 .. n-1, or a special token does not have its fixed id.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(
            f"per-layer vocabulary not found: {path}; make it with tools/preprocess_per_layer_data.py"
        )
    try:
        vocabulary = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not a per-layer vocabulary: {error}") from error
    if not isinstance(vocabulary, dict) or sorted(map(str, vocabulary.values())) != sorted(
        map(str, range(len(vocabulary)))
    ):
        raise ValueError(
            f"{path} is not a per-layer vocabulary: its ids must count from 0 without gaps or repetition"
        )
    for token, number in SPECIAL.items():
        if vocabulary.get(token) != number:
            raise ValueError(f"{path} is not a per-layer vocabulary: {token} must have id {number}")
    return vocabulary

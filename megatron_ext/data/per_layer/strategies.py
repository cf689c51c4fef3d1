"""Names of the strategies by which tokens get per-layer ids (`--per-layer-strategy`); see `per_layer_vocab`."""

from typing import Literal, get_args

Strategy = Literal[
    "syntax_focus",
    "semantic_focus",
    "attention_guidance",
    "random_subset",
    "identity",
    "bigram_hash",
    "trigram_hash",
]
STRATEGIES: tuple[Strategy, ...] = get_args(Strategy)

NGRAM_TOKENS: dict[Strategy, int] = {"bigram_hash": 2, "trigram_hash": 3}
"""Number of tokens in the n-grams of each strategy that hashes them."""

WITHOUT_VOCABULARY: tuple[Strategy, ...] = ("identity", *NGRAM_TOKENS)
"""Strategies whose ids are computed from the token ids themselves."""

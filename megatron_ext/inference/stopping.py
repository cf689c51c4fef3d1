"""Decides where a generated text ends: at token ids from the model's files, or at stop texts given by the user."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from megatron_ext.data.tokenizers import Tokenizer
from megatron_ext.training.checkpoint.checkpointer import IMPORTED


def stop_tokens(run_config: dict[str, Any], tokenizer: Tokenizer) -> tuple[int, ...]:
    """Returns the token ids that end a text, in ascending order.

    These are the tokenizer's end-of-document id and, for an imported model, the `eos_token_id` in its
    generation_config.json or config.json.

    Args:
        run_config: content of the checkpoint's run_config.json.
        tokenizer: tokenizer of the model.
    """
    section = run_config.get(IMPORTED) or {}
    # Older checkpoints keep the content of config.json here, with `eos_token_id` at its top level.
    ids = section.get("eos_token_ids", section.get("eos_token_id"))
    if ids is None:
        return (tokenizer.eod,)
    return tuple(sorted({tokenizer.eod, *map(int, ids if isinstance(ids, list) else [ids])}))


def ends_with_any(tokenizer: Tokenizer, texts: Sequence[str]) -> Callable[[list[int]], bool] | None:
    """Returns an `is_end` function for `generate` that looks for stop texts in the decoded tokens.

    Returns None if `texts` is empty.
    """
    if not texts:
        return None

    def is_end(ids: list[int]) -> bool:
        text = tokenizer.detokenize(ids)
        return any(stop in text for stop in texts)

    return is_end


def cut_at_any(text: str, stops: Iterable[str]) -> str:
    """Returns the part of `text` before the first occurrence of any stop text."""
    places = [place for stop in stops if (place := text.find(stop)) >= 0]
    return text[: min(places)] if places else text

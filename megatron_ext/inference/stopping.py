"""Where a generated text ends: ids that the model's own files name, and texts that a user names."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from megatron_ext.data.tokenizers import Tokenizer
from megatron_ext.training.checkpoint.checkpointer import IMPORTED


def stop_tokens(run_config: dict[str, Any], tokenizer: Tokenizer) -> tuple[int, ...]:
    """The ids that end a text, in ascending order.

    They are the tokenizer's end-of-document token and those that an imported model's generation_config.json or
    config.json names.

    Args:
        run_config: the checkpoint's.
        tokenizer: the model's.
    """
    section = run_config.get(IMPORTED) or {}
    # Checkpoints of an earlier version hold the content of config.json itself.
    ids = section.get("eos_token_ids", section.get("eos_token_id"))
    if ids is None:
        return (tokenizer.eod,)
    return tuple(sorted({tokenizer.eod, *map(int, ids if isinstance(ids, list) else [ids])}))


def ends_with_any(tokenizer: Tokenizer, texts: Sequence[str]) -> Callable[[list[int]], bool] | None:
    """For `generate`: tells whether new tokens contain one of the texts; None where there is none to look for."""
    if not texts:
        return None

    def is_end(ids: list[int]) -> bool:
        text = tokenizer.detokenize(ids)
        return any(stop in text for stop in texts)

    return is_end


def cut_at_any(text: str, stops: Iterable[str]) -> str:
    """The text up to the first place where one of the stops begins."""
    places = [place for stop in stops if (place := text.find(stop)) >= 0]
    return text[: min(places)] if places else text

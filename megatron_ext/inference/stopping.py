"""Where a generated text ends: ids that the model's own files name, and texts that a user names."""

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from megatron_ext.data.tokenizers import Tokenizer

GENERATION_CONFIG = "generation_config.json"


def stop_tokens(run_config: dict[str, Any], checkpoint: Path, tokenizer: Tokenizer) -> tuple[int, ...]:
    """The ids that end a text, in ascending order.

    They are the tokenizer's end-of-document token and, of an imported model, `eos_token_id` of its
    generation_config.json, or of its config.json where the former does not name one.

    Args:
        run_config: the checkpoint's; its `hugging_face` is an imported model's config.json.
        checkpoint: its directory; imported files lie beside it or in a folder beside it.
        tokenizer: the model's.

    Raises:
        ValueError: a generation_config.json is not JSON.
    """
    for source in (_generation_config(checkpoint), run_config.get("hugging_face") or {}):
        found = source.get("eos_token_id")
        if found is not None:
            ids = found if isinstance(found, list) else [found]
            return tuple(sorted({tokenizer.eod, *map(int, ids)}))
    return (tokenizer.eod,)


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


def _generation_config(checkpoint: Path) -> dict[str, Any]:
    root = checkpoint.parent
    for path in (root / GENERATION_CONFIG, *sorted(root.glob(f"*/{GENERATION_CONFIG}"))):
        if path.is_file():
            try:
                content = json.loads(path.read_text(encoding="utf-8"))
            except ValueError as error:
                raise ValueError(f"{path}: not JSON ({error})") from None
            return content if isinstance(content, dict) else {}
    return {}

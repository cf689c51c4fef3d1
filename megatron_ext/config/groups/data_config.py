"""Which indexed datasets a run reads, and how documents become samples.

Paths are prefixes as Megatron writes them (`corpus_text_document`, without `.bin` or `.idx`). Whether the files exist
and agree with each other is checked by `megatron_ext.data`.
"""

from dataclasses import dataclass
from typing import Annotated

from megatron_ext.config.command_line.field_checks import check_at_least, check_at_most, flag, flag_name

_Prefixes = Annotated[tuple[str, ...] | None, flag(metavar="[WEIGHT] PREFIX ...")]


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Datasets, blends and splits."""

    data_path: _Prefixes = None
    """One prefix, several, or weights and prefixes in turn: 0.3 first 0.7 second."""

    train_data_path: _Prefixes = None
    """The training set's own prefixes, instead of --data-path and --split."""

    valid_data_path: _Prefixes = None
    """The validation set's own prefixes."""

    test_data_path: _Prefixes = None
    """The test set's own prefixes."""

    split: str = "969, 30, 1"
    """Shares of training, validation and test in --data-path."""

    data_cache_path: str | None = None
    """Directory for the sample index. Without it beside the dataset, or in memory where that cannot be written to."""

    num_workers: int = 2
    """Loader processes for each training process."""

    reset_position_ids: bool = False
    """Count positions anew after every end-of-document token."""

    reset_attention_mask: bool = False
    """Let no token attend over an end-of-document token."""

    eod_mask_loss: bool = False
    """Leave out of the loss what follows an end-of-document token: its prediction from there, as in Megatron-LM."""

    def __post_init__(self) -> None:
        check_at_least(self, 0, "num_workers")
        check_at_most(self, 1024, "num_workers")
        own = [
            name for name in ("train_data_path", "valid_data_path", "test_data_path") if getattr(self, name)
        ]
        if self.data_path is not None and own:
            raise ValueError(f"--data-path: cannot be given together with {flag_name(own[0])}")
        for name in ("data_path", "train_data_path", "valid_data_path", "test_data_path"):
            _check_blend(flag_name(name), getattr(self, name))
        _check_split(self.split)

    @property
    def trained_on(self) -> tuple[str, ...]:
        """The training data's prefixes, with weights between them where there are any; empty where none is given."""
        return self.data_path or self.train_data_path or ()


def _check_blend(flag: str, values: tuple[str, ...] | None) -> None:
    if values is None:
        return
    given = " ".join(values)
    if not values:
        raise ValueError(f"{flag}: needs at least one prefix")
    if len(values) == 1 or not is_number(values[0]):
        return
    if len(values) % 2:
        raise ValueError(f"{flag} {given}: weights and prefixes must alternate, the last has no partner")
    for weight in values[::2]:
        if not is_number(weight) or not 0 < float(weight) < float("inf"):
            raise ValueError(f"{flag} {given}: {weight!r} is not a weight above 0")


def _check_split(split: str) -> None:
    parts = split.split(",")
    if not all(is_number(part) and float(part) >= 0 for part in parts) or not sum(map(float, parts)) > 0:
        raise ValueError(f"--split {split}: must be up to three shares such as 969,30,1")
    if len(parts) > 3:
        raise ValueError(
            f"--split {split}: has {len(parts)} shares, at most three (training, validation, test) are known"
        )


def is_number(text: str) -> bool:
    """True for a weight in a blend, False for a prefix."""
    try:
        float(text)
    except ValueError:
        return False
    return True

"""The indexed datasets that a run reads, and how their documents become training samples.

Datasets are named by Megatron's prefixes: the path without `.bin` or `.idx`, such as `corpus_text_document`.
`megatron_ext.data` checks that the files exist and match each other.
"""

from dataclasses import dataclass
from typing import Annotated

from megatron_ext.config.command_line.field_checks import check_at_least, check_at_most, flag, flag_name

_Prefixes = Annotated[tuple[str, ...] | None, flag(metavar="[WEIGHT] PREFIX ...")]


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Flags for the datasets of a run, their blending weights, and their split into training, validation and test."""

    data_path: _Prefixes = None
    """Dataset prefixes: one, several, or several with a weight before each (0.3 first 0.7 second)."""

    train_data_path: _Prefixes = None
    """Dataset prefixes for training; use instead of the training part of --data-path and --split."""

    valid_data_path: _Prefixes = None
    """Dataset prefixes for validation; use instead of the validation part of --data-path and --split."""

    test_data_path: _Prefixes = None
    """Dataset prefixes for testing; use instead of the test part of --data-path and --split."""

    mock_data: bool = False
    """Try a run without data files, on synthetic documents: one third each for training, validation and test."""

    split: str = "969, 30, 1"
    """Proportions in which --data-path is divided into training, validation and test sets."""

    data_cache_path: str | None = None
    """Directory that caches the sample index. Default: the dataset's directory, or memory if it is not writable."""

    num_workers: int = 2
    """Number of data-loading processes for each training process."""

    reset_position_ids: bool = False
    """Restart the position ids at 0 after every end-of-document token."""

    reset_attention_mask: bool = False
    """Prevent tokens from attending across an end-of-document token."""

    eod_mask_loss: bool = False
    """Exclude from the loss the prediction made at each end-of-document token, as Megatron-LM's flag does."""

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
            if self.mock_data and getattr(self, name) is not None:
                raise ValueError(f"--mock-data: cannot be given together with {flag_name(name)}")
        _check_split(self.split)

    @property
    def trained_on(self) -> tuple[str, ...]:
        """Dataset prefixes for training, with any weights that were given; empty if no dataset was given."""
        return self.data_path or self.train_data_path or ()


def _check_blend(flag: str, values: tuple[str, ...] | None) -> None:
    if values is None:
        return
    given = " ".join(values)
    if not values:
        raise ValueError(f"{flag}: requires at least one prefix")
    if len(values) == 1 or not is_number(values[0]):
        return
    if len(values) % 2:
        raise ValueError(f"{flag} {given}: weights and prefixes must alternate (got an odd number of values)")
    for weight in values[::2]:
        if not is_number(weight) or not 0 < float(weight) < float("inf"):
            raise ValueError(f"{flag} {given}: weight {weight!r} must be a number above 0")


def split_shares(split: str) -> list[str]:
    """Returns the numbers in a value of --split as text, without the quotes that some Megatron-LM scripts pass."""
    return split.strip("'\"").split(",")


def _check_split(split: str) -> None:
    parts = split_shares(split)
    if not all(is_number(part) and float(part) >= 0 for part in parts) or not sum(map(float, parts)) > 0:
        raise ValueError(f"--split {split}: must be one to three numbers such as 969,30,1")
    if len(parts) > 3:
        raise ValueError(
            f"--split {split}: must have at most three shares (training, validation, test), got {len(parts)}"
        )


def is_number(text: str) -> bool:
    """Returns True if an item of a dataset list such as `0.3 first 0.7 second` is a weight, False if it is a prefix."""
    try:
        float(text)
    except ValueError:
        return False
    return True

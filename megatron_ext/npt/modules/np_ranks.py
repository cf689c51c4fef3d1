"""Reads values of --np-rank: one rank, a rank per NPT layer, a separate rank for `down`, or a limit for the
calibration.

    64                  all layers and targets
    64/192              gate, up and fc1 have rank 64, `down` has 192
    64,96/192,32        one entry per NPT layer, in ascending order of the layers
    auto:0.15           the calibration chooses ranks with which the number of NP parameters is 15 % of the number of
                        the converted layers' own parameters
    auto:kl=0.01        the calibration chooses the smallest ranks with a predicted KL(base || NPT) of at most 0.01
                        nats per token

Stored settings never contain `auto`: they are an int if all ranks are equal, otherwise text in the second or third
form. The command line imports this file, so it must not import torch.
"""

from collections.abc import Iterable
from typing import NamedTuple

Rank = tuple[int, int]
"""Rank of gate, up and fc1, and rank of `down`."""

_AUTO, _KL = "auto:", "kl="


class Limit(NamedTuple):
    """The limit after `auto:`, which is either a fraction of the converted layers' parameters or a predicted KL per
    token.
    """

    share: float | None
    kl: float | None


def normalised(value: int | str) -> int | str:
    """Returns a value of --np-rank in the form in which it is stored; a single number becomes an int.

    Raises:
        ValueError: the value has another format, a rank is below 1, or a limit is not above 0.
    """
    text = str(value).replace(" ", "")
    if text.startswith(_AUTO):
        limit(text)
        return text
    return format_ranks(parse_ranks(text))


def parse_ranks(value: int | str) -> list[Rank]:
    """Returns the entries of a value other than `auto`: one for all layers, or one per layer."""
    entries = []
    for entry in str(value).split(","):
        try:
            numbers = [int(number) for number in entry.split("/")]
        except ValueError:
            numbers = []
        if len(numbers) not in (1, 2):
            raise ValueError(
                f"--np-rank {value}: must be a whole number, such as 64; two numbers, for fc1 and down, such as "
                "64/192; a list of these with one entry per NPT layer, such as 64,96/192,32; or a limit for the "
                "calibration, such as auto:0.15 or auto:kl=0.01"
            )
        if min(numbers) < 1:
            raise ValueError(f"--np-rank {value}: every rank must be at least 1")
        entries.append((numbers[0], numbers[-1]))
    return entries


def format_ranks(ranks: Iterable[Rank]) -> int | str:
    """Returns the shortest stored form of ranks: one entry if all layers have equal ranks."""
    entries = [str(fc1) if fc1 == down else f"{fc1}/{down}" for fc1, down in ranks]
    if len(set(entries)) == 1:
        entries = entries[:1]
    return int(entries[0]) if len(entries) == 1 and entries[0].isdigit() else ",".join(entries)


def described(value: int | str) -> str:
    """Returns text for a message: the rank, or the smallest and the largest of several ranks."""
    ranks = parse_ranks(value)
    if len(ranks) == 1:
        return str(value)
    texts = [f"{min(part)} to {max(part)}" for part in zip(*ranks, strict=True)]
    return texts[0] if texts[0] == texts[1] else f"{texts[0]} (down {texts[1]})"


def limit(value: int | str) -> Limit | None:
    """Returns the limit after `auto:`; None if the value is numeric.

    Raises:
        ValueError: the limit is not a number above 0, or a share is above 1.
    """
    if not str(value).startswith(_AUTO):
        return None
    text = str(value).removeprefix(_AUTO)
    try:
        number = float(text.removeprefix(_KL))
    except ValueError:
        number = 0.0
    if not 0 < number < float("inf"):
        raise ValueError(
            f"--np-rank {value}: the limit must be a number above 0, such as auto:0.15 or auto:kl=0.01"
        )
    if text.startswith(_KL):
        return Limit(None, number)
    if number > 1:
        example = number / 100 if number <= 100 else 0.15
        raise ValueError(
            f"--np-rank {value}: the share must be a fraction of at most 1, such as auto:{example:g}"
        )
    return Limit(number, None)


def rank_of(value: int | str, place: int, count: int, target: str) -> int:
    """Returns the rank of one target of one layer.

    Args:
        value: value of --np-rank.
        place: index of the layer among the NPT layers.
        count: number of NPT layers.
        target: `gate`, `up`, `down` or `fc1`.

    Raises:
        ValueError: the value has another number of entries than there are layers, or is `auto`.
    """
    if limit(value) is not None:
        raise ValueError(
            f"--np-rank {value}: no rank has been chosen yet; use --np-init-strategy calibrated, which "
            "chooses the ranks"
        )
    entries = parse_ranks(value)
    if len(entries) not in (1, count):
        raise ValueError(
            f"--np-rank {value}: must have one entry or one per NPT layer (got "
            f"{len(entries)} entries for {count} layers)"
        )
    return entries[place if len(entries) > 1 else 0][target == "down"]

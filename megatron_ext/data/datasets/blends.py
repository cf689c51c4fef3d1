"""Translates the data flags into mcore's terms: blends (datasets with weights), and the documents of each split."""

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_ext.config.groups.data_config import DataConfig, split_shares
from megatron_ext.data.indexed.indexed_files import open_index
from megatron_ext.data.indexed.same_file import refuse_same_dataset

SPLITS = ("training", "validation", "test")
Blend = tuple[list[str], list[float] | None]


@dataclass(frozen=True)
class Blends:
    """The datasets of a run; exactly one of `blend` and `blend_per_split` is set."""

    blend: Blend | None
    """A blend that `split` divides into training, validation and test."""

    blend_per_split: list[Blend | None] | None
    """Blends for training, validation and test; None for a split that needs no samples."""

    split: tuple[float, float, float]
    """Shares of training, validation and test in `blend`, which add up to 1."""

    num_samples: tuple[int, int, int]
    """Number of samples needed from each split; 0 for a split that has neither a share of `split` nor a path."""

    per_layer: dict[str, str] | None
    """Maps each prefix to the prefix of its per-layer data; None without per-layer data."""

    def prefixes(self) -> list[str]:
        """Returns all prefixes of the blends in order, each once."""
        blends = [self.blend] if self.blend is not None else self.blend_per_split or []
        return list(dict.fromkeys(prefix for blend in blends if blend is not None for prefix in blend[0]))


def blends_of(
    data: DataConfig, num_samples: tuple[int, int, int], per_layer_data_path: Sequence[str] | None
) -> Blends:
    """Returns the blends that the data flags describe.

    Args:
        data: the data flags.
        num_samples: samples needed from each split; a split with 0 samples, or without a share or path, is not built.
        per_layer_data_path: prefixes of the per-layer data, in the order of the main prefixes.

    Raises:
        ValueError: no data is given, or the per-layer prefixes do not match the main ones.
    """
    own = [data.train_data_path, data.valid_data_path, data.test_data_path]
    if data.data_path is None and not any(own):
        raise ValueError("no data: give --data-path, or --train-data-path and --valid-data-path")
    if data.data_path is not None:
        prefixes, weights = parse_blend(data.data_path)
        per_layer = _pair(("--data-path", prefixes, weights), per_layer_data_path)
        shares = _shares(data.split)
        return Blends((prefixes, weights), None, shares, _only_where(shares, num_samples), per_layer)
    wanted = _only_where(own, num_samples)
    blends = [
        parse_blend(path) if path and number else None for path, number in zip(own, wanted, strict=True)
    ]
    prefixes = [prefix for path in own if path for prefix in parse_blend(path)[0]]
    per_layer = _pair(("--train-, --valid- and --test-data-path", prefixes, None), per_layer_data_path)
    return Blends(None, blends, (0.0, 0.0, 0.0), wanted, per_layer)


def parse_blend(values: Sequence[str]) -> Blend:
    """Parses a flag's values, `PREFIX ...` or `WEIGHT PREFIX WEIGHT PREFIX ...`, into (prefixes, weights or None)."""
    if len(values) % 2 == 0:
        try:
            return [value.strip() for value in values[1::2]], [float(value) for value in values[::2]]
        except ValueError:  # the first value of each pair is not a weight: all values are prefixes
            pass
    return [value.strip() for value in values], None


def check_repeats(blends: Blends) -> None:
    """Refuses a dataset that appears twice in one blend, because its weight would be wrong or its documents would
    count twice.

    Raises:
        ValueError: a dataset appears twice; the message names the flag and both spellings of the prefix.
    """
    if blends.blend is not None:
        refuse_same_dataset("--data-path", blends.blend[0])
    for name, blend in zip(("train", "valid", "test"), blends.blend_per_split or [], strict=False):
        if blend is not None:
            refuse_same_dataset(f"--{name}-data-path", blend[0])


def check_splits(blends: Blends, seq_length: int) -> None:
    """Refuses a required split that has fewer than 2 tokens or, in a blend without weights, too few for one sample.

    With an empty split, mcore would loop forever.

    Raises:
        ValueError: a split is too small; the message names the dataset, the split and its number of tokens.
    """
    for number, (name, wanted) in enumerate(zip(SPLITS, blends.num_samples, strict=True)):
        if not wanted:
            continue
        if blends.blend is not None:
            prefixes, weights = blends.blend
            bounds = (sum(blends.split[:number]), sum(blends.split[: number + 1]))
        else:
            assert blends.blend_per_split is not None
            prefixes, weights = blends.blend_per_split[number] or ([], None)
            bounds = (0.0, 1.0)
        minimum = seq_length + 1 if weights is None and len(prefixes) > 1 else 2
        for prefix in prefixes:
            _check_split(prefix, name, bounds, minimum)


def tokens_between(prefix: str, begin: float, end: float) -> int:
    """Counts the tokens between the fractions `begin` and `end` of a dataset's sequences, rounded as mcore does."""
    index = open_index(prefix)
    first, last = (round(bound * index.num_sequences) for bound in (begin, end))
    return int(index.sequence_start(last) - index.sequence_start(first))


def _check_split(prefix: str, name: str, bounds: tuple[float, float], minimum: int) -> None:
    """Refuses one split of one dataset if it holds fewer than `minimum` tokens."""
    tokens = tokens_between(prefix, *bounds)
    if tokens < minimum:
        index = open_index(prefix)
        begin, end = (round(bound * index.num_sequences) for bound in bounds)
        remedy = "give more data"
        if bounds != (0.0, 1.0):
            remedy = f"change --split (for example 90,10,0: no test data) or {remedy}"
        raise ValueError(
            f"{prefix}: the {name} split has {end - begin} of {index.num_sequences} documents and {tokens} tokens,"
            f" but at least {minimum} tokens are needed; {remedy}"
        )


def _shares(split: str) -> tuple[float, float, float]:
    """Parses "969, 30, 1" into shares that add up to 1; missing shares are 0."""
    parts = [float(part) for part in split_shares(split)]
    parts += [0.0] * (3 - len(parts))
    total = sum(parts)
    return parts[0] / total, parts[1] / total, parts[2] / total


def _only_where(given: Sequence[object], num_samples: tuple[int, int, int]) -> tuple[int, int, int]:
    """Returns `num_samples` with 0 in place of the number for each split that has no data."""
    train, valid, test = (number if source else 0 for source, number in zip(given, num_samples, strict=True))
    return train, valid, test


def _pair(
    main: tuple[str, list[str], list[float] | None], per_layer: Sequence[str] | None
) -> dict[str, str] | None:
    """Maps each main prefix to its per-layer prefix; `main` holds the main flag's name, prefixes and weights."""
    if per_layer is None:
        return None
    flag, prefixes, weights = main
    paired, own_weights = parse_blend(per_layer)
    if len(paired) != len(prefixes):
        raise ValueError(
            f"--per-layer-data-path has {len(paired)} prefixes, but {flag} has {len(prefixes)}; give one for each"
        )
    if own_weights is not None and own_weights != weights:
        raise ValueError(
            f"--per-layer-data-path has the weights {own_weights}, but {flag} has {weights}; they must be equal"
        )
    result: dict[str, str] = {}
    for prefix, aligned in zip(prefixes, paired, strict=True):
        if result.setdefault(prefix, aligned) != aligned:
            raise ValueError(
                f"--per-layer-data-path pairs {prefix} with both {result[prefix]} and {aligned}; give one of them"
            )
    return result

"""Flags of the NP components, which turn a layer into an NPT layer: form, target, rank, initial values, layers.

The defaults are those of docs/design/npt_equivalence.md: form `low_rank`, target gate, rank 16, attention residual
dropped, upper half of the layers.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Annotated, Literal

from megatron_ext.config.command_line.field_checks import check_at_least, check_choices, check_positive, flag
from megatron_ext.npt.modules.np_ranks import format_ranks, limit, normalised, parse_ranks, rank_of

_TARGETS: dict[str, tuple[str, ...]] = {
    "gate": ("gate",),
    "gate+up": ("gate", "up"),
    "gate+up+down": ("gate", "up", "down"),
    "fc1": ("fc1",),
    # The names used in docs/design.
    "single": ("gate",),
    "dual": ("gate", "up"),
    "triple": ("gate", "up", "down"),
}


@dataclass(frozen=True, kw_only=True)
class NPTModuleConfig:
    """Flags for NP components, through which the attention output of each token changes the weights of the MLP."""

    npt_layers: Annotated[str, flag(aliases=("--layers", "--train_layers"))] = "upper_half"
    """Layers with NP components: all, upper_half, lower_half, or numbers and ranges counted from 0, such as 0,3,5 or -1
    or 4:8 (without 8).
    """

    np_form: Literal["low_rank", "outer_product", "key_value"] = "low_rank"
    """Form of the weight update (delta) that the attention output a generates. low_rank: B diag(tanh(a A)) A^T.
    outer_product: v_b v_a^T, where v_a and v_b are vectors computed from a. key_value: v n^T / |n|^2, where v is
    computed from a, and the key n is the MLP's input; for gate+up, gate+up+down and fc1, a gain also rescales the
    weight.
    """

    np_target: Literal["gate", "gate+up", "gate+up+down", "fc1", "single", "dual", "triple"] = "gate"
    """MLP weights that get a delta. single, dual and triple are other names for gate, gate+up and gate+up+down; fc1
    is for an MLP without a gate.
    """

    np_rank: Annotated[str | int, flag(aliases=("--rank",))] = 16
    """Rank of the weight update: a number; or 64/192 for rank 64 on gate, up and fc1 and rank 192 on down; or a
    list of these with one entry per NPT layer. With auto:0.15, the calibration chooses ranks so that the NP
    parameters are 15% of the converted layers' own. With auto:kl=0.01, it chooses the smallest ranks whose predicted
    KL(base || NPT) per token is at most 0.01 nats.
    """

    num_np_components: int = 1
    """Number of deltas that are added up, each with its own factors. With low_rank, k components of rank r equal one
    component of rank k r.
    """

    np_affine: bool = True
    """With outer_product: add a learned constant to v_a. Without the constant, the delta is the same for a and -a."""

    np_normalize: bool = True
    """With outer_product: normalise the vectors generated from the attention output. Without normalisation, the delta
    grows with the square of the attention output's size, and training may diverge.
    """

    np_residual: Literal["keep", "drop"] = "drop"
    """Whether the attention output is also added to the residual stream, as in the base layer (keep), or not (drop)."""

    np_scale: Annotated[float, flag(aliases=("--modulation_scale",))] = 1.0
    """Factor by which every delta is multiplied."""

    np_init_scale: float = 0.01
    """Initial scale of the deltas; used with --np-init-strategy improved."""

    np_init_strategy: Annotated[
        Literal["improved", "conservative", "calibrated"], flag(aliases=("--np-init",))
    ] = "improved"
    """improved: deltas start small, and all factors get gradients from the first step. conservative: output factors,
    and therefore all deltas, start at zero (for key_value, all except the gain). calibrated: factors computed from
    --calibration-tokens so that the layers are near the base layers. For key_value these are the optimum, in closed
    form; for the other forms, a least-squares fit.
    """

    freeze_base: bool = True
    """Freeze the base model and train only the NP components."""

    def __post_init__(self) -> None:
        check_choices(self)
        object.__setattr__(self, "np_rank", normalised(self.np_rank))
        check_at_least(self, 1, "num_np_components")
        check_positive(self, "np_scale", "np_init_scale")
        if self.np_form == "key_value" and self.num_np_components > 1:
            raise ValueError(
                f"--num-np-components {self.num_np_components}: --np-form key_value requires 1, "
                "because several components equal one of a larger rank; raise --np-rank instead"
            )
        if self.np_form == "key_value" and self.np_target in ("gate", "single"):
            raise ValueError(
                f"--np-target {self.np_target}: not supported with --np-form key_value, which changes "
                "the input of gate and up together; choose gate+up for --np-residual keep, or gate+up+down for drop"
            )
        self._check_calibration()
        if self.np_form != "outer_product":
            for name, flag in (("np_affine", "--no-np-affine"), ("np_normalize", "--no-np-normalize")):
                if not getattr(self, name):
                    raise ValueError(f"{flag}: requires --np-form outer_product (got {self.np_form})")
        parse_layers(self.npt_layers)

    def _check_calibration(self) -> None:
        calibrated = self.np_init_strategy == "calibrated"
        if limit(self.np_rank) is not None and not calibrated:
            raise ValueError(
                f"--np-rank {self.np_rank}: requires --np-init-strategy calibrated (got {self.np_init_strategy})"
            )
        if calibrated and self.np_form == "key_value" and self.np_scale != 1:
            raise ValueError(
                "--np-init-strategy calibrated: with --np-form key_value, requires --np-scale 1 "
                f"(got {self.np_scale:g})"
            )
        if calibrated and self.np_form == "outer_product" and not self.np_affine:
            raise ValueError(
                "--no-np-affine: not supported with --np-init-strategy calibrated, because without the "
                "affine constant the delta is the same for a and -a"
            )
        if limit(self.np_rank) is not None and self.np_form != "key_value":
            raise ValueError(
                f"--np-rank {self.np_rank}: requires --np-form key_value (got {self.np_form}); pass a number"
            )

    @property
    def targets(self) -> tuple[str, ...]:
        """The weights that each get a separate delta, from `gate`, `up`, `down`, `fc1`."""
        targets = _TARGETS[self.np_target]
        if self.np_form == "key_value" and self.is_gated:
            # gate and up, the two halves of fc1, get one delta: that of fc1.
            return ("fc1", *targets[2:])
        return targets

    @property
    def named_targets(self) -> tuple[str, ...]:
        """Names of the targets for messages; gate and up, which share a rank, are one target, `gate+up`."""
        targets = _TARGETS[self.np_target]
        of_fc1 = "+".join(target for target in targets if target != "down")
        return (of_fc1, *(target for target in targets if target == "down"))

    @property
    def is_gated(self) -> bool:
        """Whether `np_target` is for an MLP with a gate."""
        return self.np_target != "fc1"

    @property
    def has_affine(self) -> bool:
        """Whether `v_a` has a learned constant."""
        return self.np_form == "outer_product" and self.np_affine

    @property
    def has_gain(self) -> bool:
        """Whether the MLP's input is multiplied by a gain, which depends on the attention output."""
        return self.np_form == "key_value"

    def rank(self, layer: int, target: str, num_layers: int) -> int:
        """Returns the rank of one component of a layer's target.

        Args:
            layer: index of an NPT layer, from 0.
            target: one of `targets`.
            num_layers: number of layers of the model.

        Raises:
            ValueError: --np-rank is a list that does not fit the NPT layers, or `auto`.
        """
        layers = self.layers(num_layers)
        return rank_of(self.np_rank, layers.index(layer), len(layers), target)

    def with_layers(self, layers: Iterable[int]) -> "NPTModuleConfig":
        """Returns a copy for other layers; if --np-rank is a list, every layer keeps its rank.

        Raises:
            ValueError: --np-rank is a list without an entry for one of the layers.
        """
        chosen, rank = sorted(set(layers)), self.np_rank
        if "," in str(rank):
            ranks = dict(zip(self.npt_layers.split(","), parse_ranks(rank), strict=True))
            missing = [number for number in chosen if str(number) not in ranks]
            if missing:
                raise ValueError(
                    f"--np-rank {rank}: gives ranks for layers {self.npt_layers} (--npt-layers), but layer "
                    f"{missing[0]} needs one too; give one rank for all layers, or add this layer to both lists"
                )
            rank = format_ranks(ranks[str(number)] for number in chosen)
        return replace(self, npt_layers=",".join(map(str, chosen)), np_rank=rank)

    def layers(self, num_layers: int) -> tuple[int, ...]:
        """Returns the indices of the layers that get NP components, from 0, in ascending order.

        Raises:
            ValueError: a number or range does not fit a model of `num_layers` layers.
        """
        return choose_layers(self.npt_layers, num_layers)

    def check_model(self, gated: bool, changes_outputs: str | None = None) -> None:
        """Checks that the model's MLP has the weights that `--np-target` names, and that its output is added to the
        residual stream unchanged.

        Args:
            gated: whether the MLP has a gate.
            changes_outputs: see `ModelConfig.changes_outputs`.

        Raises:
            ValueError: the MLP does not have these weights, or NPT cannot use the model.
        """
        if changes_outputs:
            # The modulated MLP must be able to return `a + MLP(..)` of any size, but a norm after the MLP would
            # change its size.
            raise ValueError(f"{changes_outputs}: not supported by the model family npt")
        if gated != self.is_gated:
            kind, choices = ("gated", "gate, gate+up or gate+up+down") if gated else ("not gated", "fc1")
            raise ValueError(f"--np-target {self.np_target}: the model's MLP is {kind}; choose {choices}")


def parse_layers(text: str) -> list[int | tuple[int | None, int | None]]:
    """Parses a value of --npt-layers into numbers and ranges (start, end); a word such as `all` gives (None, None).

    Raises:
        ValueError: the text is neither a word nor a list of numbers and ranges.
    """
    if text in ("all", "upper_half", "lower_half"):
        return [(None, None)]
    parts: list[int | tuple[int | None, int | None]] = []
    for part in text.split(","):
        try:
            numbers = [int(number) if number.strip() else None for number in part.split(":")]
        except ValueError:
            numbers = []
        if len(numbers) == 2:
            parts.append((numbers[0], numbers[1]))
        elif len(numbers) == 1 and numbers[0] is not None:
            parts.append(numbers[0])
        else:
            raise ValueError(
                f"--npt-layers {text}: must be all, upper_half, lower_half, or numbers and ranges such as "
                "0,3,5 or -1 or 4:8"
            )
    return parts


def choose_layers(text: str, num_layers: int) -> tuple[int, ...]:
    """Returns the indices, from 0 and ascending, of the layers that a value of --npt-layers selects.

    `lower_half` selects the first L // 2 layers, `upper_half` the others. Negative numbers count from the end.

    Raises:
        ValueError: the text is not a value of --npt-layers, or names layers that the model does not have.
    """
    half = num_layers // 2
    words = {"all": (0, num_layers), "upper_half": (half, num_layers), "lower_half": (0, half)}
    chosen: set[int] = set()
    for part in [words[text]] if text in words else parse_layers(text):
        start, end = part if isinstance(part, tuple) else (part, part)
        first = 0 if start is None else start + num_layers * (start < 0)
        if isinstance(part, tuple):
            last = num_layers if end is None else end + num_layers * (end < 0)
        else:
            last = first + 1
        if not 0 <= first < last <= num_layers:
            raise ValueError(
                f"--npt-layers {text}: out of range or empty; the model has layers 0 to {num_layers - 1}"
            )
        chosen.update(range(first, last))
    return tuple(sorted(chosen))

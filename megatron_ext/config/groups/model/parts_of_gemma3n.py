"""The base model's AltUp, Laurel and sparse activations, the parts of a layer that come from Gemma 3n."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Annotated

from megatron_ext.config.command_line.field_checks import (
    check_at_least,
    check_positive,
    flag,
    flag_name,
)
from megatron_ext.config.command_line.layer_windows import shares_of

if TYPE_CHECKING:
    from megatron_ext.config.groups.model_config import ModelConfig


@dataclass(frozen=True, kw_only=True)
class Gemma3nFields:
    """Flags for AltUp, Laurel and sparse activations."""

    altup_streams: int | None = None
    """Number of residual streams (AltUp), as in Gemma 3n: each layer computes one of them and predicts and corrects
    the others. Default: one stream, without AltUp.
    """

    altup_coef_clip: float | None = None
    """With --altup-streams: limit the weights of AltUp's predictions and corrections to this absolute value in
    training. Default: no limit.
    """

    laurel_rank: int | None = None
    """Add a low-rank path of this rank beside the attention (Laurel), as in Gemma 3n. Default: no path."""

    mlp_activation_sparsity: Annotated[str | None, flag(metavar="SHARE | LIST")] = None
    """With --swiglu or --geglu: fraction of the MLP's gates that are set to zero, as in Gemma 3n; the threshold
    assumes normally distributed values. One number, or a list with a number for each layer such as [0.95]*10+[0]*25.
    Default: none.
    """


def check_parts_of_gemma3n(model: "ModelConfig") -> None:
    """Raises `ValueError` if a flag has a bad value, contradicts another, or has no effect."""
    check_at_least(model, 2, "altup_streams")
    check_at_least(model, 1, "laurel_rank")
    check_positive(model, "altup_coef_clip")
    if model.altup_coef_clip is not None and model.altup_streams is None:
        raise ValueError(
            f"--altup-coef-clip {model.altup_coef_clip}: has no effect; it requires --altup-streams"
        )
    if model.mlp_activation_sparsity is not None and not model.is_gated:
        raise ValueError(
            f"--mlp-activation-sparsity {model.mlp_activation_sparsity}: has no effect; it requires "
            "--swiglu or --geglu"
        )
    sparsities(model.mlp_activation_sparsity, model.num_layers)


def sparsities(text: str | None, num_layers: int) -> tuple[float, ...]:
    """Converts a value of --mlp-activation-sparsity to the fraction of each layer's MLP gates that are set to zero.

    Raises:
        ValueError: the value is neither a number nor a list of one number per layer, of at least 0 and below 1.
    """
    if text is None:
        return (0.0,) * num_layers
    shares = shares_of(text, num_layers)
    if shares is None or not all(0 <= share < 1 for share in shares):
        raise ValueError(
            f"--mlp-activation-sparsity {text}: must be one number for all layers, or a list of "
            f"{num_layers} numbers such as [0.95]*2+[0]*2; each must be at least 0 and below 1"
        )
    return shares


def spell_list(values: Sequence[float]) -> str:
    """Formats a list with repeated entries as products, such as [0.95]*10+[0]*25."""
    runs = [(value, len(list(run))) for value, run in groupby(values)]
    return "+".join(f"[{value}]*{count}" if count > 1 else f"[{value}]" for value, count in runs)


def refuse_parts_of_gemma3n(model: "ModelConfig", names: Sequence[str], by: str) -> None:
    """Raises `ValueError` if one of the named flags is set; `by` names the feature that does not support it."""
    for name in names:
        value = getattr(model, name)
        if value is not None:
            raise ValueError(f"{flag_name(name)} {value}: not supported by {by}")

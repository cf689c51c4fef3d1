"""The loss scale of fp16 runs: the loss is multiplied by it, so that small gradients do not vanish in fp16.

megatron-core's scaler divides the gradients by the scale before the update. A step whose gradients overflow is
skipped; after --hysteresis overflows the scale is halved, and after --loss-scale-window steps without an overflow it
is doubled.
"""

from typing import Any

import torch
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.grad_scaler import DynamicGradScaler, MegatronGradScaler

LOSS_SCALE = "loss_scale"
"""Key of the loss scaler's state in state.json; only fp16 runs have it."""


def scaler_of(optimizer: MegatronOptimizer) -> MegatronGradScaler | None:
    """Returns the optimizer's loss scaler; None without fp16."""
    # A dense model's optimizer has one part; further parts would be for experts, and would have the same scale.
    part, *_ = getattr(optimizer, "chained_optimizers", [optimizer])
    scaler: MegatronGradScaler | None = getattr(part, "grad_scaler", None)
    return scaler


def can_fall(scaler: MegatronGradScaler | None) -> torch.Tensor | None:
    """Returns whether overflows may still lower the scale, as a scalar on the device; None if they never do."""
    if not isinstance(scaler, DynamicGradScaler):
        return None
    return (scaler.scale > scaler.min_scale).squeeze()


def loss_scale_state(optimizer: MegatronOptimizer) -> dict[str, Any]:
    """Returns the scale and the counts on which its next changes depend, as JSON values; empty without fp16."""
    scaler = scaler_of(optimizer)
    if scaler is None:
        return {}
    counts = {name: value for name, value in scaler.state_dict().items() if name != "scale"}
    return {LOSS_SCALE: {"scale": scaler.scale.item(), **counts}}


def restore_loss_scale(optimizer: MegatronOptimizer, state: dict[str, Any]) -> None:
    """Restores the result of `loss_scale_state`; a fixed scale is always taken from --loss-scale.

    Args:
        optimizer: the optimizer.
        state: the content of state.json; if the earlier run had no fp16 or a fixed scale, a new scale starts.
    """
    scaler, stored = scaler_of(optimizer), state.get(LOSS_SCALE, {})
    if isinstance(scaler, DynamicGradScaler) and len(stored) > 1:
        scaler.load_state_dict({**stored, "scale": torch.tensor([stored["scale"]], dtype=torch.float32)})

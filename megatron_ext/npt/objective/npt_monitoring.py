"""Summary values of an NPT step, and a warning about collapsed layers.

The summary values, by name:

    npt loss                    the minimized loss: the sum of the step's losses, each with its weight
    mlp_direct_loss, ...        mean over layers of the loss with this name
    npt/v_a_norm, ...           mean of this norm over layers, in steps in which norms are measured
    curriculum/stage            index of the current stage, from 0
    curriculum/attention_share, curriculum/mlp_share       the student's shares in the inputs of attention and MLP

`layer_losses` records the values of single layers. A layer has collapsed if its v_a or v_b has nearly vanished: then it
no longer generates a delta, and learns slowly or not at all.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from megatron_ext.npt.objective.step_objective import StepObjective

NORMS = ("v_a_norm", "v_b_norm")
"""Names of the norms that must not vanish."""
COLLAPSED_SHARE, COLLAPSED_NORM = 1e-3, 1e-6
"""A norm has vanished if it is below the first constant times its initial value, or below the second constant."""

_SIZES = (*NORMS, "v_a_attention_similarity", "delta_norm")
_LOSSES = (
    "mlp_direct_loss",
    "equivalence_loss",
    "attention_reconstruction_loss",
    "regularization_loss",
)
_TOTAL = "npt_loss"


def summarize(values: Mapping[str, float], objective: StepObjective) -> dict[str, float]:
    """Returns totals and means of a step's values, by name.

    Args:
        values: the step's values by name; the values of single layers are named `name/layer_i`.
        objective: the step's weights and curriculum stage.
    """
    found = {}
    for name in (*_LOSSES, *_SIZES):
        of_layers = [value for key, value in values.items() if key.startswith(f"{name}/layer_")]
        if of_layers:
            found[name if name in _LOSSES else f"npt/{name}"] = math.fsum(of_layers) / len(of_layers)
    total = [value for key, value in values.items() if key.startswith(f"{_TOTAL}/layer_")]
    total.append(objective.fidelity * values.get("fidelity_loss", 0.0))
    total.append(objective.lm * values.get("lm loss", 0.0))
    return {
        "npt loss": math.fsum(total),
        **found,
        "curriculum/stage": float(objective.stage_index),
        "curriculum/attention_share": objective.stage.attention_share,
        "curriculum/mlp_share": objective.stage.mlp_share,
    }


@dataclass
class CollapseWatch:
    """Warns once when a layer's v_a or v_b vanishes, and again only after it has recovered."""

    first: dict[str, float] = field(default_factory=dict)
    """Maps the name of each layer's norm to the norm's first value that is not zero."""

    collapsed: set[str] = field(default_factory=set)
    """Names of the norms that have vanished."""

    def look(self, values: Mapping[str, float]) -> list[str]:
        """Checks a step's values; returns warnings for the user."""
        lines = []
        for name, value in sorted(values.items()):
            kind, _, layer = name.partition("/layer_")
            if kind not in NORMS or not math.isfinite(value):
                continue
            first = self.first.get(name)
            if first is None or first < COLLAPSED_NORM:
                # A norm near zero cannot be the reference yet: with --np-init-strategy conservative, v_b starts at
                # zero.
                starts = first is None
                self.first[name] = value
                if starts:
                    continue
            if value >= max(COLLAPSED_NORM, COLLAPSED_SHARE * self.first[name]):
                self.collapsed.discard(name)
            elif name not in self.collapsed:
                self.collapsed.add(name)
                lines.append(
                    f"warning: layer {layer}: {kind} has fallen to {value:.2e} (first value {self.first[name]:.2e}): "
                    "the NP component has collapsed and has no effect; try a lower --lr or --regularization-weight"
                )
        return lines

    def state_dict(self) -> dict[str, Any]:
        """Returns the state as JSON values."""
        return {"first": dict(self.first), "collapsed": sorted(self.collapsed)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores the result of `state_dict`."""
        self.first, self.collapsed = dict(state["first"]), set(state["collapsed"])

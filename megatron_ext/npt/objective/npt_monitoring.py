"""What an NPT run tells beside the losses of its layers: totals, means over layers, the curriculum, collapse.

    npt loss                    all that the step has trained for, weights included
    mlp_direct_loss, ...        mean over layers of the loss with this name
    npt/v_a_norm, ...           mean over layers of a size, in steps where sizes are measured
    curriculum/stage            the stage's place in the curriculum, from 0; /attention_share, /mlp_share the student's

Values of single layers are logged where they arise, see `plan`. A layer has collapsed when v_a or v_b has all but
vanished: it generates no delta any more, and learns slowly or not at all.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from megatron_ext.npt.objective.step_objective import StepObjective

NORMS = ("v_a_norm", "v_b_norm")
"""Sizes that must not vanish."""
COLLAPSED_SHARE, COLLAPSED_NORM = 1e-3, 1e-6
"""A size below this share of its first value, or below this value, has vanished."""

_SIZES = (*NORMS, "v_a_attention_similarity", "delta_norm")
_LOSSES = (
    "mlp_direct_loss",
    "equivalence_loss",
    "attention_reconstruction_loss",
    "regularization_loss",
)
_TOTAL = "npt_loss"


def summarize(values: Mapping[str, float], objective: StepObjective) -> dict[str, float]:
    """Totals and means of a step's values.

    Args:
        values: by name, those of layers as `name/layer_i`.
        objective: what the step has trained.
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
    """Name of a layer's size -> its first value that was not zero."""

    collapsed: set[str] = field(default_factory=set)
    """Names of those that have vanished."""

    def look(self, values: Mapping[str, float]) -> list[str]:
        """Takes a step's values; returns lines for the user."""
        lines = []
        for name, value in sorted(values.items()):
            kind, _, layer = name.partition("/layer_")
            if kind not in NORMS or not math.isfinite(value):
                continue
            first = self.first.get(name)
            if first is None or first < COLLAPSED_NORM:
                # Nothing to compare with yet; under `conservative` v_b starts at zero and may take a while to grow.
                starts = first is None
                self.first[name] = value
                if starts:
                    continue
            if value >= max(COLLAPSED_NORM, COLLAPSED_SHARE * self.first[name]):
                self.collapsed.discard(name)
            elif name not in self.collapsed:
                self.collapsed.add(name)
                lines.append(
                    f"warning: layer {layer}: {kind} has fallen to {value:.2e} (first {self.first[name]:.2e}): its NP "
                    "component has collapsed and changes nothing; try a lower --lr or --regularization-weight"
                )
        return lines

    def state_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return {"first": dict(self.first), "collapsed": sorted(self.collapsed)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes what `state_dict` gave."""
        self.first, self.collapsed = dict(state["first"]), set(state["collapsed"])

"""What one training step of NPT trains: the weights of the losses, and the stage of the curriculum.

The command line reads this file through the training configuration, so it imports no torch.
"""

from dataclasses import dataclass
from typing import Literal

from megatron_ext.npt.objective.curriculum import STUDENT, Stage


@dataclass(frozen=True, kw_only=True)
class LayerWeights:
    """Weights of a layer's losses; 0 leaves one out."""

    direct_mlp: float = 0.0
    """Direct MLP."""

    equivalence: float = 0.0
    """Equivalence."""

    equivalence_loss: Literal["mse", "cosine"] = "mse"
    """How equivalence is measured."""

    reconstruction: float = 0.0
    """Attention reconstruction."""

    regularization: float = 0.0
    """Regularization."""

    @property
    def any(self) -> bool:
        """True where a layer has a loss at all."""
        return any((self.direct_mlp, self.equivalence, self.reconstruction, self.regularization))


@dataclass(frozen=True, kw_only=True)
class StepObjective:
    """What one step trains."""

    layer: LayerWeights
    """Losses of every NPT layer, before the layer's own weight."""

    fidelity: float = 0.0
    """Weight of the fidelity."""

    lm: float = 0.0
    """Weight of the cross-entropy."""

    stage: Stage
    """The curriculum's stage."""

    stage_index: int
    """Its place in the curriculum."""

    @property
    def reads_teacher(self) -> bool:
        """True where the teacher runs: its states enter the layers, or the output is compared with its."""
        return self.stage.blends or self.fidelity > 0


PLAIN_LM = StepObjective(layer=LayerWeights(), lm=1.0, stage=STUDENT, stage_index=0)
"""Cross-entropy alone: what a family without a training configuration trains for."""

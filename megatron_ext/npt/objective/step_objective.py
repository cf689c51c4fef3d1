"""The objective of one NPT training step: the weights of the losses, and the stage of the curriculum.

The command line imports this file through the training configuration, so it must not import torch.
"""

from dataclasses import dataclass
from typing import Literal

from megatron_ext.npt.objective.curriculum import STUDENT, Stage


@dataclass(frozen=True, kw_only=True)
class LayerWeights:
    """Weights of a layer's losses; a loss with weight 0 is not computed."""

    direct_mlp: float = 0.0
    """Weight of the direct MLP loss."""

    equivalence: float = 0.0
    """Weight of the equivalence loss."""

    equivalence_loss: Literal["mse", "cosine"] = "mse"
    """Measure of the difference between two outputs in the equivalence loss: mean square error, or 1 - cosine."""

    reconstruction: float = 0.0
    """Weight of the attention reconstruction loss."""

    regularization: float = 0.0
    """Weight of the regularization loss."""

    local: bool = False
    """Whether the losses are local; if not, they are those of docs/design. See `layer_losses`."""

    @property
    def compares_outputs(self) -> bool:
        """Whether a loss compares the modulated MLP's output with its target from the base layer."""
        return bool(self.direct_mlp or self.equivalence)

    @property
    def any(self) -> bool:
        """Whether the layer has any loss."""
        return any((self.direct_mlp, self.equivalence, self.reconstruction, self.regularization))


@dataclass(frozen=True, kw_only=True)
class StepObjective:
    """The weights of the losses, and the curriculum stage, of one training step."""

    layer: LayerWeights
    """Weights of the losses in every NPT layer; each layer multiplies them by its own factor (`--layer-weights`)."""

    fidelity: float = 0.0
    """Weight of the fidelity loss."""

    lm: float = 0.0
    """Weight of the cross-entropy."""

    stage: Stage
    """The curriculum's stage in this step."""

    stage_index: int
    """Index of the stage in the curriculum, from 0."""

    layer_parallel: bool = False
    """Whether each layer trains separately on the teacher's states, without running the student."""

    @property
    def reads_teacher(self) -> bool:
        """Whether the step needs the teacher's hidden states, for the layers' inputs or for the fidelity loss."""
        return self.stage.blends or self.fidelity > 0


PLAIN_LM = StepObjective(layer=LayerWeights(), lm=1.0, stage=STUDENT, stage_index=0)
"""The objective of an `NPTFamily` without a training configuration: cross-entropy only."""

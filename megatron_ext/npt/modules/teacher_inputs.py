"""Passes the teacher's hidden states from the fields of a batch to a pipeline stage's NPT layers.

They are packed into one auxiliary stream, a tensor that accompanies the hidden states through the stage.
"""

import torch

from megatron_ext.models.model_extension import StageModule

TEACHER = "npt_teacher"
"""Name of the stream that contains the teacher's inputs to this stage's NPT layers, packed as [layers, s, b, h]."""


def input_name(layer: int) -> str:
    """Returns the name of the batch field with the teacher's input to layer number `layer`, counted from 0.

    The field has the shape [s, b, h] ([s/t, b, h] with sequence parallelism).
    """
    return f"{TEACHER}/layer_{layer}"


def state_names(layer: int) -> tuple[str, str, str]:
    """Returns the names of the batch fields with a layer's input, attention output and MLP output in the teacher.

    All have the shape of the input; see `input_name`.
    """
    return input_name(layer), f"{TEACHER}/attention_{layer}", f"{TEACHER}/mlp_{layer}"


class TeacherInputs(StageModule):
    """Packs the teacher's inputs to the NPT layers of a model chunk into the stream `TEACHER`."""

    def __init__(self, layers: tuple[int, ...]) -> None:
        """Args:
        layers: indices of the chunk's NPT layers, from 0.
        """
        super().__init__()
        self.layers = layers

    def forward(
        self, auxiliary_inputs: dict[str, torch.Tensor], travelling: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """Returns the stream `TEACHER`, or an empty dictionary if the micro-batch has no teacher inputs."""
        names = [input_name(layer) for layer in self.layers]
        if not names or names[0] not in auxiliary_inputs:
            return {}
        return {TEACHER: torch.stack([auxiliary_inputs[name] for name in names])}

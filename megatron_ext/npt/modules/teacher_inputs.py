"""Passes the teacher's hidden states from batch fields to a stage's NPT layers, packed into one auxiliary stream."""

import torch

from megatron_ext.models.model_extension import StageModule

TEACHER = "npt_teacher"
"""Name of the auxiliary stream with the teacher's inputs of this stage's NPT layers, packed as [layers, s, b, h]."""


def input_name(layer: int) -> str:
    """Returns the name of the batch field that holds a layer's input in the teacher; layers are numbered from 0.

    The field has the shape [s, b, h] ([s/t, b, h] under sequence parallel).
    """
    return f"{TEACHER}/layer_{layer}"


class TeacherInputs(StageModule):
    """Packs the teacher's inputs of a chunk's NPT layers into the stream `TEACHER`."""

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

"""Named tensors that travel beside the hidden states: through the layers of a stage, and from stage to stage.

A family declares `AuxiliaryStream`s; their widths add up. Two ways of travel:

* to the layers: the engine hands one extra tensor, `context`, to every layer and treats it as a real input of
  activation recomputation. A decoder-only layer leaves it alone, so all streams of a stage are packed into it, flat,
  one after the other. This module is the only place that knows about the borrowed name.
* to the next stage: streams with `travels=True` are appended to the hidden states as further rows of width h, so that
  the pipeline schedule sends one tensor, [k * s, b, h]. To the schedule it is a longer sequence, which it takes as it
  is with and without interleaving; a wider tensor it would take in one of them only.

Shapes: under sequence parallel `s` of the hidden states is the local part; a stream with `full_sequence=True` has all
rows.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F


@dataclass(frozen=True, kw_only=True)
class AuxiliaryStream:
    """One named tensor [s, b, width] beside the hidden states."""

    name: str
    """Unique over all families of a run."""

    width: int | None
    """Size of the last dimension on this rank. None: as many columns as a micro-batch brings, or none; at most one
    stream of a run, only to the layers."""

    full_sequence: bool = False
    """True: all rows of the sequence are present on every rank, under sequence parallel too."""

    to_layers: bool = True
    """True: the layers of a stage can read it."""

    travels: bool = False
    """True: it is sent to the next pipeline stage."""


class AuxiliaryInputs:
    """The layout of all streams of a run, and the two ways of travel."""

    def __init__(self, streams: list[AuxiliaryStream], sequence_parallel_size: int = 1) -> None:
        names = [stream.name for stream in streams]
        if len(set(names)) != len(names):
            raise ValueError(f"auxiliary streams must have different names, got {names}")
        if any(stream.travels and stream.full_sequence for stream in streams):
            raise ValueError(
                "an auxiliary stream that travels between stages has the hidden states' rows, not the full sequence"
            )
        # The stream of open width comes last: its places are what the others leave.
        self._to_layers = sorted((s for s in streams if s.to_layers), key=lambda stream: stream.width is None)
        if sum(stream.width is None for stream in streams) > 1:
            raise ValueError("at most one auxiliary stream may leave its width open")
        self._travelling = [stream for stream in streams if stream.travels]
        self._sequence_parallel_size = sequence_parallel_size

    def pipeline_factor(self, hidden_size: int) -> int:
        """k: how many times longer than the hidden states the tensor between two stages is."""
        return 1 + -(-sum(stream.width or 0 for stream in self._travelling) // hidden_size)

    @property
    def travels(self) -> bool:
        """True if any stream goes from stage to stage."""
        return bool(self._travelling)

    @property
    def reaches_layers(self) -> bool:
        """True if any stream is to be packed for the layers."""
        return bool(self._to_layers)

    def join(self, hidden_states: torch.Tensor, values: dict[str, torch.Tensor]) -> torch.Tensor:
        """[s, b, h] and the travelling streams -> [k * s, b, h], what a stage sends."""
        if not self._travelling:
            return hidden_states
        rows, batch, hidden_size = hidden_states.shape
        widths = sum(stream.width or 0 for stream in self._travelling)
        further = self.pipeline_factor(hidden_size) - 1
        streams = torch.cat([values[stream.name] for stream in self._travelling], dim=-1)
        padded = F.pad(streams, (0, further * hidden_size - widths))
        as_rows = padded.view(rows, batch, further, hidden_size).movedim(2, 0).flatten(0, 1)
        return torch.cat([hidden_states, as_rows])

    def split(self, joined: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Undoes `join`: what a stage receives -> hidden states and the travelling streams by name."""
        if not self._travelling:
            return joined, {}
        _, batch, hidden_size = joined.shape
        factor = self.pipeline_factor(hidden_size)
        rows = joined.size(0) // factor
        streams = joined[rows:].view(factor - 1, rows, batch, hidden_size).movedim(0, 2).flatten(2)
        sizes = [stream.width or 0 for stream in self._travelling]
        values = streams.split([*sizes, streams.size(-1) - sum(sizes)], dim=-1)
        return joined[:rows], {s.name: v for s, v in zip(self._travelling, values, strict=False)}

    def pack(self, values: dict[str, torch.Tensor]) -> torch.Tensor | None:
        """The streams for the layers -> one flat tensor. A value may have any shape with its stream's element count.

        None where there is nothing to pack: the only stream is of open width, and this micro-batch brings none.
        """
        flat = [
            values[stream.name].reshape(-1)
            for stream in self._to_layers
            if stream.width is not None or stream.name in values
        ]
        return (flat[0] if len(flat) == 1 else torch.cat(flat)) if flat else None

    def open(self, packed: torch.Tensor | None, hidden_states: torch.Tensor) -> "LayerInputs":
        """What a slot of a layer reads from and writes to; `hidden_states` [s, b, h] tells the row counts."""
        rows, batch = hidden_states.shape[:2]
        return LayerInputs(self._to_layers, packed, rows, batch, self._sequence_parallel_size)


class _Read(torch.autograd.Function):
    """packed -> (packed[start : start + size], packed). The second output is what the next reader takes.

    A slice's own backward would make a zero-filled tensor of full size for every reader. Here the gradient comes back
    along the chain of readers, and each adds its part in place; nothing else sees that buffer.
    """

    @staticmethod
    def forward(ctx: Any, packed: torch.Tensor, start: int, size: int) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.place = start, size
        ctx.total = packed.numel()
        ctx.set_materialize_grads(False)
        return packed.narrow(0, start, size), packed.view_as(packed)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor | None) -> tuple[torch.Tensor | None, None, None]:
        grad, later = grads
        if grad is None:
            return later, None, None
        if later is None:
            later = grad.new_zeros(ctx.total)
        later.narrow(0, *ctx.place).add_(grad)
        return later, None, None


class LayerInputs:
    """The streams as one layer sees them."""

    def __init__(
        self,
        streams: list[AuxiliaryStream],
        packed: torch.Tensor | None,
        rows: int,
        batch: int,
        sequence_parallel_size: int,
    ) -> None:
        self.packed = packed
        """The flat tensor; a `write` replaces it."""
        self._places: dict[str, tuple[int, int, int, int]] = {}
        start = 0
        for stream in streams:
            stream_rows = rows * sequence_parallel_size if stream.full_sequence else rows
            width = stream.width
            if width is None:
                left = 0 if packed is None else packed.numel() - start
                width = left // (stream_rows * batch)
            self._places[stream.name] = (start, stream_rows, batch, width)
            start += stream_rows * batch * width

    def has(self, name: str) -> bool:
        """True unless the stream is of open width, and this micro-batch brings none."""
        return self._places[name][3] > 0

    def read(self, name: str) -> torch.Tensor:
        """The stream as [s, b, width] (a view; contiguous, so that its owner may view it differently)."""
        return self.read_part(name, 0, 1)

    def read_part(self, name: str, part: int, parts: int) -> torch.Tensor:
        """Part `part` of a stream packed as [parts, s, b, width / parts]: a view [s, b, width / parts].

        How a stream that has something for every layer of a stage gives a layer its own. The gradient of the packed
        tensor is one buffer that every reader adds its part to, not a full one for each.
        """
        assert self.packed is not None, f"no auxiliary stream was packed, and '{name}' was asked for"
        start, rows, batch, width = self._places[name]
        size = rows * batch * width // parts
        value, self.packed = _Read.apply(self.packed, start + part * size, size)
        return value.view(rows, batch, width // parts)

    def write(self, name: str, value: torch.Tensor) -> None:
        """Replaces the stream for the slots and layers that follow on this stage; the next stage does not see it."""
        assert self.packed is not None, f"no auxiliary stream was packed, and '{name}' was written"
        start, *shape = self._places[name]
        end = start + shape[0] * shape[1] * shape[2]
        self.packed = torch.cat([self.packed[:start], value.reshape(-1), self.packed[end:]])

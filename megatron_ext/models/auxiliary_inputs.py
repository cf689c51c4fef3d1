"""Auxiliary streams: named tensors that accompany the hidden states through the layers and from stage to stage.

A model family declares its `AuxiliaryStream`s. Streams are transported in two ways:

* To the layers of a stage. The engine passes one extra tensor, `context`, to every layer and treats `context` as an
  input of activation recomputation. A decoder-only layer has no other use for `context`, so all streams are packed
  into it as one flat tensor. Only `GPTModel` and `ExtendedTransformerLayer` use that name.
* To the next stage. Streams with `travels=True` are appended to the hidden states as further rows of width h, so that
  the pipeline schedule sends one tensor, [k * s, b, h]. The schedule sees a longer sequence, which works with and
  without interleaving; the interleaved schedule would refuse a wider tensor. A stream with `written=True`, which
  layers may overwrite, is sent with its value after the stage's last layer.

Shapes: `s` is the number of tokens of a sequence on this rank. Under sequence parallelism, this is the local part of
the sequence; a stream with `full_sequence=True` always has all rows. In a model with several residual streams (AltUp),
the hidden states have s rows for each residual stream, but auxiliary streams have only s rows.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from megatron_ext.models.ops.chained_slices import take_slice


@dataclass(frozen=True, kw_only=True)
class AuxiliaryStream:
    """Declaration of one named tensor [s, b, width]."""

    name: str
    """Name of the stream, unique over all model families of a run."""

    width: int | None
    """Size of the last dimension on this rank. None: the width may differ per micro-batch and may be 0; at most one
    stream of a run may have width None, and it cannot travel.
    """

    full_sequence: bool = False
    """Whether every rank has all rows of the sequence, even under sequence parallelism."""

    to_layers: bool = True
    """Whether the layers of a stage can read the stream."""

    travels: bool = False
    """Whether the stream is sent to the next pipeline stage."""

    written: bool = False
    """Whether layers write the stream, which holds zeros before the first write. A pipeline stage sends the value
    after its last layer.
    """


class AuxiliaryInputs:
    """Layout of a run's auxiliary streams.

    Packs them for the layers, and concatenates them with the hidden states that are sent between pipeline stages.
    """

    def __init__(
        self, streams: list[AuxiliaryStream], sequence_parallel_size: int = 1, residual_streams: int = 1
    ) -> None:
        names = [stream.name for stream in streams]
        if len(set(names)) != len(names):
            raise ValueError(f"auxiliary streams need distinct names, got {names}")
        # The stream of variable width comes last, because its size is the rest of the packed tensor.
        self._to_layers = sorted((s for s in streams if s.to_layers), key=lambda stream: stream.width is None)
        if sum(stream.width is None for stream in streams) > 1:
            raise ValueError("at most one auxiliary stream may have width=None")
        self._travelling = [stream for stream in streams if stream.travels]
        self._written = [stream for stream in self._travelling if stream.written]
        self._sequence_parallel_size = sequence_parallel_size
        self._residual_streams = residual_streams

    def pipeline_factor(self, hidden_size: int) -> int:
        """Returns k: the tensor sent between two stages has k rows per token."""
        return self._factor(self._travelling, hidden_size)

    @property
    def travels(self) -> bool:
        """Whether any stream is sent from stage to stage."""
        return bool(self._travelling)

    @property
    def reaches_layers(self) -> bool:
        """Whether any stream is packed for the layers."""
        return bool(self._to_layers)

    def join(self, hidden_states: torch.Tensor, values: dict[str, torch.Tensor]) -> torch.Tensor:
        """Returns the tensor that a stage sends, [k * s, b, h]: hidden states [s, b, h], then travelling streams."""
        return self._join(self._travelling, hidden_states, values)

    def split(self, joined: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Splits a received tensor, [k * s, b, h], into hidden states and travelling streams; inverse of `join`."""
        return self._split(self._travelling, joined)

    def with_written(self, hidden_states: torch.Tensor, layer_inputs: "LayerInputs") -> torch.Tensor:
        """Returns the last layer's output, followed by the streams that layers have written, as further rows.

        They form one tensor because the layers of a stage can return only one, in particular under activation
        recomputation.
        """
        values = {stream.name: layer_inputs.read(stream.name) for stream in self._written}
        return self._join(self._written, hidden_states, values)

    def without_written(self, output: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Splits the result of `with_written` into hidden states and streams."""
        return self._split(self._written, output)

    def unwritten(self, embedding: torch.Tensor) -> dict[str, torch.Tensor]:
        """Returns the zeros that each written stream holds before a layer writes it."""
        rows, batch, _ = embedding.shape
        return {
            stream.name: embedding.new_zeros(rows * self._parts(stream), batch, stream.width or 0)
            for stream in self._written
        }

    def _parts(self, stream: AuxiliaryStream) -> int:
        """Returns the ratio of the stream's rows to the rows of the hidden states on this rank."""
        return self._sequence_parallel_size if stream.full_sequence else 1

    def _factor(self, streams: list[AuxiliaryStream], hidden_size: int) -> int:
        return self._residual_streams + self._further_rows(streams, hidden_size)

    def _further_rows(self, streams: list[AuxiliaryStream], hidden_size: int) -> int:
        return -(-sum((stream.width or 0) * self._parts(stream) for stream in streams) // hidden_size)

    def _join(
        self, streams: list[AuxiliaryStream], hidden_states: torch.Tensor, values: dict[str, torch.Tensor]
    ) -> torch.Tensor:
        if not streams:
            return hidden_states
        rows, batch, hidden_size = hidden_states.shape
        rows //= self._residual_streams
        further = self._further_rows(streams, hidden_size)
        # A stream with the whole sequence is sent as several parts side by side, each as long as the hidden states.
        found = [
            values[stream.name].view(self._parts(stream), rows, batch, -1).movedim(0, 2).flatten(2)
            for stream in streams
        ]
        wide = torch.cat(found, dim=-1)
        padded = F.pad(wide, (0, further * hidden_size - wide.size(-1)))
        as_rows = padded.view(rows, batch, further, hidden_size).movedim(2, 0).flatten(0, 1)
        return torch.cat([hidden_states, as_rows])

    def _split(
        self, streams: list[AuxiliaryStream], joined: torch.Tensor
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        if not streams:
            return joined, {}
        _, batch, hidden_size = joined.shape
        rows = joined.size(0) // self._factor(streams, hidden_size)
        own = rows * self._residual_streams
        wide = joined[own:].view(-1, rows, batch, hidden_size).movedim(0, 2).flatten(2)
        sizes = [(stream.width or 0) * self._parts(stream) for stream in streams]
        values = wide.split([*sizes, wide.size(-1) - sum(sizes)], dim=-1)
        found = {
            stream.name: value.unflatten(-1, (self._parts(stream), -1)).movedim(2, 0).flatten(0, 1)
            for stream, value in zip(streams, values, strict=False)
        }
        return joined[:own], found

    def pack(self, values: dict[str, torch.Tensor]) -> torch.Tensor | None:
        """Packs the streams for the layers into one flat tensor.

        Args:
            values: maps stream name to a tensor of any shape that has as many elements as the stream. The stream of
                variable width may be missing.

        Returns:
            A tensor of one dimension, or None if there is nothing to pack.
        """
        flat = [
            values[stream.name].reshape(-1)
            for stream in self._to_layers
            if stream.width is not None or stream.name in values
        ]
        return (flat[0] if len(flat) == 1 else torch.cat(flat)) if flat else None

    def open(self, packed: torch.Tensor | None, hidden_states: torch.Tensor) -> "LayerInputs":
        """Returns an object that a layer uses to read `packed`; the sizes s and b are those of `hidden_states`."""
        rows, batch = hidden_states.size(0) // self._residual_streams, hidden_states.size(1)
        return LayerInputs(self._to_layers, packed, rows, batch, self._sequence_parallel_size)


class LayerInputs:
    """Reads and writes the packed streams in one layer."""

    def __init__(
        self,
        streams: list[AuxiliaryStream],
        packed: torch.Tensor | None,
        rows: int,
        batch: int,
        sequence_parallel_size: int,
    ) -> None:
        self.packed = packed
        """The flat tensor; `read` and `write` replace it."""
        self.rows = rows
        """Number of rows per residual stream of the hidden states."""
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
        """Returns whether this micro-batch has the stream; only a stream of variable width can be missing."""
        return self._places[name][3] > 0

    def read(self, name: str) -> torch.Tensor:
        """Returns the stream as a contiguous view [s, b, width]."""
        return self.read_part(name, 0, 1)

    def read_part(self, name: str, part: int, parts: int) -> torch.Tensor:
        """Returns part `part` of a stream that was packed as [parts, s, b, width / parts].

        A stream can hold one part for each layer of a stage; each layer reads its own. The gradient of the packed
        tensor is one buffer to which every reader adds its part.

        Returns:
            A contiguous view [s, b, width / parts].
        """
        assert self.packed is not None, f"cannot read auxiliary stream '{name}': nothing was packed"
        start, rows, batch, width = self._places[name]
        size = rows * batch * width // parts
        value, self.packed = take_slice(self.packed, 0, start + part * size, size)
        return value.view(rows, batch, width // parts)

    def write(self, name: str, value: torch.Tensor) -> None:
        """Replaces the stream for all later modules and layers of this stage.

        If the stream is declared with `written=True`, the next stage gets the new value, too.
        """
        assert self.packed is not None, f"cannot write auxiliary stream '{name}': nothing was packed"
        start, *shape = self._places[name]
        end = start + shape[0] * shape[1] * shape[2]
        self.packed = torch.cat([self.packed[:start], value.reshape(-1), self.packed[end:]])

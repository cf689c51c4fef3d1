"""The values of a step or an evaluation, which are reduced over the ranks on the device and later read by the host.

    value = sum(value * weight) / sum(weight)        over micro-batches, data-parallel ranks and stages

Each value is a row [weighted sum, sum of weights]: the losses of the last stage, then the values that layers have
recorded, with weight 1 for each data-parallel rank. All rows are reduced together. For this, all ranks need the same
list of names of the layers' values, but a rank does not know the names on other stages. Therefore the last row counts
the ranks whose own names are all in the list. If the count is smaller than the number of ranks, every rank sees this,
and all ranks exchange their names once.
"""

from collections.abc import Iterable

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megatron_ext.models.attached_losses import LayerLosses
from megatron_ext.platform import process_groups
from megatron_ext.platform.collectives import merge_over_ranks


class LayerNames:
    """The names under which any layer has recorded a value so far; equal on every rank."""

    def __init__(self) -> None:
        self.names: tuple[str, ...] = ()

    def exchange(self, own: Iterable[str]) -> None:
        """Adds every rank's names `own` to `names`, which is then the same on all ranks. Collective."""
        found = dict.fromkeys((*self.names, *own))
        for group in _groups():
            found = merge_over_ranks(found, group)
        # Sort the names, because rows are added by position, and ranks may have recorded in a different order.
        self.names = tuple(sorted(found))


class StepValues:
    """The reduced values of a step or an evaluation, on the device."""

    def __init__(
        self,
        outputs: list[dict[str, torch.Tensor]],
        names: tuple[str, ...],
        layer_names: LayerNames,
        *,
        of_nothing: float,
    ) -> None:
        """Takes the layers' values from `LayerLosses`, and reduces all values. Collective.

        Args:
            outputs: one mapping per micro-batch, from name to a tensor [weighted sum, sum of weights]; on stages other
                than the last an empty list.
            names: the names of the losses, in the same order on every rank.
            layer_names: the names of the layers' values that all ranks know.
            of_nothing: the value to return for a loss whose weights are all 0.
        """
        self._losses, self._layer_names, self._of_nothing = names, layer_names, of_nothing
        self._sums = torch.zeros(len(names), 2, dtype=torch.float64, device=process_groups.device())
        for output in outputs:
            self._sums += torch.stack([output[name] for name in names]) if names else 0.0
        self._recorded = LayerLosses.take()
        self._names = layer_names.names
        self.rows = self._reduced()
        """The reduced rows, [rows, 2] in float64, on the device; `named` needs a copy on the host."""

    def are_finite(self) -> torch.Tensor:
        """Returns whether all losses are finite, as a scalar on the device."""
        sums, weights = self.rows[: len(self._losses)].unbind(1)
        return ((sums / weights).isfinite() | (weights == 0)).all()

    def named(self, rows: list[list[float]]) -> tuple[dict[str, float], dict[str, float]]:
        """Returns the losses and the layers' values by name. Collective if a layer has recorded under a new name.

        Args:
            rows: the content of `self.rows`.
        """
        knowing, ranks = rows[-1]
        if knowing < ranks or not self._knows_own_names():
            self._layer_names.exchange(self._recorded)
            self._names = self._layer_names.names
            rows = self._reduced().tolist()
        losses = {
            name: total / weight if weight else self._of_nothing
            for name, (total, weight) in zip(self._losses, rows, strict=False)
        }
        of_layers = zip(self._names, rows[len(self._losses) : -1], strict=True)
        recorded = {name: total / weight for name, (total, weight) in of_layers if weight}
        # Layers record in fp32, so round the mean over ranks to fp32.
        values = torch.tensor(list(recorded.values()), dtype=torch.float32).tolist()
        return losses, dict(zip(recorded, values, strict=True))

    def read(self) -> tuple[dict[str, float], dict[str, float]]:
        """Copies the rows to the host and returns the result of `named`; waits for the device. Collective."""
        return self.named(self.rows.tolist())

    def _knows_own_names(self) -> bool:
        return self._recorded.keys() <= set(self._names)

    def _reduced(self) -> torch.Tensor:
        """Returns this rank's rows, summed over data-parallel ranks and stages."""
        # Use scalars that are already on the device, so that nothing is copied to it.
        zero = torch.zeros((), device=process_groups.device())
        one = torch.ones_like(zero)
        values = [self._recorded.get(name, zero) for name in self._names]
        weights = [one if name in self._recorded else zero for name in self._names]
        values.append(one if self._knows_own_names() else zero)
        weights.append(one)
        of_layers = torch.stack((torch.stack(values), torch.stack(weights)), dim=1)
        rows = torch.cat((self._sums, of_layers.double()))
        for group in _groups():
            dist.all_reduce(rows, group=group)
        return rows


def _groups() -> tuple[dist.ProcessGroup, dist.ProcessGroup]:
    return (
        parallel_state.get_data_parallel_group(with_context_parallel=True),
        # A row is zero on stages that do not own its value, so the sum over the stages is the value.
        parallel_state.get_pipeline_model_parallel_group(),
    )

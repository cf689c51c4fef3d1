"""Trains per-layer tables by rows: memory, communication and time of a step depend only on the rows that it looks up.

A step has these parts, for the L tables of this rank, the n rows that any data-parallel rank looks up, the m of these
rows that this rank updates, and q columns:

    begin      copies m rows of weights and state out of the tables, [L, m, q], and brings them up to date
    forward    looks ids up in the copied rows, [L, n, q]; `places` returns the place of an id among them
    backward   adds the gradients of all micro-batches up in one tensor [L, n, q], in fp32
    prepare    averages the gradient over data-parallel ranks, with one all-reduce of [L, n, q]
    step       updates the m copied rows and writes them back

Every data-parallel rank has whole tables. Optimizer state and, with bf16, fp32 main weights are plain tensors of the
tables' shape. By default every rank has all of them, and m = n. With the distributed optimizer a rank has them only
for its own block of rows (`RowBlocks`): it updates the m rows of the step that are in this block, and `begin` gathers
the n rows from all ranks. The tables' other rows are then out of date until `bring_up_to_date`.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.optimizer import MegatronOptimizer

from megatron_ext.per_layer.sparse.missed_steps import MissedSteps
from megatron_ext.per_layer.sparse.row_blocks import RowBlocks
from megatron_ext.per_layer.sparse.row_statistics import RowStatistics
from megatron_ext.per_layer.sparse.row_updates import RowUpdate, State, StepFacts
from megatron_ext.per_layer.sparse.table_memory import TableMemory
from megatron_ext.per_layer.sparse.touched_rows import touched_rows
from megatron_ext.platform import process_groups
from megatron_ext.training.interface.own_optimizer import HeldState, OwnOptimizer

_ELEMENTS_AT_ONCE = 1 << 22
"""Number of elements that are brought up to date at a time before a save or an evaluation."""

_LEAST_WIDTH = 256
"""A row counts as at least this many elements, because the terms of its missed steps need memory, too."""


@dataclass(frozen=True)
class StepRows:
    """The rows of a step, copied out of the tables."""

    ids: torch.Tensor
    """The rows' ids, ascending, [n]."""

    own: slice
    """The m of the n rows that this rank updates."""

    weights: torch.Tensor
    """Weights of the m rows, fp32, [L, m, q]."""

    state: State
    """Optimizer state of the m rows, [L, m, q] or [L, m, 1]."""

    gradient: torch.Tensor
    """Gradient of the n rows, fp32, [L, n, q]."""

    inputs: list[torch.Tensor]
    """The rows that the forward pass looks up: L leaf tensors [n, q] in the tables' precision."""


class RowOptimizer(OwnOptimizer):
    """The optimizer of all tables on this rank."""

    def __init__(
        self,
        tables: Sequence[torch.nn.Parameter],
        update: RowUpdate,
        data_group: dist.ProcessGroup,
        engine: MegatronOptimizer,
        group: dict[str, Any],
        memory: TableMemory,
    ) -> None:
        """Args:
        tables: the tables of this rank's layers, each [Vp, q], which do not require gradients.
        update: the update rule.
        data_group: the data-parallel ranks, context-parallel ones included; all hold the same tables.
        engine: as in `OwnOptimizer`.
        group: as in `OwnOptimizer`.
        memory: the memory that holds tables and state.
        """
        super().__init__(engine, group)
        self.tables = tuple(tables)
        self.rule = update
        self.data_group = data_group
        self._memory = memory
        self._blocks = RowBlocks(
            len(self.tables[0]),
            data_group,
            self.host_group or data_group,
            divides=self.is_distributed and memory.is_on_device,
        )
        constants = update.constants
        own = [table.detach()[self._blocks.start : self._blocks.end] for table in self.tables]
        rows, columns = own[0].shape
        # In fp32 these are parts of the tables themselves.
        self._mains = own
        if own[0].dtype != torch.float32:
            self._mains = memory.zeros(len(own), (rows, columns), torch.float32)
            self.reload_model_params()
        device = process_groups.device()
        self._count = torch.zeros(1, dtype=torch.int64, device=device)
        """Number of updates so far, on the device, because only the device knows immediately whether a step is
        skipped.
        """

        self._missed = MissedSteps(update.momentum, constants.beta2, constants.eps, self._count)
        self._state = {
            name: memory.zeros(len(own), (rows, width or columns), torch.float32)
            for name, width in update.width_of_state.items()
        }
        self._host_reads = device.type == "cpu"
        """Whether the host reads values in order to save work; on a GPU it would have to wait for each value."""

        self._last_steps = torch.zeros(rows, dtype=torch.int32, device=device)
        """For each row of the block, the last step whose update has been applied to it."""

        self.statistics: RowStatistics | None = None
        """Counts the rows that steps look up; None if they are not counted."""

        self._rows: StepRows | None = None
        self._gradients: list[torch.Tensor] = []
        self._is_reduced = False

    @torch.no_grad()
    def begin(self, ids: Sequence[torch.Tensor]) -> None:
        """Prepares the rows of a training step. Collective.

        Args:
            ids: the per-layer ids of this rank's micro-batches.
        """
        rows, below = touched_rows(ids, self._blocks)
        if self.statistics is not None:
            self.statistics.add(rows)
        own = self._blocks.own(below)
        weights, state = self._copied(rows[own] - self._blocks.start)
        whole = self._blocks.gather(weights.to(self.tables[0].dtype), below)
        gradient = torch.zeros(whole.shape, device=whole.device)
        inputs = [of_table.detach().requires_grad_() for of_table in whole]
        for leaf, into in zip(inputs, gradient, strict=True):
            leaf.register_post_accumulate_grad_hook(partial(_move_gradient, into))
        for table, of_table in zip(self.tables, gradient, strict=True):
            table.main_grad, table.gradient_rows = of_table, rows  # type: ignore[attr-defined]
        self._groups[0]["params"], self._gradients = [weights], [gradient]
        self._rows, self._is_reduced = StepRows(rows, own, weights, state, gradient, inputs), False

    def places(self, ids: torch.Tensor) -> torch.Tensor:
        """Returns the index of each id among the step's rows, in the shape of `ids`."""
        assert self._rows is not None, "begin() has not been called"
        return torch.searchsorted(self._rows.ids, ids.contiguous())

    def inputs(self, table: torch.nn.Parameter) -> torch.Tensor:
        """Returns the step's rows of a table, [n, q]; the backward pass computes their gradient."""
        assert self._rows is not None, "begin() has not been called"
        place = next(place for place, each in enumerate(self.tables) if each is table)
        return self._rows.inputs[place]

    def is_in_step(self) -> bool:
        """Returns whether a training step has begun and its update is still to come."""
        return self._rows is not None

    @torch.no_grad()
    def reduce(self) -> None:
        """Averages the gradient over the data-parallel ranks, once per step. Collective."""
        if self._rows is None or self._is_reduced:
            return
        self._is_reduced, gradient = True, self._rows.gradient
        if self.data_group.size() > 1:
            gradient.div_(self.data_group.size())
            dist.all_reduce(gradient, group=self.data_group)

    def prepare_grads(self) -> bool:
        """Averages the gradient over the data-parallel ranks. Collective.

        Always returns False ("no infinity found"), because the gradient's norm reveals values that are not finite.
        """
        self.reduce()
        if self._rows is not None:
            # Clipping scales this tensor in place. A part of the gradient is copied, because torch's fused update
            # does not accept slices.
            self._rows.weights.grad = self._rows.gradient[:, self._rows.own].contiguous()
        return False

    def gradients(self) -> list[torch.Tensor]:
        """Returns the gradient of the last step that has begun."""
        return self._gradients

    def data_parallel_rank(self) -> int:
        """Returns this rank's index among the data-parallel ranks."""
        return self.data_group.rank()

    @torch.no_grad()
    def step_with_ready_grads(self) -> bool:
        """Updates the step's rows, and writes them back."""
        if self._rows is None:
            return True
        rows, group = self._rows, self._groups[0]
        places = rows.ids[rows.own] - self._blocks.start
        assert rows.weights.grad is not None
        step = StepFacts(group, self._count, self.is_applied)
        self.rule.update(rows.weights, rows.weights.grad, rows.state, step)
        self._write(places, rows.weights, rows.state)
        self._count = self._count + self.is_applied
        if self.rule.catches_up:
            self._missed.record(group["lr"], group["weight_decay"], self.is_applied)
        # `begin` has brought these rows up to date, even if the update is skipped.
        self._last_steps[places] = self._count.int()
        self._rows, group["params"] = None, []
        return True

    @torch.no_grad()
    def bring_up_to_date(self) -> None:
        """Applies all postponed updates, then exchanges rows, so that every rank has the whole tables up to date.

        Must not be called within a step. Collective.
        """
        if self.rule.catches_up:
            width = max(len(self._mains) * self.tables[0].size(1), _LEAST_WIDTH)
            at_once = max(1, _ELEMENTS_AT_ONCE // width)
            for number, block in enumerate(self._last_steps.split(at_once)):
                places = (block < self._count).nonzero().squeeze(1) + number * at_once
                if places.numel() and self._memory.is_writer:
                    self._write(places, *self._copied(places))
            self._last_steps.copy_(self._count)
            self._missed.restart(self._count)
        for table in self.tables:
            self._blocks.complete(table)
        self._memory.settle()

    def held(self) -> Iterator[HeldState]:
        """Yields the tables and their state on this rank; see the base class."""
        for place, (table, main) in enumerate(zip(self.tables, self._mains, strict=True)):
            state = {name: tensors[place] for name, tensors in self._state.items()}
            tensors = state if table.dtype == torch.float32 else {"param": main, **state}
            yield HeldState(table, tensors, self._blocks.start, self._blocks.end)

    def whole(self) -> Iterator[tuple[torch.Tensor, State]]:
        """Yields the tables and their complete state; see the base class."""
        for held in self.held():
            gathered = {name: self._blocks.gather_to_first(t) for name, t in held.tensors.items()}
            state = {name: tensor for name, tensor in gathered.items() if tensor is not None}
            if len(state) == len(gathered):
                yield held.parameter, state

    def step_count(self) -> int:
        """Returns the number of updates so far; waits for the device."""
        return int(self._count)

    def restored(self, step: int) -> None:
        """Prepares to continue after `step` updates; see the base class."""
        self._rows = None
        self._count = torch.full_like(self._count, step)
        self._last_steps.fill_(step)
        self._missed.restart(self._count)

    def reload_model_params(self, state_dict: Any = None) -> None:
        """Copies the model's weights into the main weights."""
        if self.tables[0].dtype == torch.float32 or not self._memory.is_writer:
            return
        for main, table in zip(self._mains, self.tables, strict=True):
            main.copy_(table.detach()[self._blocks.start : self._blocks.end])
            self._memory.release()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Does nothing, because the gradient of each step starts with zeros."""

    def _copied(self, places: torch.Tensor) -> tuple[torch.Tensor, State]:
        """Copies rows of this rank's block out of tables and state, and brings the copies up to date."""
        weights = self._memory.fetch(self._mains, places)
        state = {name: self._memory.fetch(tensors, places) for name, tensors in self._state.items()}
        if self.rule.catches_up:
            self._catch_up(places, weights, state)
        return weights, state

    def _write(self, places: torch.Tensor, weights: torch.Tensor, state: State) -> None:
        """Writes rows of this rank's block back into tables and state."""
        self._memory.write(self._mains, places, weights)
        if self.tables[0].dtype != torch.float32:
            self._memory.write(self.tables, places + self._blocks.start, weights)
        for name, tensors in self._state.items():
            self._memory.write(tensors, places, state[name])

    def _catch_up(self, places: torch.Tensor, weights: torch.Tensor, state: State) -> None:
        """Applies the missed updates to copied rows, in place; see `missed_steps`."""
        if not self._missed.recorded:
            return
        since, row = self._last_steps[places].long(), None
        if self._host_reads:  # computing each distinct step once is less work than computing every row
            since, row = since.unique(return_inverse=True)

        def by_row(values: torch.Tensor) -> torch.Tensor:
            values = values.float()
            return (values if row is None else values[row]).unsqueeze(1)

        weights.mul_(by_row(self._missed.decay(since)))
        if not self.rule.momentum or (self._host_reads and not state["exp_avg"].any()):
            return
        constants = self.rule.constants
        root = state["exp_avg_sq"].sqrt()
        total, divisor = torch.zeros_like(root), torch.empty_like(root)
        for factor, shift in self._missed.moment_terms(since, host_reads=self._host_reads):
            torch.add(root, by_row(shift), alpha=constants.eps, out=divisor)
            total.addcdiv_(by_row(factor), divisor)
        weights.addcmul_(state["exp_avg"], total, value=-1)
        gaps = (self._missed.last - since).double()
        state["exp_avg"].mul_(by_row(constants.beta1**gaps))
        state["exp_avg_sq"].mul_(by_row(constants.beta2**gaps))


def _move_gradient(into: torch.Tensor, leaf: torch.Tensor) -> None:
    """Adds the gradient of a leaf tensor, in the model's precision, to the step's gradient, and clears it."""
    assert leaf.grad is not None
    into.add_(leaf.grad)
    leaf.grad = None

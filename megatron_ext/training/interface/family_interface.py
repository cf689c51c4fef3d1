"""What a family hands the training system, beyond its part of the model.

`training` knows families only through this interface and never asks which one it has. Every method has a default that
does nothing, so that a family states just what it needs; several families may take part in one run.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from megatron.core.optimizer.optimizer_config import ParamKey
from megatron.core.optimizer_param_scheduler import ParamGroupOverride

from megatron_ext.config.groups.model_config import ModelConfig
from megatron_ext.config.groups.optimizer_config import OptimizerSettings
from megatron_ext.config.groups.parallel_config import ParallelConfig
from megatron_ext.models.costs.model_cost import ModelCost
from megatron_ext.models.costs.step_work import StepWork
from megatron_ext.models.gpt_model import GPTModel
from megatron_ext.models.model_extension import Extension
from megatron_ext.reports.scalar_charts import ScalarChart
from megatron_ext.training.interface.output_losses import OutputLoss

Batch = dict[str, torch.Tensor]
"""One micro-batch: `tokens`, `labels`, `position_ids` [b, s] integer, `loss_mask` [b, s] float, families' fields."""


@dataclass(frozen=True, kw_only=True)
class Message:
    """What a family has to say after a step."""

    text: str
    """One line to print; or with `tag` a text for TensorBoard, in Markdown."""

    tag: str | None = None
    """TensorBoard tag."""


class Family:
    """A family's part in a run. Subclasses override what they need."""

    name: str
    """Short name, also the extension's."""

    statistics_interval: int | None = None
    """Steps between two calls of `statistics`; None for never."""

    charts: tuple[ScalarChart, ...] = ()
    """The charts of all values that the family may log."""

    free_on_resume: frozenset[str] = frozenset()
    """Keys of `configuration` that may differ between a checkpoint and the run that loads it (dropout, ...)."""

    def extension(self) -> Extension:
        """The family's contribution to the model."""
        raise TypeError(f"{type(self).__name__} must say what it adds to the model")

    def check(self, model: ModelConfig, parallel: ParallelConfig) -> None:
        """Raises `ValueError` where the family does not fit the model or its parallel layout; called before anything
        is built.
        """

    def configuration(self) -> dict[str, Any]:
        """What a checkpoint must know to rebuild the family, as JSON values; see `Checkpointer`."""
        return {}

    def dataset_options(self) -> dict[str, Any]:
        """Keyword arguments for `data.gpt_dataset.build_datasets`: the family's data files beside the main ones."""
        return {}

    def cost(self, model: ModelConfig) -> ModelCost | None:
        """Parameters and FLOPs the family adds to `model`."""
        return None

    def step_work(self, model: ModelConfig, iteration: int) -> StepWork | None:
        """What a training step trains and runs, of the family's part of `model` and of the rest; None for everything.

        Args:
            model: the base model.
            iteration: the step, from 1; asked for right after it, and of a run's last step before the run.
        """
        return None

    def prepare_model(self, chunks: list[GPTModel]) -> None:
        """Called once after the model is built and before it is wrapped: freeze parameters here."""

    def make_batch(self, batch: Batch) -> Batch:
        """What the model is fed and asked, from a micro-batch as the data has it; in training and evaluation.

        Called before the batch is moved to the device, and before all else that reads it. At most one family of a run
        changes tokens or labels.
        """
        return batch

    def auxiliary_inputs(self, batch: Batch) -> dict[str, torch.Tensor]:
        """The family's inputs to the model on every pipeline stage, from a micro-batch on this rank's device."""
        return {}

    def parameter_overrides(self, settings: OptimizerSettings) -> dict[ParamKey, ParamGroupOverride]:
        """Learning-rate and weight-decay overrides for the family's parameters, in the engine's terms.

        Args:
            settings: the run's, from which relative overrides are made.
        """
        return {}

    def output_loss(self) -> OutputLoss | None:
        """What a training step makes of the model's output, asked for before every step; None for cross-entropy.

        At most one family of a run has an opinion. Evaluations use `evaluation_loss`.
        """
        return None

    def evaluation_loss(self) -> OutputLoss | None:
        """The same for evaluations; among its names is `lm loss`, in nats a token. None for cross-entropy.

        It tells the values of single tokens (`OutputLoss.of_tokens`) too.
        """
        return None

    def begin_step(self, chunks: list[GPTModel], iteration: int | None) -> None:
        """Called before everything else of a training step (numbered from 1), and with None before an evaluation."""

    def prepare_batches(
        self, chunks: list[GPTModel], families: list["Family"], batches: list[Batch]
    ) -> Iterable[Batch]:
        """Called on a training step's micro-batches, on the device: the place for a teacher's pass.

        Args:
            chunks: this rank's model chunks, unwrapped.
            families: all families of the run.
            batches: the micro-batches of the step.

        Returns:
            As many micro-batches, with more fields. Without pipeline parallelism they may be made one at a time, as
            they are used.
        """
        return batches

    def evaluation(
        self, chunks: list[GPTModel], split: str, loss: float, evaluate: Callable[[], float]
    ) -> dict[str, float]:
        """Further values of an evaluation, by name; losses but for names with `/`. Collective.

        Args:
            chunks: this rank's model chunks, unwrapped.
            split: `validation` or `test`; a split's batches are the same in every evaluation.
            loss: the mean cross-entropy that was found.
            evaluate: the mean cross-entropy on the evaluation's batches, of the model as it is when called.
        """
        return {}

    def summary(self, values: Mapping[str, float]) -> dict[str, float]:
        """Further values of a training step, from its losses and its layers' values, by name; the same on every rank.

        A name without `/` is shown in the progress line.
        """
        return {}

    def after_step(
        self, chunks: list[GPTModel], families: list["Family"], iteration: int, values: Mapping[str, float]
    ) -> list[Message]:
        """Called after a training step; collective, what rank 0 returns is told.

        Args:
            chunks: this rank's model chunks, unwrapped.
            families: all families of the run.
            iteration: the step, from 1.
            values: its losses and its layers' values, by name; the same on every rank.
        """
        return []

    def is_complete(self) -> bool:
        """True where the run may end before its last step, as if it were the last; the same on every rank."""
        return False

    def begin_statistics(self, chunks: list[GPTModel]) -> None:
        """Called before a step whose statistics are wanted: modules start to record."""

    def statistics(self, chunks: list[GPTModel]) -> dict[str, float]:
        """Called after that step's backward, before the optimizer: TensorBoard tag -> value, complete on rank 0.

        Collective: every rank calls it; a layer counts once, norms are global over tensor and pipeline ranks.
        """
        return {}

    def check_plain(self, *, as_adapters: bool) -> None:
        """Raises `ValueError` where `merge` (`as_adapters`: `write_adapters`) cannot be done; called before loading."""
        raise ValueError(f"the family {self.name} is no set of adapters, and no Llama-family model has it")

    def merge(self, chunks: list[GPTModel]) -> list[str]:
        """Turns a loaded model into a base model of the same function, for an export; returns notes for the user."""
        raise TypeError(f"{type(self).__name__} has passed check_plain and cannot merge")

    def write_adapters(
        self, chunks: list[GPTModel], model: ModelConfig, directory: Path, base_model: str, *, overwrite: bool
    ) -> list[str]:
        """Writes what is beyond the base model in the format of `peft`; returns notes for the user. Collective.

        Args:
            chunks: this rank's model chunks, unwrapped.
            model: the base model.
            directory: gets a directory for each adapter.
            base_model: where the base model is exported to.
            overwrite: replace what is there.
        """
        raise TypeError(f"{type(self).__name__} has passed check_plain and cannot write adapters")

    def write_files(self, chunks: list[GPTModel], folder: Path, state: dict[str, Any]) -> None:
        """Writes the family's own files into a checkpoint, where they get checksums; collective, on rank 0 to disk.

        Args:
            chunks: this rank's model chunks, unwrapped.
            folder: the checkpoint's directory while it is being written.
            state: what the checkpoint tells of the run: `progress`, `scheduler`, `optimizer_step`, ..., `run_config`.
        """

    def state_dict(self) -> dict[str, Any]:
        """What to save beyond the model, as JSON values."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes what `state_dict` gave."""


def auxiliary_inputs(families: Iterable[Family], batch: Batch) -> dict[str, torch.Tensor]:
    """The auxiliary inputs of all families of a run."""
    return {name: value for family in families for name, value in family.auxiliary_inputs(batch).items()}


def make_batch(families: Iterable[Family], batch: Batch) -> Batch:
    """A micro-batch as all families of a run make it."""
    for family in families:
        batch = family.make_batch(batch)
    return batch

"""The hooks through which a model family takes part in training.

A model family (PLE, NPT, progressive growth) is a plug-in of a training run; a run may have several. The package
`training` uses model families only through this interface and never checks which one it has. The methods have defaults,
most of which do nothing, so a model family overrides only what it needs.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.optimizer_config import ParamKey
from megatron.core.optimizer_param_scheduler import ParamGroupOverride

from megatron_ext.config.groups.model_config import ModelConfig
from megatron_ext.config.groups.optimizer_config import OptimizerSettings
from megatron_ext.config.groups.parallel_config import ParallelConfig
from megatron_ext.models.costs.activation_memory import FamilyActivations, ParallelLayout
from megatron_ext.models.costs.model_cost import ModelCost
from megatron_ext.models.costs.step_work import StepWork
from megatron_ext.models.gpt_model import GPTModel
from megatron_ext.models.model_extension import Extension
from megatron_ext.reports.scalar_charts import ScalarChart
from megatron_ext.training.interface.output_losses import OutputLoss
from megatron_ext.training.interface.own_optimizer import OwnOptimizer

Batch = dict[str, torch.Tensor]
"""The tensors of a micro-batch by name: `tokens`, `labels`, `position_ids` [b, s] integer, `loss_mask` [b, s] float,
and fields that model families add.
"""

PRECEDING_TOKENS = "preceding_tokens"
"""Name of a batch field in generation with a KV cache: the tokens [b, n] that precede those of the current pass."""


@dataclass(frozen=True, kw_only=True)
class Message:
    """A text that a model family reports after a step."""

    text: str
    """One line to print; if `tag` is set, a Markdown text for TensorBoard instead."""

    tag: str | None = None
    """TensorBoard tag of the text; None to print the text."""


class Family:
    """A model family's part in a run; subclasses override what they need."""

    name: str
    """Short name of the model family and of its `Extension`."""

    is_frozen: bool = False
    """Whether all of the model family's parameters are frozen in this run; set by the code that builds the run."""

    statistics_interval: int | None = None
    """Number of steps between two calls of `statistics`; None never calls it."""

    charts: tuple[ScalarChart, ...] = ()
    """The charts of all values that the model family may log."""

    free_on_resume: frozenset[str] = frozenset()
    """Keys of `configuration` that may differ between a checkpoint and the run that loads it, such as dropout."""

    def extension(self) -> Extension:
        """Returns the model family's contribution to the model."""
        raise TypeError(f"{type(self).__name__} must implement extension()")

    def check(self, model: ModelConfig, parallel: ParallelConfig) -> None:
        """Checks that the model family supports the model and its parallel layout; called before anything is built.

        Raises:
            ValueError: the model family does not support them.
        """

    def configuration(self) -> dict[str, Any]:
        """Returns the settings from which the model family is rebuilt when a checkpoint is loaded, as JSON values."""
        return {}

    def dataset_options(self) -> dict[str, Any]:
        """Returns keyword arguments for `gpt_dataset.build_datasets` that specify the model family's own data files."""
        return {}

    def cost(self, model: ModelConfig) -> ModelCost | None:
        """Returns the parameters and FLOPs that the model family adds to `model`; None if it adds none."""
        return None

    def size_flags(self) -> str:
        """Returns the flags, with their values, that make the model family's part of a model large; "" if none does."""
        return ""

    def step_work(self, model: ModelConfig, iteration: int) -> StepWork | None:
        """Describes the parts of the model that a training step runs and trains; None if all parts.

        Args:
            model: configuration of the base model.
            iteration: number of the step, from 1. The method is called when the step has been queued; before the run it
                is called with the number of the last step.
        """
        return None

    def activations(self, layout: ParallelLayout, iteration: int) -> FamilyActivations | None:
        """Returns the activation memory that the model family adds to a training step; None if it adds none.

        Args:
            layout: the run's sizes and parallel layout; its `work` is that of all model families together.
            iteration: number of the step, from 1.
        """
        return None

    def prepare_model(self, chunks: list[GPTModel]) -> None:
        """Called once, after the model is built and before it is wrapped; the place to freeze parameters."""

    def make_batch(self, batch: Batch) -> Batch:
        """Changes a micro-batch of the dataset before anything else reads it, in training and evaluation.

        Called before the batch is moved to the device. At most one model family of a run may change tokens or labels.
        """
        return batch

    def sequence_fields(self, batch: Batch) -> Batch:
        """Returns fields [b, s] that depend on several tokens of a sequence, to be added to a micro-batch.

        Called after `make_batch` of every model family, with whole sequences: context-parallel ranks take their parts
        afterwards.
        """
        return {}

    def auxiliary_inputs(self, batch: Batch) -> dict[str, torch.Tensor]:
        """Computes the model family's additional inputs from a micro-batch on the device; called on every stage."""
        return {}

    def parameter_overrides(self, settings: OptimizerSettings) -> dict[ParamKey, ParamGroupOverride]:
        """Returns overrides of learning rate and weight decay for the model family's parameters.

        Args:
            settings: the run's optimizer settings, to which overrides may be relative.
        """
        return {}

    def own_optimizers(
        self, chunks: list[GPTModel], settings: OptimizerSettings, engine: MegatronOptimizer
    ) -> list[OwnOptimizer]:
        """Returns optimizers for parameters that the engine does not train because they do not require gradients.

        Args:
            chunks: this rank's model chunks, unwrapped.
            settings: the run's optimizer settings.
            engine: the engine's optimizer, to which the result is chained.
        """
        return []

    def output_loss(self) -> OutputLoss | None:
        """Returns the training loss on the model's output; None for cross-entropy. Called before every step.

        At most one model family of a run may override this. Evaluations use `evaluation_loss`.
        """
        return None

    def evaluation_loss(self) -> OutputLoss | None:
        """Returns the loss for evaluations; None for cross-entropy.

        Its names must include `lm loss`, in nats per token, and it must implement `OutputLoss.of_tokens`.
        """
        return None

    def begin_step(self, chunks: list[GPTModel], iteration: int | None) -> None:
        """Called before each training step with its number, from 1, and before each evaluation with None."""

    def prepare_batches(
        self, chunks: list[GPTModel], families: list["Family"], batches: list[Batch]
    ) -> Iterable[Batch]:
        """Adds fields to a training step's micro-batches on the device, for example a teacher's hidden states.

        Args:
            chunks: this rank's model chunks, unwrapped.
            families: all model families of the run.
            batches: the micro-batches of the step.

        Returns:
            The same number of micro-batches. Without pipeline parallelism they may be computed lazily, one at a time.
        """
        return batches

    def trains_apart(self) -> bool:
        """Returns whether `backward` computes this step's gradients, without a pass through the whole model.

        Called before every step. At most one model family of a run may return True; then no output loss is computed.
        """
        return False

    def backward(self, chunks: list[GPTModel], batch: Batch) -> None:
        """Computes the losses of a micro-batch from `prepare_batches`, and adds their gradients to those of the step.

        Called only if `trains_apart` returned True for this step.
        """
        raise TypeError(
            f"{type(self).__name__} overrides trains_apart but not backward; it must override both"
        )

    def evaluation(
        self, chunks: list[GPTModel], split: str, loss: float, evaluate: Callable[[], float]
    ) -> dict[str, float]:
        """Returns further values of an evaluation, by name; a name without `/` is reported as a loss. Collective.

        Args:
            chunks: this rank's model chunks, unwrapped.
            split: `validation` or `test`; a split's batches are the same in every evaluation.
            loss: the mean cross-entropy of this evaluation, in nats per token.
            evaluate: recomputes the mean cross-entropy on the same batches with the model's current state.
        """
        return {}

    def summary(self, iteration: int, values: Mapping[str, float]) -> dict[str, float]:
        """Returns additional values of a training step by name, computed from its losses and its layers' values.

        The values must be equal on every rank. A value whose name has no `/` is shown in the progress line. The host
        may read a step's values during the next step, so the result must not depend on the model family's state.

        Args:
            iteration: number of the step, from 1.
            values: the step's losses and its layers' values, by name.
        """
        return {}

    def needs_values(self, iteration: int) -> bool:
        """Returns whether `after_step` must be called before the next step starts, which makes the host wait.

        Otherwise `after_step` is called while the device computes the next step. The result must be equal on every
        rank.
        """
        return False

    def after_step(
        self, chunks: list[GPTModel], families: list["Family"], iteration: int, values: Mapping[str, float]
    ) -> list[Message]:
        """Called after a training step. Collective; rank 0's messages are logged.

        Args:
            chunks: this rank's model chunks, unwrapped.
            families: all model families of the run.
            iteration: number of the step, from 1.
            values: the step's losses and its layers' values, by name; equal on every rank.
        """
        return []

    def is_complete(self) -> bool:
        """Returns whether the run should end now, although steps are left; must be equal on every rank.

        The run then ends as after its last step, with the final save and evaluation.
        """
        return False

    def begin_statistics(self, chunks: list[GPTModel]) -> None:
        """Called before a step whose statistics are due; the model family's modules should start recording."""

    def statistics(self, chunks: list[GPTModel]) -> dict[str, float]:
        """Returns statistics by TensorBoard tag. Collective; called before the update.

        Only rank 0's result is used. Norms must be global over tensor-parallel ranks and pipeline stages.
        """
        return {}

    def check_plain(self, *, as_adapters: bool) -> None:
        """Checks that the model can be exported by `merge`, or by `write_adapters`; called before weights are loaded.

        Args:
            as_adapters: whether `write_adapters` will be used instead of `merge`.

        Raises:
            ValueError: the model family does not support this export.
        """
        raise ValueError(
            f"the model family '{self.name}' cannot be exported with --merge-adapters or --adapter-dir, because its "
            "layers can become neither plain layers nor adapters"
        )

    def merge(self, chunks: list[GPTModel]) -> list[str]:
        """Converts a loaded model to a base model that computes the same function; returns messages for the user."""
        raise TypeError(f"{type(self).__name__} overrides check_plain but not merge; it must override both")

    def write_adapters(
        self, chunks: list[GPTModel], model: ModelConfig, directory: Path, base_model: str, *, overwrite: bool
    ) -> list[str]:
        """Writes the model family's adapters in the format of `peft`; returns messages for the user. Collective.

        Args:
            chunks: this rank's model chunks, unwrapped.
            model: configuration of the base model.
            directory: the directory of the export; each adapter is written to its own subdirectory.
            base_model: path or name of the exported base model, stored in the adapters' configuration.
            overwrite: whether to replace existing files.
        """
        raise TypeError(
            f"{type(self).__name__} overrides check_plain but not write_adapters; it must override both"
        )

    def write_files(self, chunks: list[GPTModel], folder: Path, state: dict[str, Any]) -> None:
        """Writes the model family's own files into a checkpoint; the checkpoint's manifest covers them. Collective.

        Only rank 0 writes to disk; the other ranks take part in gathering the tensors.

        Args:
            chunks: this rank's model chunks, unwrapped.
            folder: the checkpoint's directory while it is being written.
            state: content of the checkpoint's state.json (`progress`, `scheduler`, `optimizer_step`, ...), and under
                the key `run_config` the run's configuration.
        """

    def state_dict(self) -> dict[str, Any]:
        """Returns the model family's state other than model parameters, to be saved as JSON values."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores the result of `state_dict`."""


def auxiliary_inputs(families: Iterable[Family], batch: Batch) -> dict[str, torch.Tensor]:
    """Returns the auxiliary inputs of all model families."""
    return {name: value for family in families for name, value in family.auxiliary_inputs(batch).items()}


def make_batch(families: Iterable[Family], batch: Batch) -> Batch:
    """Applies every model family's `make_batch` to a micro-batch, then adds their `sequence_fields`."""
    families = list(families)
    for family in families:
        batch = family.make_batch(batch)
    return batch | {
        name: value for family in families for name, value in family.sequence_fields(batch).items()
    }

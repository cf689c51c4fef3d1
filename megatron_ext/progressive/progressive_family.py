"""The model family of progressive training: grows the model from a checkpoint, freezes layers, applies the objective.

Each phase of progressive training is one run. It trains the newest stack on the trunk (the older stacks), or the whole
rack (all stacks). A run builds the model with all layers of the phase, loads the trunk from the last checkpoint of
the previous phase, freezes the parts that the phase does not train, and trains.
"""

import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from megatron.core.optimizer import MegatronOptimizer

from megatron_ext.config.groups.model_config import ModelConfig
from megatron_ext.config.serialize import group_in, group_to_dict
from megatron_ext.interop.peft_export import write_adapters
from megatron_ext.lora.adapter_cost import adapted_activations
from megatron_ext.lora.trainable_layers import merge_adapters, prepare_layers, weight_bytes
from megatron_ext.models.costs.activation_memory import FamilyActivations, ParallelLayout
from megatron_ext.models.costs.model_cost import ModelCost
from megatron_ext.models.costs.step_work import StepWork
from megatron_ext.models.gpt_model import HIDDEN_STATES, GPTModel
from megatron_ext.models.initialization import initialize_parameters
from megatron_ext.platform.collectives import gather_or_raise
from megatron_ext.progressive import rack_export
from megatron_ext.progressive.cache.activation_cache import ActivationCache
from megatron_ext.progressive.cache.frozen_trunk import without_dropout
from megatron_ext.progressive.growth import grown_weights as growth
from megatron_ext.progressive.growth.plateau import Plateau
from megatron_ext.progressive.growth.rack import Rack
from megatron_ext.progressive.growth.trunk_strategy import (
    Trains,
    frozen_below,
    settings_after_training,
    settings_by_layer,
)
from megatron_ext.progressive.objectives.stack_objective import StackObjective
from megatron_ext.progressive.objectives.time_steps import TIME_STEP
from megatron_ext.progressive.progressive_charts import PROGRESSIVE_CHARTS
from megatron_ext.progressive.progressive_cost import progressive_cost, progressive_work
from megatron_ext.progressive.progressive_extension import ProgressiveExtension
from megatron_ext.progressive.settings.progressive_config import ProgressiveConfig
from megatron_ext.training.checkpoint.parameter_count import count_parameters
from megatron_ext.training.interface.family_interface import Batch, Family, Message
from megatron_ext.training.interface.output_losses import OutputLoss


@dataclass(frozen=True, kw_only=True)
class Trunk:
    """The checkpoint from which a model grows, made by the previous phase."""

    folder: Path
    """Directory of the checkpoint."""

    rack: Rack
    """The stacks of the model in the checkpoint."""

    trains: Trains
    """The part of the model that was trained in the phase that wrote the checkpoint."""


class ProgressiveFamily(Family):
    """Progressive growth as a model family: grows the model of one phase, and freezes the parts that are not
    trained.
    """

    name = "progressive"

    charts = PROGRESSIVE_CHARTS

    free_on_resume = frozenset(
        {
            *("enabled", "target_stacks", "max_stacks", "n_blocks", "building_mode", "new_stack_precision"),
            *("growth_init", "stack_steps", "stack_tokens", "joint_steps", "joint_lr", "qlora_configs"),
            *("plateau_patience", "plateau_min_delta", "cache_activations", "cache_dir", "cache_max_gb"),
        }
    )

    def __init__(
        self,
        config: ProgressiveConfig,
        rack: Rack,
        trains: Trains = "none",
        *,
        trunk: Trunk | None = None,
        mask_token_id: int | None = None,
        cache_identity: Mapping[str, Any] | None = None,
        frozen: dict[int, str] | None = None,
        seed: int = 0,
        tokens_in: Callable[[int], int] = lambda steps: 0,
        statistics_interval: int | None = None,
    ) -> None:
        """Args:
        config: the configuration of progressive training.
        rack: all stacks of the model.
        trains: the part of the model that the phase trains.
        trunk: the checkpoint from which the model grows; None for a new model, or for one that is loaded unchanged.
        mask_token_id: id of the mask token, from `stack_objective.reserve_mask_token`; None if no tokens are masked.
        cache_identity: values that distinguish the caches of different runs; None for no activation cache.
        frozen: maps the index of a stack to `frozen` (nothing trains) or `qlora` (only adapters train); overrides the
            trunk strategy for these stacks.
        seed: the run's seed.
        tokens_in: returns the number of tokens that the run has consumed after a given number of steps, for the log.
        statistics_interval: number of steps between two records of the statistics; None for no record.
        """
        self.config = config
        self.rack = rack
        self.trains = trains
        self.trunk = trunk
        self.seed = seed
        self.tokens_in = tokens_in
        self.statistics_interval = statistics_interval
        self.plan = settings_by_layer(rack, config, trains, frozen)
        self.losses: list[float] = []
        """Losses of the steps that this process has run."""

        self.plateau = Plateau(config.plateau_patience, config.plateau_min_delta)
        self.earlier_steps: dict[str, int] = {}
        """Number of updates in earlier phases of each parameter that keeps its optimizer state, by global name."""

        self.parameters: dict[str, int] = {}
        """Maps `trainable` and `frozen` to the number of such parameters of the whole model."""

        self.mask_token_id = mask_token_id
        moves = "qlora" in (frozen or {}).values()
        self.trunk_layers = 0 if moves else frozen_below(rack, config, trains)
        caches = config.cache_activations and self.trunk_layers > 0
        self.cache: ActivationCache | None = None
        if cache_identity is not None and caches:
            self.cache = ActivationCache(config, trunk_layers=self.trunk_layers, identity=cache_identity)
        self.objective: StackObjective | None = None
        if mask_token_id is not None or not config.masks_tokens:
            self.objective = StackObjective(
                config,
                stack_idx=rack.newest.index,
                seed=seed,
                mask_token_id=mask_token_id,
                fixed_masks=caches,
            )

    @classmethod
    def from_configuration(cls, configuration: dict[str, Any]) -> "ProgressiveFamily":
        """Rebuilds the model family from the result of `configuration()`, for inference."""
        config = group_in(ProgressiveConfig, configuration, "settings")
        family = cls(config, Rack.from_json(configuration["rack"]), mask_token_id=configuration["mask_token"])
        family.plan = settings_after_training(family.rack, config, configuration["trains"])
        return family

    def configuration(self) -> dict[str, Any]:
        """Returns the rack (the list of stacks), the trained part, the mask token and all settings, as JSON values."""
        return {
            "rack": self.rack.as_json(),
            "trains": self.trains,
            "mask_token": self.mask_token_id,
            "settings": group_to_dict(self.config),
        }

    def extension(self) -> ProgressiveExtension:
        """Returns the parts that progressive training adds to the model."""
        return ProgressiveExtension(self.plan, self.config)

    def cost(self, model: ModelConfig) -> ModelCost:
        """Returns the parameters and FLOPs that adapters and time embedding add to `model`."""
        return progressive_cost(self.plan, self.config, model)

    def step_work(self, model: ModelConfig, iteration: int) -> StepWork:
        """Describes the parts of the model that a step runs and trains.

        The trunk is not counted if the activation cache supplied its output for all micro-batches of the last step.
        """
        spared = self.cache is not None and self.cache.was_skipped
        return progressive_work(
            self.plan,
            self.config,
            model,
            trains_embedding=self.trains_embedding,
            cached_layers=self.trunk_layers if spared else 0,
        )

    def activations(self, layout: ParallelLayout, iteration: int) -> FamilyActivations:
        """Returns the bytes that adapters and precisions add to the activations of a step."""
        return adapted_activations(self.plan, layout)

    def prepare_model(self, chunks: list[GPTModel]) -> None:
        """Loads the trunk, initializes the new stack, and freezes the parts that the phase does not train."""
        if self.trunk is not None:
            self._grow(chunks, self.trunk)
        prepare_layers(chunks, self.plan)
        if not self.trains_embedding:
            for chunk in chunks:
                for module in (getattr(chunk, name, None) for name in ("embedding", self.name)):
                    if chunk.stage.is_first and module is not None:
                        module.requires_grad_(False)
        if self.trunk is not None:
            self.earlier_steps = growth.parameters_with_state(
                chunks, self.trunk.folder, self._sources(self.trunk)
            )
        self.parameters = count_parameters(chunks)

    @property
    def trains_embedding(self) -> bool:
        """Whether the embeddings are trained: in the first phase, in the joint phase, and if the flags require it."""
        asked = self.config.train_embedding or self.config.trunk_strategy == "trained"
        return self.trains == "all" or len(self.rack.stacks) == 1 or asked

    def carry_optimizer_state(self, chunks: list[GPTModel], optimizer: MegatronOptimizer) -> None:
        """Copies the trunk's optimizer state into a new run's optimizer; called by `RunOptions.begin`."""
        if self.trunk is not None:
            growth.carry_optimizer_state(chunks, optimizer, self.trunk.folder, self._sources(self.trunk))

    def make_batch(self, batch: Batch) -> Batch:
        """Turns a micro-batch into inputs, labels and loss weights of the training objective."""
        return batch if self.objective is None else self.objective.make_batch(batch)

    def auxiliary_inputs(self, batch: Batch) -> dict[str, torch.Tensor]:
        """Returns the time steps and the trunk's output, if the micro-batch has them."""
        wanted = [HIDDEN_STATES, *([TIME_STEP] if self.config.embeds_time else [])]
        return {name: batch[name] for name in wanted if name in batch}

    def begin_step(self, chunks: list[GPTModel], iteration: int | None) -> None:
        """Before an evaluation, makes the model run all layers instead of using the cache."""
        if self.cache is not None and iteration is None:
            self.cache.release(chunks)

    def prepare_batches(
        self, chunks: list[GPTModel], families: list[Family], batches: list[Batch]
    ) -> Iterable[Batch]:
        """Adds the trunk's output to the micro-batches, from the cache or from a forward pass of the trunk."""
        if self.cache is not None:
            return self.cache.prepare(chunks, families, batches)
        if self.trunk_layers:
            # Turn off dropout in a frozen trunk, so that runs with and without the cache give equal values.
            without_dropout(chunks, self.trunk_layers)
        return batches

    def close(self) -> None:
        """Closes the files of the activation cache."""
        if self.cache is not None:
            self.cache.close()

    def evaluation_loss(self) -> OutputLoss | None:
        """Returns the loss that also measures the accuracy on masked tokens, if the objective masks tokens."""
        return None if self.objective is None else self.objective.evaluation_loss()

    def check_plain(self, *, as_adapters: bool) -> None:
        """Checks that the rack can be exported; see `rack_export.check_plain`."""
        rack_export.check_plain(self.config, self.plan, as_adapters=as_adapters)

    def merge(self, chunks: list[GPTModel]) -> list[str]:
        """Adds all adapters to their base weights; returns messages about the stacks' precision."""
        merge_adapters(chunks)
        return rack_export.precision_notes(self.rack, self.plan)

    def write_adapters(
        self, chunks: list[GPTModel], model: ModelConfig, directory: Path, base_model: str, *, overwrite: bool
    ) -> list[str]:
        """Writes each adapter to its own directory in the format of `peft`."""
        written = write_adapters(chunks, model, directory, base_model, overwrite=overwrite)
        return [*written, *rack_export.precision_notes(self.rack, self.plan)]

    def summary(self, iteration: int, values: Mapping[str, float]) -> dict[str, float]:
        """Returns the loss under a name that contains the stack, and the number of tokens so far."""
        name = "joint" if self.trains == "all" else f"stack_{self.rack.newest.index}"
        found = {"progressive/total_tokens": float(self.tokens_in(iteration))}
        if "lm loss" in values:
            found[f"progressive/loss_{name}"] = values["lm loss"]
        return found

    def needs_values(self, iteration: int) -> bool:
        """Returns whether the plateau detection needs the loss of this step."""
        return self.plateau.patience is not None

    def after_step(
        self, chunks: list[GPTModel], families: list[Family], iteration: int, values: Mapping[str, float]
    ) -> list[Message]:
        """Returns a message if the loss has reached a plateau."""
        self.losses.append(values["lm loss"])
        was_reached = self.plateau.is_reached
        self.plateau.add(values["lm loss"])
        if self.plateau.is_reached and not was_reached:
            config = self.config
            text = (
                f"plateau at step {iteration}: the mean loss of the last {config.plateau_patience} steps is not "
                f"{config.plateau_min_delta:g} lower than the mean loss of the {config.plateau_patience} steps before"
            )
            return [Message(text=text)]
        return []

    def is_complete(self) -> bool:
        """Returns whether the loss has reached a plateau, which ends the phase."""
        return self.plateau.is_reached

    def statistics(self, chunks: list[GPTModel]) -> dict[str, float]:
        """Returns the numbers of trained parameters, frozen parameters and stacks; the cache's hit rate and size."""
        counts = {f"progressive/{name}_parameters": float(n) for name, n in self.parameters.items()}
        cached = self.cache.values() if self.cache is not None else {}
        return {**counts, **cached, "progressive/stacks": float(len(self.rack.stacks))}

    def state_dict(self) -> dict[str, Any]:
        """Returns the state of the plateau detection, and each parameter's number of updates in earlier phases."""
        return {"plateau": self.plateau.state_dict(), "earlier_steps": self.earlier_steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores the state of the plateau detection; the numbers of updates are read from the trunk's checkpoint."""
        self.plateau.load_state_dict(state["plateau"])

    def _sources(self, trunk: Trunk) -> dict[int, int]:
        return self.rack.layers_of_other(trunk.rack)

    def _grow(self, chunks: list[GPTModel], trunk: Trunk) -> None:
        is_new = len(trunk.rack.stacks) < len(self.rack.stacks)
        if is_new:
            config = chunks[0].config
            seed = stack_seed(self.seed, self.rack.newest.index)
            for chunk in chunks:
                initialize_parameters(chunk, seed, config.init_method_std, config.num_layers)
        growth.read_trunk(chunks, trunk.folder, self._sources(trunk))
        if is_new:
            plan = settings_by_layer(trunk.rack, self.config, trunk.trains)
            growth.start_new_layers(
                chunks, trunk.folder, self.rack, trunk.rack, plan, self.config.growth_init
            )


def stack_seed(seed: int, index: int) -> int:
    """Returns the seed of a stack's initial weights."""
    # Initial values depend on the seed and the parameter's name. With `prepend`, the layers of every new stack get
    # the same numbers and therefore the same names, so each stack needs its own seed.
    digest = hashlib.sha256(f"{seed}:stack {index}".encode()).digest()
    return int.from_bytes(digest[:6], "little")


def stack_bytes(chunks: list[GPTModel], rack: Rack) -> dict[int, int]:
    """Returns the bytes of each stack's weights, by index, on the rank where the stack is largest. Collective."""
    own = weight_bytes(chunks)
    local = {stack.index: sum(own.get(layer, 0) for layer in layers) for stack, layers in rack.layers()}
    found = gather_or_raise(lambda: local)
    return {index: max(part[index] for part in found) for index in local}

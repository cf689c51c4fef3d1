"""The model family NPT: its additions to the model, the frozen base, its cost, and the losses of each step.

Without a training configuration, as in tools that evaluate or generate, `NPTFamily` only extends the model.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from megatron_ext.config.command_line.flag_text import argument_text
from megatron_ext.config.groups.model.layer_shapes import refuse_layer_sizes
from megatron_ext.config.groups.model_config import ModelConfig
from megatron_ext.config.groups.parallel_config import ParallelConfig
from megatron_ext.config.serialize import group_in, group_to_dict
from megatron_ext.data.tokenizers import Tokenizer
from megatron_ext.models.base_parameters import base_parameters
from megatron_ext.models.costs.activation_memory import FamilyActivations, ParallelLayout
from megatron_ext.models.costs.model_cost import ModelCost
from megatron_ext.models.costs.step_work import StepWork, Use
from megatron_ext.models.gpt_model import GPTModel
from megatron_ext.npt.evaluation.training_samples import paired_sample
from megatron_ext.npt.modules.npt_extension import NPTExtension
from megatron_ext.npt.modules.npt_layers import deactivated, np_modules
from megatron_ext.npt.modules.npt_module_config import NPTModuleConfig
from megatron_ext.npt.modules.teacher_inputs import TEACHER
from megatron_ext.npt.npt_activations import npt_activations
from megatron_ext.npt.npt_cost import npt_cost, npt_work
from megatron_ext.npt.objective.fidelity_loss import NPTOutputLoss
from megatron_ext.npt.objective.layer_losses import LayerStepLosses
from megatron_ext.npt.objective.layer_parallel import train_layers
from megatron_ext.npt.objective.npt_charts import NPT_CHARTS
from megatron_ext.npt.objective.npt_monitoring import CollapseWatch, summarize
from megatron_ext.npt.objective.npt_training_config import NPTTrainingConfig
from megatron_ext.npt.objective.step_objective import PLAIN_LM, StepObjective
from megatron_ext.npt.objective.teacher import Teacher, Wanted
from megatron_ext.npt.weights.state_files import multi_layer_state, write_state_files
from megatron_ext.training.interface.family_interface import Batch, Family, Message
from megatron_ext.training.interface.output_losses import OutputLoss


class NPTFamily(Family):
    """NPT as a model family: adds NP components to the model, and the losses that train them."""

    name = "npt"

    charts = NPT_CHARTS

    free_on_resume = frozenset({"np_init_scale", "np_init_strategy"})

    def __init__(
        self,
        settings: NPTModuleConfig,
        training: NPTTrainingConfig | None = None,
        *,
        total_steps: int = 0,
        trains: tuple[int, ...] | None = None,
        tokenizer: Tokenizer | None = None,
    ) -> None:
        """Args:
        settings: configuration of the NP components.
        training: configuration of losses, curriculum and teacher; None outside training.
        total_steps: number of steps of the run, over which the curriculum is spread.
        trains: indices of the NPT layers to train, from 0; the other NPT layers are frozen. None for all.
        tokenizer: the run's tokenizer, for generated text samples.
        """
        self.settings = settings
        self.training = training
        self.total_steps = total_steps
        self.trains = trains
        self.tokenizer = tokenizer
        self.watch = CollapseWatch()
        if training is not None and training.allow_layer_mismatch:
            self.free_on_resume |= {"npt_layers"}
        self.teacher = Teacher(int(training.teacher_cache_gb * 2**30) if training is not None else 0)
        self._objective: StepObjective | None = None
        self._records = False
        self._base_losses: dict[str, float] = {}

    @classmethod
    def from_configuration(cls, configuration: dict[str, Any]) -> "NPTFamily":
        """Rebuilds the model family from the result of `configuration()`."""
        return cls(group_in(NPTModuleConfig, configuration, "settings"))

    def configuration(self) -> dict[str, Any]:
        """Returns NPT's settings as JSON values."""
        return {"settings": group_to_dict(self.settings)}

    def extension(self) -> NPTExtension:
        """Returns NPT's extension of the model: NP components in the chosen layers."""
        return NPTExtension(self.settings)

    def check(self, model: ModelConfig, parallel: ParallelConfig) -> None:
        """Raises `ValueError` if the model's MLP does not fit the settings, or if NPT does not support the model.

        Not supported are layers of different sizes, and outputs that are changed before they are added.
        """
        self.settings.check_model(model.is_gated, model.changes_outputs)
        refuse_layer_sizes(model, "the model family npt")

    def cost(self, model: ModelConfig) -> ModelCost:
        """Returns the parameters and FLOPs that NPT adds to `model`."""
        return npt_cost(self.settings, model)

    def step_work(self, model: ModelConfig, iteration: int) -> StepWork:
        """Describes the parts of the model that a step runs and trains; omits the teacher's pass if the cache had its
        states.
        """
        training, layers = self.training, self._trained(model.num_layers)
        objective = PLAIN_LM if training is None else training.objective(iteration, self.total_steps)
        weights = dict.fromkeys(layers, 1.0) if training is None else training.weights_of_layers(layers)
        work = npt_work(self.settings, model, objective, weights)
        if not self.teacher.cache.was_skipped:
            return work
        layers = (Use.SKIPPED,) * len(work.layers) if objective.layer_parallel else work.layers
        return replace(work, layers=layers, further_forwards=0)

    def activations(self, layout: ParallelLayout, iteration: int) -> FamilyActivations:
        """Returns the bytes that NPT adds to the activations of a step."""
        training, layers = self.training, self._trained(layout.model.num_layers)
        objective = PLAIN_LM if training is None else training.objective(iteration, self.total_steps)
        weights = dict.fromkeys(layers, 1.0) if training is None else training.weights_of_layers(layers)
        fidelity = "kl" if training is None else training.fidelity_loss
        return npt_activations(self.settings, layout, objective, weights, fidelity)

    def prepare_model(self, chunks: list[GPTModel]) -> None:
        """Freezes the NPT layers that do not train and, unless `--no-freeze-base` is given, the base model."""
        if self.settings.freeze_base:
            for chunk in chunks:
                for parameter in base_parameters(chunk):
                    parameter.requires_grad_(False)
        for number, module in np_modules(chunks).items():
            if self.trains is not None and number not in self.trains:
                module.requires_grad_(False)

    def begin_step(self, chunks: list[GPTModel], iteration: int | None) -> None:
        """Sets the inputs and losses of the NPT layers for this step; in an evaluation, the layers have no losses."""
        training = self.training
        self._objective = None
        for module in np_modules(chunks).values():
            module.step = None
        if training is None or iteration is None:
            return
        if training.begins_cache(iteration):
            self.teacher.cache.clear()
        self._objective = objective = training.objective(iteration, self.total_steps)
        self._records = iteration % training.npt_log_interval == 0
        weights = training.loss_weights(self._trained(chunks[0].config.num_layers))
        for chunk in chunks:
            modules = np_modules([chunk])
            for place, (number, module) in enumerate(modules.items()):
                if number in weights:
                    module.step = self._layer_step(objective, weights[number], (place, len(modules)))

    def output_loss(self) -> OutputLoss | None:
        """Returns the loss of the model's output in this step: weighted cross-entropy and fidelity."""
        if self._objective is None or self.training is None:
            return None
        return NPTOutputLoss(self._objective.lm, self._objective.fidelity, self.training.fidelity_loss)

    def prepare_batches(
        self, chunks: list[GPTModel], families: list[Family], batches: list[Batch]
    ) -> Iterable[Batch]:
        """Runs the teacher if the step needs it, and adds the teacher's hidden states to the micro-batches."""
        objective = self._objective
        if objective is None:
            return batches
        if not objective.reads_teacher:
            return batches
        num_layers = chunks[0].config.num_layers
        if objective.layer_parallel:
            assert self.training is not None
            # Round the states as in the cache: a resumed run computes them again, and all passes must see equal
            # values.
            dtype = torch.bfloat16 if self.training.teacher_cache_steps else None
            wanted = Wanted(layers=self._trained(num_layers), mlps=True, dtype=dtype)
        else:
            layers = self.settings.layers(num_layers) if objective.stage.blends else ()
            wanted = Wanted(layers=layers, output=objective.fidelity > 0)
        return self.teacher.add_states(chunks, families, batches, wanted)

    def trains_apart(self) -> bool:
        """Returns whether the step is layer-parallel."""
        return self._objective is not None and self._objective.layer_parallel

    def backward(self, chunks: list[GPTModel], batch: Batch) -> None:
        """Trains every layer separately, on the teacher's states in the micro-batch."""
        train_layers(chunks, batch)

    def auxiliary_inputs(self, batch: Batch) -> dict[str, torch.Tensor]:
        """Returns the teacher's inputs to the NPT layers, if the micro-batch has them."""
        return {name: value for name, value in batch.items() if name.startswith(f"{TEACHER}/layer_")}

    def evaluation(
        self, chunks: list[GPTModel], split: str, loss: float, evaluate: Callable[[], float]
    ) -> dict[str, float]:
        """Returns the base model's loss on the same batches, and the ratio of the two perplexities, NPT / base."""
        if self.training is None or not self.settings.freeze_base:
            return {}
        # A frozen base has the same loss in every evaluation of a split, so compute the loss once.
        if split not in self._base_losses:
            with deactivated(chunks):
                self._base_losses[split] = evaluate()
        base = self._base_losses[split]
        return {"base lm loss": base, "npt/perplexity_ratio": math.exp(loss - base)}

    def summary(self, iteration: int, values: Mapping[str, float]) -> dict[str, float]:
        """Returns the total of all losses, the mean of each layer loss over the layers, and the curriculum's state."""
        if self.training is None:
            return {}
        return summarize(values, self.training.objective(iteration, self.total_steps))

    def needs_values(self, iteration: int) -> bool:
        """Returns whether a text sample must be generated after this step."""
        every = self.training.generation_steps if self.training is not None else None
        return every is not None and every > 0 and iteration % every == 0

    def after_step(
        self, chunks: list[GPTModel], families: list[Family], iteration: int, values: Mapping[str, float]
    ) -> list[Message]:
        """Returns warnings about layers whose v_a or v_b has vanished, and generated text samples."""
        messages = [Message(text=line) for line in self.watch.look(values)]
        training = self.training
        every = training.generation_steps if training is not None else None
        if training is not None and every and iteration % every == 0 and self.tokenizer is not None:
            self.begin_step(chunks, None)
            prompt = argument_text("--generation-prompt", training.generation_prompt)
            text = paired_sample(chunks[0], families, self.tokenizer, prompt)
            messages.append(Message(text=text, tag="samples"))
        return messages

    def write_files(self, chunks: list[GPTModel], folder: Path, state: dict[str, Any]) -> None:
        """Writes the files described in docs/design/npt_curriculum.md into a training run's checkpoint."""
        if self.training is None:
            return
        weights = self.training.weights_of_layers(self._trained(chunks[0].config.num_layers))
        stages = self.training.stages(self.total_steps)
        multi_layer = multi_layer_state(weights, stages, self.teacher.cache, state["progress"]["iteration"])
        write_state_files(folder, chunks, self.settings, state, multi_layer)

    def state_dict(self) -> dict[str, Any]:
        """Returns the state of `CollapseWatch`."""
        return {"watch": self.watch.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores the result of `state_dict`."""
        if "watch" in state:
            self.watch.load_state_dict(state["watch"])

    def _trained(self, num_layers: int) -> tuple[int, ...]:
        return self.settings.layers(num_layers) if self.trains is None else self.trains

    def _layer_step(self, objective: StepObjective, weight: float, place: tuple[int, int]) -> LayerStepLosses:
        layer = objective.layer
        return LayerStepLosses(
            weights=replace(
                layer,
                direct_mlp=weight * layer.direct_mlp,
                equivalence=weight * layer.equivalence,
                reconstruction=weight * layer.reconstruction,
                regularization=weight * layer.regularization,
            ),
            attention_share=objective.stage.attention_share,
            mlp_share=objective.stage.mlp_share,
            place=place,
            records=self._records,
        )

"""How NP components are trained: the mode, its losses and their weights, curriculum, teacher, samples.

Where a value is left out, the mode decides:

    mode            losses (weights)                                         curriculum       NP components
    equivalence     equivalence 1, regularization 0.01                       student          document 002's
    single_layer    stage 1: reconstruction 1; then direct MLP 10,           student          documents 000's and 001's:
                    fidelity 1, regularization 0.01                                           outer_product, rank 256
    sequential      as single_layer, for one layer after the other           student          as single_layer
    multi_layer     direct MLP 10, fidelity 1, regularization 0.01           teacher, mixed,  as single_layer
                                                                             student
    lm              cross-entropy 1                                          student          document 002's

Source: documents 000 (single_layer, sequential), 001 (multi_layer), 002 (equivalence).
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from megatron_ext.config.command_line.field_checks import check_at_least, check_at_most, check_choices, flag
from megatron_ext.config.command_line.merge import Found
from megatron_ext.npt.modules.npt_module_config import NPTModuleConfig
from megatron_ext.npt.objective.curriculum import (
    STUDENT,
    Stage,
    parse_curriculum,
    proportional_curriculum,
    stage_index,
)
from megatron_ext.npt.objective.step_objective import LayerWeights, StepObjective

Mode = Literal["equivalence", "single_layer", "sequential", "multi_layer", "lm"]

_EQUIVALENCE = {"equivalence_weight": 1.0, "regularization_weight": 0.01}
_DIRECT = {"direct_mlp_weight": 10.0, "fidelity_weight": 1.0, "regularization_weight": 0.01}
_WEIGHTS: dict[str, dict[str, float]] = {
    "equivalence": _EQUIVALENCE,
    "single_layer": _DIRECT,
    "sequential": _DIRECT,
    "multi_layer": _DIRECT,
    "lm": {"lm_weight": 1.0},
}

MODULE_DEFAULTS: dict[str, dict[str, Any]] = {
    mode: {"np_form": "outer_product", "np_rank": 256}
    if mode in ("single_layer", "sequential", "multi_layer")
    else {}
    for mode in _WEIGHTS
}
"""Mode -> fields of `NPTModuleConfig` that have another default in it."""

STEPS_PER_LAYER = 2000
"""Document 000's steps of a layer."""


@dataclass(frozen=True, kw_only=True)
class NPTTrainingConfig:
    """What NP components are trained for, and with what input."""

    mode: Mode = "equivalence"
    """The training system: equivalence (document 002), single_layer and sequential (000), multi_layer (001), lm."""

    base_checkpoint: Annotated[str | None, flag(aliases=("--base_model_name", "--model_name"))] = None
    """Checkpoint of the base model to convert, as tools/convert_checkpoint.py or a training run writes it. --load may
    name it too; this flag is for runs that --load continues."""

    load_npt_weights: str | None = None
    """NP weights to start with (npt_weights.pt or .safetensors): exactly those of the run's layers. In single_layer
    those of other layers too: these are then active and frozen, and the layer that is trained starts anew. Form, rank,
    target, ... that are not given, and the layers but in single_layer, are those that made the file."""

    allow_layer_mismatch: bool = False
    """On --load RUN with other --npt-layers than the run's: take the NP weights of the layers that both have, with a
    warning. The step, schedule and curriculum go on; the other layers and the optimizer start anew."""

    additional_steps: int | None = None
    """On --load CHECKPOINT: go on for so many steps after it, with the configuration of its run wherever none is
    given here."""

    dataset_preset: Annotated[str | None, flag(aliases=("--dataset",))] = None
    """Name of a blend of datasets in --dataset-presets-file, as small, medium or large; --data-path wins over it."""

    dataset_presets_file: str = "examples/npt/datasets.yaml"
    """YAML file of named blends."""

    equivalence_weight: float | None = None
    """Weight of the layer-wise equivalence with the base layer on the same input."""

    equivalence_loss: Literal["mse", "cosine"] = "mse"
    """How equivalence is measured."""

    direct_mlp_weight: float | None = None
    """Weight of the direct MLP loss."""

    fidelity_weight: float | None = None
    """Weight of the logits' distance from the base model's."""

    fidelity_loss: Literal["kl", "mse"] = "kl"
    """How fidelity is measured: KL(base || NPT) of the next token, or the logits' mean square error."""

    regularization_weight: float | None = None
    """Weight of the NP factors' size (low_rank) or of what they generate (outer_product)."""

    lm_weight: float | None = None
    """Weight of the cross-entropy."""

    stage1_steps: int = 500
    """single_layer and sequential: first steps of a layer, in which v_a learns to equal the attention output."""

    steps_per_layer: int = STEPS_PER_LAYER
    """sequential: steps of every layer, with a learning-rate schedule of its own."""

    start_from_layer: int | None = None
    """sequential: the first layer to train; those of --npt-layers below it must be trained in --checkpoint-dir."""

    model_size: Literal["1b", "3b", "8b"] | None = None
    """sequential: a label for W&B's run names. The model's size is that of the base checkpoint."""

    layer_weights: str = "uniform"
    """Weights of the layers' losses: uniform, linear (1 for the first NPT layer to 0.5 for the last), or one number a
    layer, as 1,1,0.5."""

    curriculum_stages: str | None = None
    """name:steps[:attn_ratio[:mlp_ratio]],... with teacher, mixed and student. Without it multi_layer shares the run
    among the three as 2:3:4; the other modes are student throughout."""

    teacher_cache_gb: float = 0.0
    """Keep the teacher's states of sequences in the host's memory, up to this size a process; 0 for no cache."""

    generation_steps: int | None = None
    """Steps between two samples of text, written to TensorBoard; without it none."""

    generation_prompt: str = "The "
    """How those samples begin."""

    npt_log_interval: int = 10
    """Steps between two measurements of v_a, v_b and the deltas."""

    def __post_init__(self) -> None:
        check_choices(self)
        check_at_least(self, 0, "start_from_layer", "stage1_steps", "teacher_cache_gb", *_NUMBERS)
        check_at_most(self, 2**20, "teacher_cache_gb")
        check_at_least(self, 1, "steps_per_layer", "generation_steps", "npt_log_interval", "additional_steps")
        if self.curriculum_stages is not None:
            parse_curriculum(self.curriculum_stages)
        if self.layer_weights not in ("uniform", "linear"):
            _numbers(self.layer_weights)

    def weight(self, name: str) -> float:
        """A loss's weight, the mode's default applied."""
        value = getattr(self, name)
        return _WEIGHTS[self.mode].get(name, 0.0) if value is None else value

    @property
    def reconstructs(self) -> bool:
        """True in the modes that begin with stage 1."""
        return self.mode in ("single_layer", "sequential")

    def check_module(self, module: NPTModuleConfig, num_layers: int) -> None:
        """Raises `ValueError` where the losses do not fit the NP components or the layers."""
        layers = module.layers(num_layers)
        if self.reconstructs and self.stage1_steps and module.np_form != "outer_product":
            raise ValueError(
                f"--stage1-steps {self.stage1_steps}: attention reconstruction is defined for --np-form outer_product, "
                f"not {module.np_form}; with 0 there is no stage 1"
            )
        if self.mode == "single_layer" and len(layers) != 1:
            raise ValueError(
                f"--npt-layers {module.npt_layers}: --mode single_layer trains one layer, not {len(layers)}"
            )
        self.weights_of_layers(layers)

    def weights_of_layers(self, layers: tuple[int, ...]) -> dict[int, float]:
        """Layer -> weight of its losses.

        Raises:
            ValueError: `--layer-weights` is of another length.
        """
        if self.layer_weights == "uniform":
            return dict.fromkeys(layers, 1.0)
        if self.layer_weights == "linear":
            last = max(1, len(layers) - 1)
            return {layer: 1.0 - 0.5 * place / last for place, layer in enumerate(layers)}
        numbers = _numbers(self.layer_weights)
        if len(numbers) != len(layers):
            raise ValueError(
                f"--layer-weights {self.layer_weights}: {len(numbers)} numbers for {len(layers)} NPT layers"
            )
        return dict(zip(layers, numbers, strict=True))

    def stages(self, total_steps: int) -> tuple[Stage, ...]:
        """The run's curriculum."""
        if self.curriculum_stages is not None:
            return parse_curriculum(self.curriculum_stages)
        return proportional_curriculum(total_steps) if self.mode == "multi_layer" else (STUDENT,)

    def objective(self, iteration: int, total_steps: int) -> StepObjective:
        """What step `iteration` (from 1) trains."""
        stages = self.stages(total_steps)
        index = stage_index(stages, iteration)
        if self.reconstructs and iteration <= self.stage1_steps:
            return StepObjective(
                layer=LayerWeights(reconstruction=1.0), stage=stages[index], stage_index=index
            )
        return StepObjective(
            layer=LayerWeights(
                direct_mlp=self.weight("direct_mlp_weight"),
                equivalence=self.weight("equivalence_weight"),
                equivalence_loss=self.equivalence_loss,
                regularization=self.weight("regularization_weight"),
            ),
            fidelity=self.weight("fidelity_weight"),
            lm=self.weight("lm_weight"),
            stage=stages[index],
            stage_index=index,
        )


_NUMBERS = tuple(name for name in NPTTrainingConfig.__annotations__ if name.endswith("_weight"))


def mode_defaults(given: Mapping[str, Any]) -> Found:
    """Values that follow from the mode.

    Args:
        given: field's name -> value, of the command line and the YAML file.
    """
    mode = given.get("mode", "equivalence")
    sections = {"np": MODULE_DEFAULTS[mode]}
    if mode == "sequential":
        length = {"train_iters": given.get("steps_per_layer", STEPS_PER_LAYER)}
        folder = f"experiments/sequential_checkpoint_{time.strftime('%Y%m%d_%H%M%S')}"
        sections |= {
            "training": {
                "micro_batch_size": 2,
                **({} if given.keys() & {"train_samples", "num_epochs"} else length),
            },
            "optimizer": {"lr": 5e-4},
            "checkpoint": {"save": folder},
        }
    return Found(f"--mode {mode}", sections)


def _numbers(text: str) -> list[float]:
    try:
        numbers = [float(part) for part in text.split(",")]
    except ValueError:
        numbers = [-1.0]
    if min(numbers) < 0:
        raise ValueError(
            f"--layer-weights {text}: must be uniform, linear, or numbers of at least 0 as 1,1,0.5"
        )
    return numbers

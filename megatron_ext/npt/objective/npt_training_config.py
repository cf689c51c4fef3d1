"""Flags for the training of NP components: mode, losses and their weights, curriculum, teacher, text samples.

The defaults depend on the mode. The last column (defaults of the NP components) is set in `npt_run_config`:

    mode            losses (weights)                                         curriculum       NP components
    equivalence     equivalence 1                                            student          low_rank, rank 16
    single_layer    stage 1: reconstruction 1; then direct MLP 1,            student          outer_product, rank 256
                    fidelity 1
    sequential      as single_layer, for one layer after the other           student          outer_product, rank 256
    multi_layer     direct MLP 1, fidelity 1                                 teacher, mixed,  outer_product, rank 256
                                                                             student
    layer_parallel  direct MLP 1                                             teacher          low_rank, rank 16
    lm              cross-entropy 1                                          student          low_rank, rank 16

With --layer-losses document, the weights are those in docs/design: direct MLP 10, regularization 0.01.

Source: docs/design/npt_sequential.md (single_layer, sequential), docs/design/npt_curriculum.md (multi_layer),
docs/design/npt_equivalence.md (equivalence).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Literal

from megatron_ext.config.command_line.field_checks import (
    check_at_least,
    check_at_most,
    check_choices,
    flag,
    flag_name,
)
from megatron_ext.npt.modules.npt_module_config import NPTModuleConfig
from megatron_ext.npt.objective.curriculum import (
    STUDENT,
    TEACHER,
    Stage,
    parse_curriculum,
    proportional_curriculum,
    stage_index,
)
from megatron_ext.npt.objective.step_objective import LayerWeights, StepObjective

Mode = Literal["equivalence", "single_layer", "sequential", "multi_layer", "layer_parallel", "lm"]

_EQUIVALENCE = {"equivalence_weight": 1.0}
_DIRECT = {"direct_mlp_weight": 1.0, "fidelity_weight": 1.0}
_REGULARIZED = {"regularization_weight": 0.01}
_LM = {"lm": {"lm_weight": 1.0}}
_LAYER_PARALLEL = {"layer_parallel": {"direct_mlp_weight": 1.0}}
_WITH_DIRECT = ("single_layer", "sequential", "multi_layer")
WEIGHTS: Mapping[str, Mapping[str, Mapping[str, float]]] = {
    "local": {"equivalence": _EQUIVALENCE, **dict.fromkeys(_WITH_DIRECT, _DIRECT), **_LAYER_PARALLEL, **_LM},
    "document": {
        "equivalence": _EQUIVALENCE | _REGULARIZED,
        **dict.fromkeys(_WITH_DIRECT, _DIRECT | {"direct_mlp_weight": 10.0} | _REGULARIZED),
        **_LM,
    },
}
"""Default weights of the losses by --layer-losses and --mode; weights that are not listed are 0."""

STEPS_PER_LAYER = 2000
"""Default of --steps-per-layer, from docs/design/npt_sequential.md."""


@dataclass(frozen=True, kw_only=True)
class NPTTrainingConfig:
    """Flags for the training of NP components: losses, curriculum and teacher."""

    mode: Mode = "equivalence"
    """Kind of training. equivalence: match the outputs of the base layers. single_layer: train one layer. sequential:
    train one layer after the other. multi_layer: train several layers together, with a curriculum. layer_parallel:
    train each layer separately on the base model's hidden states, which is several times faster. lm: train with
    cross-entropy. The mode sets the defaults of other flags.
    """

    base_checkpoint: Annotated[str | None, flag(aliases=("--base_model_name", "--model_name"))] = None
    """Checkpoint of the base model to convert, written by tools/convert_checkpoint.py or a training run. For a new run,
    --load may name it instead.
    """

    load_npt_weights: str | None = None
    """File of NP weights to start from (npt_weights.pt or .safetensors); its layers must be exactly those of the run.
    With --mode single_layer the file may contain other layers: these are active but frozen, and the trained layer
    starts with new weights. Form, rank, target and (except in single_layer) layers default to those of the file.
    """

    calibration_tokens: int = 8192
    """With --np-init-strategy calibrated: number of training tokens to read, rounded up to whole sequences."""

    calibration_metric: Literal["fisher", "output"] = "fisher"
    """With --np-init-strategy calibrated: measure of the factors' error. fisher: the error's effect on the loss,
    which requires a backward pass. output: the size of the error in the output of the MLP's first matrix product and,
    for down, in the residual stream.
    """

    allow_layer_mismatch: bool = False
    """With --load: allow --npt-layers to differ from the checkpoint's layers. NP weights of common layers are loaded;
    other layers and the optimizer are re-initialized. Step, schedule and curriculum continue.
    """

    additional_steps: int | None = None
    """With --load: continue the run for this many more steps. Flags that are not given keep the values of the
    checkpoint's run.
    """

    dataset_preset: Annotated[str | None, flag(aliases=("--dataset",))] = None
    """Name of a blend of datasets defined in --dataset-presets-file, such as small. --data-path overrides it."""

    dataset_presets_file: str = "examples/npt/datasets.yaml"
    """YAML file that defines the blends for --dataset-preset."""

    equivalence_weight: float | None = None
    """Weight of the equivalence loss, between an NPT layer's output and the base layer's output on the same input.
    Default: 1 with --mode equivalence, otherwise 0.
    """

    equivalence_loss: Literal["mse", "cosine"] = "mse"
    """Measure of the equivalence loss: mean square error, or 1 - cosine."""

    direct_mlp_weight: float | None = None
    """Weight of the direct MLP loss, between the modulated MLP's output and its target from the base layer. Default: 1
    with --mode single_layer, sequential and multi_layer (10 with --layer-losses document), otherwise 0.
    """

    fidelity_weight: float | None = None
    """Weight of the fidelity loss, between the model's logits and the base model's logits. Default: 1 with --mode
    single_layer, sequential and multi_layer, otherwise 0.
    """

    fidelity_loss: Literal["kl", "mse"] = "kl"
    """Measure of the fidelity loss: KL(base || NPT) of the next token, or the mean square error of the logits."""

    regularization_weight: float | None = None
    """Weight of the regularization loss: norms of the NP factors (low_rank), or of v_a and v_b (outer_product).
    Default: 0; 0.01 with --layer-losses document, except with --mode lm.
    """

    lm_weight: float | None = None
    """Weight of the cross-entropy loss. Default: 1 with --mode lm, otherwise 0."""

    stage1_steps: int = 500
    """With --mode single_layer or sequential: number of steps at the start of a layer's training in which its v_a is
    trained to equal the attention output.
    """

    steps_per_layer: int = STEPS_PER_LAYER
    """With --mode sequential: number of steps per layer; each layer has its own learning-rate schedule."""

    start_from_layer: int | None = None
    """With --mode sequential: first layer to train. The lower layers of --npt-layers must already be trained in
    --checkpoint-dir.
    """

    model_size: Literal["1b", "3b", "8b"] | None = None
    """With --mode sequential: label of the model's size in the names of W&B runs. It does not change the model."""

    layer_losses: Literal["local", "document"] = "local"
    """Form of the layers' losses. local: each layer's inputs are detached, each token's squared error is divided by the
    token's own mean square, and the total is a mean over layers. document: the formulas and default weights of
    docs/design, with which the gradient of a layer's losses also reaches the NPT layers below, and the total is a sum
    over layers.
    """

    layer_weights: str = "uniform"
    """Weights of the layers' losses: uniform, linear (from 1 for the first NPT layer to 0.5 for the last), or one
    number per layer, such as 1,1,0.5.
    """

    curriculum_stages: str | None = None
    """Curriculum, as name:steps[:attn_ratio[:mlp_ratio]],... with the names teacher, mixed and student. Default: with
    --mode multi_layer, the three stages share the run's steps 2:3:4; other modes have only the student stage.
    """

    teacher_cache_gb: float = 0.0
    """Size limit, in GiB per process, of the cache of the teacher's hidden states in host memory; 0 for no cache."""

    teacher_cache_steps: int | None = None
    """With --mode layer_parallel: the samples of this many steps are read --teacher-cache-passes times before new
    samples are read. The cache holds the teacher's states for these samples, in bfloat16. Default: every sample is
    read once.
    """

    teacher_cache_passes: int = 1
    """With --teacher-cache-steps: number of times that every sample is read; the teacher runs only the first time."""

    generation_steps: int | None = None
    """Number of steps between two generated text samples in TensorBoard. Default: no samples."""

    generation_prompt: str = "The "
    """Prompt of the generated text samples."""

    npt_log_interval: int = 10
    """Number of steps between two measurements of the norms of v_a, v_b and the deltas."""

    def __post_init__(self) -> None:
        check_choices(self)
        check_at_least(self, 0, "start_from_layer", "stage1_steps", "teacher_cache_gb", *_NUMBERS)
        check_at_most(self, 2**20, "teacher_cache_gb")
        check_at_least(self, 1, "steps_per_layer", "generation_steps", "npt_log_interval", "additional_steps")
        check_at_least(self, 1, "teacher_cache_steps", "teacher_cache_passes")
        check_at_least(self, 1, "calibration_tokens")
        if self.curriculum_stages is not None:
            parse_curriculum(self.curriculum_stages)
        if self.teacher_cache_steps is None and self.teacher_cache_passes > 1:
            raise ValueError(
                f"--teacher-cache-passes {self.teacher_cache_passes}: requires --teacher-cache-steps"
            )
        if self.teacher_cache_steps is not None and self.teacher_cache_passes == 1:
            raise ValueError(
                f"--teacher-cache-steps {self.teacher_cache_steps}: requires --teacher-cache-passes of at least 2, "
                "because the cache saves nothing in a single pass"
            )
        if self.mode == "layer_parallel":
            self._check_layer_parallel()
        elif self.teacher_cache_steps is not None:
            raise ValueError(
                f"--teacher-cache-steps {self.teacher_cache_steps}: requires --mode layer_parallel (got {self.mode})"
            )
        if self.layer_weights not in ("uniform", "linear"):
            _numbers(self.layer_weights)

    def weight(self, name: str) -> float:
        """Returns the weight of a loss: the given one, or the default of the mode and of `--layer-losses`."""
        value = getattr(self, name)
        return WEIGHTS[self.layer_losses][self.mode].get(name, 0.0) if value is None else value

    @property
    def is_local(self) -> bool:
        """Whether the layers' losses are local, so that no layer's losses train the layers below."""
        return self.layer_losses == "local"

    @property
    def reconstructs(self) -> bool:
        """Whether the mode begins with stage 1, in which v_a is trained to equal the attention output."""
        return self.mode in ("single_layer", "sequential")

    def check_module(self, module: NPTModuleConfig, num_layers: int) -> None:
        """Checks that the losses fit the NP components and their layers.

        Raises:
            ValueError: the form or the number of layers does not fit the mode.
        """
        layers = module.layers(num_layers)
        if self.mode == "layer_parallel" and not module.freeze_base:
            raise ValueError(
                "--no-freeze-base: not supported by --mode layer_parallel, which trains only NP "
                "components; omit the flag"
            )
        if self.reconstructs and self.stage1_steps and module.np_form != "outer_product":
            raise ValueError(
                f"--stage1-steps {self.stage1_steps}: stage 1 requires --np-form outer_product "
                f"(got {module.np_form}); pass --stage1-steps 0 to omit stage 1"
            )
        if self.mode == "single_layer" and len(layers) != 1:
            raise ValueError(
                f"--npt-layers {module.npt_layers}: --mode single_layer requires one layer, not {len(layers)}"
            )
        self.weights_of_layers(layers)

    def weights_of_layers(self, layers: tuple[int, ...]) -> dict[int, float]:
        """Returns the weight of each layer's losses, by the layer's index.

        Raises:
            ValueError: `--layer-weights` does not have one number per layer.
        """
        if self.layer_weights == "uniform":
            return dict.fromkeys(layers, 1.0)
        if self.layer_weights == "linear":
            last = max(1, len(layers) - 1)
            return {layer: 1.0 - 0.5 * place / last for place, layer in enumerate(layers)}
        numbers = _numbers(self.layer_weights)
        if len(numbers) != len(layers):
            raise ValueError(
                f"--layer-weights {self.layer_weights}: requires one number for each of the {len(layers)} NPT layers "
                f"(got {len(numbers)})"
            )
        return dict(zip(layers, numbers, strict=True))

    def loss_weights(self, layers: tuple[int, ...]) -> dict[int, float]:
        """Returns the factor of each layer's losses in the total: the layer's weight.

        If the losses are local, the weights are divided by their sum.
        """
        weights = self.weights_of_layers(layers)
        total = sum(weights.values()) if self.is_local else 1.0
        return {layer: weight / (total or 1.0) for layer, weight in weights.items()}

    def stages(self, total_steps: int) -> tuple[Stage, ...]:
        """Returns the run's curriculum."""
        if self.curriculum_stages is not None:
            return parse_curriculum(self.curriculum_stages)
        if self.mode == "multi_layer":
            return proportional_curriculum(total_steps)
        return (TEACHER,) if self.mode == "layer_parallel" else (STUDENT,)

    def begins_cache(self, iteration: int) -> bool:
        """Returns whether step `iteration`, counted from 1, is the first of `teacher_cache_steps` steps with new
        samples.
        """
        steps = self.teacher_cache_steps
        return steps is not None and (iteration - 1) % (steps * self.teacher_cache_passes) == 0

    def objective(self, iteration: int, total_steps: int) -> StepObjective:
        """Returns the losses and the curriculum stage of step `iteration`, counted from 1."""
        stages = self.stages(total_steps)
        index = stage_index(stages, iteration)
        if self.reconstructs and iteration <= self.stage1_steps:
            return StepObjective(
                layer=LayerWeights(reconstruction=1.0, local=self.is_local),
                stage=stages[index],
                stage_index=index,
            )
        return StepObjective(
            layer=LayerWeights(
                direct_mlp=self.weight("direct_mlp_weight"),
                equivalence=self.weight("equivalence_weight"),
                equivalence_loss=self.equivalence_loss,
                local=self.is_local,
                regularization=self.weight("regularization_weight"),
            ),
            fidelity=self.weight("fidelity_weight"),
            lm=self.weight("lm_weight"),
            stage=stages[index],
            stage_index=index,
            layer_parallel=self.mode == "layer_parallel",
        )

    def _check_layer_parallel(self) -> None:
        """Raises `ValueError` for flags that --mode layer_parallel does not support."""
        for name in ("fidelity_weight", "lm_weight"):
            value = getattr(self, name)
            if value:
                raise ValueError(
                    f"{flag_name(name)} {value:g}: this loss needs the model's logits, which --mode "
                    "layer_parallel does not compute; omit the flag, and use this loss afterwards with --mode "
                    "multi_layer --load-npt-weights"
                )
        if self.curriculum_stages is not None:
            raise ValueError(
                f"--curriculum-stages {self.curriculum_stages}: in --mode layer_parallel the layers' "
                "inputs are always "
                "the teacher's; omit the flag, or choose --mode multi_layer"
            )
        if not self.is_local:
            raise ValueError(
                "--layer-losses document: not supported by --mode layer_parallel, in which every layer "
                "trains separately; omit the flag"
            )


_NUMBERS = tuple(name for name in NPTTrainingConfig.__annotations__ if name.endswith("_weight"))


def _numbers(text: str) -> list[float]:
    try:
        numbers = [float(part) for part in text.split(",")]
    except ValueError:
        numbers = [-1.0]
    if min(numbers) < 0:
        raise ValueError(
            f"--layer-weights {text}: must be uniform, linear, or numbers of at least 0 such as 1,1,0.5"
        )
    return numbers

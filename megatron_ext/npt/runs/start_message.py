"""Prints three lines before the first step of an NPT run: converted layers, initial NP weights, losses and curriculum.

The third line is the formula of `npt loss`, with the terms' names from the progress line. In the progress line, each
term is a mean over layers. The minimized loss is a mean over layers, weighted with --layer-weights; with
`--layer-losses document` it is a sum over layers.
"""

from megatron_ext.models.costs.model_cost import layer_parameters
from megatron_ext.models.gpt_model import GPTModel
from megatron_ext.npt.modules.np_ranks import described
from megatron_ext.npt.modules.npt_module_config import NPTModuleConfig
from megatron_ext.npt.objective.curriculum import STUDENT, format_curriculum
from megatron_ext.npt.objective.npt_run_config import NPTRunConfig
from megatron_ext.npt.objective.npt_training_config import NPTTrainingConfig
from megatron_ext.platform.collectives import print_on_first_rank
from megatron_ext.training.checkpoint.base_checkpoint import BaseCheckpoint
from megatron_ext.training.checkpoint.parameter_count import count_parameters


def print_start(
    chunks: list[GPTModel],
    config: NPTRunConfig,
    base: BaseCheckpoint | None,
    *,
    weights: str,
    total_steps: int,
    trains: tuple[int, ...] | None = None,
) -> None:
    """Prints the three lines; collective.

    Args:
        chunks: this rank's model chunks, unwrapped, with the untrained parameters already frozen.
        config: the run's configuration.
        base: the run's base checkpoint; None for a model from scratch.
        weights: describes the source of the NP weights.
        total_steps: number of steps of the run.
        trains: indices of the trained NPT layers, from 0; None for all.
    """
    settings = config.np
    num_layers = config.model.num_layers
    count = count_parameters(chunks)["trainable"]
    own = layer_parameters(config.model) * len(trains or settings.layers(num_layers))
    share = (
        f"{count / own:.1%} of the {own:,} in their layers"
        if settings.freeze_base
        else "including the base model"
    )
    print_on_first_rank(
        f"NPT on {base.folder if base is not None else 'a model from scratch'}: {conversion(settings, num_layers)}"
    )
    print_on_first_rank(f"NP weights: {weights}; {count:,} parameters are trained, {share}")
    print_on_first_rank(objective(config.npt, total_steps))


def fresh(settings: NPTModuleConfig, seed: int) -> str:
    """Describes newly initialized NP weights."""
    return f"initialized ({settings.np_init_strategy}, scale {settings.np_init_scale:g}, seed {seed})"


def conversion(settings: NPTModuleConfig, num_layers: int) -> str:
    """Describes the converted layers and their NP components."""
    layers = ",".join(map(str, settings.layers(num_layers)))
    affine = (
        f"affine {'on' if settings.np_affine else 'off'}, " if settings.np_form == "outer_product" else ""
    )
    return (
        f"layers {layers} of {num_layers}, {settings.np_form} on {'+'.join(settings.named_targets)}, "
        f"rank {described(settings.np_rank)}, k {settings.num_np_components}, {affine}residual {settings.np_residual}"
    )


def objective(training: NPTTrainingConfig, total_steps: int) -> str:
    """Describes the total loss, including stage 1 if there is one, and the curriculum."""
    last = training.objective(training.stage1_steps + 1, total_steps)
    terms = [
        f"{weight:g} {name}"
        for name, weight in (
            ("mlp_direct_loss", last.layer.direct_mlp),
            (f"equivalence_loss ({last.layer.equivalence_loss})", last.layer.equivalence),
            ("regularization_loss", last.layer.regularization),
        )
        if weight
    ]
    weighted = "" if training.layer_weights in ("uniform", "1.0") else f", weighted {training.layer_weights},"
    over = "mean" if training.is_local else "sum"
    parts = [f"{over} over layers{weighted} of ({' + '.join(terms)})"] if terms else []
    parts += [f"{last.fidelity:g} fidelity_loss ({training.fidelity_loss})"] if last.fidelity else []
    parts += [f"{last.lm:g} lm loss"] if last.lm else []
    first = ""
    if training.reconstructs and training.stage1_steps:
        first = f"attention_reconstruction_loss for the first {training.stage1_steps} of {total_steps} steps, then "
    stages = training.stages(total_steps)
    inputs = "no curriculum" if stages == (STUDENT,) else f"curriculum {format_curriculum(stages)}"
    if last.layer_parallel:
        inputs = "every layer separately, on the teacher's states"
        if training.teacher_cache_steps is not None:
            inputs += f" (of {training.teacher_cache_steps} steps at a time, {training.teacher_cache_passes} passes)"
    return f"npt loss = {first}{' + '.join(parts) or '0'}; {inputs}"

"""What an NPT run tells before its first step: base, converted layers; NP weights, parameters; losses, curriculum.

Three lines on rank 0. The losses' line is the formula of `npt loss`, with the names under which its terms are printed:
those are means over layers, while the total, which is what is trained, sums over them.
"""

from megatron_ext.models.costs.model_cost import layer_parameters
from megatron_ext.models.gpt_model import GPTModel
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
    """Prints the lines; collective.

    Args:
        chunks: this rank's model chunks, unwrapped, frozen where they are not trained.
        config: the run's.
        base: what the run stands on.
        weights: in words, where the NP weights come from.
        total_steps: optimizer steps of the run.
        trains: numbers of the NPT layers that are trained; None for all.
    """
    settings = config.np
    num_layers = config.model.num_layers
    count = count_parameters(chunks)["trainable"]
    own = layer_parameters(config.model) * len(trains or settings.layers(num_layers))
    share = (
        f"{count / own:.1%} of their layers' own {own:,}" if settings.freeze_base else "base model included"
    )
    print_on_first_rank(
        f"NPT on {base.folder if base is not None else 'a model from scratch'}: {conversion(settings, num_layers)}"
    )
    print_on_first_rank(f"NP weights: {weights}; {count:,} parameters are trained, {share}")
    print_on_first_rank(objective(config.npt, total_steps))


def fresh(settings: NPTModuleConfig, seed: int) -> str:
    """In words, NP weights as they are drawn."""
    return f"fresh ({settings.np_init_strategy}, scale {settings.np_init_scale:g}, seed {seed})"


def conversion(settings: NPTModuleConfig, num_layers: int) -> str:
    """In words, which layers are converted, and how."""
    layers = ",".join(map(str, settings.layers(num_layers)))
    affine = (
        f"affine {'on' if settings.np_affine else 'off'}, " if settings.np_form == "outer_product" else ""
    )
    return (
        f"layers {layers} of {num_layers}, {settings.np_form} on {'+'.join(settings.targets)}, "
        f"rank {settings.np_rank}, k {settings.num_np_components}, {affine}residual {settings.np_residual}"
    )


def objective(training: NPTTrainingConfig, total_steps: int) -> str:
    """The formula of the total loss, after stage 1 where there is one, and the curriculum."""
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
    parts = [f"sum over layers{weighted} of ({' + '.join(terms)})"] if terms else []
    parts += [f"{last.fidelity:g} fidelity_loss ({training.fidelity_loss})"] if last.fidelity else []
    parts += [f"{last.lm:g} lm loss"] if last.lm else []
    first = ""
    if training.reconstructs and training.stage1_steps:
        first = f"attention_reconstruction_loss for the first {training.stage1_steps} of {total_steps} steps, then "
    stages = training.stages(total_steps)
    inputs = "no curriculum" if stages == (STUDENT,) else f"curriculum {format_curriculum(stages)}"
    return f"npt loss = {first}{' + '.join(parts) or '0'}; {inputs}"

"""Checks that the flags of progressive training are consistent, and that they match the run in `--save`.

All checks run before the process group starts, and write nothing. Other checks are in `progressive_config`, for its own
fields, and in `phases`, for the models and schedules of the phases.
"""

from pathlib import Path

from megatron_ext.config.command_line.field_checks import flag_name
from megatron_ext.config.groups.model_config import ModelConfig
from megatron_ext.lora.four_bit_weights import Part, check_part, is_packed
from megatron_ext.progressive.growth.phases import JOINT, Phase
from megatron_ext.progressive.growth.rack import Rack
from megatron_ext.progressive.growth.training_history import FILE, History, finished_checkpoint, read_history
from megatron_ext.progressive.growth.trunk_strategy import frozen_below
from megatron_ext.progressive.settings.progressive_config import ProgressiveConfig
from megatron_ext.progressive.settings.progressive_run_config import ProgressiveRunConfig
from megatron_ext.training.checkpoint.checkpointer import read_run_config
from megatron_ext.training.checkpoint.run_directory import check_unused
from megatron_ext.training.checkpoint.same_run_checks import check_same_layers


def check_settings(config: ProgressiveRunConfig, phases: list[Phase]) -> None:
    """Checks the flags against each other and against the training run in `--save`.

    Args:
        config: the configuration of the training run.
        phases: the phases of the training run.

    Raises:
        ValueError: flags contradict each other, or contradict the training run in `--save`.
    """
    checkpoint, own = config.checkpoint, config.progressive
    if checkpoint.save is None:
        raise ValueError(
            "--save: required, because every stack grows from the checkpoint of the previous one"
        )
    if checkpoint.load is not None and Path(checkpoint.load).resolve() != Path(checkpoint.save).resolve():
        raise ValueError(
            f"--load {checkpoint.load}: not supported, because progressive training continues in "
            f"--save {checkpoint.save}; "
            "omit --load"
        )
    for name in ("finetune", "no_save_optim", "no_load_optim", "ckpt_step", "overwrite_checkpoints"):
        value = getattr(checkpoint, name)
        if value not in (None, False):
            raise ValueError(
                f"{flag_name(name)}: not supported, because progressive training continues from its "
                "own complete checkpoints"
            )
    if own.training_objective == "custom":
        raise ValueError(
            "--training-objective custom: requires targets, which indexed datasets do not have; "
            "use ProgressiveTrainer in Python"
        )
    if config.training.skip_train:
        raise ValueError(
            "--skip-train: not supported by progressive training; evaluate with tools/evaluate.py"
        )
    tied = not config.model.untie_embeddings_and_output_weights
    trains = own.train_embedding or own.trunk_strategy == "trained"
    if tied and own.enabled and own.num_stacks > 1 and not trains:
        raise ValueError(
            "--train-embedding: required without --untie-embeddings-and-output-weights, because the "
            "head, which is always trained, then shares the embedding's weights"
        )
    _check_stacks(own, phases, config.model, config.parallel.tensor_model_parallel_size)
    _check_made_with(config, check_history(Path(checkpoint.save), phases))


def _check_made_with(config: ProgressiveRunConfig, history: History) -> None:
    """Checks that the finished stacks have the architecture and the kind of attention that the flags specify.

    Without this check, the command would silently continue from a different model.

    Raises:
        ValueError: the architecture or the kind of attention differs.
    """
    if not history.finished:
        return
    assert config.checkpoint.save is not None
    folder = finished_checkpoint(Path(config.checkpoint.save), history.finished[-1].name)
    stored = read_run_config(str(folder))
    check_same_layers(config.model, stored, folder)
    ours = config.progressive.training_objective
    objective = stored["families"]["progressive"]["settings"]["training_objective"]
    if (ours == "clm") != (objective == "clm"):
        raise ValueError(
            f"--training-objective {ours}: the stacks in {folder} were trained with {objective}, so "
            f"that a token attends to {'only earlier tokens' if objective == 'clm' else 'all tokens'}; "
            f"pass --training-objective {objective}"
        )


def _check_stacks(config: ProgressiveConfig, phases: list[Phase], model: ModelConfig, ranks: int) -> None:
    """Raises `ValueError` if a stack's precision does not fit the model, or if `--cache-dir` would not be used."""
    for precision in {config.trunk_precision, *(stack.precision for stack in phases[-1].rack.stacks)}:
        if is_packed(precision):  # checked even if the library for this precision is missing
            for part in _parts(model, ranks):
                check_part(str(precision), part, ranks)
    caches = any(frozen_below(phase.rack, config, phase.trains) for phase in phases)
    if config.cache_dir is not None and not (caches and config.cache_activations):
        raise ValueError(
            f"--cache-dir {config.cache_dir}: nothing would be cached; the cache requires --cache-activations, "
            "--trunk-strategy frozen, a stack with --building-mode append, and no --train-embedding"
        )


def _parts(model: ModelConfig, ranks: int) -> list[Part]:
    """Returns the parts of a layer's four weight matrices that one tensor-parallel rank holds."""
    hidden, width = model.hidden_size, model.resolved_kv_channels
    queries, keys = model.num_attention_heads * width, model.resolved_num_query_groups * width
    inner, gates = model.resolved_ffn_hidden_size, 2 if model.is_gated else 1
    return [
        Part(rows=(queries + 2 * keys) // ranks, row=hidden, splits_input=False),
        Part(rows=hidden, row=queries // ranks, splits_input=True),
        Part(rows=gates * inner // ranks, row=hidden, splits_input=False, pieces=gates),
        Part(rows=hidden, row=inner // ranks, splits_input=True),
    ]


def check_history(save: Path, phases: list[Phase]) -> History:
    """Reads the history of the training run in `save`, and checks that it matches the phases.

    Raises:
        ValueError: the directory contains a training run with other or more stacks, or a run of another kind.
    """
    check_unused(save, "progressive training requires its own directory", but_for=(FILE,))
    history = read_history(save)
    there, planned = history.rack.stacks, phases[-1].rack.stacks
    if len(there) > len(planned):
        raise ValueError(
            f"--target-stacks {len(planned)}: must be at least {len(there)}, the number of stacks already in {save}"
        )
    if history.rack not in (Rack(), *(phase.rack for phase in phases)):
        told = " ".join(f"{stack.index}:{stack.n_blocks}:{stack.precision}" for stack in there)
        raise ValueError(
            "--n-blocks, --building-mode and --new-stack-precision must describe the stacks already "
            f"in {save}; as index:layers:precision, beginning at the embedding, these are {told}"
        )
    names = [phase.name for phase in phases]
    for place, phase in enumerate(history.finished):
        if phase.name == JOINT and len(planned) > len(there):
            raise ValueError(
                f"--target-stacks {len(planned)}: no stack can be added in {save}, because the joint "
                f"phase of its {len(there)} stacks is finished; pass another --save, and --joint-steps only with the "
                "last stack"
            )
        if place >= len(names) or phase.name != names[place]:
            raise ValueError(
                f"--save {save}: contains the finished phase {phase.name}, which does not follow from "
                "these flags; pass the same flags as before, or another --save"
            )
    return history

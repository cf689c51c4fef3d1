"""What a progressive training from the command line must not be: contradictory, or another than its directory's.

All is found out before the process group starts, and nothing is written. What the configuration alone tells is checked
in `config`, the models and schedules of the phases in `phases`.
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
    """Raises `ValueError` for what contradicts itself, or the training that is there already.

    Args:
        config: of the training.
        phases: of the training.
    """
    checkpoint, own = config.checkpoint, config.progressive
    if checkpoint.save is None:
        raise ValueError("--save: missing; every stack grows from the checkpoint of the one before")
    if checkpoint.load is not None and Path(checkpoint.load).resolve() != Path(checkpoint.save).resolve():
        raise ValueError(
            f"--load {checkpoint.load}: a progressive training goes on in --save, which is {checkpoint.save}"
        )
    for name in ("finetune", "no_save_optim", "no_load_optim", "ckpt_step", "overwrite_checkpoints"):
        value = getattr(checkpoint, name)
        if value not in (None, False):
            raise ValueError(
                f"{flag_name(name)}: a progressive training goes on from its own checkpoints, whole"
            )
    if own.training_objective == "custom":
        raise ValueError("--training-objective custom: indexed data give no targets; use ProgressiveTrainer")
    if config.training.skip_train:
        raise ValueError("--skip-train: there is nothing to do for it here; see tools/evaluate.py")
    tied = not config.model.untie_embeddings_and_output_weights
    trains = own.train_embedding or own.trunk_strategy == "trained"
    if tied and own.enabled and own.num_stacks > 1 and not trains:
        raise ValueError(
            "--train-embedding: needed without --untie-embeddings-and-output-weights, as the head always trains"
        )
    _check_stacks(own, phases, config.model, config.parallel.tensor_model_parallel_size)
    _check_made_with(config, check_history(Path(checkpoint.save), phases))


def _check_made_with(config: ProgressiveRunConfig, history: History) -> None:
    """Raises `ValueError` where the finished stacks are of another model, or were trained to see other tokens.

    A new stack on them, or the same command once more, would otherwise go on from something else than it says.
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
            f"--training-objective {ours}: the stacks of {folder} were trained with {objective}, where a token sees "
            f"{'those before it' if objective == 'clm' else 'all others'}"
        )


def _check_stacks(config: ProgressiveConfig, phases: list[Phase], model: ModelConfig, ranks: int) -> None:
    """Raises `ValueError` where a precision does not fit the model, or a cache is asked for that nothing would use."""
    for precision in {config.trunk_precision, *(stack.precision for stack in phases[-1].rack.stacks)}:
        if is_packed(precision):  # also where its library is missing
            for part in _parts(model, ranks):
                check_part(str(precision), part, ranks)
    caches = any(frozen_below(phase.rack, config, phase.trains) for phase in phases)
    if config.cache_dir is not None and not (caches and config.cache_activations):
        raise ValueError(
            f"--cache-dir {config.cache_dir}: nothing is cached: that needs --cache-activations, a frozen trunk, "
            "an appended stack, and an embedding that does not train"
        )


def _parts(model: ModelConfig, ranks: int) -> list[Part]:
    """A tensor-parallel rank's parts of a layer's four matrices."""
    hidden, width = model.hidden_size, model.resolved_kv_channels
    queries, keys = model.num_attention_heads * width, model.resolved_num_query_groups * width
    inner, gates = model.resolved_ffn_hidden_size, 2 if model.swiglu else 1
    return [
        Part(rows=(queries + 2 * keys) // ranks, row=hidden, splits_input=False),
        Part(rows=hidden, row=queries // ranks, splits_input=True),
        Part(rows=gates * inner // ranks, row=hidden, splits_input=False, pieces=gates),
        Part(rows=hidden, row=inner // ranks, splits_input=True),
    ]


def check_history(save: Path, phases: list[Phase]) -> History:
    """How far the training in a directory has come.

    Raises:
        ValueError: it is another training than that of `phases`, or has come further; or it is a run of another kind.
    """
    check_unused(save, "a progressive training needs a directory of its own", but_for=(FILE,))
    history = read_history(save)
    there, planned = history.rack.stacks, phases[-1].rack.stacks
    if len(there) > len(planned):
        raise ValueError(f"--target-stacks {len(planned)}: the rack in {save} has {len(there)} stacks")
    if history.rack not in (Rack(), *(phase.rack for phase in phases)):
        told = " ".join(f"{stack.index}:{stack.n_blocks}:{stack.precision}" for stack in there)
        raise ValueError(
            f"--n-blocks, --building-mode, --new-stack-precision: the rack in {save} was made otherwise "
            f"(stack:layers:precision, from the embedding: {told})"
        )
    names = [phase.name for phase in phases]
    for place, phase in enumerate(history.finished):
        if phase.name == JOINT and len(planned) > len(there):
            raise ValueError(
                f"--target-stacks {len(planned)}: the training in {save} is over, its {len(there)} stacks have had "
                "their joint phase; give --joint-steps with the last stack only"
            )
        if place >= len(names) or phase.name != names[place]:
            raise ValueError(f"--save {save}: holds {phase.name}, which is not of this training")
    return history

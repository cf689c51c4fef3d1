"""Exports a base model as a checkpoint that Megatron-LM's `pretrain_gpt.py --load` reads.

Without an optimizer, the exported checkpoint is a `release`: it has no step, so Megatron-LM starts from it at step 0
with a new optimizer, without further flags. One process writes all tensors; Megatron-LM reads them at any parallel
layout.
"""

from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor

from megatron_ext.config.groups.model_config import ModelConfig
from megatron_ext.config.groups.parallel_config import ParallelConfig
from megatron_ext.config.groups.tokenizer_config import TokenizerConfig
from megatron_ext.config.serialize import group_in
from megatron_ext.interop.checkpoint_without_model import CheckpointState
from megatron_ext.interop.hf_export import check_families
from megatron_ext.interop.hf_import import require_one_process
from megatron_ext.interop.megatron.megatron_arguments import export_arguments, flags_beside_checkpoint
from megatron_ext.interop.megatron.megatron_directory import make_arguments
from megatron_ext.interop.megatron.megatron_names import LINEARS, Named, export_tensors
from megatron_ext.interop.megatron.megatron_optimizer import (
    OPTIMIZER_FORMAT,
    OptimizerExport,
    optimizer_tensors,
    read_optimizer,
)
from megatron_ext.interop.output_directory import check_free, complete_directory
from megatron_ext.platform import process_groups
from megatron_ext.training.checkpoint.base_checkpoint import BaseCheckpoint
from megatron_ext.training.checkpoint.checkpoint_files import (
    TRACKER,
    checkpoint_name,
    find_checkpoint,
    fsync_path,
    write_text,
)
from megatron_ext.training.checkpoint.checkpointer import read_run_config
from megatron_ext.training.checkpoint.incomplete_checkpoints import RELEASE
from megatron_ext.training.checkpoint.saving import tensor_writer

_CHECKPOINT_VERSION = 3.0
"""Version of Megatron-LM's checkpoints with the current order of the rows of queries, keys and values."""


def export_megatron(
    load: str,
    model_dir: str | Path,
    *,
    ckpt_step: int | None = None,
    base_only: bool = False,
    with_optimizer: bool = False,
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
) -> list[str]:
    """Writes a Megatron-LM checkpoint; after an error, no files are left at `model_dir`.

    Args:
        load: a directory of checkpoints, or the directory of one checkpoint.
        model_dir: output directory, for Megatron-LM's `--load`.
        ckpt_step: step to export; the default is the newest.
        base_only: export the frozen base model without the parameters that model families added to it.
        with_optimizer: also export Adam's state, the schedule and the progress; not allowed with `base_only` or
            `dtype`.
        dtype: dtype of the exported tensors; the default is the checkpoint's.
        overwrite: replace the content of `model_dir`.

    Returns:
        Messages for the user.

    Raises:
        ValueError: Megatron-LM has no such model, or the checkpoint is damaged.
        OSError: the directory cannot be written.
    """
    require_one_process()
    check_free(model_dir, "--model-dir", overwrite=overwrite)
    run_config = read_run_config(load, ckpt_step)
    model = group_in(ModelConfig, run_config, "model")
    check_families(run_config["families"], load, base_only=base_only, target="Megatron-LM")
    export_arguments(model, 1, 1)  # refuses a model that Megatron-LM lacks, before the checkpoint is read
    folder = find_checkpoint(load, ckpt_step)
    assert folder is not None, "its configuration has been read"
    # mcore's checkpoint reader and writer need a process group, even for one process; the seed has no effect.
    process_groups.initialize(ParallelConfig(), seed=1234)
    try:
        base = BaseCheckpoint.of_run(run_config)
        folders = (folder,) if base is None else (folder, base.folder)
        state = CheckpointState(*folders, with_optimizer=with_optimizer)
        optimizer = read_optimizer(folder, run_config) if with_optimizer else None
        with complete_directory(model_dir, "--model-dir", overwrite=overwrite) as target:
            return _write(target, state, model, run_config, dtype, optimizer)
    finally:
        process_groups.shutdown()


def _write(
    target: Path,
    state: CheckpointState,
    model: ModelConfig,
    run_config: dict[str, Any],
    dtype: torch.dtype | None,
    optimizer: OptimizerExport | None,
) -> list[str]:
    rows = state.shape("embedding.word_embeddings.weight")[0]
    tensors = export_tensors(model, rows)
    first = dtype or state.dtype(tensors[0].name)
    arguments = {
        **export_arguments(model, run_config["vocab_size"], rows),
        **_tokenizer_arguments(group_in(TokenizerConfig, run_config, "tokenizer")),
        **_RUN_ARGUMENTS,
        "params_dtype": first,
        "bf16": first == torch.bfloat16,
        "fp16": first == torch.float16,
    }
    name, rest, metadata = RELEASE, {}, dict(_METADATA)
    if optimizer is not None:
        tensors = [*tensors, *optimizer_tensors(tensors, state)]
        arguments |= optimizer.arguments()
        name, rest = checkpoint_name(optimizer.progress.iteration), optimizer.content()
        metadata |= OPTIMIZER_FORMAT
    _check_complete(tensors, state)
    content = {
        **_shards(tensors, state, model.num_layers, dtype),
        **_extra_states(model),
        **rest,
        "args": make_arguments(arguments),
        "checkpoint_version": _CHECKPOINT_VERSION,
        "iteration": 0 if optimizer is None else optimizer.progress.iteration,
        "num_floating_point_operations_so_far": 0,
        "content_metadata": metadata,
    }
    folder = target / name
    folder.mkdir()
    tensor_writer.write(content, folder, _reader(tensors, state, dtype))
    write_text(target / TRACKER, RELEASE if optimizer is None else str(optimizer.progress.iteration))
    fsync_path(folder)
    return _messages(model, rows, str(first).removeprefix("torch."), optimizer)


def _reader(tensors: list[Named], state: CheckpointState, dtype: torch.dtype | None) -> tensor_writer.Read:
    """Returns a function that reads a tensor to write, or one layer of a tensor that holds all layers."""
    ours = {(tensor.theirs, tensor.layer): tensor.name for tensor in tensors}

    def read(name: str, offset: tuple[int, ...]) -> torch.Tensor:
        layer = offset[0] if (name, None) not in ours else None
        whole = state[ours[name, layer]]
        whole = whole.to(dtype or whole.dtype)
        return (whole if layer is None else whole.unsqueeze(0)).contiguous()

    return read


def _messages(model: ModelConfig, rows: int, kind: str, optimizer: OptimizerExport | None) -> list[str]:
    what = (
        "a release checkpoint"
        if optimizer is None
        else f"the checkpoint of step {optimizer.progress.iteration}"
    )
    messages = [f"{what} for pretrain_gpt.py --load, {kind}, {rows:,} rows of the vocabulary"]
    if optimizer is not None:
        messages.append(
            "pretrain_gpt.py continues it with --use-distributed-optimizer "
            "--dist-ckpt-optim-fully-reshardable and the "
            "run's own flags"
        )
    flags = flags_beside_checkpoint(model)
    if flags:
        messages.append(f"--use-checkpoint-args does not read {flags}: pass these flags to pretrain_gpt.py")
    return messages


_METADATA: dict[str, Any] = {"singleton_local_shards": False, "chained_optim_avoid_prefix": True}

_RUN_ARGUMENTS: dict[str, Any] = {
    "ckpt_format": "torch_dist",
    "tensor_model_parallel_size": 1,
    "pipeline_model_parallel_size": 1,
    "virtual_pipeline_model_parallel_size": None,
    "num_layers_per_virtual_pipeline_stage": None,
    "expert_model_parallel_size": 1,
    "world_size": 1,
    "data_parallel_size": 1,
    "consumed_train_samples": 0,
    "skipped_train_samples": 0,
    "consumed_valid_samples": 0,
    "no_save_optim": True,
    "no_save_rng": True,
    "use_distributed_optimizer": False,
    "ckpt_fully_parallel_save": False,
    "data_parallel_random_init": False,
    "phase_transition_iterations": None,
    "spec": None,
}
"""Arguments about the run that Megatron-LM reads from a checkpoint."""


def _tokenizer_arguments(config: TokenizerConfig) -> dict[str, Any]:
    names = ["tokenizer_type", "tokenizer_model", "vocab_file", "merge_file", "tiktoken_pattern"]
    if (
        config.vocab_size is not None
    ):  # export the flag's value, which for a NullTokenizer is not the number of ids
        names.append("vocab_size")
    return {name: getattr(config, name) for name in names}


def _check_complete(tensors: list[Named], state: CheckpointState) -> None:
    for tensor in tensors:
        if tensor.name not in state:
            raise ValueError(f"the model to export lacks {tensor.name}")
        if state.shape(tensor.name) != tensor.shape:
            raise ValueError(
                f"{tensor.name}: the configuration requires shape {list(tensor.shape)}, got "
                f"{list(state.shape(tensor.name))}"
            )


def _shards(
    tensors: list[Named], state: CheckpointState, num_layers: int, dtype: torch.dtype | None
) -> dict[str, ShardedTensor]:
    """Returns the tensors to write, without data; a tensor of one layer is part of a tensor of all layers."""
    shards = {}
    for tensor in tensors:
        empty = torch.empty(tensor.shape, dtype=dtype or state.dtype(tensor.name), device="meta")
        shards[f"{tensor.theirs}/{tensor.layer}"] = (
            ShardedTensor.from_rank_offsets(tensor.theirs, empty)
            if tensor.layer is None
            else ShardedTensor.from_rank_offsets(
                tensor.theirs, empty, (0, tensor.layer, num_layers), prepend_axis_num=1
            )
        )
    return shards


def _extra_states(model: ModelConfig) -> dict[str, ShardedObject]:
    """Returns the empty `_extra_state` objects that the engine's layers require, with and without TE."""
    names = [*LINEARS, "self_attention.core_attention"]
    if model.qk_layernorm:
        names += ["self_attention.q_layernorm", "self_attention.k_layernorm"]
    keys = [f"decoder.layers.{name}._extra_state" for name in names]
    layers = range(model.num_layers)
    objects = [ShardedObject(key, None, (len(layers),), (layer,)) for key in keys for layer in layers]
    objects.append(ShardedObject("decoder.final_layernorm._extra_state", None, (1,), (0,)))
    return {f"{item.key}/{item.global_offset[0]}": item for item in objects}

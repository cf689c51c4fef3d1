#!/usr/bin/env python3
"""Convert models between this package's checkpoints and Hugging Face's format, or Megatron-LM's checkpoints.

    convert_checkpoint.py import --model-dir DIR --save CKPT      make a checkpoint from config.json and safetensors
    convert_checkpoint.py import --model-dir X.gguf --save CKPT   make a checkpoint from a GGUF file
    convert_checkpoint.py export --load CKPT --model-dir DIR      make a directory that from_pretrained loads
    convert_checkpoint.py merge --load RUN --save CKPT            make a checkpoint with a run's LoRA adapters merged

    convert_checkpoint.py import --format megatron --model-dir DIR --save CKPT   read a checkpoint of Megatron-LM
    convert_checkpoint.py export --format megatron --load CKPT --model-dir DIR   write one, for pretrain_gpt.py --load

The tool runs in one process and needs no network. Checkpoints can be loaded at any tensor- and pipeline-parallel size.
Each command has its own --help; docs/interop.md lists what is converted and what is rejected.
Exit codes: 0 success, 2 wrong flag or file.
"""

import re
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from megatron_ext.config.command_line.field_checks import Switch, check_at_least, flag_name
from megatron_ext.config.command_line.parse import parse, run_main
from megatron_ext.config.groups.tokenizer_config import TokenizerType
from megatron_ext.platform.process.allocator import return_freed_memory

if TYPE_CHECKING:
    from megatron_ext.config.groups.model_config import ModelConfig

_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


_TOKENIZER = ("tokenizer_type", "tokenizer_model", "vocab_file", "merge_file", "vocab_size")
_ONLY_HUGGING_FACE = (
    "architecture",
    "max_shard_size",
    "merge_adapters",
    "adapter_dir",
    "tokenizer_model",
    "no_tokenizer",
    "per_layer_vocab_file",
    "npt_weights",
)


def _refuse(config: Any, names: tuple[str, ...], reason: str) -> None:
    """Raises `ValueError` with this reason if one of the named fields differs from its default."""
    for name in names:
        if getattr(config, name) != type(config).__dataclass_fields__[name].default:
            raise ValueError(f"{flag_name(name)}: {reason}")


@dataclass(frozen=True, kw_only=True)
class ImportConfig:
    """Flags for the model to import and the checkpoint to write."""

    model_dir: str
    """Local Hugging Face directory with config.json, safetensors and optionally a tokenizer; or a GGUF file; or, with
    --format megatron, a directory that Megatron-LM saved to.
    """

    format: Literal["huggingface", "megatron"] = "huggingface"
    """Format of --model-dir."""

    save: str
    """Directory to write the checkpoint to; must not exist yet, or be empty."""

    seq_length: int | None = None
    """Tokens per training sequence. Default: the longest sequence that the model allows, but at most 4096."""

    make_vocab_size_divisible_by: int | None = None
    """Pad the vocabulary size to a multiple of this number. Default: the largest power of two up to 128 that needs no
    padding.
    """

    ckpt_step: int | None = None
    """With --format megatron: step to import. Default: the step in latest_checkpointed_iteration.txt."""

    with_optimizer: Switch = False
    """With --format megatron: import Adam's state, the schedule and the progress too, so that --load continues the
    run.
    """

    tokenizer_type: TokenizerType | None = None
    """With --format megatron: type of the model's tokenizer. Default: the type that the checkpoint records."""

    tokenizer_model: str | None = None
    """With --format megatron: path of the tokenizer's file or directory, if the path in the checkpoint is not valid."""

    vocab_file: str | None = None
    """With --format megatron: path of vocab.json, for GPT2BPETokenizer."""

    merge_file: str | None = None
    """With --format megatron: path of merges.txt, for GPT2BPETokenizer."""

    vocab_size: int | None = None
    """With --format megatron: number of ids of a NullTokenizer or TikTokenizer."""

    def __post_init__(self) -> None:
        check_at_least(self, 1, "seq_length", "make_vocab_size_divisible_by", "vocab_size")
        check_at_least(self, 0, "ckpt_step")
        if self.format == "megatron":
            _refuse(
                self,
                ("make_vocab_size_divisible_by",),
                "has no effect with --format megatron, because the vocabulary keeps all trained rows",
            )
        else:
            _refuse(self, (*_TOKENIZER, "ckpt_step", "with_optimizer"), "requires --format megatron")

    def tokenizer(self) -> dict[str, Any]:
        """Returns the fields of the tokenizer's configuration that were given."""
        return {name: getattr(self, name) for name in _TOKENIZER if getattr(self, name) is not None}


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """Flags for the checkpoint to export and the directory to write."""

    load: str
    """Directory of checkpoints, or the directory of one checkpoint."""

    model_dir: str
    """Directory to write; must not exist or be empty, unless --overwrite is given."""

    format: Literal["huggingface", "megatron"] = "huggingface"
    """Format to write: a Hugging Face directory, or a checkpoint of Megatron-LM."""

    ckpt_step: int | None = None
    """Step to export. Default: the newest complete checkpoint."""

    architecture: str | None = None
    """Architecture to export to, such as LlamaForCausalLM (an unknown name causes an error that lists all). Default:
    the architecture from which the model was imported, otherwise the first that can express the model.
    """

    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Dtype of the exported tensors. Default: the dtype in the checkpoint."""

    max_shard_size: str = "5GB"
    """Largest size of a safetensors file, such as 500MB or 2GiB."""

    with_optimizer: Switch = False
    """With --format megatron: export Adam's state, the schedule and the progress too, so that Megatron-LM continues
    the run.
    """

    base_only: bool = False
    """Export the base model without the parameters that a model family (NPT) added; the base must have been frozen."""

    merge_adapters: Switch = False
    """Merge the adapters of a model trained by pretrain_progressive.py (objective clm) or with --lora-rank into its
    weights, and export the result as a plain model.
    """

    adapter_dir: str | None = None
    """Write each adapter in peft's format to a subdirectory of this directory, and only the base model to
    --model-dir.
    """

    tokenizer_model: str | None = None
    """Path of the tokenizer's file or directory, if it has moved since training."""

    no_tokenizer: Switch = False
    """Export the model without a tokenizer."""

    per_layer_vocab_file: str | None = None
    """For a model with per-layer embedding that was trained on aligned per-layer data: the file of the data's per-layer
    vocabulary. The table of per-layer ids must be in the same directory.
    """

    npt_weights: str | None = None
    """File npt_weights.pt or npt_weights.safetensors: export the base model in --load with these NP weights, such as
    those of a calibration.
    """

    overwrite: bool = False
    """Replace the content of --model-dir."""

    def __post_init__(self) -> None:
        check_at_least(self, 0, "ckpt_step")
        chosen = [name for name in ("base_only", "merge_adapters", "adapter_dir") if getattr(self, name)]
        if len(chosen) > 1:
            raise ValueError(f"{flag_name(chosen[0])}: cannot be given together with {flag_name(chosen[1])}")
        self.resolved_max_shard_size()
        if self.format == "megatron":
            _refuse(self, _ONLY_HUGGING_FACE, "requires --format huggingface")
        elif self.with_optimizer:
            raise ValueError("--with-optimizer: requires --format megatron")
        if self.with_optimizer:
            _refuse(self, ("base_only", "dtype"), "cannot be given together with --with-optimizer")
        if chosen:
            _refuse(
                self,
                ("per_layer_vocab_file", "npt_weights"),
                f"cannot be given together with {flag_name(chosen[0])}",
            )

    def resolved_max_shard_size(self) -> int:
        """Returns `max_shard_size` in bytes; raises `ValueError` if the text is not a size."""
        match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]?i?B?)", self.max_shard_size, re.IGNORECASE)
        unit = match[2].upper() if match else "?"
        size = int(float(match[1]) * _UNITS[unit]) if match and unit in _UNITS else 0
        if size < 1:
            raise ValueError(f"--max-shard-size {self.max_shard_size}: must be a size such as 500MB or 2GiB")
        return size


@dataclass(frozen=True, kw_only=True)
class MergeConfig:
    """Flags for the run with adapters, and for the checkpoint to write."""

    load: str
    """Directory of checkpoints of a run with --lora-rank, or the directory of one checkpoint."""

    save: str
    """Directory to write the merged model's checkpoint to; must not exist yet, or be empty."""

    ckpt_step: int | None = None
    """Step to merge. Default: the newest complete checkpoint."""

    def __post_init__(self) -> None:
        check_at_least(self, 0, "ckpt_step")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one subcommand; returns the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    command = arguments[0] if arguments else ""
    if command not in _COMMANDS:
        if command in ("-h", "--help"):
            print(__doc__)
            return 0
        raise ValueError(f"unknown command {command!r}: must be one of {', '.join(_COMMANDS)}")
    group, run, example = _COMMANDS[command]
    config = parse(
        group,
        arguments[1:],
        prog=f"tools/convert_checkpoint.py {command}",
        description=str(run.__doc__),
        example=f"python tools/convert_checkpoint.py {command} {example}",
    )
    return_freed_memory()
    run(config)
    return 0


def run_import(config: ImportConfig) -> None:
    """Convert a Hugging Face or Megatron-LM model to a checkpoint; write the model's flags to model.yaml."""
    if config.format == "megatron":
        _import_megatron(config)
        return
    from megatron_ext.interop import import_checkpoint
    from megatron_ext.registry.remote_code.export_with_code import read_families

    found = import_checkpoint(
        config.model_dir,
        config.save,
        seq_length=config.seq_length,
        make_vocab_size_divisible_by=config.make_vocab_size_divisible_by,
        read_families=read_families,
    )
    model, kind = found.model, str(found.dtype).removeprefix("torch.")
    print(
        f"{config.save}: {found.imported.config['model_type']}, {model.num_layers} layers, hidden size "
        f"{model.hidden_size}, {found.vocab_size:,} ids, {kind}"
    )
    families = found.families.configurations
    if families:
        print(
            f"with the model families {', '.join(families)}; tools/generate.py and tools/evaluate.py load it"
        )
    if families.keys() - {"per_layer"}:
        return
    save = shlex.quote(config.save)
    rest = f"--load {save} --data-path corpus_text_document --train-iters 1000"
    tokenizer = found.tokenizer_config
    if tokenizer.tokenizer_model is not None:
        print("to prepare data with the model's tokenizer:")
        print(
            f"    python tools/preprocess_data.py --input corpus.jsonl --output-prefix corpus --append-eod "
            f"--tokenizer-type {tokenizer.tokenizer_type} --tokenizer-model {shlex.quote(tokenizer.tokenizer_model)}"
        )
    suits_npt = not families and _suits_npt(model)
    print("to continue training" + (", or to convert the model to NPT" if suits_npt else "") + ":")
    print(
        f"    python pretrain_gpt_per_layer.py --config {save}/model.yaml {rest} --lr 1e-4 --finetune --save {save}-2"
    )
    if not suits_npt:
        return
    print(
        f"    python pretrain_npt.py --mode multi_layer {rest} --lr 3e-5 --np-form key_value --np-target gate+up "
        f"--np-rank auto:0.1 --np-residual keep --np-init calibrated --save {save}-npt"
    )


def _suits_npt(model: "ModelConfig") -> bool:
    from megatron_ext.config.groups.parallel_config import ParallelConfig
    from megatron_ext.npt.modules.npt_module_config import NPTModuleConfig
    from megatron_ext.npt.npt_family import NPTFamily

    try:
        NPTFamily(NPTModuleConfig(np_form="key_value", np_target="gate+up", np_residual="keep")).check(
            model, ParallelConfig()
        )
    except ValueError:
        return False
    return True


def run_merge(config: MergeConfig) -> None:
    """Add the adapters of a run with --lora-rank to the model's weights; write a checkpoint that needs no other
    checkpoint.
    """
    from megatron_ext.adapters.adapter_merge import merge_adapters_of_run

    print(f"{merge_adapters_of_run(config.load, config.save, ckpt_step=config.ckpt_step)}: merged")


def run_export(config: ExportConfig) -> None:
    """Convert a checkpoint's model to a Hugging Face directory, or to a checkpoint that Megatron-LM loads."""
    for line in _export_megatron(config) if config.format == "megatron" else _export_hugging_face(config):
        print(f"{config.model_dir}: {line}")


def _export_hugging_face(config: ExportConfig) -> list[str]:
    options: dict[str, Any] = {
        "ckpt_step": config.ckpt_step,
        "architecture": config.architecture,
        "dtype": config.dtype,
        "max_shard_size": config.resolved_max_shard_size(),
        "overwrite": config.overwrite,
        "tokenizer_model": config.tokenizer_model,
        "no_tokenizer": config.no_tokenizer,
    }
    if config.merge_adapters or config.adapter_dir is not None:
        from megatron_ext.registry.export_with_adapters import export_plain

        return export_plain(config.load, config.model_dir, adapter_dir=config.adapter_dir, **options)
    from megatron_ext.registry.remote_code.export_with_code import export_with_code

    return export_with_code(
        config.load,
        config.model_dir,
        base_only=config.base_only,
        per_layer_vocab_file=config.per_layer_vocab_file,
        npt_weights=config.npt_weights,
        **options,
    )


def _import_megatron(config: ImportConfig) -> None:
    from megatron_ext.interop.megatron.megatron_import import import_megatron

    found = import_megatron(
        config.model_dir,
        config.save,
        ckpt_step=config.ckpt_step,
        with_optimizer=config.with_optimizer,
        seq_length=config.seq_length,
        tokenizer=config.tokenizer(),
    )
    for line in found.messages:
        print(f"note: {line}")
    model, save = found.model, shlex.quote(config.save)
    print(
        f"{config.save}: {found.folder}, {model.num_layers} layers, hidden size {model.hidden_size}, "
        f"{found.tokenizer.vocab_size:,} ids in {found.rows:,} rows"
    )
    command = f"python pretrain_gpt_per_layer.py --config {save}/model.yaml --load {save} --data-path ..."
    if found.progress is None:
        print(f"to train from it:\n    {command} --finetune --save {save}-2")
    else:
        step = found.progress.progress.iteration
        print(f"to continue after step {step}, with the run's own flags:\n    {command} --save {save}")


def _export_megatron(config: ExportConfig) -> list[str]:
    from megatron_ext.interop.hf_export import DTYPES
    from megatron_ext.interop.megatron.megatron_export import export_megatron

    return export_megatron(
        config.load,
        config.model_dir,
        ckpt_step=config.ckpt_step,
        base_only=config.base_only,
        with_optimizer=config.with_optimizer,
        dtype=DTYPES[config.dtype] if config.dtype else None,
        overwrite=config.overwrite,
    )


_COMMANDS: dict[str, tuple[type[Any], Callable[..., None], str]] = {
    "import": (ImportConfig, run_import, "--model-dir models/llama --save checkpoints/llama"),
    "export": (
        ExportConfig,
        run_export,
        "--load checkpoints/llama --model-dir models/mine --max-shard-size 2GB",
    ),
    "merge": (MergeConfig, run_merge, "--load checkpoints/tuned --save checkpoints/merged"),
}


if __name__ == "__main__":
    run_main(main)

"""Loads a model and its model families from a checkpoint, in any tensor- and pipeline-parallel layout, for inference.

The checkpoint holds all that is needed except the tokenizer's files; if these have moved, the caller gives their path.
"""

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megatron_ext.config.groups.model_config import ModelConfig
from megatron_ext.config.groups.tokenizer_config import TokenizerConfig
from megatron_ext.config.serialize import group_in
from megatron_ext.data.tokenizers import Tokenizer, build_tokenizer
from megatron_ext.data.tokenizers.tokenizer import in_words
from megatron_ext.inference.choose_layout import choose_layout, describe_layout
from megatron_ext.inference.stopping import stop_tokens
from megatron_ext.models.build_model import build_model
from megatron_ext.models.gpt_model import GPTModel
from megatron_ext.models.transformer_engine import on_this_machine
from megatron_ext.platform import process_groups
from megatron_ext.training.checkpoint.checkpoint_files import BEGIN
from megatron_ext.training.checkpoint.checkpointer import load_weights, read_run_config, read_step
from megatron_ext.training.checkpoint.same_run_checks import tokenizer_in_words
from megatron_ext.training.interface.family_interface import Family

FamilyTypes = dict[str, type[Any]]
"""Maps the name of a model family to its class, which has a method `from_configuration`.

The caller passes this table, because this package must not import the model families.
"""


@dataclass(kw_only=True)
class LoadedModel:
    """A model ready for inference."""

    model: GPTModel
    """This rank's only model chunk, in evaluation mode."""

    config: ModelConfig
    """Configuration of the base model, with dropout turned off."""

    families: list[Family]
    """The model families that the model is built with."""

    tokenizer: Tokenizer
    """Tokenizer that the model was trained with; its `adds_bos` is True if texts begin with a begin-of-text token."""

    stop_tokens: tuple[int, ...]
    """Token ids that end a text: the tokenizer's end-of-document id and, for an imported model, the end-of-text ids
    that its files name.
    """

    folder: Path
    """Directory of the loaded checkpoint, `.../iter_NNNNNNN`."""

    step: int
    """Number of optimizer steps that the model was trained for."""


def load_model(
    path: str,
    families: FamilyTypes,
    *,
    ckpt_step: int | None = None,
    tensor_model_parallel_size: int | None = None,
    pipeline_model_parallel_size: int | None = None,
    bf16: bool = False,
    tokenizer: TokenizerConfig | None = None,
    bos: bool | None = None,
) -> LoadedModel:
    """Joins the process group and loads the model of a checkpoint. Collective.

    Args:
        path: a directory of checkpoints, or the directory of one checkpoint.
        families: classes of the model families that the caller supports, by name.
        ckpt_step: step to load; the default is the newest.
        tensor_model_parallel_size: may differ from the size used in training. None lets `choose_layout` choose; with
            several processes, the chosen layout is printed to standard error.
        pipeline_model_parallel_size: like `tensor_model_parallel_size`.
        bf16: run in bfloat16 instead of fp32.
        tokenizer: configuration with the new path of the tokenizer's files; None uses the path that training used.
        bos: whether a text begins with the begin-of-text token. None: as in the training data if the checkpoint
            records that, otherwise as the tokenizer's files specify.

    Raises:
        ValueError: the layout does not fit the model, the tokenizer differs from the one used in training, or the
            checkpoint is damaged or uses a model family that the caller does not support.
        OSError: a file cannot be read.
    """
    stored = read_run_config(path, ckpt_step)
    stored["model"] = on_this_machine(
        stored["model"]
    )  # the training run may have used Transformer Engine, which this machine may lack
    model = replace(group_in(ModelConfig, stored, "model"), hidden_dropout=0.0, attention_dropout=0.0)
    built = _tokenizer(path, stored, tokenizer, bos)
    made = _families(path, stored, families)
    world_size = process_groups.world_size()
    parallel = choose_layout(
        model, made, world_size, tensor=tensor_model_parallel_size, pipeline=pipeline_model_parallel_size
    )
    if world_size > 1 and tensor_model_parallel_size is None and process_groups.rank() == 0:
        print(describe_layout(parallel, world_size), file=sys.stderr, flush=True)
    process_groups.initialize(parallel, seed=1234)
    chunks = build_model(
        model,
        parallel,
        vocab_size=stored["vocab_size"],
        seed=1234,
        precision="bf16" if bf16 else "fp32",
        extensions=[family.extension() for family in made],
    )
    folder = load_weights(path, list(chunks), made, vocab_size=stored["vocab_size"], ckpt_step=ckpt_step)
    return LoadedModel(
        model=chunks[0].eval(),
        config=model,
        families=made,
        tokenizer=built,
        stop_tokens=stop_tokens(stored, built),
        folder=folder,
        step=read_step(folder),
    )


def _tokenizer(
    path: str, stored: dict[str, Any], config: TokenizerConfig | None, bos: bool | None
) -> Tokenizer:
    """Returns the tokenizer that the model was trained with; for `bos`, see `load_model`."""
    built = build_tokenizer(config or group_in(TokenizerConfig, stored, "tokenizer"))
    if built.fingerprint() != stored["tokenizer_fingerprint"]:
        ours = in_words({**built.describe(), "files": built.files})
        raise ValueError(
            f"{path}: the tokenizer that was read ({ours}) is not the one that the model was trained with "
            f"({tokenizer_in_words(stored)}); give the files of the original tokenizer"
        )
    # A model that has not been trained since its import has no section `training`; its tokenizer's files then decide.
    if "training" in stored:
        # Older checkpoints lack the entry; their training data had no begin-of-text token.
        built.begin_as(stored.get(BEGIN, []))
    built.choose_bos(bos)
    return built


def _families(path: str, stored: dict[str, Any], known: FamilyTypes) -> list[Family]:
    unknown = set(stored["families"]) - set(known)
    if unknown:
        raise ValueError(
            f"{path}: the model was built with the model family {', '.join(sorted(unknown))}, "
            "which this tool does not support"
        )
    return [known[name].from_configuration(value) for name, value in stored["families"].items()]

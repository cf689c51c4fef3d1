"""Rebuilds the model of a checkpoint, families included, at any tensor x pipeline layout, for evaluation and
generation.

Everything needed is in the checkpoint: configurations, vocabulary size, families. Only the tokenizer's files are
outside it; where they have moved, the caller gives new paths.
"""

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megatron_ext.config.groups.model_config import ModelConfig, on_this_machine
from megatron_ext.config.groups.tokenizer_config import TokenizerConfig
from megatron_ext.config.serialize import group_in
from megatron_ext.data.tokenizers import Tokenizer, build_tokenizer
from megatron_ext.data.tokenizers.tokenizer import in_words
from megatron_ext.inference.choose_layout import choose_layout, describe_layout
from megatron_ext.inference.stopping import stop_tokens
from megatron_ext.models.build_model import build_model
from megatron_ext.models.gpt_model import GPTModel
from megatron_ext.platform import process_groups
from megatron_ext.training.checkpoint.checkpoint_files import BEGIN
from megatron_ext.training.checkpoint.checkpointer import load_weights, read_run_config, read_step
from megatron_ext.training.checkpoint.same_run_checks import tokenizer_in_words
from megatron_ext.training.interface.family_interface import Family

FamilyTypes = dict[str, type[Any]]
"""Name -> family class with `from_configuration`; the script that calls knows which families there are."""


@dataclass(kw_only=True)
class LoadedModel:
    """A model ready for inference."""

    model: GPTModel
    """This rank's only chunk, in evaluation mode."""

    config: ModelConfig
    """The base model's configuration."""

    families: list[Family]
    """Its families."""

    tokenizer: Tokenizer
    """The tokenizer it was trained with; its `adds_bos` says how this model's texts begin."""

    stop_tokens: tuple[int, ...]
    """Ids that end a text: the tokenizer's end-of-document token, and those that an imported model names."""

    folder: Path
    """The checkpoint's own directory."""

    step: int
    """Optimizer steps that it was trained for."""


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
    """Joins the process group and loads a checkpoint's model.

    Args:
        path: a directory of checkpoints, or one checkpoint's own.
        families: the families the caller knows.
        ckpt_step: the step to load instead of the newest.
        tensor_model_parallel_size: the cut, which need not be the checkpoint's; None for one that fits, see
            `choose_layout`. What was chosen for several processes is printed to standard error.
        pipeline_model_parallel_size: likewise.
        bf16: the precision to run in.
        tokenizer: where the tokenizer's files are, if not where training found them.
        bos: whether a text begins with the tokenizer's begin-of-text token. None: as the model's training data does
            where that is known, else as the tokenizer's own files say.

    Raises:
        ValueError: the parallel layout does not fit the model, the tokenizer is another one, the checkpoint is
        damaged or of a
            family that the caller does not know.
        OSError: something cannot be read.
    """
    stored = read_run_config(path, ckpt_step)
    stored["model"] = on_this_machine(stored["model"])
    model = replace(group_in(ModelConfig, stored, "model"), hidden_dropout=0.0, attention_dropout=0.0)
    built = build_tokenizer(tokenizer or group_in(TokenizerConfig, stored, "tokenizer"))
    if built.fingerprint() != stored["tokenizer_fingerprint"]:
        ours = in_words({**built.describe(), "files": built.files})
        raise ValueError(
            f"{path}: was trained with another tokenizer ({tokenizer_in_words(stored)}) than {ours}"
        )
    if "training" in stored:  # not so an imported model: its tokenizer's files say how a text begins
        built.begin_as(stored.get(BEGIN, []))  # before this was recorded, no data had a begin
    built.choose_bos(bos)
    unknown = set(stored["families"]) - set(families)
    if unknown:
        raise ValueError(
            f"{path}: holds the family {', '.join(sorted(unknown))}, which this tool does not know"
        )
    made = [families[name].from_configuration(value) for name, value in stored["families"].items()]
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
        bf16=bf16,
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

"""Begins or resumes a run that trains LoRA adapters over a frozen model.

--load MODEL --finetune --lora-rank R     begins a run over the checkpoint MODEL, which may itself have adapters
--load RUN                                resumes RUN with its frozen model, its rank and its alpha
"""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from megatron_ext.adapters.adapter_family import AdapterFamily
from megatron_ext.config.groups.checkpoint_config import CheckpointConfig
from megatron_ext.config.run_config import C
from megatron_ext.data.tokenizers import Tokenizer
from megatron_ext.lora.adapter_config import AdapterConfig
from megatron_ext.models.gpt_model import GPTModel
from megatron_ext.platform.collectives import print_on_first_rank
from megatron_ext.training.checkpoint.base_checkpoint import BaseCheckpoint
from megatron_ext.training.checkpoint.checkpoint_files import find_checkpoint
from megatron_ext.training.checkpoint.checkpointer import read_run_config
from megatron_ext.training.checkpoint.parameter_count import count_parameters
from megatron_ext.training.interface.family_interface import Family
from megatron_ext.training.pretrain import MakeFamilies, pretrain
from megatron_ext.training.run_options import RunOptions

_UNSHOWN = {"npt": "NPT"}
"""Model families over which adapters have been tested with tiny models only, each with the name to print."""


def train_adapters(
    config: C, settings: AdapterConfig, make_families: MakeFamilies[C], known: Mapping[str, type[Any]]
) -> int:
    """Trains adapters; returns the process's exit code.

    Args:
        config: the run's configuration.
        settings: rank and alpha.
        make_families: builds the run's other model families, as in a run without adapters.
        known: classes of the model families that the frozen model may have, by name.

    Raises:
        ValueError, OSError: a user error; the message is one line.
    """
    base, checkpoint = find_model(config.checkpoint, settings, dry_run=config.training.dry_run)
    stored = {} if base is None else base.run_config()["families"]
    make = partial(_families, settings, make_families, known, stored)
    options = RunOptions(base=base, prepare=partial(_print_start, settings, base, stored))
    return pretrain(replace(config, checkpoint=checkpoint), make, options)


def find_model(
    checkpoint: CheckpointConfig, settings: AdapterConfig, *, dry_run: bool
) -> tuple[BaseCheckpoint | None, CheckpointConfig]:
    """Returns the frozen model's checkpoint, and the run's checkpoint flags; a new run's flags have no `--load`.

    Raises:
        ValueError: `--load` is missing, or contains neither a model to freeze nor a run with adapters.
        OSError: there is no checkpoint.
    """
    given = f"--lora-rank {settings.lora_rank}"
    if checkpoint.load is None:
        if dry_run:
            return None, checkpoint
        raise ValueError(
            f"{given}: requires a model to freeze; pass its checkpoint with --load and --finetune"
        )
    if checkpoint.finetune:
        base = BaseCheckpoint.find(checkpoint.load, checkpoint.ckpt_step)
        return base, replace(checkpoint, load=None, ckpt_step=None, finetune=False)
    folder = find_checkpoint(checkpoint.load, checkpoint.ckpt_step)
    stored = {} if folder is None else read_run_config(str(folder))
    if AdapterFamily.name not in stored.get("families", {}):
        raise ValueError(
            f"{given}: --load {checkpoint.load} contains no run with adapters; add --finetune to begin "
            "such a run on its model"
        )
    return BaseCheckpoint.of_run(stored), checkpoint


def _families(
    settings: AdapterConfig,
    make_families: MakeFamilies[C],
    known: Mapping[str, type[Any]],
    stored: Mapping[str, Any],
    config: C,
    tokenizer: Tokenizer,
) -> list[Family]:
    """Returns the families set by flags and the families of the frozen model; only the former may train."""
    if "progressive" in stored:
        raise ValueError(
            f"--lora-rank {settings.lora_rank}: not supported for the model in --load, a rack (a "
            "grown model) whose stacks have their own adapters; export it with --merge-adapters, and import the result"
        )
    families = make_families(config, tokenizer)
    made = {family.name for family in families} | {AdapterFamily.name}
    families += [known[name].from_configuration(stored[name]) for name in stored if name not in made]
    for family in families:
        family.is_frozen = family.name in stored
    return [*families, AdapterFamily(settings, [family for family in families if not family.is_frozen])]


def _print_start(
    settings: AdapterConfig, base: BaseCheckpoint | None, stored: Mapping[str, Any], chunks: list[GPTModel]
) -> None:
    """Prints the adapters, the frozen model and the parameter counts; warns about a family over which adapters
    have been tested with tiny models only. Collective.
    """
    counts = count_parameters(chunks)
    over = "a model without values" if base is None else base.folder
    print_on_first_rank(
        f"LoRA adapters of rank {settings.lora_rank}, alpha {settings.lora_alpha:g} over {over}: "
        f"{counts['trainable']:,} parameters train, {counts['frozen']:,} are frozen"
    )
    for name in stored.keys() & _UNSHOWN.keys():
        print_on_first_rank(
            f"warning: adapters over {_UNSHOWN[name]} layers have been tested with tiny models only"
        )

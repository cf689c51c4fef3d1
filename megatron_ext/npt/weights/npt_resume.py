"""Going on with an NPT run: its whole configuration from a checkpoint, and other layers than it was made with.

--additional-steps N      N more steps with the configuration of the run; flags that are given win
--allow-layer-mismatch    other --npt-layers: NP weights of the layers that both have are taken
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from megatron_ext.config.command_line.field_checks import flag_name
from megatron_ext.config.command_line.flag_table import groups_of
from megatron_ext.config.serialize import group_from_dict
from megatron_ext.npt.modules.npt_module_config import NPTModuleConfig
from megatron_ext.npt.objective.curriculum import Stage, format_curriculum
from megatron_ext.npt.objective.npt_run_config import NPTRunConfig
from megatron_ext.npt.objective.npt_training_config import NPTTrainingConfig
from megatron_ext.npt.weights.state_files import MULTI_LAYER_STATE
from megatron_ext.platform import process_groups
from megatron_ext.training.checkpoint import checkpoint_files as files

_EXCLUSIVE = (
    ("global_batch_size", "gradient_accumulation_steps"),
    ("data_path", "train_data_path", "valid_data_path", "test_data_path"),
    ("lr_warmup_fraction", "lr_warmup_iters", "lr_warmup_samples"),
)
"""Flags of which a run has one kind: where one is given, the stored ones do not count."""

_OF_THE_PAST = (
    "base_checkpoint",
    "load",
    "ckpt_step",
    "finetune",
    "overwrite_checkpoints",
    "additional_steps",
    "load_npt_weights",
    "dry_run",
    "skip_train",
)
"""Flags that said how the earlier process began or ended; the checkpoint itself names its base."""


def stored_run(folder: Path, stored: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Defaults for a run that goes on for `--additional-steps`: all that the checkpoint's run was configured with.

    The curriculum is the one that the run had, also where its stages followed from the run's length.

    Args:
        folder: the checkpoint.
        stored: its `run_config`.
        given: field's name -> value, `additional_steps` among them.

    Raises:
        ValueError: it is less than 1, contradicts another flag, or the checkpoint is no NPT run's.
    """
    steps = given["additional_steps"]
    if steps < 1:
        raise ValueError(f"--additional-steps {steps}: must be at least 1")
    for name in ("train_iters", "train_samples", "num_epochs"):
        if name in given:
            raise ValueError(
                f"--additional-steps {steps}: cannot be given together with {flag_name(name)} {given[name]}"
            )
    if "npt" not in stored:
        raise ValueError(f"--additional-steps {steps}: {folder} holds no NPT run to go on with")
    left_out = {*_OF_THE_PAST, *(n for group in _EXCLUSIVE if given.keys() & set(group) for n in group)}
    sections = {
        section: {name: value for name, value in stored[section].items() if name not in left_out}
        for section in groups_of(NPTRunConfig)
    }
    done = files.read_json(folder / files.STATE)["progress"]["iteration"]
    sections["training"] |= {"train_iters": done + steps, "train_samples": None, "num_epochs": None}
    sections["npt"]["curriculum_stages"] = _curriculum(folder)
    sections["checkpoint"]["save"] = str(folder.parent)
    return sections


def resolved_layers(module: NPTModuleConfig, num_layers: int) -> str:
    """`--npt-layers` as numbers, so that `upper_half` and the same layers by number are the same."""
    return ",".join(map(str, module.layers(num_layers)))


def loads_what_fits(
    training: NPTTrainingConfig, module: NPTModuleConfig, stored: Mapping[str, Any], folder: Path
) -> bool:
    """Whether a run has other layers than the checkpoint that it goes on from; says so on rank 0.

    Args:
        training: the run's.
        module: the run's, its layers as numbers.
        stored: the checkpoint's `run_config`, of an NPT run.
        folder: the checkpoint.

    Raises:
        ValueError: it has, and `--allow-layer-mismatch` is not given; or no layer is in both.
    """
    settings = stored["families"]["npt"]["settings"]
    num_layers = stored["model"]["num_layers"]
    theirs = group_from_dict(NPTModuleConfig, settings, "np").layers(num_layers)
    ours = module.layers(num_layers)
    if ours == theirs:
        return False
    names = {"ours": ours, "theirs": theirs, "both": [n for n in ours if n in theirs]}
    shown = {name: ",".join(map(str, layers)) for name, layers in names.items()}
    message = f"--npt-layers {shown['ours']}: the checkpoint {folder} was made with {shown['theirs']}"
    if not training.allow_layer_mismatch:
        raise ValueError(f"{message}; --allow-layer-mismatch takes what fits")
    if not names["both"]:
        raise ValueError(f"{message}; no layer is in both")
    if process_groups.rank() == 0:
        print(
            f"warning: {message}; NP weights of layers {shown['both']} are taken, other layers and the optimizer "
            "start anew",
            flush=True,
        )
    return True


def _curriculum(folder: Path) -> str:
    files.verify_checkpoint(folder, names=[MULTI_LAYER_STATE])
    state = torch.load(folder / MULTI_LAYER_STATE, weights_only=True)
    stages = [
        Stage(
            name=stage["name"],
            steps=stage["steps"],
            attention_share=stage["attn_ratio"],
            mlp_share=stage["mlp_ratio"],
        )
        for stage in state["curriculum_schedule"]
    ]
    return format_curriculum(tuple(stages))

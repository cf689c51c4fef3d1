"""Resumes an NPT run with the configuration stored in its checkpoint, or with other layers.

--additional-steps N      trains N more steps with the stored configuration; flags on the command line override it
--allow-layer-mismatch    allows other --npt-layers than the stored ones; NP weights of common layers are loaded
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
from megatron_ext.npt.objective.npt_training_config import WEIGHTS, NPTTrainingConfig
from megatron_ext.npt.weights.state_files import MULTI_LAYER_STATE
from megatron_ext.platform import process_groups
from megatron_ext.training.checkpoint import checkpoint_files as files

_EXCLUSIVE = (
    ("global_batch_size", "gradient_accumulation_steps"),
    ("data_path", "train_data_path", "valid_data_path", "test_data_path"),
    ("lr_warmup_fraction", "lr_warmup_iters", "lr_warmup_samples"),
)
"""Groups of mutually exclusive flags: if the user gives one flag, all stored values of its group are ignored."""

_OF_THE_PAST = (
    "base_checkpoint",
    "load",
    "ckpt_step",
    "use_checkpoint_args",
    "finetune",
    "overwrite_checkpoints",
    "additional_steps",
    "load_npt_weights",
    "dry_run",
    "skip_train",
)
"""Flags whose stored values a resumed run ignores. Its base model is the one that the checkpoint names."""


def stored_run(folder: Path, stored: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the defaults of a run with `--additional-steps`: the configuration of the run that wrote the checkpoint.

    The curriculum is that of the earlier run, even if the length of its stages depended on the length of that run.

    Args:
        folder: the checkpoint's directory.
        stored: the `run_config` in the checkpoint.
        given: maps the name of each field set by the user to its value; includes `additional_steps`.

    Raises:
        ValueError: `--additional-steps` is less than 1 or contradicts another flag, or the checkpoint was not written
            by an NPT run.
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
        raise ValueError(
            f"--additional-steps {steps}: requires the checkpoint of an NPT run, but {folder} is not one"
        )
    left_out = {*_OF_THE_PAST, *(n for group in _EXCLUSIVE if given.keys() & set(group) for n in group)}
    sections = {
        section: {name: value for name, value in stored[section].items() if name not in left_out}
        for section in groups_of(NPTRunConfig)
        if section in stored  # a stored run lacks the section of rehearsals
    }
    done = files.read_json(folder / files.STATE)["progress"]["iteration"]
    sections["training"] |= {"train_iters": done + steps, "train_samples": None, "num_epochs": None}
    sections["npt"] |= earlier_losses(sections["npt"])
    if sections["npt"]["mode"] != "layer_parallel":  # that mode has no curriculum
        sections["npt"]["curriculum_stages"] = _curriculum(folder)
    sections["checkpoint"]["save"] = str(folder.parent)
    return sections


def resolved_layers(module: NPTModuleConfig, num_layers: int) -> str:
    """Returns `--npt-layers` as numbers, so that `upper_half` and a list of the same layers compare as equal."""
    return ",".join(map(str, module.layers(num_layers)))


def loads_what_fits(
    training: NPTTrainingConfig, module: NPTModuleConfig, stored: Mapping[str, Any], folder: Path
) -> bool:
    """Returns whether the run's NPT layers differ from the checkpoint's; if they do, rank 0 prints a warning.

    Args:
        training: the run's training configuration.
        module: the configuration of the run's NP components, with layers as numbers.
        stored: the `run_config` in the checkpoint, written by an NPT run.
        folder: the checkpoint's directory.

    Raises:
        ValueError: the layers differ and `--allow-layer-mismatch` is not given, or no layer is common to both.
    """
    settings = stored["families"]["npt"]["settings"]
    num_layers = stored["model"]["num_layers"]
    theirs = group_from_dict(NPTModuleConfig, settings, "np").layers(num_layers)
    ours = module.layers(num_layers)
    if ours == theirs:
        return False
    names = {"ours": ours, "theirs": theirs, "both": [n for n in ours if n in theirs]}
    shown = {name: ",".join(map(str, layers)) for name, layers in names.items()}
    message = f"--npt-layers {shown['ours']}: the checkpoint {folder} has NPT layers {shown['theirs']}"
    if not training.allow_layer_mismatch:
        raise ValueError(f"{message}; add --allow-layer-mismatch to load the common layers")
    if not names["both"]:
        raise ValueError(f"{message}; at least one layer must be common to both")
    if process_groups.rank() == 0:
        print(
            f"warning: {message}; loading NP weights for layers {shown['both']} only; other layers and the optimizer "
            "are re-initialized",
            flush=True,
        )
    return True


def earlier_losses(npt: Mapping[str, Any]) -> dict[str, Any]:
    """Returns loss settings that a run of an older version did not store, because they were that version's defaults.

    Older versions used the default weights of docs/design for both values of --layer-losses.

    Args:
        npt: the stored section; `layer_losses` is missing if the run is older than the flag, and None if the mode
            determined its value.
    """
    losses, mode = npt.get("layer_losses", "document"), npt["mode"]
    if "layer_losses" in npt and losses is not None:
        return {}
    weights = WEIGHTS["document"][mode]
    return {
        "layer_losses": losses or ("document" if mode == "equivalence" else "local"),
        **{name: weight for name, weight in weights.items() if npt.get(name) is None},
    }


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

"""Parts that model families add to a model in Hugging Face's format: tensors, sections of config.json, and code.

No class of transformers has these parts. The exported directory therefore contains a Python file with a class that
computes them. config.json names this class under `auto_map`, and transformers loads it with `trust_remote_code=True`.
The base model's `model_type` gets a prefix, so that transformers' own classes refuse the directory.
"""

import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from megatron_ext.interop.formats.weight_layout import Entry

PREFIX, CLASS_PREFIX = "megatron_ext_", "MegatronExt"

SECTIONS = ("per_layer_embedding", "npt")
"""Names of the sections of config.json that families add."""


@dataclass(frozen=True, kw_only=True)
class AddedParts:
    """The parts that model families add to one model."""

    entries: list[Entry]
    """Layout of the added tensors, in a checkpoint and in Hugging Face's format."""

    fields: dict[str, Any]
    """Sections of config.json."""

    code: Path
    """Python file with the model's classes."""

    bases: tuple[str, ...]
    """Base models, such as `Llama`, for which the file has a class."""

    tensors: Mapping[str, torch.Tensor] = field(default_factory=dict)
    """Tensors, by their names in a checkpoint, that replace the checkpoint's own or that the checkpoint lacks."""

    buffers: Mapping[str, torch.Tensor] = field(default_factory=dict)
    """Integer tensors of Hugging Face's format that a checkpoint holds in another form, by name."""

    def config(self, base: dict[str, Any]) -> dict[str, Any]:
        """Returns the config.json of the extended model, given the config.json of its base model.

        Raises:
            ValueError: there is no class for this base model.
        """
        name = str(base["architectures"][0]).removesuffix("ForCausalLM")
        if name not in self.bases:
            raise ValueError(
                f"PLE or NPT layers cannot be added to a base that is exported as {base['architectures'][0]}; "
                f"--architecture must be one of {', '.join(f'{known}ForCausalLM' for known in self.bases)}"
            )
        classes = {"AutoConfig": "Config", "AutoModelForCausalLM": "ForCausalLM"}
        return {
            **base,
            "architectures": [f"{CLASS_PREFIX}{name}ForCausalLM"],
            "model_type": PREFIX + base["model_type"],
            "auto_map": {
                auto: f"{self.code.stem}.{CLASS_PREFIX}{name}{suffix}" for auto, suffix in classes.items()
            },
            **self.fields,
        }

    def write_code(self, folder: Path) -> None:
        """Copies the file with the model's class."""
        shutil.copyfile(self.code, folder / self.code.name)


def base_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the base model's config.json, given an extended model's; the inverse of `AddedParts.config`."""
    names = [str(name).removeprefix(CLASS_PREFIX) for name in config.get("architectures") or []]
    kept = {name: value for name, value in config.items() if name not in (*SECTIONS, "auto_map")}
    return {**kept, "architectures": names, "model_type": str(config["model_type"]).removeprefix(PREFIX)}


def is_extended(config: Mapping[str, Any]) -> bool:
    """Returns whether a config.json describes a model with parts that model families have added."""
    return str(config.get("model_type")).startswith(PREFIX)

"""Reads and writes the files of NP weights: the factors, and the NPT configuration of the run that trained them.

    npt_weights.pt             the factors in torch's format, {key: tensor}; loaded with `weights_only`
    npt_weights.safetensors    the same factors, with the configuration in the file's metadata
    config.json                the configuration: NPT's settings under "np", and entries that the caller adds

The keys are those of `np_factors`. The .pt files described in docs/design/npt_sequential.md and
docs/design/npt_curriculum.md differ from these only in the names of the factors.
"""

import contextlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from megatron_ext.config.serialize import group_from_dict, group_to_dict
from megatron_ext.npt.modules.npt_module_config import NPTModuleConfig
from megatron_ext.training.checkpoint import checkpoint_files as files

STEM, CONFIG = "npt_weights", "config.json"
WEIGHTS = f"{STEM}.pt"
_FREE = frozenset({"np_init_scale", "np_init_strategy", "freeze_base", "npt_layers"})
"""Settings that do not change the meaning of the weights. `npt_layers` is one of them, because the keys contain the
layers.
"""


def write_np_weights(
    folder: Path,
    tensors: Mapping[str, torch.Tensor],
    settings: NPTModuleConfig,
    more: Mapping[str, Any] | None = None,
    stem: str = STEM,
) -> None:
    """Writes the three files described at the top of this module.

    Each file is written under another name first and then renamed, so that no file is ever partial.

    Args:
        folder: an existing directory.
        tensors: the factors, as returned by `gather_np_factors`.
        settings: NPT's configuration.
        more: further entries for `config.json`.
        stem: name of the weight files without suffix; they are `{stem}.pt` and `{stem}.safetensors`.

    Raises:
        OSError: a file could not be written.
    """
    config = {"np": group_to_dict(settings)}
    contiguous = {key: tensor.contiguous() for key, tensor in tensors.items()}
    weights, safe_weights = f"{stem}.pt", f"{stem}.safetensors"
    parts = {name: folder / f".{name}.part" for name in (weights, safe_weights, CONFIG)}
    files.write_tensors(parts[weights], contiguous)
    metadata = {"format": "pt", "np": json.dumps(config["np"])}
    files.write_safetensors_file(parts[safe_weights], contiguous, metadata)
    files.write_text(parts[CONFIG], json.dumps({**config, **(more or {})}, indent=1))
    files.digests(
        folder, [part.name for part in parts.values()]
    )  # computing the digests flushes the files to disk
    for name, part in parts.items():
        part.replace(folder / name)
    files.fsync_path(folder)


def read_np_weights(path: str, settings: NPTModuleConfig) -> dict[str, torch.Tensor]:
    """Reads NP weights and, if their configuration is known, checks that it agrees with `settings`.

    Args:
        path: a `.pt` or `.safetensors` file.
        settings: the run's configuration.

    Raises:
        OSError: the file cannot be read.
        ValueError: the file does not contain NP weights, or their form, target, scale, ... differ from `settings`.
    """
    tensors, config = read_np_weight_file(path)
    if config is not None:
        check_same_meaning(path, config, settings)
    return tensors


def check_same_meaning(path: str, stored: NPTModuleConfig, settings: NPTModuleConfig) -> None:
    """Checks that NP weights have the same meaning with the stored configuration and with the current settings.

    Raises:
        ValueError: a setting that changes the meaning differs; the message names `path` and the differences.
    """
    ours, theirs = (group_to_dict(config) for config in (settings, stored))
    differences = [
        f"{name} was {theirs[name]}, now {ours[name]}"
        for name in ours
        if name not in _FREE and ours[name] != theirs[name]
    ]
    if differences:
        raise ValueError(
            f"{path}: the NP weights were trained with another configuration: {'; '.join(differences)}"
        )


def read_np_weight_file(path: str) -> tuple[dict[str, torch.Tensor], NPTModuleConfig | None]:
    """Reads the tensors of a file, and their configuration from the same file or from `config.json` beside it.

    Raises:
        OSError: the file cannot be read.
        ValueError: the file does not contain NP weights.
    """
    settings, file = read_np_settings(path), Path(path)
    return _read_safe(file) if file.suffix == ".safetensors" else _read_pt(file), settings


def read_np_settings(path: str) -> NPTModuleConfig | None:
    """Reads only the configuration, from the file or from `config.json` beside it; None if neither contains one."""
    file = Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    config = _settings_of_safe(file) if file.suffix == ".safetensors" else None
    if config is None and (file.parent / CONFIG).is_file():
        config = files.read_json(file.parent / CONFIG).get("np")
    return group_from_dict(NPTModuleConfig, config, "np") if config is not None else None


def _read_pt(file: Path) -> dict[str, torch.Tensor]:
    try:
        tensors = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # torch may raise any type of error from a damaged file
        raise ValueError(f"{file}: cannot be read as a file of tensors ({type(error).__name__})") from None
    if not isinstance(tensors, dict) or not all(
        isinstance(value, torch.Tensor) for value in tensors.values()
    ):
        raise ValueError(f"{file}: must contain a dictionary of named tensors")
    return tensors


def _read_safe(file: Path) -> dict[str, torch.Tensor]:
    with _opened(file) as opened:
        return {key: opened.get_tensor(key) for key in list(opened.keys())}


def _settings_of_safe(file: Path) -> dict[str, Any] | None:
    with _opened(file) as opened:
        config = (opened.metadata() or {}).get("np")
    return json.loads(config) if config else None


@contextlib.contextmanager
def _opened(file: Path) -> Iterator[Any]:
    try:
        with safe_open(file, framework="pt") as opened:
            yield opened
    except SafetensorError as error:
        raise ValueError(f"{file}: cannot be read as a safetensors file ({error})") from None

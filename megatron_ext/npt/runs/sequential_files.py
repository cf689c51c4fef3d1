"""The files of a sequential run, which trains NPT layers one after the other (docs/design/npt_sequential.md):

    {checkpoint-dir}/training_info.json                     trained layers, layer in progress, base model, settings
    {checkpoint-dir}/accumulated_npt_weights.pt             NP factors of all trained layers, keys as in `np_factors`
    {checkpoint-dir}/accumulated_npt_weights.safetensors    the same factors and NPT's settings; read by a resumed run
    {checkpoint-dir}/config.json                            NPT's settings, for readers of the .pt file
    {checkpoint-dir}/load_model.py                          a module whose `load_model()` returns the trained model
    {checkpoint-dir}/layer_{i}_{timestamp}/checkpoints/     files of one layer: checkpoint-{step}/, final/npt_weights.pt

Each file is written under another name first and then renamed, so that no file is ever partial. A layer counts as
trained as soon as `training_info.json` names it; this file is written last, after the accumulated weights. If the run
is interrupted between the two, the accumulated weights contain a layer that `training_info.json` does not name. The
layer's weights are then ignored, and training the layer again gives the same weights.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from megatron_ext.config.serialize import group_in, group_to_dict
from megatron_ext.npt.modules.npt_module_config import NPTModuleConfig
from megatron_ext.npt.weights.np_weight_files import read_np_weight_file, write_np_weights
from megatron_ext.training.checkpoint import checkpoint_files as files

INFO, STEM, LOADER = "training_info.json", "accumulated_npt_weights", "load_model.py"
FORMAT = "megatron_ext.npt_sequential/1"
CHECKPOINTS = "checkpoints"
"""Name of the subdirectory of a layer's directory that contains the layer's checkpoints."""


@dataclass(frozen=True, kw_only=True)
class SequentialState:
    """Progress of a sequential run."""

    settings: NPTModuleConfig
    """NPT's configuration, with the requested layers."""

    base: dict[str, str]
    """The base checkpoint, as returned by `BaseCheckpoint.as_json`."""

    trained: dict[int, str] = field(default_factory=dict)
    """Maps each trained layer to the name of the layer's directory, in the order of training."""

    current: tuple[int, str] | None = None
    """The layer being trained and the name of its directory; None if no layer is being trained."""

    def started(self, layer: int, name: str) -> "SequentialState":
        """Returns the state in which `layer` is being trained."""
        return replace(self, current=(layer, name))

    def finished(self) -> "SequentialState":
        """Returns the state in which the layer that was being trained counts as trained."""
        assert self.current is not None
        layer, name = self.current
        return replace(self, trained={**self.trained, layer: name}, current=None)

    @property
    def settings_of_trained(self) -> NPTModuleConfig:
        """NPT's configuration with only the trained layers; at least one layer must be trained."""
        return self.settings.with_layers(self.trained)


def read_state(folder: Path) -> SequentialState | None:
    """Reads the state of the sequential run in a directory; returns None if no run has begun there.

    Raises:
        ValueError: `training_info.json` is damaged, or was written by another program.
        OSError: the file cannot be read.
    """
    path = folder / INFO
    if not path.is_file():
        return None
    info = files.read_json(path)
    if info.get("format") != FORMAT:
        raise ValueError(
            f"{path} was not written by a sequential run of this package; choose another --checkpoint-dir"
        )
    try:
        current = info["layer_in_progress"]
        return SequentialState(
            settings=group_in(NPTModuleConfig, info, "np"),
            base=info["base_checkpoint"],
            trained={
                layer: Path(info["layer_checkpoints"][str(layer)]).name for layer in info["trained_layers"]
            },
            current=(current["layer"], Path(current["checkpoint"]).name) if current else None,
        )
    except KeyError as error:
        raise ValueError(f"{path} is damaged: {error} is missing") from None
    except TypeError as error:
        raise ValueError(f"{path} is damaged: a value has the wrong type ({error})") from None


def write_state(folder: Path, state: SequentialState) -> None:
    """Replaces `training_info.json`."""
    paths = {str(layer): str(folder / name) for layer, name in state.trained.items()}
    in_progress = None
    if state.current is not None:
        in_progress = {"layer": state.current[0], "checkpoint": str(folder / state.current[1])}
    info = {
        "trained_layers": list(state.trained),
        "layer_checkpoints": paths,
        "layer_in_progress": in_progress,
        "format": FORMAT,
        "base_checkpoint": state.base,
        "np": group_to_dict(state.settings),
    }
    files.replace_text(folder / INFO, json.dumps(info, indent=2))


def read_accumulated(folder: Path, state: SequentialState) -> dict[str, torch.Tensor]:
    """Reads the NP factors of the trained layers.

    Raises:
        OSError: the file cannot be read.
        ValueError: the file is damaged, or a layer is missing.
    """
    if not state.trained:
        return {}
    path = folder / f"{STEM}.safetensors"
    tensors, _ = read_np_weight_file(str(path))
    chosen = {key: tensor for key, tensor in tensors.items() if layer_of_np_key(key) in state.trained}
    missing = set(state.trained) - {layer_of_np_key(key) for key in chosen}
    if missing:
        raise ValueError(
            f"{path}: the weights of layer {', '.join(map(str, sorted(missing)))} are missing, "
            f"although {INFO} lists the layer as trained"
        )
    return chosen


def write_accumulated(folder: Path, state: SequentialState, tensors: Mapping[str, torch.Tensor]) -> None:
    """Replaces the accumulated weights and the generated Python module that loads them.

    Args:
        folder: the run's directory.
        state: the state in which all layers of `tensors` are trained.
        tensors: the NP factors of these layers.
    """
    more = {"trained_layers": list(state.trained), "base_checkpoint": state.base}
    write_np_weights(folder, tensors, state.settings_of_trained, more, STEM)
    files.replace_text(
        folder / LOADER, _LOADER.format(base=state.base["path"], sha256=state.base["sha256"], stem=STEM)
    )


def layer_of_np_key(key: str) -> int:
    """Returns the layer that the key of an NP factor names; see `np_factors`.

    Raises:
        ValueError: the key has another format.
    """
    number = key.removeprefix("layer_").partition("_np.")[0]
    if not number.isdigit():
        raise ValueError(f"{key}: is not the key of an NP factor, such as layer_0_np.gate.W_down")
    return int(number)


_LOADER = '''"""Loads a base model with NPT layers that were trained one after the other. Written by pretrain_npt.py.

In Python, with this directory on the path:

    from load_model import load_model
    print(load_model().generate("The "))
"""

from pathlib import Path

from megatron_ext.npt import NPTModel

BASE = {base!r}
"""Checkpoint of the base model on which the layers were trained."""

BASE_SHA256 = {sha256!r}
"""Digest of the base checkpoint's manifest; a checkpoint with another digest is refused."""

WEIGHTS = Path(__file__).resolve().parent / "{stem}.safetensors"
"""NP factors of the trained layers, with the configuration that made them."""


def load_model(base: str = BASE) -> NPTModel:
    """Returns the base model with the trained layers converted.

    Args:
        base: where the base checkpoint is now, if it has been moved.
    """
    model = NPTModel.from_pretrained(base, sha256=BASE_SHA256)
    model.load_npt_weights(WEIGHTS)
    return model


if __name__ == "__main__":
    print(load_model())
'''

"""The language model inside a model of text, images and audio, such as Google's own Gemma 4 E2B.

Its configuration is the section `text_config` of config.json, and its tensors have the prefix `model.language_model.`
instead of `model.`; all other tensors are left out.
"""

from collections.abc import Mapping
from typing import Any

import torch

from megatron_ext.interop.formats.hf_files import SafetensorsFiles, TensorFiles
from megatron_ext.interop.formats.weight_layout import Shape

_TEXT = {
    "gemma4": ("gemma4_text", "Gemma4ForCausalLM"),
    "gemma3n": ("gemma3n_text", "Gemma3nForCausalLM"),
}
"""Maps the model_type of a whole model to model_type and architecture of its language model."""

_PREFIX = "model.language_model."


def has_text_part(config: Mapping[str, Any]) -> bool:
    """Returns whether a config.json is that of a model whose language model can be imported alone."""
    return config.get("model_type") in _TEXT and isinstance(config.get("text_config"), dict)


def text_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the config.json that the language model would have alone."""
    kind, architecture = _TEXT[config["model_type"]]
    of_whole = ("bos_token_id", "eos_token_id", "pad_token_id", "dtype", "torch_dtype", "tie_word_embeddings")
    shared = {name: config[name] for name in of_whole if name in config}
    return {**shared, **config["text_config"], "model_type": kind, "architectures": [architecture]}


class TextTensors:
    """The language model's tensors, by the names that they would have alone."""

    def __init__(self, files: SafetensorsFiles) -> None:
        self.folder, self.described_in = files.folder, files.described_in
        self._files: TensorFiles = files
        self._names = {_alone(name): name for name in files.names if _alone(name) is not None}
        self.left_out = len(files.names) - len(self._names)
        """Number of tensors of other parts of the model."""

    @property
    def names(self) -> set[str]:
        return {name for name in self._names if name is not None}

    def shape(self, name: str) -> Shape:
        """Returns the shape of a tensor, from the file's header."""
        return self._files.shape(self._names[name])

    def dtype(self, name: str) -> torch.dtype:
        """Returns the dtype in which `read` returns a tensor."""
        return self._files.dtype(self._names[name])

    def read(self, name: str) -> torch.Tensor:
        """Reads a tensor into CPU memory."""
        return self._files.read(self._names[name])

    def read_slice(self, name: str, dim: int, start: int, size: int) -> torch.Tensor:
        """Reads the entries `start` to `start + size` of dimension `dim` only."""
        return self._files.read_slice(self._names[name], dim, start, size)


def _alone(name: str) -> str | None:
    if name == "lm_head.weight":
        return name
    return f"model.{name.removeprefix(_PREFIX)}" if name.startswith(_PREFIX) else None

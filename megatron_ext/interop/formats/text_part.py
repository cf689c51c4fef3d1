"""Reads the language model inside a model of text, images and audio, such as Google's own Gemma 3 4B and Gemma 4 E2B.

The language model's configuration is the section `text_config` of config.json. Its tensors have the prefix
`model.language_model.` instead of `model.`, or `language_model.model.` in files of transformers 4. All other tensors
are ignored.
"""

from collections.abc import Mapping
from typing import Any

import torch

from megatron_ext.interop.formats.hf_files import SafetensorsFiles, TensorFiles
from megatron_ext.interop.formats.weight_layout import Shape

_TEXT = {
    "gemma3": ("gemma3_text", "Gemma3ForCausalLM"),
    "gemma4": ("gemma4_text", "Gemma4ForCausalLM"),
    "gemma3n": ("gemma3n_text", "Gemma3nForCausalLM"),
}
"""Maps the model_type of a whole model to the model_type and architecture of its language model."""

_PREFIXES = ("model.language_model.", "language_model.model.")
_HEADS = ("lm_head.weight", "language_model.lm_head.weight")

_DEFAULTS: dict[str, dict[str, int]] = {
    "gemma3": {
        "vocab_size": 262_208,
        "hidden_size": 2304,
        "intermediate_size": 9216,
        "num_hidden_layers": 26,
        "num_attention_heads": 8,
    }
}
"""Defaults of transformers' class for fields that Google's own files leave out."""


def has_text_part(config: Mapping[str, Any]) -> bool:
    """Returns whether a config.json describes a larger model whose language model can be imported alone."""
    return config.get("model_type") in _TEXT and isinstance(config.get("text_config"), dict)


def text_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the config.json of the language model alone."""
    kind, architecture = _TEXT[config["model_type"]]
    of_whole = ("bos_token_id", "eos_token_id", "pad_token_id", "dtype", "torch_dtype", "tie_word_embeddings")
    shared = {name: config[name] for name in of_whole if name in config}
    given = {**_DEFAULTS.get(config["model_type"], {}), **shared, **config["text_config"]}
    return {**given, "model_type": kind, "architectures": [architecture]}


class TextTensors:
    """The language model's tensors, by their names in a language model that is stored alone."""

    def __init__(self, files: SafetensorsFiles) -> None:
        self.folder, self.described_in = files.folder, files.described_in
        self._files: TensorFiles = files
        self._names = {alone: name for name in files.names if (alone := _alone(name)) is not None}
        self.left_out = len(files.names) - len(self._names)
        """Number of tensors of other parts of the model."""

    @property
    def names(self) -> set[str]:
        return set(self._names)

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
        """Reads only the entries `start` to `start + size - 1` of dimension `dim`."""
        return self._files.read_slice(self._names[name], dim, start, size)


def _alone(name: str) -> str | None:
    if name in _HEADS:
        return "lm_head.weight"
    for prefix in _PREFIXES:
        if name.startswith(prefix):
            return f"model.{name.removeprefix(prefix)}"
    return None

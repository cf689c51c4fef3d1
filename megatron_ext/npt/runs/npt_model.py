"""The Python API of NPT, for a single process. Example:

    model = NPTModel.from_pretrained("llama")
    model.load_npt_weights("run/final/npt_weights.safetensors")
    print(model.generate("The function returns"))

`from_pretrained` reads a Hugging Face model, a GGUF file, or a checkpoint of this project. It initializes the
process group that megatron-core needs, without `torchrun`; nothing is downloaded. For training use `pretrain_npt.py`.
Source: docs/design/npt_sequential.md.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from megatron_ext.config.groups.model_config import ModelConfig
from megatron_ext.config.groups.parallel_config import ParallelConfig
from megatron_ext.data.tokenizers import Tokenizer
from megatron_ext.inference.generation import Sampling, generate
from megatron_ext.inference.load_model import load_model
from megatron_ext.interop import load_hf, load_into
from megatron_ext.interop.gguf.gguf_metadata import is_gguf
from megatron_ext.models.build_model import build_model
from megatron_ext.models.gpt_model import GPTModel
from megatron_ext.npt.modules.npt_layers import deactivated, np_modules
from megatron_ext.npt.modules.npt_module_config import NPTModuleConfig
from megatron_ext.npt.npt_family import NPTFamily
from megatron_ext.npt.weights.conversion import convert, initialize_np_factors
from megatron_ext.npt.weights.np_factors import gather_np_factors, load_np_factors
from megatron_ext.npt.weights.np_weight_files import (
    STEM,
    check_same_meaning,
    read_np_weight_file,
    write_np_weights,
)
from megatron_ext.platform import process_groups
from megatron_ext.training.checkpoint.base_checkpoint import BaseCheckpoint
from megatron_ext.training.checkpoint.checkpoint_files import find_checkpoint
from megatron_ext.training.checkpoint.incomplete_checkpoints import is_hugging_face
from megatron_ext.training.interface.family_interface import Family

Prompt = str | Sequence[int]
"""A text, or token ids."""


class NPTConfig:
    """Names the layers to convert to NPT layers, and describes their NP components.

    Names and defaults are those of docs/design/npt_sequential.md.
    """

    def __init__(
        self,
        layers_to_convert: str | Sequence[int] = "upper_half",
        np_rank: int | str | Sequence[int] = 256,
        single_layer_mode: bool = False,
        **settings: Any,
    ) -> None:
        """Args:
        layers_to_convert: indices of layers from 0, or a value of --npt-layers.
        np_rank: rank of the weight update: a number, a list with one rank per layer, or a value of --np-rank.
        single_layer_mode: whether to require exactly one layer and the form outer_product, as `--mode single_layer`
            does.
        **settings: further fields of `NPTModuleConfig`; the default form is outer_product.

        Raises:
            ValueError: a value is not allowed, or a field in `settings` does not exist.
        """
        layers = layers_to_convert
        self.single_layer_mode = single_layer_mode
        known = {"np_form": "outer_product", **settings}
        unknown = sorted(known.keys() - NPTModuleConfig.__dataclass_fields__.keys())
        if unknown:
            raise ValueError(f"NPTConfig: unknown setting {unknown[0]}={known[unknown[0]]!r}")
        text = layers if isinstance(layers, str) else ",".join(map(str, layers))
        rank = np_rank if isinstance(np_rank, (int, str)) else ",".join(map(str, np_rank))
        self.module = NPTModuleConfig(npt_layers=text, np_rank=rank, **known)
        """The same settings in the form that the command line uses."""
        if single_layer_mode and self.module.np_form != "outer_product":
            raise ValueError(
                f"NPTConfig: single_layer_mode requires np_form='outer_product' (got {settings['np_form']})"
            )

    def __repr__(self) -> str:
        return f"NPTConfig({self.module})"


class NPTModel:
    """A base model whose layers can be converted to NPT layers."""

    def __init__(self, model: GPTModel, config: ModelConfig, tokenizer: Tokenizer, vocab_size: int) -> None:
        """Args:
        model: the whole model, unwrapped.
        config: the model's configuration.
        tokenizer: the model's tokenizer.
        vocab_size: number of token ids; further rows of the embedding are padding.
        """
        self.model = model.eval()
        self.config = config
        self.tokenizer = tokenizer
        self.vocab_size = vocab_size
        self.settings: NPTModuleConfig | None = None
        """NPT's configuration; None while no layer is converted."""

    @classmethod
    def from_pretrained(
        cls, path: str | Path, *, bf16: bool = False, sha256: str | None = None
    ) -> "NPTModel":
        """Loads a model from a local directory or a GGUF file.

        Args:
            path: a Hugging Face directory or a GGUF file of a model with a Llama architecture, a checkpoint of this
                project, or a directory of such checkpoints. For a checkpoint of an NPT run, the run's base model is
                loaded, and its layers are converted as in the run.
            bf16: whether to compute in bfloat16 instead of fp32.
            sha256: digest that the checkpoint must have, as stored in `training_info.json`; None accepts any
                checkpoint.

        Raises:
            FileNotFoundError: the path contains no model.
            ValueError: the model is damaged, its kind is not supported, or its digest differs from `sha256`.
        """
        if process_groups.world_size() > 1:
            raise ValueError(
                f"NPTModel supports only one process, but there are {process_groups.world_size()}; "
                "start it without torchrun"
            )
        imports = is_gguf(path) or is_hugging_face(Path(path))
        if not imports and find_checkpoint(str(path)) is not None:
            if sha256 is not None and BaseCheckpoint.find(str(path)).sha256 != sha256:
                raise ValueError(
                    f"{path}: this is not the requested checkpoint; its digest differs from `sha256`"
                )
            loaded = load_model(str(path), {NPTFamily.name: NPTFamily}, bf16=bf16)
            model = cls(loaded.model, loaded.config, loaded.tokenizer, loaded.tokenizer.vocab_size)
            families = [family for family in loaded.families if isinstance(family, NPTFamily)]
            model.settings = families[0].settings if families else None
            return model
        if not imports and not Path(path).is_dir():
            raise FileNotFoundError(f"{path}: no such directory; models are not downloaded")
        found = load_hf(path)
        parallel = ParallelConfig()
        process_groups.initialize(parallel, seed=1234)
        config = replace(found.model, hidden_dropout=0.0, attention_dropout=0.0)
        chunks = build_model(
            config, parallel, vocab_size=found.vocab_size, seed=1234, precision="bf16" if bf16 else "fp32"
        )
        load_into(chunks, found.state)
        return cls(chunks[0], config, found.tokenizer, found.vocab_size)

    @property
    def npt_layers(self) -> tuple[int, ...]:
        """Indices of the converted layers, from 0."""
        return tuple(np_modules([self.model]))

    def convert_to_npt(self, config: NPTConfig | NPTModuleConfig, *, seed: int = 1234) -> None:
        """Adds initialized NP components to layers; all other weights stay unchanged.

        Args:
            config: the layers to convert, and the form of their NP components.
            seed: seed of the initial values; a training run with the same seed gets the same values.

        Raises:
            ValueError: the configuration does not fit the model, or layers are already converted.
        """
        module = config.module if isinstance(config, NPTConfig) else config
        if self.settings is not None:
            raise ValueError(
                f"convert_to_npt: layers {self.npt_layers} are already converted; load the model again"
            )
        layers = module.layers(self.config.num_layers)
        if isinstance(config, NPTConfig) and config.single_layer_mode and len(layers) != 1:
            raise ValueError(f"NPTConfig: single_layer_mode requires one layer, not {len(layers)}")
        convert([self.model], module)
        initialize_np_factors([self.model], seed)
        self.settings = module

    def load_npt_weights(self, weights: str | Path | Mapping[str, torch.Tensor]) -> None:
        """Loads NP weights; if they do not fit, the model stays unchanged.

        Args:
            weights: a `.pt` or `.safetensors` file, or tensors by name. If no layer is converted yet, layers are
                converted as the configuration in the file says. Otherwise this configuration must equal the model's
                in all settings that change the meaning of the weights.

        Raises:
            OSError: the file cannot be read.
            ValueError: no layer is converted and there is no configuration, or the weights do not fit the model (the
                message lists the differences).
        """
        if isinstance(weights, Mapping):
            tensors, settings = dict(weights), None
        else:
            tensors, settings = read_np_weight_file(str(weights))
        if self.settings is not None:
            if settings is not None:
                check_same_meaning(str(weights), settings, self.settings)
            load_np_factors([self.model], tensors)
            return
        if settings is None:
            raise ValueError(
                "load_npt_weights: no layer is converted, and the weights have no configuration; "
                "call convert_to_npt first"
            )
        slots = [(layer, layer.feed_forward) for layer in self.model.decoder.layers]
        self.convert_to_npt(settings)
        try:
            load_np_factors([self.model], tensors)
        except ValueError:
            for layer, slot in slots:
                layer.feed_forward = slot
            self.settings = None
            raise

    def save_npt_weights(self, path: str | Path) -> None:
        """Writes the NP weights as NAME.pt and NAME.safetensors, and the configuration as `config.json`.

        Args:
            path: a directory (then NAME is npt_weights), or a file NAME.pt or NAME.safetensors.

        Raises:
            OSError: a file cannot be written.
            ValueError: no layer is converted.
        """
        if self.settings is None:
            raise ValueError("save_npt_weights: no layer is converted; call convert_to_npt first")
        is_file = Path(path).suffix in (".pt", ".safetensors")
        folder = Path(path).parent if is_file else Path(path)
        folder.mkdir(parents=True, exist_ok=True)
        tensors = gather_np_factors([self.model])
        write_np_weights(folder, tensors, self.settings, stem=Path(path).stem if is_file else STEM)

    def deactivated(self, layers: Collection[int] | None = None) -> AbstractContextManager[None]:
        """Returns a context in which the given layers, or all, run as base layers."""
        return deactivated([self.model], layers)

    def generate(
        self,
        prompt: Prompt,
        *,
        max_new_tokens: int = 64,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 0.0,
        seed: int = 1234,
    ) -> Any:
        """Continues the prompt and returns only the new part: a text for a text, token ids for token ids.

        The sampling settings are explained in `megatron_ext/inference/generation.py`.

        Raises:
            ValueError: the prompt is empty or too long, or a setting is out of range.
        """
        sampling = Sampling(
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            seed=seed,
            stop_tokens=(self.tokenizer.eod,),
        )
        new = generate(self.model, self._families(), [self._ids(prompt)], sampling, self.vocab_size)[0]
        return self.tokenizer.detokenize(new) if isinstance(prompt, str) else new

    @torch.no_grad()
    def logits(self, ids: torch.Tensor | Sequence[int]) -> torch.Tensor:
        """Returns logits [b, s, V] for token ids [b, s], or [s, V] for ids [s]."""
        tokens = torch.as_tensor(ids, dtype=torch.long, device=process_groups.device())
        batch = tokens.view(-1, tokens.size(-1))
        self.model.check_length(batch.size(1))
        positions = torch.arange(batch.size(1), device=batch.device).expand_as(batch)
        found: torch.Tensor = self.model(batch, positions, None)
        return found[..., : self.vocab_size].view(*tokens.shape, self.vocab_size)

    def loss(self, text: Prompt) -> float:
        """Returns the mean of -log p(token) over the tokens of a text, in nats.

        The text is read in windows of the model's sequence length; each token is predicted from the earlier tokens of
        its window. A window begins with the last token of the previous window.

        Raises:
            ValueError: the text has fewer than two tokens.
        """
        ids = self._ids(text)
        if len(ids) < 2:
            raise ValueError(f"loss: requires at least two tokens, got {len(ids)}")
        total = sum(self._window_losses(ids))
        return total / (len(ids) - 1)

    def perplexity(self, text: Prompt) -> float:
        """Returns exp(`loss`) of a text or token ids."""
        return float(torch.tensor(self.loss(text), dtype=torch.float64).exp())

    def __repr__(self) -> str:
        config, layers = self.config, ", ".join(map(str, self.npt_layers)) or "none"
        return f"NPTModel(layers={config.num_layers}, hidden_size={config.hidden_size}, converted={layers})"

    def _window_losses(self, ids: list[int]) -> Iterator[float]:
        length = self.config.seq_length
        for start in range(0, len(ids) - 1, length):
            window = ids[start : start + length + 1]
            log_p = self.logits(window[:-1]).double().log_softmax(-1)
            labels = torch.tensor(window[1:], device=log_p.device)
            yield -float(log_p.gather(-1, labels.unsqueeze(-1)).sum())

    def _ids(self, prompt: Prompt) -> list[int]:
        if isinstance(prompt, str):
            return self.tokenizer.begin(self.tokenizer.tokenize(prompt))
        return [int(token) for token in prompt]

    def _families(self) -> list[Family]:
        return [] if self.settings is None else [NPTFamily(self.settings)]


NPTLlamaModel = NPTModel
"""The name of `NPTModel` in docs/design/npt_sequential.md."""

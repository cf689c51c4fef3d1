"""`ProgressiveRackBuilder` of the Python API: adds stacks of layers one by one, and builds the model.

    builder = ProgressiveRackBuilder(config=config, building_mode="append", default_precision="full")
    builder.append_stack(n_blocks=4)
    builder.prepend_stack(n_blocks=4, precision="half")
    rack = builder.build_rack()

After training with `ProgressiveTrainer`, the model is built with its trained weights; stacks added after training are
initialized. One process is enough; with torchrun and the section `parallel` of the configuration, every process builds
its part of the model.
"""

from dataclasses import replace
from typing import Any

import torch.distributed as dist

from megatron_ext.data.tokenizers.byte_and_null import NullTokenizer
from megatron_ext.data.tokenizers.tokenizer import Tokenizer
from megatron_ext.lora.trainable_layers import prepare_layers
from megatron_ext.models.build_model import build_model
from megatron_ext.models.gpt_model import GPTModel
from megatron_ext.platform import process_groups
from megatron_ext.progressive.growth.rack import Rack, Stack
from megatron_ext.progressive.growth.trunk_strategy import Trains, settings_by_layer
from megatron_ext.progressive.objectives.stack_objective import reserve_mask_token
from megatron_ext.progressive.progressive_family import ProgressiveFamily, Trunk
from megatron_ext.progressive.settings.progressive_config import MODES, PRECISIONS
from megatron_ext.progressive.settings.stackwise_config import StackWiseConfig


def create_stack_from_config(stack_id: int, n_blocks: int | None, config: StackWiseConfig) -> Stack:
    """Creates the description of a stack (a group of layers) from a configuration.

    Args:
        stack_id: index of the stack in the order of creation, from 0.
        n_blocks: number of layers; None for the configuration's value.
        config: contains the precision, and the default of `n_blocks`.

    Raises:
        ValueError: the configuration is invalid; see `StackWiseConfig.validate`.
    """
    progressive = config.progressive_config(stack_id + 1)
    blocks = progressive.blocks_of(stack_id) if n_blocks is None else n_blocks
    return Stack(index=stack_id, n_blocks=_blocks(blocks), precision=progressive.precision_of(stack_id))


class ProgressiveRackBuilder:
    """Builds a rack (a model) stack by stack."""

    def __init__(
        self,
        *,
        config: StackWiseConfig | None = None,
        building_mode: str | None = None,
        default_precision: str | None = None,
        **model: Any,
    ) -> None:
        """Args:
        config: the whole configuration; pass either `config` or `model`.
        building_mode: position of stacks added by `add_stack`; None for the configuration's value.
        default_precision: precision of stacks that are added without a precision; None for the configuration's value.
        **model: `vocab_size`, `d_model`, `d_ff`, `n_heads` and other keys of the section `model`.

        Raises:
            ValueError: both `config` and `model` are given, or neither is; or a value is invalid.
        """
        if (config is None) == (not model):
            raise ValueError(
                "ProgressiveRackBuilder: pass either a config, or vocab_size, d_model, d_ff and n_heads"
            )
        self.config = config if config is not None else StackWiseConfig(model=model)
        self.config.validate()
        self.building_mode = _word("building_mode", building_mode, MODES)
        self.default_precision = _word("default_precision", default_precision, PRECISIONS)
        self.rack = Rack()
        self.frozen: dict[int, str] = {}
        """Maps indices of frozen stacks to `frozen` (by `freeze_trunk`) or `qlora` (by `freeze_all_but_qlora`)."""

        self.trained: Trunk | None = None
        """The checkpoint of the trained stacks; None before training."""

        self.chunks: list[GPTModel] = []
        """The chunks of the last model that was built."""

    @property
    def num_stacks(self) -> int:
        """Current number of stacks."""
        return len(self.rack.stacks)

    def append_stack(self, n_blocks: int | None = None, precision: str | None = None) -> Stack:
        """Adds a stack after all other stacks.

        Args:
            n_blocks: number of layers; None for the configuration's value.
            precision: full, half, bfloat16, nvfp4 or qlora; None for the builder's default or the configuration's
                value.

        Raises:
            ValueError: the precision is unknown, `n_blocks` is less than 1, or the rack already has `max_stacks`
                stacks.
        """
        return self._add("append", n_blocks, precision)

    def prepend_stack(self, n_blocks: int | None = None, precision: str | None = None) -> Stack:
        """Adds a stack before all other stacks; takes the arguments and raises the errors of `append_stack`."""
        return self._add("prepend", n_blocks, precision)

    def add_stack(self) -> Stack:
        """Adds a stack at the position of the building mode, with the default number of layers and precision."""
        index = self.num_stacks
        mode = self.building_mode
        if mode is None:
            mode = self.config.progressive_config(index + 1).mode_of(index) if index else "append"
        return self._add(mode, None, None)

    def freeze_trunk(self, trunk_indices: list[int]) -> None:
        """Freezes the given stacks, including their adapters.

        Raises:
            ValueError: a stack does not exist.
        """
        self._freeze(trunk_indices, "frozen")

    def freeze_all_but_qlora(self, trunk_indices: list[int]) -> None:
        """Freezes the given stacks except for their adapters.

        Raises:
            ValueError: a stack does not exist, or stacks have no adapters in this configuration.
        """
        if not self.config.progressive_config(max(1, self.num_stacks)).qlora_enabled:
            raise ValueError(
                "freeze_all_but_qlora requires qlora_enabled=True; without it, stacks have no adapters"
            )
        self._freeze(trunk_indices, "qlora")

    def build_rack(self, trains: Trains = "newest") -> GPTModel:
        """Builds this process's part of the model with all stacks; trained stacks get their trained weights.

        Args:
            trains: the parameters that require gradients: those trained with the newest stack (`newest`), `all`, or
                `none`.

        Raises:
            ValueError: there is no stack, or the parallel layout does not fit the model.
        """
        if not self.num_stacks:
            raise ValueError("build_rack: the rack has no stack; call append_stack first")
        config = self.config.run_config(self.num_stacks)
        parallel, training = config.parallel, config.training
        model = replace(config.model, num_layers=self.rack.num_layers)
        if not dist.is_initialized() or not self.chunks:
            process_groups.initialize(parallel, training.seed)
        family = ProgressiveFamily(
            config.progressive,
            self.rack,
            trains,
            trunk=self.trained,
            mask_token_id=self.mask_token_id,
            frozen=self.frozen,
            seed=training.seed,
        )
        self.chunks = build_model(
            model,
            parallel,
            vocab_size=self.vocab_size,
            seed=training.seed,
            precision=training.precision,
            extensions=[family.extension()],
        )
        family.prepare_model(self.chunks)
        return self.chunks[0]

    @property
    def mask_token_id(self) -> int | None:
        """Id of the mask token: the configured id, or the first unused id; None if the objective masks no tokens."""
        return self._vocabulary()[1]

    @property
    def vocab_size(self) -> int:
        """Number of token ids of the model, including an end-of-document token and a mask token."""
        return self._vocabulary()[0].vocab_size

    def _vocabulary(self) -> tuple[Tokenizer, int | None]:
        config = self.config.progressive_config(max(1, self.num_stacks))
        tokenizer = NullTokenizer(self.config.vocab_size)
        mask = reserve_mask_token(tokenizer, config.mask_token_id) if config.masks_tokens else None
        return tokenizer, mask

    def _add(self, mode: str, n_blocks: int | None, precision: str | None) -> Stack:
        index = self.num_stacks
        stack = create_stack_from_config(index, n_blocks, self.config)
        chosen = _word("precision", precision or self.default_precision, PRECISIONS) or stack.precision
        self.rack = self.rack.grown(mode, stack.n_blocks, chosen)
        return self.rack.newest

    def _freeze(self, indices: list[int], how: str) -> None:
        for index in indices:
            if not 0 <= index < self.num_stacks:
                raise ValueError(
                    f"trunk_indices {index}: must be from 0 to {self.num_stacks - 1}, the index of the newest stack"
                )
        self.frozen |= dict.fromkeys(indices, how)
        if self.chunks and self.chunks[0].config.num_layers == self.rack.num_layers:
            config = self.config.progressive_config(self.num_stacks)
            prepare_layers(self.chunks, settings_by_layer(self.rack, config, "newest", self.frozen))


def _word(name: str, value: str | None, choices: tuple[str, ...]) -> str | None:
    if value is not None and value not in choices:
        raise ValueError(f"{name} {value}: must be one of {', '.join(choices)}")
    return value


def _blocks(n_blocks: int) -> int:
    if n_blocks < 1:
        raise ValueError(f"n_blocks {n_blocks}: must be at least 1")
    return n_blocks

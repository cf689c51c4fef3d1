"""megatron-core's GPTModel with auxiliary inputs: what families need beside token ids, on every pipeline stage.

    stage in    hidden states and travelling streams (the first stage starts them from the word embedding)
    stage       family modules turn auxiliary inputs and travelling streams into the streams of this stage's layers
    run_layers  layers may be passed over: a forward pass may end at a layer, or start there from known hidden states
    stage out   hidden states joined with the travelling streams; the last stage returns logits or losses

Shapes: tokens [b, s], hidden states [s, b, h] ([s/t, b, h] under sequence parallel), losses [b, s], logits [b, s, V/t].
Without streams the forward pass is megatron-core's own, to the bit.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel as EngineGPTModel

from megatron_ext.config.groups.model_config import check_fits_window
from megatron_ext.models.auxiliary_inputs import AuxiliaryInputs
from megatron_ext.models.model_extension import StageInfo, StageModule
from megatron_ext.models.ops.cross_entropy import cross_entropy

WORD_EMBEDDING = "word_embedding"
"""Name of the travelling stream that holds the word embedding as the first layer gets it, [s, b, h]."""

HIDDEN_STATES = "hidden_states"
"""Side input: what `GPTModel.run_layers` starts from, [s, b, h] ([s/t, b, h] under sequence parallel)."""


class GPTModel(EngineGPTModel):
    """megatron-core's model, one pipeline chunk of it, with the families' stage modules."""

    def __init__(
        self,
        *args: Any,
        auxiliary: AuxiliaryInputs,
        stage: StageInfo,
        sliding_window: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.sliding_window = sliding_window
        self.auxiliary = auxiliary
        self.stage = stage
        self.stage_module_names: list[str] = []
        self._received: dict[str, torch.Tensor] = {}
        self._starts_from_known = False
        self._runs_none = False

    def add_stage_module(self, name: str, module: StageModule) -> None:
        """Registers a family's module under its own attribute, so that its parameters are named `{name}.*`."""
        setattr(self, name, module)
        self.stage_module_names.append(name)
        # In the order of use, by which the engine gathers parameters ahead of the forward pass.
        for later in ("decoder", "output_layer"):
            if later in self._modules:
                self._modules[later] = self._modules.pop(later)

    def check_length(self, length: int, asked: str | None = None) -> None:
        """Raises `ValueError` for sequences that the model cannot be run on.

        Args:
            length: tokens of a sequence, those in a KV cache and those still to be generated included.
            asked: the flags and values that ask for it.
        """
        check_fits_window(self.sliding_window, length, asked or f"a sequence of {length} tokens")
        if asked and length > self.max_sequence_length and self.position_embedding_type == "learned_absolute":
            raise ValueError(f"{asked}: exceeds the model's {self.max_sequence_length} positions")

    def set_input_tensor(self, input_tensor: Any) -> None:
        """Takes what the stage before has joined, [k * s, b, h], and splits it."""
        tensor = input_tensor[0] if isinstance(input_tensor, list) else input_tensor
        if tensor is not None:
            tensor, self._received = self.auxiliary.split(tensor)
        super().set_input_tensor(tensor)

    def forward(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        attention_mask: torch.Tensor | None,
        auxiliary_inputs: dict[str, torch.Tensor] | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """One stage.

        Args:
            input_ids: [b, s].
            position_ids: [b, s].
            attention_mask: [b, 1, s, s], True where forbidden, or None for plain causal attention.
            auxiliary_inputs: the families' batch fields by name.
            **kwargs: as in megatron-core (`labels` [b, s], `inference_context`, `runtime_gather_output`, ...).

        Returns:
            Losses [b, s] or logits on the last stage, else what `AuxiliaryInputs.join` gives.
        """
        travelling, self._received = self._received, {}
        auxiliary_inputs = auxiliary_inputs or {}
        recomputes = self.training and self.config.recompute_granularity == "full"
        if self.pre_process and (self.stage_module_names or self.auxiliary.travels or recomputes):
            embedding = self.embedding(input_ids=input_ids, position_ids=position_ids)
            for name in self.stage_module_names:
                embedding = getattr(self, name).embed(embedding, auxiliary_inputs)
            if recomputes and torch.is_grad_enabled() and not embedding.requires_grad:
                # Under a frozen embedding: a recomputed layer gets gradients only if its input does.
                embedding.requires_grad_()
            kwargs["decoder_input"] = embedding
            travelling = {WORD_EMBEDDING: embedding}
        if self._starts_from_known:
            kwargs |= self._known_start(auxiliary_inputs[HIDDEN_STATES], recomputes)
        streams = dict(travelling)
        for name in self.stage_module_names:
            streams |= getattr(self, name)(auxiliary_inputs, travelling)
        packed = self.auxiliary.pack(streams) if self.auxiliary.reaches_layers else None
        if packed is not None:
            kwargs["extra_block_kwargs"] = {"context": packed}
        output = super().forward(input_ids, position_ids, attention_mask, **kwargs)
        if self._runs_none and not self.stage.is_last:
            output = output.clone()  # a stage frees what it has sent, and this is what it has received
        return output if self.stage.is_last else self.auxiliary.join(output, streams)

    def run_layers(self, start: int = 0, end: int | None = None) -> None:
        """From now on runs the layers of `range(start, end)` only (numbers over the whole model); all by default.

        Where it starts later than at layer 0, the chunk that holds layer `start` takes the hidden states that this
        layer reads from the auxiliary input `HIDDEN_STATES`; chunks before it send on what they get.
        """
        for layer in self.decoder.layers:
            number = layer.layer_number - 1
            layer.skipped = number < start or (end is not None and number >= end)
        self._starts_from_known = start > 0 and start in self.stage.layer_numbers
        self._runs_none = all(layer.skipped for layer in self.decoder.layers)

    def _known_start(self, hidden_states: torch.Tensor, recomputes: bool) -> dict[str, torch.Tensor]:
        """Puts known hidden states in the place of the stage's input."""
        if self.pre_process:
            if recomputes and torch.is_grad_enabled():
                hidden_states = hidden_states.detach().requires_grad_()
            return {"decoder_input": hidden_states}
        self.decoder.set_input_tensor(_Replace.apply(self.decoder.input_tensor, hidden_states))
        return {}

    @contextlib.contextmanager
    def without_head(self) -> Iterator[None]:
        """Within it the last stage returns what the output layer would read, [s, b, h]; no labels then."""
        self.post_process = False
        try:
            yield
        finally:
            self.post_process = self.stage.is_last

    def logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Logits [s, b, V/t] of what the output layer reads, [s, b, h] ([s/t, b, h]); on the last stage only."""
        tied = self.share_embeddings_and_output_weights
        weight = self.shared_embedding_or_output_weight() if tied else None
        return self.output_layer(hidden_states, weight=weight)[0]

    def compute_language_model_loss(self, labels: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """Losses [b, s] of labels [b, s] under logits [s, b, V/t]."""
        if self.pg_collection.tp.size() > 1:
            return super().compute_language_model_loss(labels, logits)
        return cross_entropy(logits, labels.transpose(0, 1)).transpose(0, 1)


class _Replace(torch.autograd.Function):
    """(received, known) -> known. The stage before, which waits for a gradient of what it sent, gets zeros."""

    @staticmethod
    def forward(ctx: Any, received: torch.Tensor, known: torch.Tensor) -> torch.Tensor:
        return known.clone()

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        return torch.zeros_like(grads[0]), None

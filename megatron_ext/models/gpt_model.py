"""megatron-core's GPTModel, extended by auxiliary inputs that model families need on every stage besides token ids.

A stream is a tensor that accompanies the hidden states; a travelling stream is also sent to the next pipeline stage.
The parts of a stage's forward pass:

    input       takes hidden states and travelling streams; the first stage starts both from the word embedding
    families    stage modules compute the streams of this stage's layers from auxiliary inputs and travelling streams
    AltUp       builds several residual streams from the first layer's input; see `gemma3n.altup`
    layers      run all layers, or only a range (`run_layers`), which can start from known hidden states
    output      joins hidden states with the travelling streams; the last stage returns logits or losses

Shapes: tokens [b, s], hidden states [s, b, h] ([s/t, b, h] under sequence parallel), losses [b, s], logits [b, s, V/t].
Under context parallelism `s` is the number of this rank's tokens of each sequence.
With AltUp the hidden states between layers have s rows for each residual stream.
Without streams the forward pass equals megatron-core's to the bit.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel as EngineGPTModel
from megatron.core.transformer.enums import AttnMaskType

from megatron_ext.config.groups.model_config import check_fits_window
from megatron_ext.models.auxiliary_inputs import AuxiliaryInputs
from megatron_ext.models.gemma3n.altup import RotaryOfStreams, StartStreams
from megatron_ext.models.model_extension import StageInfo, StageModule
from megatron_ext.models.ops.attention import SDPAttention
from megatron_ext.models.ops.cross_entropy import cross_entropy
from megatron_ext.models.ops.documents.document_bounds import (
    document_lengths,
    forbidden_pairs,
    packed_documents,
)
from megatron_ext.models.ops.plain_strides import plain_strides
from megatron_ext.models.ops.positions.rotary_by_length import RotaryByLength

WORD_EMBEDDING = "word_embedding"
"""Name of the travelling stream that holds the first layer's input, the word embedding [s, b, h]."""

HIDDEN_STATES = "hidden_states"
"""Name of the auxiliary input from which `GPTModel.run_layers` starts.

Shape [s, b, h] ([s/t, b, h] under sequence parallel).
"""


class GPTModel(EngineGPTModel):
    """One pipeline chunk of megatron-core's GPT model, with the model families' stage modules."""

    def __init__(
        self,
        *args: Any,
        auxiliary: AuxiliaryInputs,
        stage: StageInfo,
        sliding_window: int | None = None,
        embedding_multiplier: float = 1.0,
        logit_divisor: float = 1.0,
        final_logit_softcapping: float | None = None,
        altup_streams: int | None = None,
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
        self.altup_start: StartStreams | None = None
        if self.pre_process and altup_streams is not None:
            self.altup_start = StartStreams(self.config, altup_streams)
            self._keep_order_of_use()
        # The engine transposes the word embedding and the gradient of the logits.
        if self.pre_process:
            self.embedding.register_forward_hook(lambda _, __, output: plain_strides(output))
            if embedding_multiplier != 1.0:
                self.embedding.register_forward_hook(
                    lambda _, __, output: output * output.new_tensor(embedding_multiplier)
                )
        if self.post_process:
            self.output_layer.register_forward_hook(
                lambda _, __, output: (plain_strides(output[0]), output[1])
            )
            if logit_divisor != 1.0:
                self.output_layer.register_forward_hook(
                    lambda _, __, output: (output[0] / logit_divisor, output[1])
                )
            if final_logit_softcapping is not None:
                self.output_layer.register_forward_hook(
                    lambda _, __, output: (softcapped(output[0], final_logit_softcapping), output[1])
                )

    def add_stage_module(self, name: str, module: StageModule) -> None:
        """Registers a model family's module under its own attribute, so that its parameters are named `{name}.*`."""
        setattr(self, name, module)
        self.stage_module_names.append(name)
        self._keep_order_of_use()

    def _keep_order_of_use(self) -> None:
        # The engine prefetches sharded parameters in the order of the modules, so keep the order in which they are
        # used.
        for later in ("decoder", "output_layer"):
            if later in self._modules:
                self._modules[later] = self._modules.pop(later)

    def check_length(self, length: int, asked: str | None = None) -> None:
        """Checks that the model supports sequences of `length` tokens.

        Args:
            length: tokens per sequence, including those in a KV cache and those still to be generated.
            asked: flags and values that request this length; the error begins with them.

        Raises:
            ValueError: `length` exceeds the sliding window or the learned positions.
        """
        check_fits_window(self.sliding_window, length, asked or f"a sequence of {length} tokens")
        if asked and length > self.max_sequence_length and self.position_embedding_type == "learned_absolute":
            raise ValueError(
                f"{asked}: a sequence of {length} tokens exceeds the model's {self.max_sequence_length} positions; "
                "use a shorter prompt or fewer new tokens"
            )

    @property
    def _rotary(self) -> torch.nn.Module | None:
        rotary: torch.nn.Module | None = getattr(self, "rotary_pos_emb", None)
        return rotary.rotary if isinstance(rotary, RotaryOfStreams) else rotary

    @property
    def cache_limit(self) -> int | None:
        """Number of tokens beyond which a KV cache is invalid, because `longrope` then rotates all positions with other
        frequencies; None without such a limit.
        """
        rotary = self._rotary
        if not isinstance(rotary, RotaryByLength) or rotary.model.rope_scaling_type != "longrope":
            return None
        return rotary.model.rope_original_max_position_embeddings

    def set_input_tensor(self, input_tensor: Any) -> None:
        """Stores the tensor from the previous stage, [k * s, b, h], split into hidden states and streams."""
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
        document_bounds: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Runs this stage.

        Args:
            input_ids: [b, s].
            position_ids: [b, s].
            attention_mask: [b, 1, s, s], True where attention is forbidden, or None for plain causal attention.
            auxiliary_inputs: the batch fields that model families add, by name.
            document_bounds: [D + 1], the beginnings of the documents in these sequences (`ops.documents`), or None.
            **kwargs: as in megatron-core (`labels` [b, s], `inference_context`, `runtime_gather_output`, ...).

        Returns:
            On the last stage losses [b, s] or logits [b, s, V/t]; on other stages hidden states and travelling
            streams in one tensor [k * s, b, h].
        """
        if isinstance(self._rotary, RotaryByLength):
            lengths = None
            if document_bounds is not None:
                lengths = document_lengths(document_bounds, input_ids.size(1) * self.pg_collection.cp.size())
            self._rotary.begin(kwargs.get("inference_context"), input_ids.size(1), lengths)
        travelling, self._received = self._received, {}
        auxiliary_inputs = auxiliary_inputs or {}
        recomputes = self.training and self.config.recompute_granularity == "full"
        has_further = bool(self.stage_module_names) or self.auxiliary.travels or self.altup_start is not None
        if self.pre_process and (has_further or recomputes):
            embedding = self.embedding(input_ids=input_ids, position_ids=position_ids)
            for name in self.stage_module_names:
                embedding = getattr(self, name).embed(embedding, auxiliary_inputs)
            if recomputes and torch.is_grad_enabled() and not embedding.requires_grad:
                # Needed if the embedding is frozen: a recomputed layer gets gradients only if its input requires
                # them.
                embedding.requires_grad_()
            kwargs["decoder_input"] = embedding if self.altup_start is None else self.altup_start(embedding)
            travelling = {WORD_EMBEDDING: embedding, **self.auxiliary.unwritten(embedding)}
        if self._starts_from_known:
            kwargs |= self._known_start(auxiliary_inputs[HIDDEN_STATES], recomputes)
        streams = dict(travelling)
        for name in self.stage_module_names:
            streams |= getattr(self, name)(auxiliary_inputs, travelling)
        if document_bounds is not None:
            assert attention_mask is None, "pass attention_mask or document_bounds, not both"
            attention_mask, more = self._attention_of_documents(document_bounds, input_ids)
            kwargs |= more
        packed = self.auxiliary.pack(streams) if self.auxiliary.reaches_layers else None
        if packed is not None:
            kwargs["extra_block_kwargs"] = {"context": packed}
        output = super().forward(input_ids, position_ids, attention_mask, **kwargs)
        if self._runs_none and not self.stage.is_last:
            # If no layer ran, the output is the received tensor itself. Copy it, because the schedule frees a tensor
            # after sending it.
            output = output.clone()
        if self.stage.is_last:
            return output
        output, written = self.auxiliary.without_written(output)
        return self.auxiliary.join(output, streams | written)

    def _attention_of_documents(
        self, bounds: torch.Tensor, tokens: torch.Tensor
    ) -> tuple[torch.Tensor | None, dict[str, Any]]:
        """Returns a mask and further arguments of the engine's `forward`, one of which keeps documents apart.

        The mask is for megatron-core's own attention, whose scores are [s, s] anyway; otherwise it is None.
        """
        attention = self.decoder.layers[0].self_attention
        if isinstance(attention.core_attention, SDPAttention):
            length = tokens.size(1) * self.pg_collection.cp.size()
            return None, {"packed_seq_params": packed_documents(bounds, length)}
        causal = attention.attn_mask_type is AttnMaskType.causal
        return forbidden_pairs(bounds, tokens.size(1), causal=causal).to(tokens.device), {}

    def run_layers(self, start: int = 0, end: int | None = None) -> None:
        """Restricts later forward passes to the layers of `range(start, end)`; by default all layers run.

        Args:
            start: first layer, numbered over the whole model from 0. If it is above 0, the chunk that holds the layer
                reads its input from the auxiliary input `HIDDEN_STATES`; earlier chunks pass on their input.
            end: first layer that does not run; None for the end of the model.
        """
        for layer in self.decoder.layers:
            number = layer.layer_number - 1
            layer.skipped = number < start or (end is not None and number >= end)
        self._starts_from_known = start > 0 and start in self.stage.layer_numbers
        self._runs_none = all(layer.skipped for layer in self.decoder.layers)

    def _known_start(self, hidden_states: torch.Tensor, recomputes: bool) -> dict[str, torch.Tensor]:
        """Replaces the stage's input by known hidden states; returns extra arguments for the engine's `forward`."""
        if self.pre_process:
            if recomputes and torch.is_grad_enabled():
                hidden_states = hidden_states.detach().requires_grad_()
            return {"decoder_input": hidden_states}
        self.decoder.set_input_tensor(_Replace.apply(self.decoder.input_tensor, hidden_states))
        return {}

    @contextlib.contextmanager
    def without_head(self) -> Iterator[None]:
        """Inside this context, the last stage returns the output layer's input, [s, b, h]; labels are not allowed."""
        self.post_process = False
        try:
            yield
        finally:
            self.post_process = self.stage.is_last

    def logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Applies the output layer, on the last stage only.

        Args:
            hidden_states: output of the final norm, [s, b, h] ([s/t, b, h] under sequence parallel).

        Returns:
            Logits [s, b, V/t].
        """
        tied = self.share_embeddings_and_output_weights
        weight = self.shared_embedding_or_output_weight() if tied else None
        return self.output_layer(hidden_states, weight=weight)[0]

    def compute_language_model_loss(self, labels: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """Returns the losses [b, s] for labels [b, s] and logits [s, b, V/t]."""
        if self.pg_collection.tp.size() > 1:
            return super().compute_language_model_loss(labels, logits)
        return cross_entropy(logits, labels.transpose(0, 1)).transpose(0, 1)


def softcapped(logits: torch.Tensor, limit: float) -> torch.Tensor:
    """Returns `limit * tanh(logits / limit)`."""
    return torch.tanh(logits / limit) * limit


class _Replace(torch.autograd.Function):
    """Returns `known`; sends zeros as the gradient of `received`, because the previous stage waits for a gradient."""

    @staticmethod
    def forward(ctx: Any, received: torch.Tensor, known: torch.Tensor) -> torch.Tensor:
        return known.clone()

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        return torch.zeros_like(grads[0]), None


@contextlib.contextmanager
def only_layers(chunks: list[GPTModel], *, start: int = 0, end: int | None = None) -> Iterator[None]:
    """Returns a context in which only the layers of `range(start, end)` run; see `GPTModel.run_layers`.

    Args:
        chunks: a rank's model chunks, unwrapped.
        start: first layer, numbered over the whole model from 0.
        end: first layer that does not run; None for the end of the model.
    """
    for chunk in chunks:
        chunk.run_layers(start, end)
    try:
        yield
    finally:
        for chunk in chunks:
            chunk.run_layers()

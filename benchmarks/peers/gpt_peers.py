"""The models that benchmarks/gpt.py compares ours with: Hugging Face's Llama, and megatron-core's own GPTModel.

Each function returns two functions: forward and backward on the next batch, and a whole training step.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch

from megatron_ext.config.groups.model_config import ModelConfig
from megatron_ext.config.groups.optimizer_config import OptimizerSettings
from megatron_ext.config.groups.parallel_config import ParallelConfig
from megatron_ext.models.engine_config import NO_CUDA_GRAPHS

Passes = tuple[Callable[[], None], Callable[[], None]]
Batches = Iterator[dict[str, torch.Tensor]]


def hugging_face(
    shape: ModelConfig, vocab_size: int, bf16: bool, device: torch.device, batches: Batches
) -> Passes:
    """Builds Hugging Face's Llama with SDPA and torch's fused AdamW, which in bf16 updates bf16 weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    settings = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.resolved_ffn_hidden_size,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_attention_heads,
        max_position_embeddings=shape.seq_length,
        tie_word_embeddings=False,
        use_cache=False,
        attn_implementation="sdpa",
    )
    with device:
        model = LlamaForCausalLM(settings).to(torch.bfloat16 if bf16 else torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.01, fused=True)

    def forward_backward() -> None:
        tokens = next(batches)["tokens"].to(device)
        optimizer.zero_grad()
        model(input_ids=tokens, labels=tokens).loss.backward()

    def step() -> None:
        forward_backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    return forward_backward, step


def mcore(shape: ModelConfig, vocab_size: int, bf16: bool, device: torch.device, batches: Batches) -> Passes:
    """Builds megatron-core's model without Transformer Engine, run by its own schedule and trained by our optimizer."""
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron.core.pipeline_parallel import get_forward_backward_func

    from megatron_ext.platform.process_groups import initialize
    from megatron_ext.training.engine.data_parallel import wrap_model
    from megatron_ext.training.engine.optimizer import build_optimizer

    parallel = ParallelConfig()
    initialize(parallel, seed=1)
    with device:  # its norms are built on torch's default device
        chunk: Any = GPTModel(
            _engine_config(shape, bf16, fused=device.type == "cuda"),
            get_gpt_layer_local_spec(normalization=shape.normalization),
            vocab_size=vocab_size,
            max_sequence_length=shape.seq_length,
            position_embedding_type=shape.position_embedding_type,
            share_embeddings_and_output_weights=False,
        )
    wrapped = wrap_model([chunk], parallel, precision="bf16" if bf16 else "fp32")
    optimizer = build_optimizer(
        OptimizerSettings(lr=1e-4, clip_grad=1.0), parallel, wrapped, [], precision="bf16" if bf16 else "fp32"
    )

    def forward(iterator: Batches, model: Any) -> Any:
        batch = {name: value.to(device) for name, value in next(iterator).items()}
        losses = model(batch["tokens"], batch["position_ids"], None, labels=batch["labels"])
        return losses, lambda out: (out.float().mean(), {})

    def forward_backward() -> None:
        wrapped[0].zero_grad_buffer()
        optimizer.zero_grad()
        get_forward_backward_func()(
            forward_step_func=forward,
            data_iterator=batches,
            model=wrapped,
            num_microbatches=1,
            seq_length=shape.seq_length,
            micro_batch_size=1,  # of the pipeline's messages, of which one stage sends none
            forward_only=False,
        )

    def step() -> None:
        forward_backward()
        optimizer.step()

    return forward_backward, step


def _engine_config(shape: ModelConfig, bf16: bool, fused: bool) -> Any:
    from megatron.core.transformer.transformer_config import TransformerConfig

    dtype = torch.bfloat16 if bf16 else torch.float32
    return TransformerConfig(
        num_layers=shape.num_layers,
        hidden_size=shape.hidden_size,
        ffn_hidden_size=shape.resolved_ffn_hidden_size,
        num_attention_heads=shape.num_attention_heads,
        normalization=shape.normalization,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=bf16,
        # Its attention stores all scores. As Megatron-LM advises, the backward pass computes them again.
        recompute_granularity="selective",
        recompute_modules=["core_attn"],
        bias_activation_fusion=fused,
        bias_dropout_fusion=fused,
        masked_softmax_fusion=False,  # a kernel of Apex
        gradient_accumulation_fusion=False,
        **NO_CUDA_GRAPHS,
    )

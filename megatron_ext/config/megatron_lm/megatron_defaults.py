"""Megatron-LM's defaults that differ from the defaults here; `--defaults megatron` uses them."""

from collections.abc import Mapping
from typing import Any

TAKEN: Mapping[str, Mapping[str, Any]] = {
    "model": {
        "normalization": "LayerNorm",
        "position_embedding_type": "learned_absolute",
        "bias_gelu_fusion": True,
    },
    "training": {"calculate_per_token_loss": False},
    "logging": {"log_throughput": False, "log_validation_ppl": False},
}
"""The defaults set by `--defaults megatron`, by config group and field."""

KEPT = {
    "attention_backend": ("auto", "sdpa computes the same attention with torch's kernels"),
    "distributed_backend": ("nccl", "auto is NCCL if there is a GPU"),
    "eval_interval": (
        "None",
        "with it, Megatron-LM ends with an error while it counts the validation samples",
    ),
    "gradient_accumulation_fusion": (
        "True",
        "it requires Transformer Engine and a GPU, and sums the same gradients",
    ),
    "micro_batch_size": ("None", "Megatron-LM requires the flag"),
    "num_query_groups": ("1", "it has an effect only with --group-query-attention, see below"),
    "overlap_p2p_communication": ("True", "it changes only speed, and has not run on NCCL yet"),
    "profile_ranks": ("[]", "it stands for all ranks, the default here"),
    "recompute_modules": ("None", "it stands for core_attn, the default here"),
    "split": ("None", "it stands for 969, 30, 1, the default here"),
    "tiktoken_pattern": ("None", "it stands for v2, the default here"),
    "tokenizer_type": ("None", "pretrain_gpt.py sets GPT2BPETokenizer, the default here"),
    "transformer_impl": (
        "transformer_engine",
        "auto is Transformer Engine if it is installed and there is a GPU",
    ),
}
"""Fields that keep their default here with --defaults megatron. Maps each to Megatron-LM's default and the reason."""


def megatron_defaults(given: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Returns Megatron-LM's defaults by config group and field.

    Args:
        given: values that flags and the YAML file set, by field name.

    Raises:
        ValueError: --num-query-groups was given without --group-query-attention, so that Megatron-LM would ignore it.
    """
    found = {group: dict(values) for group, values in TAKEN.items()}
    if any(given.get(name) for name in ("swiglu", "squared_relu", "disable_bias_linear")):
        del found["model"][
            "bias_gelu_fusion"
        ]  # the flag chooses a kernel for GELU (tanh approximation) with biases
    groups = given.get("num_query_groups")
    if given.get("group_query_attention"):
        found["model"]["num_query_groups"] = 1
    elif groups is not None:
        raise ValueError(
            f"--num-query-groups {groups}: Megatron-LM ignores it without --group-query-attention; "
            "with --defaults megatron, give both or none"
        )
    return found

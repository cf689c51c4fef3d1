#!/usr/bin/env python3
"""Measures a checkpoint's perplexity on an indexed dataset; one process, or several under `torchrun`."""

import json
from dataclasses import dataclass
from pathlib import Path

from megatron_ext.config.cli import parse, run_main
from megatron_ext.config.flags import check_at_least


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """What to evaluate, on what, and how it is cut."""

    load: str
    """Directory of checkpoints, or one checkpoint's own."""

    data_path: tuple[str, ...]
    """Prefixes of indexed datasets, each evaluated by itself."""

    ckpt_step: int | None = None
    """Step to load, instead of the newest complete one."""

    unigram_from: str | None = None
    """Prefix of the training data: also print the cross-entropy of its token frequencies on the evaluated data."""

    micro_batch_size: int = 4
    """Windows at a time on each process."""

    max_tokens: int | None = None
    """At most so many tokens of each dataset."""

    seq_length: int | None = None
    """Tokens of a window. Without it the training's sequence length."""

    tensor_model_parallel_size: int | None = None
    """Processes that share every layer's matrices. Without it all that `torchrun` has started."""

    pipeline_model_parallel_size: int = 1
    """Processes among which the layers are split."""

    bf16: bool = False
    """Compute in bfloat16."""

    output: str | None = None
    """JSON file for the result."""

    def __post_init__(self) -> None:
        check_at_least(self, 1, "micro_batch_size", "max_tokens", "seq_length", "tensor_model_parallel_size")
        check_at_least(self, 1, "pipeline_model_parallel_size")


def main() -> None:
    """Evaluates and prints one line a dataset on rank 0."""
    config: EvaluateConfig = parse(
        EvaluateConfig,
        prog="tools/evaluate.py",
        description="Perplexity of a checkpoint on indexed datasets.",
        example="torchrun --nproc-per-node 2 tools/evaluate.py --load runs/ckpt --data-path held_out_text_document",
    )["config"]
    from megatron_ext.data.manifest import check_dataset
    from megatron_ext.data.unigram import unigram_cross_entropy
    from megatron_ext.families import FAMILIES
    from megatron_ext.inference.loading import load_model
    from megatron_ext.inference.perplexity import evaluate_perplexity
    from megatron_ext.platform import distributed

    for prefix in (*config.data_path, *([config.unigram_from] if config.unigram_from else [])):
        check_dataset(prefix)
    loaded = load_model(
        config.load,
        FAMILIES,
        ckpt_step=config.ckpt_step,
        tensor_model_parallel_size=config.tensor_model_parallel_size,
        pipeline_model_parallel_size=config.pipeline_model_parallel_size,
        bf16=config.bf16,
    )
    results = {}
    for prefix in config.data_path:
        check_dataset(prefix, loaded.tokenizer.fingerprint())
        found = evaluate_perplexity(
            [loaded.model],
            loaded.families,
            prefix,
            sequence_length=config.seq_length or loaded.config.seq_length,
            micro_batch_size=config.micro_batch_size,
            max_tokens=config.max_tokens,
        )
        results[prefix] = {"loss": found.loss, "perplexity": found.perplexity, "tokens": found.tokens}
        line = f"{prefix}: loss {found.loss:.4f} nats a token, perplexity {found.perplexity:.2f}"
        line += f", {found.tokens:,} tokens"
        if config.unigram_from is not None:
            entropy = unigram_cross_entropy(config.unigram_from, prefix, loaded.tokenizer.vocab_size)
            results[prefix]["unigram_cross_entropy"] = entropy
            line += f"; unigram cross-entropy {entropy:.4f}"
        if distributed.rank() == 0:
            print(line, flush=True)
    if config.output is not None and distributed.rank() == 0:
        Path(config.output).write_text(json.dumps(results, indent=2) + "\n")
    distributed.shutdown()


if __name__ == "__main__":
    run_main(main)

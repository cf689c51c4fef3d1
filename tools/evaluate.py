#!/usr/bin/env python3
"""Measures the perplexity of a model on indexed datasets, in one process or in several under `torchrun`."""

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING

from megatron_ext.config.command_line.field_checks import check_at_least
from megatron_ext.config.command_line.parse import parse, run_main
from megatron_ext.config.groups.inference_config import LoadConfig

if TYPE_CHECKING:
    from megatron_ext.inference.load_model import LoadedModel
    from megatron_ext.inference.perplexity import Perplexity


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(LoadConfig):
    """Flags for the checkpoint and data to evaluate, and for the parallel layout."""

    load: str
    """Directory of checkpoints, or the directory of one checkpoint."""

    data_path: tuple[str, ...]
    """Prefixes of indexed datasets; each is evaluated separately."""

    unigram_from: str | None = None
    """Prefix of the training data, from which two baselines are computed: the cross-entropy of its unigram
    distribution, and (if the model reports an accuracy) the accuracy of always predicting its most frequent token.
    """

    micro_batch_size: int = 4
    """Number of windows (sequences of --seq-length tokens) that each process evaluates at a time."""

    max_tokens: int | None = None
    """Evaluate only this many tokens of each dataset. Default: all."""

    seq_length: int | None = None
    """Tokens per window. Default: the sequence length used in training."""

    output: str | None = None
    """JSON file to write the result to."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(self, 1, "micro_batch_size", "max_tokens", "seq_length")


def main() -> None:
    """Evaluates the datasets, and prints one line for each on rank 0."""
    config: EvaluateConfig = parse(
        EvaluateConfig,
        prog="tools/evaluate.py",
        description="Perplexity of a checkpoint on indexed datasets.",
        example="torchrun --nproc-per-node 2 tools/evaluate.py --load runs/ckpt --data-path held_out_text_document",
    )
    from megatron_ext.data.corpora.unigram import most_frequent_token
    from megatron_ext.data.indexed.manifest import check_dataset
    from megatron_ext.data.indexed.same_file import refuse_same_dataset
    from megatron_ext.inference.load_model import load_model
    from megatron_ext.platform import process_groups
    from megatron_ext.registry.known_families import FAMILIES
    from megatron_ext.registry.loaded_path import check_holds_checkpoint
    from megatron_ext.reports.report_files import check_report_writable, write_report

    if config.output is not None:
        check_report_writable("--output", config.output)
    refuse_same_dataset("--data-path", config.data_path)
    for prefix in (*config.data_path, *([config.unigram_from] if config.unigram_from else [])):
        check_dataset(prefix)
    check_holds_checkpoint("--load", config.load, config.ckpt_step)
    loaded = load_model(
        config.load,
        FAMILIES,
        **config.load_options(),
    )
    if process_groups.rank() == 0:
        print(f"{loaded.folder}: step {loaded.step}", flush=True)
    length = config.seq_length or loaded.config.seq_length
    loaded.model.check_length(length, f"--seq-length {length}")
    train = config.unigram_from
    guess = None if train is None else most_frequent_token(train, loaded.tokenizer.vocab_size)
    results = {}
    for prefix in config.data_path:
        check_dataset(prefix, loaded.tokenizer)
        entry, line = _evaluate(config, loaded, prefix, length, guess)
        results[prefix] = {**entry, "step": loaded.step}
        if process_groups.rank() == 0:
            print(f"{prefix}: {line}", flush=True)
    if config.output is not None and process_groups.rank() == 0:
        write_report(config.output, json.dumps(results, indent=2) + "\n")
    process_groups.shutdown()


def _evaluate(
    config: EvaluateConfig, loaded: "LoadedModel", prefix: str, length: int, guess: int | None
) -> tuple[dict[str, float], str]:
    """Evaluates a dataset; returns its entry in the JSON file and its printed line. Every rank must call this."""
    from megatron_ext.data.corpora.unigram import unigram_cross_entropy
    from megatron_ext.data.files.console import token_progress
    from megatron_ext.inference.perplexity import evaluate_perplexity, held_out_tokens
    from megatron_ext.platform.process_groups import rank
    from megatron_ext.progressive.objectives.unmasking import objective_of
    from megatron_ext.registry.known_families import window_begin

    begin = window_begin(loaded)
    total = held_out_tokens(prefix, config.max_tokens, begin)
    with token_progress(prefix, total, shown=rank() == 0) as progress:
        found = evaluate_perplexity(
            [loaded.model],
            loaded.families,
            prefix,
            sequence_length=length,
            micro_batch_size=config.micro_batch_size,
            max_tokens=config.max_tokens,
            guess=guess,
            begin=begin,
            progress=progress,
        )
    train, vocab_size = config.unigram_from, loaded.tokenizer.vocab_size
    entropy = None if train is None else unigram_cross_entropy(train, prefix, vocab_size)
    objective = objective_of(loaded.families)
    counted = counted_tokens(found.tokens, total, None if objective is None else objective.kind)
    entry, line = _report(found, entropy, counted)
    if begin is not None:
        line += f"; every window begins with {loaded.tokenizer.inv_vocab[begin.token]}"
    return entry, line


def counted_tokens(tokens: int, total: int, objective: str | None) -> str:
    """Describes the tokens that an evaluation counts.

    Args:
        tokens: number of counted tokens, or the sum of their weights.
        total: number of tokens that were read.
        objective: the training objective of a progressive model; None for other models.
    """
    if objective == "mlm":
        return f"{tokens:,} masked tokens of {total:,}"
    return f"{tokens:,} tokens" + (
        " by weight (only masked tokens count)" if objective == "diffusion" else ""
    )


def _report(
    found: "Perplexity", unigram_cross_entropy: float | None, counted: str
) -> tuple[dict[str, float], str]:
    """Returns a dataset's entry in the JSON file, and its printed line."""
    entry = {"loss": found.loss, "perplexity": found.perplexity, "tokens": found.tokens}
    line = f"loss {found.loss:.4f} nats per token, perplexity {found.perplexity:.2f}, {counted}"
    further = {name.replace("/", "_"): value for name, value in found.values.items()}
    if further and found.guess_accuracy is not None:
        further["unigram_accuracy"] = found.guess_accuracy
    if unigram_cross_entropy is not None:
        further["unigram_cross_entropy"] = unigram_cross_entropy
    for name, value in further.items():
        line += f"; {name.replace('_', ' ').replace('cross ', 'cross-')} {value:.4f}"
    return entry | further, line


if __name__ == "__main__":
    run_main(main)

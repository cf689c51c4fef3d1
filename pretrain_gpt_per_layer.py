#!/usr/bin/env python3
"""Pretrains a GPT with per-layer embeddings (PLE), in one process or in many under `torchrun`.

torchrun --nproc-per-node 2 pretrain_gpt_per_layer.py --use-per-layer-embedding --num-layers 4 ...
"""

from collections.abc import Mapping
from typing import Any

from megatron_ext.config.command_line.parse import parse, run_main
from megatron_ext.config.run_config import TRAINING
from megatron_ext.per_layer.per_layer_config import PerLayerConfig

EXAMPLE = (
    "torchrun --nproc-per-node 2 pretrain_gpt_per_layer.py --tensor-model-parallel-size 2 --num-layers 4 "
    "--hidden-size 256 --num-attention-heads 4 --seq-length 256 --use-per-layer-embedding --per-layer-hidden-size 32 "
    "--micro-batch-size 4 --train-iters 200 --lr 1e-3 --data-path corpus_text_document "
    "--tokenizer-type HuggingFaceTokenizer --tokenizer-model tokenizer.json"
)


def main() -> int:
    """Parses the command line and trains; returns the exit code."""
    configs = parse(
        {**TRAINING, "per_layer": PerLayerConfig},
        prog="pretrain_gpt_per_layer.py",
        description="Pretrain a GPT with per-layer embeddings (PLE). With --load, the checkpoint provides the model's "
        "shape and the tokenizer; the flags marked as required below are then optional.",
        example=EXAMPLE,
        defaults=_defaults,
    )
    # Imported late: torch and mcore take seconds to import; `--help` and errors in the flags should appear at once.
    from megatron_ext.training.pretrain import pretrain

    return pretrain(configs, _families)


def _defaults(given: Mapping[str, str]) -> dict[str, Any]:
    """Defaults from the checkpoint in --load: model, tokenizer and per-layer settings."""
    if "load" not in given:
        return {}
    from megatron_ext.training.checkpoint.run_directory import stored_sections

    return stored_sections(given, ("model", "tokenizer", "per_layer"))


def _families(configs: dict[str, Any], tokenizer: Any) -> list[Any]:
    from megatron_ext.per_layer.per_layer_family import PerLayerFamily

    config: PerLayerConfig = configs["per_layer"]
    return [PerLayerFamily.from_tokenizer(config, tokenizer)] if config.use_per_layer_embedding else []


if __name__ == "__main__":
    run_main(main)

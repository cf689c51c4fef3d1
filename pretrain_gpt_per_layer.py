#!/usr/bin/env python3
"""Pretrains a GPT model with per-layer embeddings (PLE), in one process or in several under `torchrun`.

torchrun --nproc-per-node 2 pretrain_gpt_per_layer.py --use-per-layer-embedding --num-layers 4 ...
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from megatron_ext.config.command_line.parse import Found, parse, run_main
from megatron_ext.per_layer.per_layer_config import PerLayerRunConfig, inherited
from megatron_ext.rehearsal.rehearse import run_or_rehearse

if TYPE_CHECKING:
    from megatron_ext.data.tokenizers import Tokenizer
    from megatron_ext.training.interface.family_interface import Family

EXAMPLE = (
    "torchrun --nproc-per-node 2 pretrain_gpt_per_layer.py --tensor-model-parallel-size 2 --num-layers 4 "
    "--hidden-size 256 --num-attention-heads 4 --seq-length 256 --use-per-layer-embedding --per-layer-hidden-size 32 "
    "--micro-batch-size 4 --train-iters 200 --lr 1e-3 --data-path corpus_text_document "
    "--tokenizer-type HuggingFaceTokenizer --tokenizer-model tokenizer.json"
)


def main() -> int:
    """Parses the command line and trains; returns the exit code."""
    config = parse(
        PerLayerRunConfig,
        prog="pretrain_gpt_per_layer.py",
        description="Pretrain a GPT with per-layer embeddings (PLE). With --load, the checkpoint provides the model's "
        "shape and the tokenizer; the flags marked as required below are then optional.",
        example=EXAMPLE,
        find=_find,
    )
    return run_or_rehearse(config, _run)


def _run(config: PerLayerRunConfig) -> int:
    # Imported late: torch and mcore take seconds to import; `--help` and errors in the flags should appear at once.
    from megatron_ext.training.pretrain import pretrain

    if config.adapters.lora_rank is None:
        return pretrain(config, _families)
    from megatron_ext.adapters.adapter_run import train_adapters
    from megatron_ext.registry.known_families import FAMILIES

    return train_adapters(config, config.adapters, _families, FAMILIES)


def _find(given: Mapping[str, Any]) -> list[Found]:
    """Returns defaults from the --load checkpoint: model, tokenizer, per-layer settings and adapters."""
    if not given.keys() & {"load", "use_checkpoint_args"}:
        return []
    from megatron_ext.training.checkpoint.run_directory import stored_defaults

    stored = stored_defaults(given, ("model", "tokenizer", "per_layer", "adapters"))
    return [inherited(found, given) for found in stored]


def _families(config: PerLayerRunConfig, tokenizer: "Tokenizer") -> list["Family"]:
    from megatron_ext.per_layer.per_layer_family import PerLayerFamily

    own = config.per_layer
    if not own.use_per_layer_embedding:
        return []
    return [PerLayerFamily.from_tokenizer(own, tokenizer, mock_data=config.data.mock_data)]


if __name__ == "__main__":
    run_main(main)

"""Trains PLE and NPT layers in one model with the megatron-core that Python finds, saves, loads, and generates.

python engine_run.py FOLDER CHECKPOINT     prints the results as one line of JSON
"""

import json
import sys
from typing import Any

from megatron_ext.config.groups.checkpoint_config import CheckpointConfig
from megatron_ext.config.groups.parallel_config import ParallelConfig
from megatron_ext.inference.generation import Sampling, generate
from megatron_ext.npt.modules.npt_module_config import NPTModuleConfig
from megatron_ext.npt.npt_family import NPTFamily
from megatron_ext.per_layer.per_layer_config import PerLayerConfig
from megatron_ext.per_layer.per_layer_family import PerLayerFamily
from megatron_ext.testing.checkpoint_runs import RunSettings, TinyRun
from megatron_ext.testing.tiny_training import VOCAB_SIZE
from megatron_ext.training.interface.family_interface import Family

PARALLEL = ParallelConfig(use_distributed_optimizer=True, overlap_grad_reduce=True)
STEPS = 2
PROMPTS = [[5, 17, 80], [3], [9, 9, 2, 41, 60, 7]]


def families() -> list[Family]:
    """PLE in all layers, NP components in every second one."""
    per_layer = PerLayerConfig(
        use_per_layer_embedding=True, per_layer_hidden_size=8, per_layer_strategy="identity"
    )
    plastic = NPTModuleConfig(npt_layers="1,3", np_rank=4, freeze_base=False)
    return [PerLayerFamily(per_layer, VOCAB_SIZE), NPTFamily(plastic)]


def trained(folder: str) -> dict[str, Any]:
    """Trains, saves a checkpoint to `folder` halfway, and generates."""
    run = TinyRun(_settings(CheckpointConfig(save=folder)))
    losses = run.train(STEPS)
    run.save()
    losses += run.train(STEPS)
    sampling = Sampling(max_new_tokens=8, temperature=0)
    return {
        "losses": losses,
        "tokens": generate(run.stepper.models[0], run.stepper.families, PROMPTS, sampling, VOCAB_SIZE),
    }


def continued(checkpoint: str) -> list[float]:
    """Loads a checkpoint and trains on; returns the losses."""
    return TinyRun(_settings(CheckpointConfig(load=checkpoint))).train(STEPS)


def _settings(checkpoint: CheckpointConfig) -> RunSettings:
    return RunSettings(parallel=PARALLEL, checkpoint=checkpoint, make_families=families)


if __name__ == "__main__":
    import megatron.core

    result = {
        "version": megatron.core.__version__,
        **trained(sys.argv[1]),
        "continued": continued(sys.argv[2]),
    }
    print(json.dumps(result))

"""This rank's random number generators as tensors and numbers: torch, CUDA, numpy, Python, the engine's named streams.

The engine keeps one stream that tensor-parallel ranks share and one of each rank's own (attention dropout); both are
part of the state, so that a run that is resumed draws the same dropout masks as one that never stopped.
"""

import hashlib
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

from megatron_ext.platform.distributed import seed_streams
from megatron_ext.training.checkpoint_files import write_tensors


def capture() -> dict[str, Any]:
    """The state of all generators; tensors, numbers and dictionaries of them."""
    legacy: Any = np.random.get_state(legacy=False)
    version, words, gauss = random.getstate()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(),
        "engine": dict(get_cuda_rng_tracker().get_states()),
        "numpy": torch.from_numpy(legacy["state"]["key"].astype(np.int64)),
        "numpy_rest": [legacy["state"]["pos"], legacy["has_gauss"], legacy["gauss"]],
        "python": torch.tensor(words, dtype=torch.int64),
        "python_rest": [version, gauss],
    }


def restore(state: dict[str, Any]) -> None:
    """Takes what `capture` gave."""
    torch.set_rng_state(state["torch"])
    torch.cuda.set_rng_state(state["cuda"])
    get_cuda_rng_tracker().set_states(dict(state["engine"]))
    position, has_gauss, gauss = state["numpy_rest"]
    key = state["numpy"].numpy().astype(np.uint32)
    np.random.set_state(
        {
            "bit_generator": "MT19937",
            "state": {"key": key, "pos": position},
            "has_gauss": has_gauss,
            "gauss": gauss,
        }
    )
    version, python_gauss = state["python_rest"]
    random.setstate((version, tuple(state["python"].tolist()), python_gauss))


def file_name(rank: int) -> str:
    """Where a rank's generators are kept inside a checkpoint."""
    return f"rng/rank_{rank:05d}.pt"


def save(path: Path) -> None:
    """Writes the state of all generators to a file."""
    write_tensors(path, capture())


def load(path: Path) -> None:
    """Reads what `save` wrote."""
    restore(torch.load(path, weights_only=True))


def reseed(seed: int, iteration: int) -> None:
    """Seeds all generators from the run's seed and the step, so that no earlier dropout mask comes again.

    Args:
        seed: the run's seed.
        iteration: the step at which the run goes on.
    """
    digest = hashlib.sha256(f"{seed}:{iteration}".encode()).digest()
    own = seed_streams(int.from_bytes(digest[:4], "little") // 2)
    random.seed(own)
    np.random.seed(own % 2**32)

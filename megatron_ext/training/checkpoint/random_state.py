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

from megatron_ext.platform import process_groups
from megatron_ext.platform.collectives import gather_or_raise
from megatron_ext.platform.process_groups import seed_streams
from megatron_ext.training.checkpoint.checkpoint_files import write_tensors

_CUDA_STATE_BYTES = 16
"""Size of a CUDA generator's state (seed and offset); a CPU generator's, of its table, has 5056 bytes."""


def random_state_now() -> dict[str, Any]:
    """The state of all generators; tensors, numbers and dictionaries of them."""
    legacy: Any = np.random.get_state(legacy=False)
    version, words, gauss = random.getstate()
    return {
        "device": process_groups.device().type,
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(),
        "engine": dict(get_cuda_rng_tracker().get_states()),
        "numpy": torch.from_numpy(legacy["state"]["key"].astype(np.int64)),
        "numpy_rest": [legacy["state"]["pos"], legacy["has_gauss"], legacy["gauss"]],
        "python": torch.tensor(words, dtype=torch.int64),
        "python_rest": [version, gauss],
    }


def restore_random_state(state: dict[str, Any]) -> None:
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
    write_tensors(path, random_state_now())


def load(path: Path) -> str | None:
    """Takes what `save` wrote; collective.

    Args:
        path: of this rank's file.

    Returns:
        Why nothing is taken, on any rank: a file is missing, or the generators are those of another kind of device.
    """
    if not all(gather_or_raise(path.is_file)):
        return "the checkpoint holds none"
    state: dict[str, Any] = {}

    def read() -> str:
        state.update(torch.load(path, weights_only=True))
        return _device_of(state)

    kinds = gather_or_raise(read)
    ours = process_groups.device().type
    if any(kind != ours for kind in kinds):
        return f"they are those of {' and '.join(sorted(set(kinds)))}, the run is on {ours}"
    restore_random_state(state)
    return None


def _device_of(state: dict[str, Any]) -> str:
    """The kind of device, cpu or cuda, whose generators these are; files of before it was noted tell by the size."""
    return str(state.get("device") or ("cuda" if state["cuda"].numel() == _CUDA_STATE_BYTES else "cpu"))


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

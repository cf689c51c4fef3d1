"""Saves and restores this rank's random generators: torch, CUDA, numpy, Python, and megatron-core's named streams.

megatron-core has one random stream that all tensor-parallel ranks share, and one per rank (for attention dropout). Both
are saved, so that a resumed run samples the same dropout masks as a run that was never interrupted.
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
"""Size of a CUDA generator's state (seed and offset); a CPU generator's state, a table, has 5056 bytes."""


def random_state_now() -> dict[str, Any]:
    """Returns the state of all generators, as tensors, numbers, and dictionaries of tensors and numbers."""
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
    """Restores the state that `random_state_now` returned."""
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
    """Returns the path of a rank's file inside a checkpoint."""
    return f"rng/rank_{rank:05d}.pt"


def save(path: Path) -> None:
    """Writes the state of all generators to a file."""
    write_tensors(path, random_state_now())


def load(path: Path) -> str | None:
    """Restores the state that `save` wrote; collective.

    Args:
        path: this rank's file.

    Returns:
        None if every rank has restored its state; otherwise the reason why no rank did: a file is missing, or was
        written on another kind of device.
    """
    if not all(gather_or_raise(path.is_file)):
        return "the checkpoint does not contain their state"
    state: dict[str, Any] = {}

    def read() -> str:
        state.update(torch.load(path, weights_only=True))
        return _device_of(state)

    kinds = gather_or_raise(read)
    ours = process_groups.device().type
    if any(kind != ours for kind in kinds):
        return f"the checkpoint's states are for {' and '.join(sorted(set(kinds)))}, but the run uses {ours}"
    restore_random_state(state)
    return None


def _device_of(state: dict[str, Any]) -> str:
    """Returns the kind of device, cpu or cuda, to which a state belongs."""
    # Files of the first version do not name the device; the size of the state shows it.
    return str(state.get("device") or ("cuda" if state["cuda"].numel() == _CUDA_STATE_BYTES else "cpu"))


def reseed(seed: int, iteration: int) -> None:
    """Seeds all generators from the run's seed and a step, so that no earlier dropout mask is repeated.

    Args:
        seed: the run's seed.
        iteration: the step from which the run resumes.
    """
    digest = hashlib.sha256(f"{seed}:{iteration}".encode()).digest()
    own = seed_streams(int.from_bytes(digest[:4], "little") // 2)
    random.seed(own)
    np.random.seed(own % 2**32)

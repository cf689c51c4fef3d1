"""The activation cache: stores a frozen trunk's output for each sample, so that later epochs need not run the trunk.

The trunk is the layers below the stack that is trained. The key of an entry is

    key = digest(fingerprint of the trunk, the trunk's inputs for the sample: masked tokens, positions, time step)

A key identifies the sample, its masks and the trunk. Other weights, masks or data give other keys, so no entry can be
out of date. A training step always starts at the end of the trunk: from cached hidden states, or from the result of a
separate forward pass of the trunk. The losses are equal to the bit in both cases, and also without a cache.

The pipeline stage that holds the first layer above the trunk stores that layer's input; each of its tensor-parallel and
context-parallel ranks stores its own copy or part. A micro-batch is a hit if all ranks of a model copy have all its
samples. A cache in memory contains only what its own process has stored; a cache on disk also contains what other
processes, and the same run before it was resumed, have stored. A cache on disk has these files:

    cache_dir/cache.json                      identifies the run to which the cache belongs
    cache_dir/{fingerprint}/tp{rank}/*        the entries, see `activation_store`; entries of other trunks are removed
"""

import json
import logging
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megatron_ext.config.command_line.error_lines import describe
from megatron_ext.data.datasets.sample_documents import DOCUMENT_STARTS
from megatron_ext.data.datasets.sample_ids import digest
from megatron_ext.models.gpt_model import HIDDEN_STATES, GPTModel
from megatron_ext.platform import process_groups
from megatron_ext.platform.collectives import on_every_rank
from megatron_ext.progressive.cache.activation_store import DiskStore, MemoryStore, Store
from megatron_ext.progressive.cache.frozen_trunk import (
    check_frozen,
    run_trunk,
    trunk_fingerprint,
    trunk_version,
)
from megatron_ext.progressive.settings.progressive_config import ProgressiveConfig
from megatron_ext.training.frozen_forward import FrozenForward, ids_of_parts
from megatron_ext.training.interface.family_interface import Batch, Family, auxiliary_inputs

IDENTITY_FILE = "cache.json"

_log = logging.getLogger(__name__)


def check_cache_directory(config: ProgressiveConfig, identity: Mapping[str, Any]) -> None:
    """Checks that `--cache-dir` does not exist, is empty, or contains a cache of the same run; changes nothing.

    Args:
        config: the configuration whose `cache_dir` is checked.
        identity: JSON values that distinguish the caches of different runs.

    Raises:
        ValueError: the directory contains something else, or another run's cache.
    """
    if config.cache_dir is None or not config.cache_activations:
        return
    directory = Path(config.cache_dir)
    if not directory.exists() or (directory.is_dir() and not any(directory.iterdir())):
        return
    if not directory.is_dir():
        raise ValueError(f"--cache-dir {directory}: must be a directory, but is a file")
    try:
        found = json.loads((directory / IDENTITY_FILE).read_text(encoding="utf-8"))["identity"]
    except (OSError, ValueError, KeyError, TypeError):
        raise ValueError(
            f"--cache-dir {directory}: must be empty, or contain an activation cache; pass another directory"
        ) from None
    expected = json.loads(json.dumps(identity))
    for name in sorted(found.keys() | expected.keys()):
        if found.get(name) != expected.get(name):
            raise ValueError(
                f"--cache-dir {directory}: belongs to another run (its {name} is {found.get(name)}, "
                f"this run's is {expected.get(name)}); pass another directory"
            )


class ActivationCache(FrozenForward):
    """The activation cache of one phase of training; in a phase, the trunk stays the same."""

    def __init__(self, config: ProgressiveConfig, *, trunk_layers: int, identity: Mapping[str, Any]) -> None:
        """Args:
        config: contains the directory of the cache, and its size limit per process.
        trunk_layers: number of layers of the trunk, which are the model's first layers.
        identity: values that distinguish the caches of different runs; also part of the fingerprint.

        Raises:
            ValueError: the directory belongs to another run.
        """
        super().__init__()
        check_cache_directory(config, identity)
        self._directory = None if config.cache_dir is None else Path(config.cache_dir)
        self._max_bytes = int(config.cache_max_gb * 2**30)
        self._layers = trunk_layers
        self._identity = dict(identity)
        self._version: int | None = None
        self._fingerprint = b""
        self._store: Store | None = None

    def prepare(
        self, chunks: list[GPTModel], families: list[Family], batches: list[Batch]
    ) -> Iterable[Batch]:
        """Adds the trunk's output to the micro-batches, and makes the model start from this output.

        Args:
            chunks: this rank's model chunks, unwrapped.
            families: all model families of the run; one of them passes the batch field `HIDDEN_STATES` to the model.
            batches: the micro-batches of a step, on the device.

        Raises:
            ValueError: a parameter of the trunk is trainable.
        """
        holds = any(self._layers in chunk.stage.layer_numbers for chunk in chunks)
        self._follow_trunk(chunks, families, holds, batches[0]["tokens"].size(1))
        keys = [self._keys(families, batch) for batch in batches] if holds else []
        found: list[torch.Tensor | None] = [None] * len(batches)
        if holds:
            found = [self._find(of_batch) for of_batch in keys]
        hits = self.agree([not holds or value is not None for value in found], batches[0]["tokens"].device)
        if parallel_state.get_pipeline_model_parallel_world_size() == 1:
            agreed = [value if hit else None for value, hit in zip(found, hits, strict=True)]
            return self._one_by_one(chunks, families, batches, keys, agreed)
        computed = self._through_pipeline(chunks, families, batches, hits)
        for place, hidden_states in computed.items():
            if holds and not hits[place]:
                self._keep(keys[place], hidden_states)
                found[place] = hidden_states
        self._start(chunks)
        return [_with(batch, value) for batch, value in zip(batches, found, strict=True)]

    def release(self, chunks: list[GPTModel]) -> None:
        """Makes the model run all its layers again, as evaluations require."""
        for chunk in chunks:
            chunk.run_layers()

    def close(self) -> None:
        """Closes the files, so that another run or phase can use the directory."""
        if isinstance(self._store, DiskStore):
            self._store.close()
        self._store, self._version, self._fingerprint = None, None, b""

    def values(self) -> dict[str, float]:
        """Returns the hit rate since the last call, and the size in bytes, both over all processes. Collective."""
        sums = torch.tensor(
            [self.hits, self.misses, 0 if self._store is None else self._store.size],
            dtype=torch.float64,
            device=process_groups.device(),
        )
        dist.all_reduce(sums)
        self.hits = self.misses = 0
        hits, misses, size = sums.tolist()
        return {"cache/hit_rate": hits / max(1.0, hits + misses), "cache/bytes": size}

    def _follow_trunk(self, chunks: list[GPTModel], families: list[Family], holds: bool, length: int) -> None:
        """Opens the store for the current trunk: in the first step, and again if a weight of the trunk has changed."""
        version = trunk_version(chunks, self._layers)
        same = torch.tensor([version == self._version], dtype=torch.int32, device=process_groups.device())
        dist.all_reduce(same, op=dist.ReduceOp.MIN)
        if bool(same):
            return
        on_every_rank(lambda: check_frozen(chunks, self._layers))
        fingerprint = trunk_fingerprint(chunks, families, self._layers, self._identity)
        self._version = version
        if fingerprint != self._fingerprint:
            self._fingerprint = fingerprint
            config = chunks[0].config
            rows = length // config.tensor_model_parallel_size if config.sequence_parallel else length
            self._open(holds, (rows, config.hidden_size), config.params_dtype)

    def _open(self, holds: bool, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        """Opens a new store, in memory or on disk. Collective."""
        if isinstance(self._store, DiskStore):
            self._store.close()
        self._store = MemoryStore(self._max_bytes if self._directory is None else 0)
        if self._directory is not None:
            on_every_rank(lambda: self._open_directory(holds, shape, dtype))

    def _open_directory(self, holds: bool, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        """Opens this rank's store if it `holds` the layer above the trunk. A disk error only disables the cache."""
        # All ranks write the identity file and clean the directory up, because hosts may have separate disks.
        assert self._directory is not None
        rank = parallel_state.get_tensor_model_parallel_rank()
        directory = self._directory / self._fingerprint.hex() / f"tp{rank}"
        try:
            self._claim_directory()
            if holds:
                self._store = DiskStore(directory, f"rank{dist.get_rank()}", shape, dtype, self._max_bytes)
        except OSError as error:
            _log.warning("activation cache: %s; continuing without a cache", describe(error))

    def _claim_directory(self) -> None:
        """Writes the file that identifies the run, and removes the entries of earlier trunks."""
        assert self._directory is not None
        self._directory.mkdir(parents=True, exist_ok=True)
        identity = self._directory / IDENTITY_FILE
        if not identity.exists():
            partial = identity.with_suffix(f".partial{dist.get_rank()}")
            partial.write_text(json.dumps({"identity": self._identity}, indent=2) + "\n", encoding="utf-8")
            partial.rename(identity)
        for path in self._directory.iterdir():
            if path.is_dir() and path.name != self._fingerprint.hex():
                shutil.rmtree(path, ignore_errors=True)

    def _keys(self, families: list[Family], batch: Batch) -> list[bytes]:
        """Returns a key for each sequence of a micro-batch. Collective over context-parallel ranks."""
        read = {"tokens": batch["tokens"], "positions": batch["position_ids"]} | auxiliary_inputs(
            families, batch
        )
        read |= {name: batch[name] for name in ("attention_mask", DOCUMENT_STARTS) if name in batch}
        # The micro-batch size is part of the key, because the result can differ in the last bits between sizes.
        rows = batch["tokens"].size(0)
        keys = []
        for row in range(rows):
            parts: list[bytes | torch.Tensor] = [self._fingerprint, rows.to_bytes(8, "little")]
            for name, value in sorted(read.items()):
                by_row = value.size(0) == rows and not value.is_floating_point()
                parts += [name.encode(), value[row] if by_row else value]
            keys.append(digest(parts))
        return ids_of_parts(keys, batch["tokens"].device)

    def _find(self, keys: list[bytes]) -> torch.Tensor | None:
        """Returns the stored activations of a micro-batch, [s, b, h] in host memory, or None if one is missing."""
        assert self._store is not None
        values = [self._store.get(key) for key in keys]
        if any(value is None for value in values):
            return None
        return torch.stack([value for value in values if value is not None], dim=1)

    def _keep(self, keys: list[bytes], hidden_states: torch.Tensor) -> None:
        assert self._store is not None
        for row, key in enumerate(keys):
            self._store.put(key, hidden_states[:, row])

    def _one_by_one(
        self,
        chunks: list[GPTModel],
        families: list[Family],
        batches: list[Batch],
        keys: list[list[bytes]],
        found: list[torch.Tensor | None],
    ) -> Iterator[Batch]:
        for batch, of_batch, value in zip(batches, keys, found, strict=True):
            if value is None:
                (value,) = run_trunk(chunks, families, [batch], self._layers)
                self._keep(of_batch, value)
            self._start(chunks)
            yield _with(batch, value)

    def _through_pipeline(
        self, chunks: list[GPTModel], families: list[Family], batches: list[Batch], hits: list[bool]
    ) -> dict[int, torch.Tensor]:
        """Runs the trunk on the micro-batches that are not in the cache; returns its outputs by micro-batch index."""
        chosen = [place for place, hit in enumerate(hits) if not hit]
        if not chosen:
            return {}
        # The interleaved schedule requires that the number of micro-batches is a multiple of the number of stages. To
        # reach it, some cached micro-batches run again.
        stages = parallel_state.get_pipeline_model_parallel_world_size()
        chosen += [place for place, hit in enumerate(hits) if hit][: -len(chosen) % stages]
        outputs = run_trunk(chunks, families, [batches[place] for place in chosen], self._layers)
        return dict(zip(chosen, outputs, strict=False))

    def _start(self, chunks: list[GPTModel]) -> None:
        for chunk in chunks:
            chunk.run_layers(self._layers)


def _with(batch: Batch, hidden_states: torch.Tensor | None) -> Batch:
    """Returns the micro-batch with the trunk's output added; unchanged without one, as on other pipeline stages."""
    if hidden_states is None:
        return batch
    return {**batch, HIDDEN_STATES: hidden_states.to(batch["tokens"].device, non_blocking=True)}

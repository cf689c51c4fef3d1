"""Tables off the device (--per-layer-offload) against tables trained by rows on it: losses and checkpoints to the bit.

Memory of the process, one copy for the data-parallel ranks of a host, frozen tables.
"""

import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megatron_ext.config.groups.checkpoint_config import CheckpointConfig
from megatron_ext.config.groups.parallel_config import ParallelConfig
from megatron_ext.per_layer.per_layer_config import PerLayerConfig
from megatron_ext.per_layer.per_layer_family import PerLayerFamily
from megatron_ext.per_layer.per_layer_inputs import stage_module
from megatron_ext.platform.memory.mapped_tensors import release_pages
from megatron_ext.testing.checkpoint_runs import RunSettings, TinyRun, read_plain
from megatron_ext.testing.layout_runs import LayoutRuns, Variant
from megatron_ext.testing.run_distributed import run_distributed
from megatron_ext.testing.run_single import run_single
from megatron_ext.testing.tiny_training import TINY, VOCAB_SIZE, synthetic_batches
from megatron_ext.training.interface.family_interface import Family

MODEL = replace(TINY, num_layers=2)
ROWS = 4 * VOCAB_SIZE
TABLE = [4 * token if token % 2 else 0 for token in range(VOCAB_SIZE)]
ROWS_ONLY = PerLayerConfig(
    use_per_layer_embedding=True,
    per_layer_vocab_size=ROWS,
    per_layer_hidden_size=8,
    per_layer_init_std=0.2,
    per_layer_sparse=True,
    log_per_layer_stats=True,
    per_layer_stats_interval=10,
)
CPU = replace(ROWS_ONLY, per_layer_offload="cpu")
DISK = replace(ROWS_ONLY, per_layer_offload="disk", per_layer_offload_dir=tempfile.gettempdir())
DIVIDED = "DP2 distributed optimizer"


class _Make:
    """Makes the families of a run; travels to the processes by pickle."""

    def __init__(self, settings: PerLayerConfig, table: list[int] = TABLE) -> None:
        self.settings, self.table = settings, table

    def __call__(self) -> list[Family]:
        return [PerLayerFamily(self.settings, VOCAB_SIZE, self.table)]


def _variant(settings: PerLayerConfig, **fields: str) -> Variant:
    return Variant(
        make_families=_Make(settings),
        steps=20,
        model=MODEL,
        micro_batch_size=2,
        precision=fields.get("precision", "fp32"),  # type: ignore[arg-type]
    )


def _trigrams(settings: PerLayerConfig) -> PerLayerConfig:
    return replace(settings, per_layer_strategy="trigram_hash", log_per_layer_stats=False)


_RUNS = LayoutRuns(
    {
        "device": _variant(ROWS_ONLY),
        "cpu": _variant(CPU),
        "disk": _variant(DISK),
        "device, bf16": _variant(ROWS_ONLY, precision="bf16"),
        "disk, bf16": _variant(DISK, precision="bf16"),
        "device, rowwise_adagrad": _variant(replace(ROWS_ONLY, per_layer_optimizer="rowwise_adagrad")),
        "disk, rowwise_adagrad": _variant(replace(DISK, per_layer_optimizer="rowwise_adagrad")),
        "device, trigrams": _variant(_trigrams(ROWS_ONLY)),
        "disk, trigrams": _variant(_trigrams(DISK)),
    },
    [],
    {
        "TP2": ["device", "disk", "device, rowwise_adagrad", "disk, rowwise_adagrad"],
        "PP2": ["device", "disk"],
        "DP2": ["device", "cpu", "disk", "device, bf16", "disk, bf16", "device, trigrams", "disk, trigrams"],
        DIVIDED: ["device", "disk", "device, bf16", "disk, bf16"],
    },
)


@pytest.mark.parametrize(
    ("layout", "variant"),
    [
        (layout, name)
        for layout, names in _RUNS.layouts.items()
        for name in names
        if not name.startswith("device") and layout != DIVIDED
    ],
)
def test_tables_off_the_device_have_losses_to_the_bit(layout: str, variant: str) -> None:
    on_device = variant.replace("disk", "device").replace("cpu", "device")
    for ours, theirs in zip(_RUNS.at(layout, variant), _RUNS.at(layout, on_device), strict=True):
        assert len(ours.trace.losses) == 20
        assert ours.trace.losses == theirs.trace.losses
        assert ours.trace.grad_norms == theirs.trace.grad_norms
        assert ours.trace.statistics == theirs.trace.statistics
        assert ours.saved == theirs.saved


@pytest.mark.parametrize("precision", ["", ", bf16"])
def test_ranks_of_the_distributed_optimizer_share_tables_that_they_would_divide(precision: str) -> None:
    found, expected = (_RUNS.at(DIVIDED, f"{kind}{precision}")[0].trace for kind in ("disk", "device"))
    # Which rows are caught up together differs, and with it how the missed steps are summed.
    assert found.losses == pytest.approx(expected.losses, rel=5e-3 if precision else 1e-5)


def _run(
    settings: PerLayerConfig,
    table: list[int] = TABLE,
    bf16: bool = False,
    save: str | None = None,
    load: str | None = None,
) -> TinyRun:
    return TinyRun(
        RunSettings(
            parallel=ParallelConfig(),
            checkpoint=CheckpointConfig(save=save, load=load),
            model=MODEL,
            make_families=_Make(settings, table),
            precision="bf16" if bf16 else "fp32",
        )
    )


def _written_by_first_rank(settings: PerLayerConfig) -> tuple[bool, list[float], list[float]]:
    run = _run(settings)
    stage = stage_module(run.chunks[0])
    with torch.no_grad():
        stage.tables()[1][3] += 1.0 + dist.get_rank()  # each rank adds to the same row
    dist.barrier()
    changed = stage.tables()[1][3].tolist()
    run.train(2)
    run.stepper.evaluate(lambda: synthetic_batches(MODEL.seq_length), 1)
    return stage.memory.is_writer, changed, stage.tables()[0][:8].flatten().tolist()


@pytest.mark.parametrize("settings", [CPU, DISK])
def test_data_parallel_ranks_of_a_host_share_one_copy_that_one_of_them_writes(
    settings: PerLayerConfig,
) -> None:
    (first, changed, rows), (second, seen, rows_seen) = run_distributed(_written_by_first_rank, 2, settings)
    assert (first, second) == (True, False)
    assert changed == seen and max(changed) > 2.0
    assert rows == rows_seen


def _moved(
    folder: str, place: list[PerLayerConfig], bf16: bool
) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Three runs of four steps, each with its settings, which follow one another through checkpoints."""
    losses: list[float] = []
    for number, settings in enumerate(place):
        run = _run(settings, bf16=bf16, save=folder, load=folder if number else None)
        losses += run.train(4)
        run.save()
    return losses, read_plain(f"{folder}/iter_0000012")


@pytest.mark.parametrize("bf16", [False, True])
def test_a_run_moves_its_tables_to_disk_and_back_between_checkpoints_to_the_bit(
    bf16: bool, tmp_path: Path
) -> None:
    losses, saved = run_single(_moved, str(tmp_path / "stays"), [ROWS_ONLY] * 3, bf16)
    for name, place in (("goes", [ROWS_ONLY, DISK, ROWS_ONLY]), ("disk", [DISK, DISK, CPU])):
        found, tensors = run_single(_moved, str(tmp_path / name), place, bf16)
        assert found == losses
        assert tensors.keys() == saved.keys()
        assert [key for key in saved if not torch.equal(tensors[key], saved[key])] == []
    assert saved["optimizer.state.exp_avg.per_layer.layers.1.embedding.weight"].any()


def test_a_run_with_whole_tables_goes_on_from_tables_on_disk_and_back(tmp_path: Path) -> None:
    whole = replace(ROWS_ONLY, per_layer_sparse=False)
    expected, _ = run_single(_moved, str(tmp_path / "whole"), [whole] * 3, False)
    for name, place in (("there", [DISK, whole, whole]), ("and back", [whole, DISK, whole])):
        found, _ = run_single(_moved, str(tmp_path / name), place, False)
        assert found == pytest.approx(expected, rel=1e-5)


def _frozen() -> tuple[list[float], list[bool]]:
    run = _run(replace(DISK, freeze_per_layer_embedding=True))
    before = [table.detach().clone() for table in stage_module(run.chunks[0]).tables()]
    losses = run.train(4)
    return losses, [
        torch.equal(old, new) for old, new in zip(before, stage_module(run.chunks[0]).tables(), strict=True)
    ]


def _frozen_on_device() -> list[float]:
    return _run(replace(ROWS_ONLY, freeze_per_layer_embedding=True)).train(4)


def test_frozen_tables_are_read_from_disk() -> None:
    losses, same = run_single(_frozen)
    assert losses == run_single(_frozen_on_device)
    assert all(same)


MANY = 400_000


def _memory() -> dict[str, int]:
    """Resident MiB of this process: its own memory, and pages of files."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    found = {line.split(":")[0]: int(line.split()[1]) // 1024 for line in lines if line.startswith("Rss")}
    return {"own": found["RssAnon"] + found["RssShmem"], "files": found["RssFile"]}


def _growth(folder: str, settings: PerLayerConfig) -> dict[str, list[int]]:
    """MiB by which the process grows: built, after training, an evaluation and a save, and after a load."""
    settings = replace(settings, per_layer_vocab_size=MANY, log_per_layer_stats=False)
    table = [token * (MANY // VOCAB_SIZE) for token in range(VOCAB_SIZE)]
    _run(replace(settings, per_layer_vocab_size=ROWS)).train(1)  # what the first step makes for good
    release_pages()
    before = _memory()
    grown: dict[str, list[int]] = {"own": [], "files": []}

    def note() -> None:
        for kind, size in _memory().items():
            grown[kind].append(size - before[kind])

    run = _run(settings, table, save=folder)
    note()
    run.train(2)
    run.stepper.evaluate(lambda: synthetic_batches(MODEL.seq_length), 1)
    run.save()
    note()
    again = _run(settings, table, load=folder)
    again.train(1)
    note()
    return grown


def test_a_process_does_not_keep_tables_on_disk_resident(tmp_path: Path) -> None:
    mib = MANY * 8 * 4 / 2**20  # of one table; two of them, with two moments each
    # In processes of their own, so that no freed memory is used again.
    disk = run_distributed(_growth, 1, str(tmp_path / "disk"), DISK)[0]
    device = run_distributed(_growth, 1, str(tmp_path / "device"), ROWS_ONLY)[0]
    assert device["own"][0] > 5 * mib
    # One number per row, and in a load one table at a time.
    assert disk["own"][0] < 3 * mib and disk["own"][1] < 4 * mib and disk["own"][2] < 6 * mib
    assert max(disk["files"][:2]) < 2 * mib

"""Where sample indices are kept when the data's directory cannot be written to, or the disk is full."""

import resource
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_ext.config.data import DataConfig
from megatron_ext.testing.distributed import run_distributed
from tests.data.test_gpt_dataset import assert_same_samples, build, make


def test_where_the_datas_directory_cannot_be_written_to_the_samples_are_the_same(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prefix = make(f"{tmp_path}/d", aligned=False)
    (tmp_path / "index_cache").write_text("")  # the directory cannot be made, for any user
    in_memory, _, _ = build(DataConfig(data_path=(prefix,), split="1"), (100, 0, 0))
    note = f"note: {tmp_path}/index_cache: File exists; every process makes the sample indices in its memory"
    assert note in capsys.readouterr().out
    kept = DataConfig(data_path=(prefix,), split="1", data_cache_path=f"{tmp_path}/cache")
    assert_same_samples(in_memory, build(kept, (100, 0, 0))[0])
    assert sorted(path.suffix for path in tmp_path.iterdir()) == ["", "", ".bin", ".idx"]


def samples_of_a_blend(prefix: str) -> list[Any]:
    data = DataConfig(data_path=("0.5", prefix, "0.5", prefix + "2"))
    train, _, _ = build(data, (50, 0, 0), ["0.5", f"{prefix}_pl", "0.5", f"{prefix}2_pl"])
    return [train[number]["per_layer_ids"].tolist() for number in range(50)]


def test_two_ranks_see_the_same_blend_with_a_cache_and_without(tmp_path: Path) -> None:
    prefix = make(f"{tmp_path}/d", seed=1)
    make(f"{tmp_path}/d2", seed=2)
    with_cache = run_distributed(samples_of_a_blend, 2, prefix)
    for path in (tmp_path / "index_cache").iterdir():
        path.unlink()
    (tmp_path / "index_cache").rmdir()
    (tmp_path / "index_cache").write_text("")
    assert run_distributed(samples_of_a_blend, 2, prefix) == with_cache
    assert with_cache[0] == with_cache[1]


def test_a_full_disk_is_one_line_and_leaves_no_index(tmp_path: Path) -> None:
    prefix = make(f"{tmp_path}/d", aligned=False)
    data = DataConfig(data_path=(prefix,), split="1", data_cache_path=f"{tmp_path}/cache")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, before[1]))  # as a full disk: writing beyond it fails
    try:
        with pytest.raises(OSError, match="--data-cache-path DIR keeps the sample indices elsewhere") as told:
            build(data, (2000, 0, 0))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert told.value.filename == f"{tmp_path}/cache"
    assert list((tmp_path / "cache").iterdir()) == []
    assert torch.is_tensor(build(data, (2000, 0, 0))[0][1999]["tokens"])


def test_one_dataset_twice_in_a_blend_is_refused_with_both_names(tmp_path: Path) -> None:
    prefix = make(f"{tmp_path}/d", aligned=False)
    other = f"{tmp_path}/./d"
    for data, flag in (
        (DataConfig(data_path=(prefix, other)), "--data-path"),
        (DataConfig(data_path=("0.3", prefix, "0.7", other)), "--data-path"),
        (DataConfig(train_data_path=(prefix, other), valid_data_path=(prefix,)), "--train-data-path"),
    ):
        with pytest.raises(ValueError, match=f"{flag}: {prefix} and {other} are the same file; give it once"):
            build(data)

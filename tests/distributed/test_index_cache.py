"""The cache of sample indices, shared by runs and nodes: whole files, old ones kept for whoever has mapped them."""

import os
import resource
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_ext.config.groups.data_config import DataConfig
from megatron_ext.data.datasets.gpt_dataset import build_datasets
from megatron_ext.testing.run_distributed import run_distributed
from megatron_ext.testing.tiny_datasets import ListTokenizer, write_dataset
from tests.unit.data.test_gpt_dataset import assert_same_samples, make
from tests.unit.data.test_gpt_dataset import build as build_all

TOKENIZER = ListTokenizer([f"t{number}" for number in range(300)])
SAMPLES = 200


@pytest.fixture
def prefixes(tmp_path: Path) -> list[str]:
    random = np.random.default_rng(0)
    found = [f"{tmp_path}/{name}" for name in "ab"]
    for prefix in found:
        write_dataset(prefix, [[random.integers(1, 300, 30).tolist()] for _ in range(40)])
    return found


def build(cache: str, *prefixes: str) -> Any:
    path = prefixes if len(prefixes) == 1 else ("0.5", prefixes[0], "0.5", prefixes[1])
    data = DataConfig(data_path=path, split="1", data_cache_path=cache)
    return build_datasets(data, seq_length=16, seed=1, num_samples=(SAMPLES, 0, 0), tokenizer=TOKENIZER)[0]


def tokens(dataset: Any) -> torch.Tensor:
    return torch.stack([dataset[number]["tokens"] for number in range(SAMPLES)])


def test_an_index_built_again_leaves_the_files_that_another_run_has_mapped_as_they_are(
    tmp_path: Path, prefixes: list[str]
) -> None:
    cache = tmp_path / "cache"
    expected = tokens(build(str(cache), prefixes[0]))
    reader = build(str(cache), prefixes[0])  # maps the files
    inodes = {path: path.stat().st_ino for path in cache.glob("*.npy")}
    assert len(inodes) == 3
    next(cache.glob("*.txt")).unlink()  # as a run sees it that began before the other had finished
    for name, age in (("old", 2 * 24 * 3600), ("of-now", 0)):
        (cache / f".building-{name}").mkdir()
        os.utime(cache / f".building-{name}", times=(time.time() - age,) * 2)
    assert tokens(build(str(cache), prefixes[0])).equal(expected)
    assert all(path.stat().st_ino != inode for path, inode in inodes.items())
    assert tokens(reader).equal(expected)
    # What a killed run has left is gone, what another run may be building is not.
    assert [path.name for path in cache.glob(".building-*")] == [".building-of-now"]


def build_blend(cache: str, first: str, second: str) -> tuple[torch.Tensor, dict[str, int]]:
    dataset = build(cache, first, second)
    return tokens(dataset), {path.name: path.stat().st_ino for path in Path(cache).glob("*_Blend*.npy")}


def test_a_blends_index_that_was_left_truncated_is_built_again_in_files_of_its_own(
    tmp_path: Path, prefixes: list[str]
) -> None:
    cache = tmp_path / "cache"
    expected, inodes = run_distributed(build_blend, 2, str(cache), *prefixes)[1]
    assert len(inodes) == 2
    for path in cache.glob("*_Blend*.npy"):
        path.write_bytes(path.read_bytes()[:-40])
    for found, again in run_distributed(build_blend, 2, str(cache), *prefixes):
        assert found.equal(expected)
        assert again.keys() == inodes.keys() and all(again[name] != inodes[name] for name in inodes)


def build_on_a_node_of_its_own(folder: str, prefix: str) -> str:
    node = torch.distributed.get_rank()
    try:
        build(f"{folder}/node{node}/cache", prefix)
    except FileNotFoundError as error:
        return str(error)
    return ""


def test_a_cache_that_nodes_do_not_share_is_named_on_every_rank(tmp_path: Path, prefixes: list[str]) -> None:
    for message in run_distributed(build_on_a_node_of_its_own, 2, str(tmp_path), prefixes[0]):
        assert message.startswith(f"{tmp_path}/node1/cache: rank 1 does not see ")
        assert "storage that all nodes share" in message


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path, prefixes: list[str]) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=rf"^{tmp_path}/file: .* give --data-cache-path another directory$"):
        build(f"{tmp_path}/file", prefixes[0])


def test_where_the_datas_directory_cannot_be_written_to_the_samples_are_the_same(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prefix = make(f"{tmp_path}/d", aligned=False)
    (tmp_path / "index_cache").write_text("")  # the directory cannot be made, for any user
    in_memory, _, _ = build_all(DataConfig(data_path=(prefix,), split="1"), (100, 0, 0))
    note = f"note: {tmp_path}/index_cache: File exists; every process builds the sample indices in its own memory"
    assert note in capsys.readouterr().out
    kept = DataConfig(data_path=(prefix,), split="1", data_cache_path=f"{tmp_path}/cache")
    assert_same_samples(in_memory, build_all(kept, (100, 0, 0))[0])
    assert sorted(path.suffix for path in tmp_path.iterdir()) == ["", "", ".bin", ".idx"]


def samples_of_a_blend(prefix: str) -> list[Any]:
    data = DataConfig(data_path=("0.5", prefix, "0.5", prefix + "2"))
    train, _, _ = build_all(data, (50, 0, 0), ["0.5", f"{prefix}_pl", "0.5", f"{prefix}2_pl"])
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
        with pytest.raises(
            OSError, match=rf"^{tmp_path}/cache: .* give --data-cache-path another directory$"
        ):
            build_all(data, (2000, 0, 0))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert list((tmp_path / "cache").iterdir()) == []
    assert torch.is_tensor(build_all(data, (2000, 0, 0))[0][1999]["tokens"])


def test_one_dataset_twice_in_a_blend_is_refused_with_both_names(tmp_path: Path) -> None:
    prefix = make(f"{tmp_path}/d", aligned=False)
    other = f"{tmp_path}/./d"
    for data, flag in (
        (DataConfig(data_path=(prefix, other)), "--data-path"),
        (DataConfig(data_path=("0.3", prefix, "0.7", other)), "--data-path"),
        (DataConfig(train_data_path=(prefix, other), valid_data_path=(prefix,)), "--train-data-path"),
    ):
        with pytest.raises(ValueError, match=f"{flag}: {prefix} and {other} are the same file; give it once"):
            build_all(data)


def build_on_this_rank(prefix: str, cache: str, file: str, misaligned: str) -> list[Any]:
    """Samples of a blend on one rank, then the errors of two builds that only rank 0 can notice."""
    data = DataConfig(data_path=("0.5", prefix, "0.5", prefix + "2"), data_cache_path=cache)
    train, _, _ = build_all(data, (50, 0, 0), ["0.5", f"{prefix}_pl", "0.5", f"{prefix}2_pl"])
    results: list[Any] = [[train[number]["per_layer_ids"].tolist() for number in range(50)]]
    for bad_cache, per_layer in ((file, f"{prefix}_pl"), (cache, misaligned)):
        try:
            build_all(DataConfig(data_path=(prefix,), data_cache_path=bad_cache), (50, 0, 0), [per_layer])
        except (ValueError, OSError) as error:
            results.append(str(error))
    return results


def test_two_ranks_see_the_same_samples_and_the_same_errors(tmp_path: Path) -> None:
    prefix = make(f"{tmp_path}/d", seed=1)
    make(f"{tmp_path}/d2", seed=2)
    (tmp_path / "file").write_text(
        ""
    )  # a cache directory that cannot be made: rank 0 fails inside mcore's builder
    write_dataset(f"{tmp_path}/other", [[[1]]])  # rank 0 alone compares the shapes
    paths = (prefix, f"{tmp_path}/cache", f"{tmp_path}/file", f"{tmp_path}/other")
    ranks = run_distributed(build_on_this_rank, 2, *paths)
    assert ranks[0][0] == ranks[1][0]
    assert len(ranks[0][0]) == 50
    for samples, in_the_builder, in_the_check in ranks:
        assert len(samples) == 50
        assert "file" in in_the_builder
        assert "is not aligned with" in in_the_check

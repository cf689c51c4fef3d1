"""The cache of sample indices, shared by runs and nodes: whole files, old ones kept for whoever has mapped them."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_ext.config.data import DataConfig
from megatron_ext.data.gpt_dataset import build_datasets
from megatron_ext.testing.datasets import ListTokenizer, write_dataset
from megatron_ext.testing.distributed import run_distributed

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
    assert tokens(build(str(cache), prefixes[0])).equal(expected)
    assert all(path.stat().st_ino != inode for path, inode in inodes.items())
    assert tokens(reader).equal(expected)
    assert not list(cache.glob(".building-*"))


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
        assert message.startswith(f"--data-cache-path {tmp_path}/node1/cache: rank 1 does not see ")
        assert "storage that all nodes share" in message


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path, prefixes: list[str]) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=rf"^--data-cache-path {tmp_path}/file: .* give another directory$"):
        build(f"{tmp_path}/file", prefixes[0])

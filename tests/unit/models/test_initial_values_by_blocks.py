"""Initial values are sampled by blocks of rows, and are those that one call samples."""

import pytest
import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor

from megatron_ext.models import initialization


@pytest.mark.parametrize(
    "shape", [(5,), (16,), (100,), (1000, 3), (33, 5), (257, 8), (65, 1), (64, 64), (4097, 2, 3), (3, 1000)]
)
@pytest.mark.parametrize("kind", ["std", "bound"])
def test_blocks_have_the_values_of_one_call(
    shape: tuple[int, ...], kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for at_once in (64, 1 << 22):
        monkeypatch.setattr(initialization, "_ELEMENTS_AT_ONCE", at_once)
        shard = ShardedTensor.from_rank_offsets("name", torch.zeros(shape))
        initialization._fill(shard, 7, **{kind: 0.1})
        found.append(shard.data)
    assert found[0].abs().min() >= 0 and found[0].unique().numel() > 0.9 * found[0].numel()
    assert torch.equal(*found)


@pytest.mark.parametrize("dim", [0, 1])
def test_the_parts_of_a_tensor_are_those_of_the_whole(dim: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(initialization, "_ELEMENTS_AT_ONCE", 64)
    whole = ShardedTensor.from_rank_offsets("name", torch.zeros(60, 6))
    initialization._fill(whole, 7, std=0.1)
    parts = []
    for place in range(3):
        data = torch.zeros(20, 6) if dim == 0 else torch.zeros(60, 2)
        part = ShardedTensor.from_rank_offsets("name", data, (dim, place, 3))
        initialization._fill(part, 7, std=0.1)
        parts.append(part.data)
    assert torch.equal(torch.cat(parts, dim), whole.data)

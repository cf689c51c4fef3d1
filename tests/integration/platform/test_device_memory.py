"""Memory in use grows by what is allocated, and its peak stays; in a process that has freed nothing before."""

import pytest
import torch

from megatron_ext.platform.device_memory import MemoryUse, memory_use
from megatron_ext.testing.run_distributed import run_distributed

SIZE = 256 * 2**20


def _before_with_and_after_a_block() -> tuple[MemoryUse, MemoryUse, MemoryUse]:
    before = memory_use()
    block = torch.ones(SIZE, dtype=torch.uint8)
    during = memory_use()
    del block
    return before, during, memory_use()


@pytest.mark.skipif(torch.cuda.is_available(), reason="looks at resident memory")
def test_resident_memory_grows_by_what_is_allocated_and_the_peak_stays() -> None:
    before, during, after = run_distributed(_before_with_and_after_a_block, 1)[0]
    assert during.current - before.current == pytest.approx(SIZE, rel=0.1)
    assert during.peak >= during.current
    assert after.current < during.current
    assert after.peak == pytest.approx(during.peak, rel=0.01)  # the kernel counts in batches
    assert during.reserved == during.current

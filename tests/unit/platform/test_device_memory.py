"""Memory in use grows by what is allocated, and its peak stays."""

import pytest
import torch

from megatron_ext.platform.device_memory import memory_use


@pytest.mark.skipif(torch.cuda.is_available(), reason="looks at resident memory")
def test_resident_memory_grows_by_what_is_allocated_and_the_peak_stays() -> None:
    size = 256 * 2**20
    before = memory_use()
    block = torch.ones(size, dtype=torch.uint8)
    during = memory_use()
    del block
    after = memory_use()
    assert during.current - before.current == pytest.approx(size, rel=0.1)
    assert during.peak >= during.current
    assert after.current < during.current
    assert after.peak == pytest.approx(during.peak, rel=0.01)  # the kernel counts in batches
    assert during.reserved == during.current

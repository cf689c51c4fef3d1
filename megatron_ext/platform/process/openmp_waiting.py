"""Limits how long OpenMP threads spin while they wait for each other.

PyTorch uses as many threads as there are cores unless OMP_NUM_THREADS is set. In its OpenMP library, libgomp, a thread
that waits for the others spins up to 300,000 times. On a busy machine, the other thread is often not running, and
spinning occupies the core that the other thread needs.
"""

import os
from collections.abc import MutableMapping

_CHOICES = ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT")

# tools/evaluate.py on 4,000 tokens, 2 cores with a load average of 7 to 10, alternating: 9.7 to 16.5 s without a limit,
# 4.8 to 9.1 s with one thread, 4.7 to 6.4 s with this limit, 4.2 to 5.8 s with OMP_WAIT_POLICY=passive, which does not
# spin. But on an idle machine, passive doubles the best time of steps of less than a millisecond (1.3 ms instead of
# 0.6 ms, with or without this limit).
_SPINS = "10000"


def install(environment: MutableMapping[str, str] = os.environ) -> None:
    """Sets the limit unless one of the variables `_CHOICES` is set; has an effect only before torch is imported."""
    if not any(name in environment for name in _CHOICES):
        environment["GOMP_SPINCOUNT"] = _SPINS

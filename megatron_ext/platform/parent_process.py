"""A process that does not outlive the one that has started it."""

import ctypes
import signal

_PR_SET_PDEATHSIG = 1  # from sys/prctl.h


def signal_at_parents_end(number: signal.Signals) -> None:
    """Has the system send this process a signal when the thread that has started it ends, in whatever way.

    Only Linux can do it; elsewhere nothing happens.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "prctl"):
        libc.prctl(_PR_SET_PDEATHSIG, number)

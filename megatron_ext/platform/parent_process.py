"""Prevents a process from outliving its parent process."""

import ctypes
import signal

_PR_SET_PDEATHSIG = 1  # from sys/prctl.h


def signal_at_parents_end(number: signal.Signals) -> None:
    """Makes the kernel send this process a signal when its parent ends for any reason; works on Linux only.

    "Parent" means the thread that started this process: the signal is also sent when only that thread ends.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "prctl"):
        libc.prctl(_PR_SET_PDEATHSIG, number)

"""A signal to any rank ends every rank after the step, with the code that tells which signal it was."""

import os
import signal
import time

import pytest

from megatron_ext.testing.run_distributed import run_distributed
from megatron_ext.training.stop_signals import EXIT_CODES, NO_SIGNAL, SignalWatcher


def _shared(number: int, rank: int) -> list[list[float]]:
    """What the ranks share before and after one of them gets a signal, and when another's time is over."""
    from megatron_ext.config.groups.parallel_config import ParallelConfig
    from megatron_ext.platform.process_groups import initialize

    initialize(ParallelConfig(), seed=1)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # tests under nohup would ignore it
    before = signal.getsignal(number)
    with SignalWatcher() as signals:
        shared = [signals.shared(time_is_left=True).tolist()]
        is_signalled = int(os.environ["RANK"]) == rank
        if is_signalled:
            os.kill(os.getpid(), number)
        shared.append(signals.shared(time_is_left=is_signalled).tolist())
    assert signal.getsignal(number) is before
    return shared


@pytest.mark.parametrize(
    ("number", "rank"),
    [(signal.SIGTERM, 1), (signal.SIGUSR1, 0), (signal.SIGINT, 1), (signal.SIGHUP, 0)],
)
def test_all_ranks_know_of_a_signal_to_one_and_of_the_end_of_anothers_time(number: int, rank: int) -> None:
    assert run_distributed(_shared, 2, number, rank) == [[[NO_SIGNAL, 1], [-number, 0]]] * 2


def test_a_second_interrupt_ends_the_process_at_once_but_not_torchruns_copy_of_the_first(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    with SignalWatcher():
        os.kill(os.getpid(), signal.SIGINT)
        now += 0.5
        os.kill(os.getpid(), signal.SIGINT)
        now += 5.0
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_under_nohup_a_closed_terminal_is_no_reason_to_stop() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with SignalWatcher():
            assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
            assert signal.getsignal(signal.SIGTERM) != signal.SIG_DFL
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_exit_codes_differ_from_each_other_and_from_those_of_errors() -> None:
    codes = set(EXIT_CODES.values())
    assert len(codes) == len(EXIT_CODES) and not codes & {0, 1, 2}

"""Nothing under tests/unit starts a process; what needs one belongs to tests/distributed or tests/integration."""

import multiprocessing.process
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """Refuses processes in a unit test and in the fixtures that are made for it, whatever their scope."""

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError(f"{item.nodeid} starts a process; move it out of tests/unit")

    if not item.path.is_relative_to(Path(__file__).parent):  # this hook sees every test
        return (yield)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(subprocess.Popen, "__init__", refuse)
        patch.setattr(multiprocessing.process.BaseProcess, "start", refuse)
        patch.setattr(os, "fork", refuse)
        return (yield)

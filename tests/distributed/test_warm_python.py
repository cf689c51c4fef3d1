"""`warm_python` does what the interpreter does, but in processes that have imported the engine."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from megatron_ext.testing.warm_python.warm_server import warm_python

RANK = """
import json, os, signal, sys
sockets = [os.readlink(f"/proc/self/fd/{name}") for name in os.listdir("/proc/self/fd") if int(name) > 2
           and os.path.exists(f"/proc/self/fd/{name}")]
found = {
    "modules": "megatron.core" in sys.modules,
    "session": os.getsid(0) == os.getpid(),
    "handlers": [signal.getsignal(n) is signal.SIG_DFL for n in (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)],
    "interrupt": signal.getsignal(signal.SIGINT) is signal.default_int_handler,
    "sockets": sum("socket" in name for name in sockets),
    "parent": os.getppid(),
    "rank": os.environ["RANK"],
    "arguments": sys.argv[1:],
}
os.write(1, (json.dumps(found) + "\\n").encode())
sys.exit(3 if os.environ["RANK"] == "1" and "fail" in sys.argv else 0)
"""
SCRIPT = """
import atexit, os, sys
from helper import WORD
assert "torch" in sys.modules
atexit.register(print, "at exit")
print(WORD, sys.argv[1:], os.getcwd(), os.environ["GIVEN"], sys.stdin.read())
print("to stderr", file=sys.stderr)
sys.exit(7)
"""


@pytest.fixture
def script(tmp_path: Path) -> Path:
    (tmp_path / "helper.py").write_text("WORD = 'imported'\n")
    (tmp_path / "script.py").write_text(SCRIPT)
    return tmp_path / "script.py"


def test_a_script_has_its_streams_arguments_directory_environment_and_exit_code(
    script: Path, tmp_path: Path
) -> None:
    (tmp_path / "elsewhere").mkdir()
    done = subprocess.run(
        [warm_python(), "-u", str(script), "a b", "é"],
        cwd=tmp_path / "elsewhere",
        env={**os.environ, "GIVEN": "value"},
        input="typed",
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 7
    assert done.stdout == f"imported ['a b', 'é'] {tmp_path}/elsewhere value typed\nat exit\n"
    assert done.stderr == "to stderr\n"


def test_modules_run_other_options_get_a_new_interpreter_and_errors_have_their_traceback(
    script: Path, tmp_path: Path
) -> None:
    def run(*arguments: str) -> tuple[int, str, str]:
        done = subprocess.run(
            [warm_python(), *arguments], cwd=tmp_path, capture_output=True, text=True, timeout=60
        )
        return done.returncode, done.stdout, done.stderr

    (tmp_path / "module.py").write_text("import sys\nprint(__name__, sys.argv[1:])\n1 / 0\n")
    code, out, error = run("-m", "module", "--flag")
    assert (code, out) == (1, "__main__ ['--flag']\n") and error.endswith("division by zero\n")
    assert run("-I", "-c", "import sys; print('torch' in sys.modules, sys.executable)") == (
        0,
        f"False {sys.executable}\n",
        "",
    )


@pytest.mark.parametrize(("words", "code"), [(["work"], 0), (["fail"], 1)])
def test_torchs_launcher_forks_its_ranks_which_inherit_neither_handlers_nor_sockets(
    words: list[str], code: int, tmp_path: Path
) -> None:
    (tmp_path / "rank.py").write_text(RANK)
    launcher = [warm_python(), "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*launcher, str(tmp_path / "rank.py"), *words], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == code
    ranks = [json.loads(line) for line in done.stdout.splitlines()]
    assert sorted(rank.pop("rank") for rank in ranks) == ["0", "1"]
    assert len({rank.pop("parent") for rank in ranks}) == 1
    expected = {"modules": True, "session": True, "handlers": [True] * 3, "interrupt": True, "sockets": 0}
    assert ranks == [{**expected, "arguments": words}] * 2
    assert ("exitcode  : 3 " in done.stderr) == bool(code)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_signal_to_the_command_ends_its_process(number: signal.Signals, tmp_path: Path) -> None:
    waiting = "import os, time\nprint(os.getpid(), flush=True)\ntime.sleep(600)\n"
    (tmp_path / "wait.py").write_text(waiting)
    command = [warm_python(), str(tmp_path / "wait.py")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        pid = int(process.stdout.readline())
        process.send_signal(number)
        assert process.wait(30) == -number
    end = time.monotonic() + 30
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < end
        time.sleep(0.05)

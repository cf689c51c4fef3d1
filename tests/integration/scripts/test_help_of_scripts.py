"""`--help` of every script, tool and benchmark answers at once, without importing torch and the engine (seconds)."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
COMMANDS = [
    str(path.relative_to(ROOT))
    for place in ("pretrain_*.py", "tools/*.py", "benchmarks/*.py")
    for path in sorted(ROOT.glob(place))
    if path.name != "run_lm_eval.py"  # its command line is lm_eval's, which imports torch first
]

# A new interpreter, in which each script runs in a fork of its own. Argument 1 is the file for the results.
ALL_IN_FORKS = """
import json, os, runpy, sys
import megatron_ext.config.command_line.parse, megatron_ext.config.run_config  # what most of them import

results, *scripts = sys.argv[1:]
with open(results, "w") as file:
    for script in scripts:
        read, written = os.pipe()
        if not os.fork():
            sys.stdout = os.fdopen(written, "w", encoding="utf-8")
            code, sys.argv, sys.path[0] = 0, [script, "--help"], os.path.dirname(script)
            try:
                runpy.run_path(script, run_name="__main__")
            except SystemExit as end:
                code = end.code or 0
            except Exception as error:
                code = repr(error)
            sys.stdout.flush()
            print(json.dumps([script, code, sorted(sys.modules)]), file=file, flush=True)
            os._exit(0)
        os.close(written)
        with os.fdopen(read, encoding="utf-8") as output:
            text = output.read()
        os.wait()
        print(json.dumps(text), file=file, flush=True)
"""


@pytest.fixture(scope="module")
def helps(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[object, set[str], str]]:
    """Exit code, imported modules and output of each script's --help."""
    results = tmp_path_factory.mktemp("help") / "results"
    subprocess.run([sys.executable, "-c", ALL_IN_FORKS, str(results), *COMMANDS], check=True, cwd=ROOT)
    lines = [json.loads(line) for line in results.read_text(encoding="utf-8").splitlines()]
    return {
        script: (code, set(modules), text)
        for (script, code, modules), text in zip(lines[::2], lines[1::2], strict=True)
    }


@pytest.mark.parametrize("script", COMMANDS)
def test_help_comes_without_torch(script: str, helps: dict[str, tuple[object, set[str], str]]) -> None:
    code, imported, text = helps[script]
    assert code == 0 and "--help" in text
    assert "dataclasses" in imported
    assert not imported & {"torch", "megatron", "transformers"}

"""The command line in a process of its own: help, exit codes, locales, and what an import costs."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

SHAPE = "--num-layers 2 --hidden-size 64 --num-attention-heads 4 --seq-length 32"
ROOT = Path(__file__).parents[3]

SCRIPT = """
from dataclasses import dataclass
from megatron_ext.config.command_line.parse import parse, run_main
from megatron_ext.config.groups.model_config import ModelConfig
from megatron_ext.config.groups.parallel_config import ParallelConfig
from megatron_ext.config.cross_checks import validate

@dataclass(frozen=True, kw_only=True)
class Flags:
    model: ModelConfig
    parallel: ParallelConfig

def main():
    flags = parse(Flags, prog="train.py", description="Trains.", example="python train.py --num-layers 2")
    validate(flags.model, flags.parallel)
    if flags.model.num_layers == 77:
        open("/no/such/folder/file")
    if flags.model.num_layers == 78:
        raise RuntimeError("a defect")
    print("trained")

run_main(main)
"""


def run_script(arguments: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-c", SCRIPT, *arguments.split()],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "COLUMNS": "100", "RANK": "0", "WORLD_SIZE": "1", **environment},
    )


@pytest.mark.parametrize(
    ("script", "default"),
    [
        ("pretrain_npt.py", "from --load; required without it"),
        ("pretrain_progressive.py", "sum over the stacks"),
    ],
)
def test_a_scripts_help_calls_required_only_what_nothing_else_gives(script: str, default: str) -> None:
    root = Path(__file__).parents[3]
    shown = subprocess.run(
        [sys.executable, script, "--help"], capture_output=True, text=True, check=True, cwd=root
    )
    text = " ".join(re.sub("[│╭╮╰╯─]", " ", shown.stdout).split())
    assert f"Number of transformer layers. (default: {default})" in text
    assert (
        "Number of transformer layers."
        not in text[text.index(" required: ") : text.index(" options: ", text.index(" required: "))]
    )


def test_help_is_grouped_by_concern_and_fits_100_columns() -> None:
    done = run_script("--help")
    assert done.returncode == 0
    assert done.stderr == ""
    for word in (
        "model options",
        "parallel options",
        "--config",
        "--num-layers",
        "python train.py --num-layers 2",
    ):
        assert word in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 100


def test_a_users_mistake_ends_a_script_with_one_line_on_rank_0_and_code_2_everywhere() -> None:
    bad = f"{SHAPE} --tensor-model-parallel-size 3"
    first, second = run_script(bad, WORLD_SIZE="3"), run_script(bad, WORLD_SIZE="3", RANK="1")
    assert (first.returncode, second.returncode) == (2, 2)
    assert (
        first.stderr
        == "error: --num-attention-heads 4: must be divisible by --tensor-model-parallel-size 3\n"
    )
    assert second.stderr == ""
    assert first.stdout == ""


def test_a_missing_file_is_named_and_a_defect_keeps_its_traceback() -> None:
    missing = run_script(SHAPE.replace("--num-layers 2", "--num-layers 77"))
    assert missing.returncode == 2
    assert missing.stderr == "error: /no/such/folder/file: No such file or directory\n"
    defect = run_script(SHAPE.replace("--num-layers 2", "--num-layers 78"))
    assert defect.returncode == 1
    assert "Traceback" in defect.stderr
    assert run_script(SHAPE).stdout == "trained\n"


NO_LOCALE = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


@pytest.mark.parametrize(
    ("settings", "wanted"),
    [
        (NO_LOCALE, "é 漢\u2028".encode() + b"\xff"),
        ({**NO_LOCALE, "PYTHONIOENCODING": "latin-1"}, b"\xe9 \\u6f22\\u2028\xff"),
        ({"PYTHONIOENCODING": "utf-8"}, "é 漢\u2028".encode() + b"\xff"),
    ],
    ids=["no locale", "latin-1", "utf-8"],
)
def test_any_text_is_printed_without_a_traceback(settings: dict[str, str], wanted: bytes) -> None:
    script = (
        "from megatron_ext.config.command_line.error_lines import run_main\n"
        "run_main(lambda: print('\\xe9 \\u6f22\\u2028\\udcff'))"
    )
    inherited = {
        name: value for name, value in os.environ.items() if not name.startswith(("PYTHONIO", "LC_"))
    }
    environment = {**inherited, **settings, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, wanted + b"\n", b"")


def test_a_program_without_a_locale_runs_in_pythons_utf8_mode(tmp_path: Path) -> None:
    script = tmp_path / "tool.py"
    script.write_text(
        "import sys\nfrom megatron_ext.config.command_line.error_lines import run_main\n"
        "def main():\n    print(sys.argv[1:], sys.flags.utf8_mode, open(__file__[:-2] + 'txt').read())\n"
        "if __name__ == '__main__':\n    run_main(main)\n",
        encoding="utf-8",
    )
    (tmp_path / "tool.txt").write_text("漢", encoding="utf-8")
    environment = {**os.environ, **NO_LOCALE, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-W", "error::UserWarning", str(script), "é", "--flag"]
    done = subprocess.run(command, env=environment, capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout == "['é', '--flag'] 1 漢\n".encode()


def test_importing_the_configuration_imports_neither_torch_nor_megatron() -> None:
    code = (
        "import importlib, pkgutil, sys, megatron_ext.config as c\n"
        "for m in pkgutil.iter_modules(c.__path__): importlib.import_module('megatron_ext.config.' + m.name)\n"
        "assert not {'torch', 'megatron', 'transformers', 'numpy'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def _succeeds_without_compiling(code: str) -> None:
    """Runs code in a new interpreter, in which torch.compile imports the compiler but needs no C++ compiler."""
    command = [sys.executable, "-W", "ignore", "-c", code]
    # With this variable torch.compile leaves the function as it is.
    environment = {**os.environ, "TORCH_COMPILE_DISABLE": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_importing_the_engine_imports_no_compiler_and_its_functions_are_compiled_when_they_are_called() -> (
    None
):
    code = (
        "import gc, sys, megatron_ext.training.pretrain\n"
        "assert not {'torch._dynamo', 'torch._inductor'} & set(sys.modules)\n"
        "assert gc.isenabled() and gc.get_freeze_count() > 100_000\n"
        "import torch\n"
        "from megatron.core.fusions.fused_bias_swiglu import swiglu\n"
        "y = torch.tensor([[1.0, 2.0, 3.0, 4.0]])\n"
        "assert torch.equal(swiglu(y), torch.nn.functional.silu(y[:, :2]) * y[:, 2:])\n"
        "assert 'torch._dynamo' in sys.modules\n"
    )
    _succeeds_without_compiling(code)


def test_weights_in_four_bits_import_no_compiler_and_bitsandbytes_compiles_the_same_values_when_called() -> (
    None
):
    code = (
        "import sys, megatron_ext, torch\n"
        "from megatron_ext.lora.four_bit_weights import NF4\n"
        "weight, four_bits = torch.randn(8, 64), NF4()\n"
        "packed = four_bits.pack(weight)\n"
        "found = four_bits.unpack(packed, weight.shape, torch.float32)\n"
        "assert not {'torch._dynamo', 'torch._inductor'} & set(sys.modules)\n"
        "from bitsandbytes.backends.default.ops import _dequantize_4bit_compute as compute\n"
        "codes, scales = packed.codes.reshape(-1), packed.scales.view(torch.float32)\n"
        "code = four_bits._code_on(weight.device)\n"
        "assert torch.equal(compute(codes, scales, code, 64, weight.shape, torch.float32), found)\n"
        "assert 'torch._dynamo' in sys.modules\n"
    )
    _succeeds_without_compiling(code)


def test_an_optimizer_imports_no_compiler_steps_as_with_one_and_can_be_compiled() -> None:
    code = (
        "import sys, megatron_ext, torch\n"
        "def train(wrapper):\n"
        "    weight = torch.nn.Parameter(torch.ones(3))\n"
        "    optimizer = torch.optim.AdamW([weight], lr=0.5)\n"
        "    for _ in range(3):\n"
        "        optimizer.zero_grad()\n"
        "        (weight**3).sum().backward()\n"
        "        wrapper(optimizer.step)()\n"
        "        optimizer.load_state_dict(optimizer.state_dict())\n"
        "        assert torch.is_grad_enabled()\n"
        "    return weight.tolist()\n"
        "without = train(lambda step: step)\n"
        "assert 'torch._dynamo' not in sys.modules\n"
        "import torch._dynamo\n"
        "assert train(lambda step: step) == without\n"
        "compiled = train(lambda step: torch.compile(step, backend='eager'))\n"
        "assert torch.allclose(torch.tensor(compiled), torch.tensor(without), rtol=1e-4)\n"
    )
    command = [sys.executable, "-W", "ignore", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr

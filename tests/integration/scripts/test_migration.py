"""What docs/migration.md and docs/per_layer.md promise of names is so: their tables are read, and every cell is tried.

The tables are found by their headings (Scripts, Flags, Files, Classes and functions, Metrics), under whichever document
they stand, so that a new document needs no new test.
"""

import dataclasses
import functools
import importlib
import importlib.util
import json
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_ext.config.command_line.flag_table import flags_of, known_flags
from megatron_ext.config.command_line.parse import parse
from megatron_ext.config.groups.logging_config import LoggingConfig
from megatron_ext.config.groups.model_config import ModelConfig
from megatron_ext.config.groups.parallel_config import ParallelConfig
from megatron_ext.models.costs.model_cost import model_cost
from megatron_ext.per_layer.per_layer_config import PerLayerConfig
from megatron_ext.per_layer.per_layer_cost import per_layer_cost
from megatron_ext.per_layer.per_layer_family import PerLayerFamily
from megatron_ext.testing.run_single import run_single
from megatron_ext.testing.tiny_training import TINY, VOCAB_SIZE, train_tiny
from megatron_ext.training.logging.reporter import Reporter
from megatron_ext.training.logging.step_metrics import StepMetrics
from tests.integration.npt.npt_run_helpers import MULTI_LAYER, make_base, train, write_data

ROOT = Path(__file__).parents[3]
Row = list[str]

# What a command cannot do without, and what makes the flags of a table meaningful.
NEEDED = {
    "pretrain_gpt_per_layer.py": "--num-layers 4 --hidden-size 512 --num-attention-heads 8 --seq-length 128 --lr 1e-3"
    " --train-iters 10 --vocab-file vocab.json --merge-file merges.txt --use-per-layer-embedding",
    "pretrain_npt.py": "--num-layers 40 --hidden-size 512 --num-attention-heads 8 --seq-length 128 --lr 1e-3"
    " --train-iters 10 --tokenizer-type NullTokenizer --vocab-size 64 --save out",
    "pretrain_progressive.py": "--num-layers 1 --hidden-size 512 --num-attention-heads 8 --seq-length 128 --lr 1e-3"
    " --train-iters 1 --tokenizer-type NullTokenizer --vocab-size 64 --training-objective mlm",
    "tools/evaluate_npt.py": "--checkpoint run --data-path held_out",
    "tools/preprocess_data.py": "--input in.jsonl --output-prefix out --vocab-file vocab.json --merge-file merges.txt",
    "tools/preprocess_per_layer_data.py": "--output-prefix out --per-layer-output-prefix out_per_layer"
    " --per-layer-vocab-file vocab_per_layer.json --vocab-file vocab.json --merge-file merges.txt",
}


def tables(document: str) -> Iterator[tuple[str, list[Row]]]:
    """Yields (heading above it, rows without the header) for every table of a Markdown file."""
    heading, rows = "", []
    for line in [*(ROOT / document).read_text(encoding="utf-8").splitlines(), ""]:
        if line.startswith("#"):
            heading = line.lstrip("# ")
        if line.startswith("|"):
            cells = re.split(r"(?<!\\)\|", line.strip().strip("|"))
            rows.append([cell.strip() for cell in cells])
        elif rows:
            yield heading, rows[2:]
            rows = []


def rows_under(heading: str) -> list[Row]:
    """All rows of docs/migration.md's tables with this heading."""
    found = [row for title, rows in tables("docs/migration.md") if title == heading for row in rows]
    assert found, f"docs/migration.md has no table under {heading}"
    return found


def quoted(cell: str) -> list[str]:
    """What stands in backticks."""
    return re.findall(r"`([^`]+)`", cell)


class _Captured(Exception):
    """Carries what a script's main gives to `parse`."""


@functools.cache
def configuration_of(command: str) -> type[Any]:
    """The configuration that a script's command line fills."""

    def capture(config_type: type[Any], *arguments: Any, **options: Any) -> None:
        raise _Captured(config_type)

    path = ROOT / command.split()[0]
    # A name of its own: another test may have imported the script, and pickles its functions by name.
    specification = importlib.util.spec_from_file_location(f"captured_{path.stem}", path)
    assert specification is not None and specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    sys.modules[specification.name] = module  # dataclasses look their module up
    specification.loader.exec_module(module)
    module.parse = capture  # type: ignore[attr-defined]
    argv = sys.argv
    sys.argv = [command, *command.split()[1:]]
    try:
        module.main()
    except _Captured as captured:
        return captured.args[0]
    finally:
        sys.argv = argv
    raise AssertionError(f"{command} reads no command line")


def parsed_value(command: str, flag: str, sample: str) -> Any:
    """The value of the field behind `flag` after `command flag sample` has been parsed."""
    config_type = configuration_of(command)
    given = [*shlex.split(NEEDED[command]), flag, *shlex.split(sample)]
    config = parse(config_type, given)
    field = next(known for known in flags_of(config_type) if flag.replace("_", "-") in known.names)
    return getattr(getattr(config, field.group, config), field.field)


def default_value(command: str, flag: str) -> Any:
    flags = flags_of(configuration_of(command))
    return next(known for known in flags if flag.replace("_", "-") in known.names).default


FLAGS = rows_under("Flags")


@pytest.mark.parametrize("row", FLAGS, ids=[f"{row[2]} {row[0]}".replace("`", "") for row in FLAGS])
def test_every_flag_parses_with_its_command_and_has_the_documents_default(row: Row) -> None:
    theirs, ours, command = (quoted(cell)[0] for cell in row[:3])
    for flag in (theirs, ours):
        assert flag.replace("_", "-") in known_flags(configuration_of(command))
        for sample in row[3].split(", "):
            value = parsed_value(command, flag, sample)
            values = value if isinstance(value, tuple) else [value]
            assert [str(each) for each in values] == (sample.split() or ["True"])
    if row[4]:
        assert str(default_value(command, ours)) == row[4]


def test_every_path_that_stands_for_a_script_exists() -> None:
    for row in rows_under("Scripts"):
        assert quoted(row[1]), f"{row[0]} has no counterpart"
        for path in quoted(row[1]):
            assert (ROOT / path).is_file(), path


def test_every_file_is_named_by_a_flag_of_a_command_that_exists() -> None:
    for row in rows_under("Files"):
        flag, command = quoted(row[1])[0], quoted(row[2])[0]
        assert flag in known_flags(configuration_of(command)), row[0]


def test_every_class_and_function_imports() -> None:
    for row in rows_under("Classes and functions"):
        for name in quoted(row[1]):
            module, _, attribute = name.rpartition(".")
            assert hasattr(importlib.import_module(module), attribute), name


def _statistics_tags() -> set[str]:
    """Tags of PLE's statistics with every combination method, from real steps; runs in a process of its own."""
    tags: set[str] = set()
    for method in ("scaled_add", "concat", "gated"):
        settings = PerLayerConfig(
            use_per_layer_embedding=True,
            per_layer_combination_method=method,
            per_layer_strategy="identity",
            per_layer_hidden_size=8,
            log_per_layer_stats=True,
            log_per_layer_gradients=True,
            per_layer_stats_interval=1,
        )
        trace = train_tiny(ParallelConfig(), 1, functools.partial(_family, settings), TINY)
        tags |= set(trace.statistics)
    return tags


def _family(settings: PerLayerConfig) -> list[Any]:
    return [PerLayerFamily(settings, VOCAB_SIZE)]


def _reporter_tags(directory: Path) -> set[str]:
    """Tags that the reporter writes for a step and an evaluation."""
    logging = LoggingConfig(
        tensorboard_dir=str(directory), log_interval=1, log_memory=True, device_peak_tflops=1.0
    )
    metrics = StepMetrics(
        losses={"lm loss": 2.0},
        learning_rate=1e-3,
        grad_norm=1.0,
        batch_size=1,
        tokens=8,
        consumed_samples=1,
        seconds=0.1,
        flops_per_token=1.0,
        params_norm=1.0,
    )
    with Reporter(logging, total_iterations=1, rank=0, world_size=1) as reporter:
        reporter.step(1, metrics)
        reporter.validation(1, {"lm loss": 2.0}, consumed_samples=1)
    return set(EventAccumulator(str(directory)).Reload().Tags()["scalars"])


def _npt_run(folder: str, data: str) -> None:
    base = make_base(folder, data)
    more = [
        "--equivalence-weight",
        "1",
        "--regularization-weight",
        "0.01",
        "--eval-iters",
        "1",
        "--generation-steps",
        "1",
        "--generation-prompt",
        "1 2",
    ]
    where = ["--save", f"{folder}/run", "--tensorboard-dir", f"{folder}/logs"]
    train(*MULTI_LAYER, *more, *where, "--load", base, "--data-path", data, "--train-iters", "1")


@pytest.fixture(scope="module")
def npt_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a short NPT run leaves: checkpoints in `run`, TensorBoard files in `logs`."""
    folder = tmp_path_factory.mktemp("npt")
    run_single(_npt_run, str(folder), write_data(folder))
    return folder


def _npt_tags(folder: Path) -> set[str]:
    tags = EventAccumulator(str(folder / "logs")).Reload().Tags()
    texts = {tag.removesuffix("/text_summary") for tag in tags["tensors"]}
    return texts | {re.sub(r"layer_\d$", "layer_i", tag) for tag in tags["scalars"]}


def test_every_metric_is_a_tag_that_training_writes(tmp_path: Path, npt_run: Path) -> None:
    written = run_single(_statistics_tags) | _reporter_tags(tmp_path)
    written = {re.sub(r"layer_\d\d$", "layer_NN", tag) for tag in written} | _npt_tags(npt_run)
    named = {tag for row in rows_under("Metrics") for tag in quoted(row[1])}
    assert named <= written
    assert {tag for tag in written if tag.startswith("per-layer/")} <= named, (
        "a statistic that no table tells"
    )
    scripts = ("pretrain_gpt_per_layer.py", "pretrain_npt.py")
    known = {flag for script in scripts for flag in known_flags(configuration_of(script))}
    assert {flag for row in rows_under("Metrics") for flag in quoted(row[2])} <= known


def test_every_state_key_is_in_its_file_of_a_checkpoint(npt_run: Path) -> None:
    for row in rows_under("State keys"):
        path = npt_run / "run" / "checkpoint-1" / quoted(row[1])[0]
        is_json = path.suffix == ".json"
        state = json.loads(path.read_text()) if is_json else torch.load(path, weights_only=True)
        found = {re.sub(r"^layer_\d+_", "layer_i_", key) for key in state}
        assert set(quoted(row[2])) <= found, row[0]


def test_every_configuration_key_is_a_flag_that_its_section_may_hold() -> None:
    from pretrain_npt import DOCUMENT_SECTIONS

    flags = flags_of(configuration_of("pretrain_npt.py"))
    for row in rows_under("Configuration keys"):
        section, key = quoted(row[0])[0].split(": ")
        named = f"--{key.replace('_', '-')}"
        field = next(known for known in flags if named in known.names)
        assert field.name == quoted(row[1])[0]
        assert field.group in (section, *DOCUMENT_SECTIONS[section])
        if row[2]:
            assert str(default_value("pretrain_npt.py", named)) == row[2]


def test_the_page_of_per_layer_embedding_tells_every_flag_and_its_default() -> None:
    rows = next(rows for heading, rows in tables("docs/per_layer.md") if heading == "Flags")
    told = {quoted(row[0])[0]: row[1] for row in rows}
    fields = dataclasses.fields(PerLayerConfig)
    assert told == {f"--{field.name.replace('_', '-')}": str(field.default) for field in fields}


def test_the_cost_table_is_what_the_accounting_computes() -> None:
    rows = next(rows for heading, rows in tables("docs/per_layer.md") if heading == "What it costs")
    assert len(rows) > 10
    for row in rows:
        layers, hidden = (int(number) for number in re.findall(r"= (\d+)", row[0]))
        model = ModelConfig(
            num_layers=layers,
            hidden_size=hidden,
            num_attention_heads=hidden // 64,
            seq_length=2048,
            position_embedding_type="learned_absolute",
            normalization="LayerNorm",
        )
        settings = PerLayerConfig(use_per_layer_embedding=True, per_layer_hidden_size=int(row[2]))
        base, added = model_cost(model, 50257), per_layer_cost(settings, model, int(row[1]))
        assert row[5] == f"{100 * added.parameters / base.parameters:.1f}%"
        assert row[6] == f"{100 * added.forward_flops_per_token / base.forward_flops_per_token:.1f}%"


DOCUMENTS = ["README.md", *sorted(f"docs/{path.name}" for path in ROOT.glob("docs/*.md"))]


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_link_to_a_file_of_the_project_leads_somewhere(document: str) -> None:
    text = (ROOT / document).read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text):
        assert (ROOT / document).parent.joinpath(target).exists(), target

"""TensorBoard's Custom Scalars page of real runs of each family, as TensorBoard's own plugin serves it."""

import json
import re
import runpy
import shlex
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tensorboard.backend.event_processing.data_provider import MultiplexerDataProvider
from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer
from tensorboard.context import RequestContext

from megatron_ext.platform import process_groups
from megatron_ext.testing.run_single import run_single
from megatron_ext.testing.tiny_datasets import write_dataset
from megatron_ext.training.logging.tensorboard_writer import SAMPLES_FOLDER

ROOT = Path(__file__).parents[3]
VOCABULARY = 64
MODEL = (
    "--hidden-size 32 --num-attention-heads 4 --seq-length 16 --swiglu --disable-bias-linear --hidden-dropout 0 "
    f"--attention-dropout 0 --tokenizer-type NullTokenizer --vocab-size {VOCABULARY}"
)
RUN = (
    "--num-workers 0 --split 80,10,10 --eval-interval 1 --eval-iters 1 --log-interval 1 --device-peak-tflops 1 "
    "--micro-batch-size 2 --global-batch-size 4 --lr 1e-2 --log-memory --log-params-norm"
)
PLE = (
    "--use-per-layer-embedding --per-layer-hidden-size 8 --per-layer-strategy identity --per-layer-stats-interval 1 "
    "--log-per-layer-stats --log-per-layer-gradients"
)
NPT = "--load {folder}/base --npt-layers upper_half --np-rank 4 --npt-log-interval 1 --train-iters 2"
GROWTH = "--n-blocks 1 --target-stacks 2 --max-stacks 2 --stack-steps 1 --epoch-samples 8 --no-qlora-enabled"
COMMANDS = {
    "base": f"pretrain_gpt_per_layer.py {MODEL} --num-layers 2 --train-iters 1 --save {{folder}}/base",
    **{
        f"per-layer {method}": f"pretrain_gpt_per_layer.py {MODEL} {PLE} --num-layers 2 --train-iters 1 "
        f"--per-layer-combination-method {method}"
        for method in ("scaled_add", "concat", "gated")
    },
    "npt multi_layer": f"pretrain_npt.py {NPT} --mode multi_layer --lm-weight 0.1 --equivalence-weight 0.1",
    "npt single_layer": f"pretrain_npt.py {NPT} --mode single_layer --stage1-steps 1",
    "progressive clm": f"pretrain_progressive.py {MODEL} {GROWTH} --training-objective clm --joint-steps 1 "
    "--save {folder}/clm",
    "progressive mlm": f"pretrain_progressive.py {MODEL} {GROWTH} --training-objective mlm --no-cache-activations "
    "--max-stacks 1 --target-stacks 1 --save {folder}/mlm",
}


def _run_all(folder: str) -> None:
    process_groups.shutdown = lambda: (
        None
    )  # all runs share the group of `run_single`, which restores the function
    for name, command in COMMANDS.items():
        script, *flags = shlex.split(f"{command} {RUN}".format(folder=folder))
        sys.argv = [
            script,
            *flags,
            "--data-path",
            f"{folder}/corpus",
            "--tensorboard-dir",
            f"{folder}/logs/{name}",
        ]
        assert runpy.run_path(str(ROOT / script))["main"]() == 0, name


@pytest.fixture(scope="module")
def logs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    random = np.random.default_rng(1)
    write_dataset(str(folder / "corpus"), [[random.integers(0, VOCABULARY, 40).tolist()] for _ in range(60)])
    run_single(_run_all, str(folder))
    return folder / "logs"


def _plugin(folder: Path, provider: MultiplexerDataProvider) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a package inside TensorBoard calls itself deprecated
        from tensorboard.plugins.base_plugin import TBContext
        from tensorboard.plugins.custom_scalar.custom_scalars_plugin import CustomScalarsPlugin
        from tensorboard.plugins.scalar.scalars_plugin import ScalarsPlugin
    plugins: dict[str, Any] = {}
    context = TBContext(logdir=str(folder), data_provider=provider, plugin_name_to_instance=plugins)
    plugins["scalars"] = ScalarsPlugin(context)
    return CustomScalarsPlugin(context)


def _served(folder: Path) -> tuple[list[dict[str, Any]], set[str], dict[str, list[str]]]:
    """The page's sections, all scalar tags of the run, and chart -> tags that the plugin finds for it."""
    multiplexer = EventMultiplexer().AddRunsFromDirectory(str(folder)).Reload()
    provider = MultiplexerDataProvider(multiplexer, str(folder))
    plugin = _plugin(folder, provider)
    sections = json.loads(plugin.layout_impl(RequestContext(), ""))["category"]
    written = provider.list_scalars(RequestContext(), experiment_id="", plugin_name="scalars")
    assert set(written) == {".", SAMPLES_FOLDER}
    tags = {tag for of_run in written.values() for tag in of_run}
    found: dict[str, list[str]] = {}
    for section in sections:
        for chart in section["chart"]:
            answers = [
                plugin.scalars_impl(RequestContext(), run, pattern, "")
                for run in written
                for pattern in chart["multiline"]["tag"]
            ]
            assert all(answer["regex_valid"] for answer in answers)
            found[f"{section['title']}: {chart['title']}"] = [
                tag for answer in answers for tag in answer["tag_to_events"]
            ]
    return sections, tags, found


@pytest.mark.parametrize("name", list(COMMANDS))
def test_every_tag_of_a_run_is_in_exactly_one_chart_and_no_chart_is_empty(logs: Path, name: str) -> None:
    _, tags, found = _served(logs / name)
    shown = [tag for of_chart in found.values() for tag in of_chart]
    assert sorted(shown) == sorted(tags)
    assert all(found.values())
    assert not [chart for chart in found if chart.startswith("Other values")], "all tags are declared"


@pytest.mark.parametrize("name", list(COMMANDS))
def test_losses_stand_first_then_rate_and_norms_and_what_is_over_samples_last_and_closed(
    logs: Path, name: str
) -> None:
    sections, _, found = _served(logs / name)
    titles = [section["title"] for section in sections]
    assert titles[:3] == ["Losses", "Learning rate and norms", "Speed and memory"]
    assert titles[-2:] == ["Counts", "Over consumed samples"]
    assert [section["closed"] for section in sections] == [title in titles[-2:] for title in titles]
    assert "lm loss" in found["Losses: Cross-entropy"] or name == "npt single_layer"


@pytest.mark.parametrize("name", list(COMMANDS))
def test_the_layers_of_a_statistic_share_a_chart(logs: Path, name: str) -> None:
    _, tags, found = _served(logs / name)
    statistics = {re.sub(r"/layer_\d+", "", tag) for tag in tags if "/layer_" in tag}
    charts = [chart for chart, shown in found.items() if any("/layer_" in tag for tag in shown)]
    assert len(charts) == len(statistics)
    assert bool(charts) == name.startswith(("per-layer", "npt"))

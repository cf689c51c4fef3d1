"""What an NPT run writes beside its losses: totals, means, curriculum, collapse warnings, samples, perplexity ratio."""

import math
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_ext.npt.objective.npt_monitoring import CollapseWatch
from megatron_ext.testing.run_distributed import run_distributed
from megatron_ext.testing.run_single import run_single
from tests.integration.npt.npt_run_helpers import MULTI_LAYER, make_base, train, write_data


def test_a_layer_whose_norm_vanishes_is_told_once_until_it_recovers() -> None:
    watch, told = CollapseWatch(), []
    for value in (2.0, 0.1, 1.9e-3, 1e-3, 0.5, 1e-7):
        told.append(watch.look({"v_b_norm/layer_3": value, "v_a_norm/layer_3": 1.0, "lm loss": 0.0}))
        restored = CollapseWatch()
        restored.load_state_dict(watch.state_dict())
        watch = restored
    assert [len(lines) for lines in told] == [0, 0, 1, 0, 0, 1]
    assert told[2][0].startswith("warning: layer 3: v_b_norm has fallen to 1.90e-03 (first value 2.00e+00)")


def test_factors_that_start_at_zero_have_not_collapsed() -> None:
    watch = CollapseWatch()
    assert not watch.look({"v_b_norm/layer_0": 0.0})
    assert not watch.look({"v_b_norm/layer_0": 1e-4})
    assert not watch.look({"v_b_norm/layer_0": 1e-2})
    assert watch.look({"v_b_norm/layer_0": 1e-8})


def test_a_norm_below_the_absolute_bound_has_collapsed() -> None:
    watch = CollapseWatch()
    watch.look({"v_a_norm/layer_0": 1e-5})
    assert not watch.look({"v_a_norm/layer_0": 2e-6}) and watch.look({"v_a_norm/layer_0": 0.9e-6})


def _run(folder: str, data: str) -> str:
    base = make_base(folder, data)
    flags = [*MULTI_LAYER, "--layer-weights", "1,0.5", "--lm-weight", "0.25", "--data-path", data]
    flags += ["--curriculum-stages", "teacher:1,mixed:1:0.3:0.6,student:9", "--regularization-weight", "0.1"]
    flags += ["--generation-steps", "2", "--generation-prompt", "1 2 3", "--eval-iters", "1"]
    return train(*flags, "--load", base, "--train-iters", "3", "--tensorboard-dir", f"{folder}/logs")[1]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, EventAccumulator]:
    folder = tmp_path_factory.mktemp("run")
    output = run_single(_run, str(folder), write_data(folder))
    events = EventAccumulator(str(folder / "logs"))
    events.Reload()
    return output, events


def _values(events: EventAccumulator, tag: str) -> list[float]:
    return [event.value for event in events.Scalars(tag)]


def test_the_total_is_the_weighted_mean_over_layers_plus_the_losses_of_the_output(
    run: tuple[str, EventAccumulator],
) -> None:
    events = run[1]
    losses = {
        name: [_values(events, f"{name}/layer_{layer}") for layer in (2, 3)]
        for name in ("mlp_direct_loss", "regularization_loss")
    }
    weights = {"mlp_direct_loss": 1.0, "regularization_loss": 0.1}
    for step, total in enumerate(_values(events, "npt loss")):
        expected = 1.0 * _values(events, "fidelity_loss")[step] + 0.25 * _values(events, "lm loss")[step]
        for name, weight in weights.items():
            first, second = losses[name]
            expected += weight * (first[step] + 0.5 * second[step]) / 1.5
            assert _values(events, name)[step] == pytest.approx((first[step] + second[step]) / 2)
        assert total == pytest.approx(expected, rel=1e-5)


def test_the_curriculum_is_written(run: tuple[str, EventAccumulator]) -> None:
    assert _values(run[1], "curriculum/stage") == [0, 1, 2]
    assert _values(run[1], "curriculum/attention_share") == pytest.approx([0, 0.3, 1])
    assert _values(run[1], "curriculum/mlp_share") == pytest.approx([0, 0.6, 1])


def test_every_size_of_the_documents_is_written_for_every_layer(run: tuple[str, EventAccumulator]) -> None:
    for name in ("v_a_attention_similarity", "v_a_norm", "v_b_norm", "delta_norm"):
        of_layers = [_values(run[1], f"{name}/layer_{layer}") for layer in (2, 3)]
        means = [math.fsum(values) / 2 for values in zip(*of_layers, strict=True)]
        assert _values(run[1], f"npt/{name}") == pytest.approx(means, rel=1e-5)
    assert len(_values(run[1], "grad-norm")) == 3


def test_the_progress_line_and_the_validation_show_what_matters(run: tuple[str, EventAccumulator]) -> None:
    lines = run[0].splitlines()
    step = next(line for line in lines if line.startswith("step 2"))
    for name in ("npt loss", "lm loss", "fidelity_loss", "mlp_direct_loss"):
        assert f"| {name} " in step
    validation = next(line for line in lines if line.startswith("validation at step 3"))
    ratio = _values(run[1], "npt/perplexity_ratio validation")[0]
    assert f"perplexity ratio {ratio:.4f}" in validation and "base lm loss" in validation
    ppl, base = (_values(run[1], f"{name} validation ppl")[0] for name in ("lm loss", "base lm loss"))
    assert ratio == pytest.approx(ppl / base, rel=1e-5)


def test_samples_of_base_and_npt_are_written_as_text(run: tuple[str, EventAccumulator]) -> None:
    texts = [event.tensor_proto.string_val[0].decode() for event in run[1].Tensors("samples/text_summary")]
    assert len(texts) == 1
    assert texts[0].count("1 2 3") == 2 and "**base**" in texts[0] and "**npt**" in texts[0]


def _refused(layout: list[str]) -> str:
    flags = [*MULTI_LAYER, "--data-path", "nothing", "--train-iters", "1", "--generation-steps", "5", *layout]
    shape = ["--num-layers", "4", "--hidden-size", "32", "--num-attention-heads", "4", "--seq-length", "16"]
    with pytest.raises(ValueError, match="--generation-steps") as error:
        train(*flags, *shape, "--tokenizer-type", "NullTokenizer", "--vocab-size", "64", "--swiglu")
    return str(error.value)


@pytest.mark.parametrize(
    ("layout", "flag"),
    [
        (["--tensor-model-parallel-size", "2", "--sequence-parallel"], "--sequence-parallel"),
        (
            ["--pipeline-model-parallel-size", "2", "--num-layers-per-virtual-pipeline-stage", "1"],
            "--num-layers-per-virtual-pipeline-stage",
        ),
    ],
)
def test_samples_are_refused_at_a_layout_that_generation_does_not_know(layout: list[str], flag: str) -> None:
    expected = f"--generation-steps 5: not supported with {flag}; omit one of the two"
    assert run_single(_refused, layout) == expected


def _sampled_at(folder: str, data: str, base: str, layout: list[str]) -> Any:
    flags = [
        *MULTI_LAYER,
        "--data-path",
        data,
        "--load",
        base,
        "--train-iters",
        "2",
        "--generation-steps",
        "1",
    ]
    return train(*flags, "--generation-prompt", "5 6", "--tensorboard-dir", f"{folder}/logs", *layout)


@pytest.mark.parametrize(
    "layout",
    [["--tensor-model-parallel-size", "2"], ["--pipeline-model-parallel-size", "2"]],
    ids=["TP2", "PP2"],
)
def test_samples_are_the_same_at_every_parallel_layout_that_is_allowed(
    layout: list[str], tmp_path: Path
) -> None:
    data, texts = write_data(tmp_path), []
    base = run_single(make_base, str(tmp_path), data)
    for processes, flags in ((1, []), (2, layout)):
        folder = tmp_path / str(processes)
        assert run_distributed(_sampled_at, processes, str(folder), data, base, flags)[0][0] == 0
        events = EventAccumulator(str(folder / "logs"))
        events.Reload()
        texts.append([event.tensor_proto.string_val[0] for event in events.Tensors("samples/text_summary")])
    assert len(texts[0]) == 2 and texts[0] == texts[1]

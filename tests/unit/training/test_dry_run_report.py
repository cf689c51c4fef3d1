"""What `--dry-run` prints, for shapes whose figures are known."""

import io
import sys
from dataclasses import replace
from typing import Any

import pytest

from megatron_ext.config.groups.model_config import ModelConfig
from megatron_ext.config.groups.optimizer_config import OptimizerSettings
from megatron_ext.config.groups.parallel_config import ParallelConfig
from megatron_ext.config.groups.rehearsal_config import RehearsalConfig
from megatron_ext.config.groups.tokenizer_config import TokenizerConfig
from megatron_ext.config.groups.training_config import TrainingConfig
from megatron_ext.config.run_config import RunConfig
from megatron_ext.models.costs.model_cost import ModelCost
from megatron_ext.models.costs.step_work import StepWork, Use
from megatron_ext.training.dry_run_report import planned_world_size, print_dry_run
from megatron_ext.training.interface.family_interface import Family
from tests.unit.training.reporting_helpers import Terminal

GPT3 = ModelConfig(
    num_layers=96,
    hidden_size=12288,
    num_attention_heads=96,
    seq_length=2048,
    position_embedding_type="learned_absolute",
    normalization="LayerNorm",
)
LAYOUT = ParallelConfig(
    tensor_model_parallel_size=8,
    pipeline_model_parallel_size=16,
    use_distributed_optimizer=True,
    sequence_parallel=True,
    recompute_granularity="full",
    recompute_method="uniform",
    recompute_num_layers=1,
)
TRAINED = TrainingConfig(global_batch_size=1536, train_iters=1000, bf16=True, dry_run=True)


class Extra(Family):
    name = "extra"

    def cost(self, model: ModelConfig) -> ModelCost:
        return ModelCost(parameters=25_395_163_136, forward_flops_per_token=5e9)


def dry_run(
    monkeypatch: pytest.MonkeyPatch,
    *families: Family,
    model: ModelConfig = GPT3,
    parallel: ParallelConfig = LAYOUT,
    training: TrainingConfig = TRAINED,
    stream: io.StringIO | None = None,
) -> str:
    monkeypatch.setenv("WORLD_SIZE", "1024")
    stream = stream or io.StringIO()
    print_dry_run(run_config(model, parallel, training), lambda *_: list(families), stream)
    return stream.getvalue()


def run_config(
    model: ModelConfig = GPT3, parallel: ParallelConfig = LAYOUT, training: TrainingConfig = TRAINED
) -> RunConfig:
    return RunConfig(
        model=model,
        parallel=parallel,
        training=training,
        optimizer=OptimizerSettings(lr=1e-4),
        tokenizer=TokenizerConfig(tokenizer_type="NullTokenizer", vocab_size=51199),
    )


def rows(text: str, name: str) -> list[list[str]]:
    """Cells of the rows that begin with `name`."""
    lines = [line.strip() for line in text.splitlines()]
    return [[cell for cell in line.split("  ") if cell] for line in lines if line.startswith(name + "  ")]


def test_parameters_are_listed_for_base_and_families(monkeypatch: pytest.MonkeyPatch) -> None:
    text = dry_run(monkeypatch, Extra())
    # 12 L h^2 (1 + 13 / 12h) + (V + s) h of arXiv 2104.04473, and the final norm
    base = 96 * (12 * 12288**2 + 13 * 12288) + (51200 + 2048) * 12288 + 2 * 12288
    assert [row[1].strip() for row in rows(text, "base")] == [f"{base:,}"]
    assert [row[1].strip() for row in rows(text, "extra")] == ["25,395,163,136"]
    assert [row[1].strip() for row in rows(text, "total")] == [f"{base + 25_395_163_136:,}"]
    assert rows(text, "extra")[0][3].strip() == "12.7%"


class Freezes(Extra):
    name = "freezes"

    def step_work(self, model: ModelConfig, iteration: int) -> StepWork:
        assert iteration == TRAINED.train_iters
        return StepWork(
            layers=(Use.FORWARD,) * 95 + (Use.TRAINED,),
            head=Use.GRADIENT,
            trains_embedding=False,
            trained_parameters=1000,
            flops_per_token=7.0,
        )


def test_what_is_frozen_neither_counts_as_trained_nor_has_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    text = dry_run(monkeypatch, Freezes(), training=replace(TRAINED, global_batch_size=8))
    layer = 12 * 12288**2 + 13 * 12288
    assert [row[4].strip() for row in rows(text, "base")] == [f"{layer:,}"]
    assert [row[4].strip() for row in rows(text, "freezes")] == ["1,000"]
    assert [row[4].strip() for row in rows(text, "total")] == [f"{layer + 1000:,}"]
    (frozen,), (last,) = rows(text, "0"), rows(text, "15")
    assert [cell.strip() for cell in frozen[3:5]] == ["32 B", "12 B"]  # the family's 8
    assert float(last[3].split()[0]) == pytest.approx(4 * layer / 8 / 2**30, abs=0.01)


def test_the_layout_and_the_step_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    text = dry_run(monkeypatch)
    assert "1024 processes = data 8 x tensor 8 x pipeline 16; bf16" in text
    assert "one step = 1536 sequences of 2048 tokens; 192 micro-batches of 1 per data-parallel rank" in text


def test_a_ramp_of_the_batch_size_shortens_the_run_and_not_the_step(monkeypatch: pytest.MonkeyPatch) -> None:
    ramp = replace(TRAINED, train_iters=None, train_samples=1536 * 1000, rampup_batch_size=(768, 768, 7680))
    text = dry_run(monkeypatch, training=ramp)
    assert "the first 10 steps have 768 to 1536 sequences, in 2 sizes" in text
    plain = dry_run(monkeypatch)
    (step,), (plain_step,) = rows(text, "model (basis of MFU)"), rows(plain, "model (basis of MFU)")
    assert (
        step == plain_step
    )  # 7680 samples in smaller steps, and the same number of samples in the whole run


def test_flops_of_a_step_are_those_of_the_published_formula(monkeypatch: pytest.MonkeyPatch) -> None:
    text = dry_run(monkeypatch)
    tokens, layers, hidden, vocab, sequence = 1536 * 2048, 96, 12288, 51200, 2048
    factor = 1 + sequence / (6 * hidden) + vocab / (16 * layers * hidden)
    step = 96 * tokens * layers * hidden**2 * factor
    (again,) = rows(text, "with recomputation")
    assert again[2].strip() == f"{step / 1e18:.3g}E"
    assert again[3].strip() == f"{step / 1024 / 1e15:.3g}P"
    assert again[4].strip() == f"{step * 1000 / 1e21:.3g}Z"


def test_memory_is_listed_for_every_stage_that_differs(monkeypatch: pytest.MonkeyPatch) -> None:
    text = dry_run(monkeypatch, training=TrainingConfig(global_batch_size=8, train_iters=1, bf16=True))
    # one micro-batch a step: inner stages are alike
    (first,), (inner,), (last,) = rows(text, "0"), rows(text, "1-14"), rows(text, "15")
    weights, gradients, optimizer, activations, temporary, total = (_gib(cell) for cell in inner[2:8])
    parameters = 6 * ((12 * 12288**2 + 7 * 12288) / 8 + 6 * 12288)
    assert (weights, gradients, optimizer) == pytest.approx(
        (2 * parameters / 2**30, 4 * parameters / 2**30, 1.5 * parameters / 2**30), abs=0.01
    )
    assert total == pytest.approx(weights + gradients + optimizer + activations + temporary, abs=0.03)
    assert _gib(first[7]) > total
    assert _gib(last[7]) > total


def _gib(cell: str) -> float:
    """A size of the table, in GiB."""
    number, unit = cell.split()
    return float(number) * {"MiB": 2**-10, "GiB": 1.0}[unit]


@pytest.mark.parametrize(
    ("training", "parallel", "ratio"),
    [
        ({"bf16": True}, {}, 2.0),
        ({"bf16": True}, {"grad_reduce_in_bf16": True}, 1.0),
        ({"fp16": True}, {}, 1.0),
        ({"fp16": True}, {"accumulate_allreduce_grads_in_fp32": True}, 2.0),
        ({}, {}, 1.0),
    ],
)
def test_gradients_take_the_bytes_of_the_precision_they_are_summed_in(
    training: dict[str, Any], parallel: dict[str, Any], ratio: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = dry_run(
        monkeypatch,
        training=TrainingConfig(global_batch_size=8, train_iters=1, **training),
        parallel=replace(LAYOUT, **parallel),
    )
    ((_, _, weights, gradients, *_),) = rows(text, "1-14")
    assert float(gradients.split()[0]) / float(weights.split()[0]) == pytest.approx(ratio, rel=0.01)


def test_the_number_of_processes_is_the_flag_the_environment_or_one_model_copy(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    given = run_config()
    assert planned_world_size(given) == 128
    monkeypatch.setenv("WORLD_SIZE", "256")
    assert planned_world_size(given) == 256
    assert planned_world_size(replace(given, rehearsal=RehearsalConfig(world_size=512))) == 512


def test_only_rank_0_prints(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "3")
    assert dry_run(monkeypatch) == ""


def test_plain_text_has_no_control_codes_and_fits_a_page(monkeypatch: pytest.MonkeyPatch) -> None:
    text = dry_run(monkeypatch, Extra())
    assert "\x1b" not in text
    assert max(map(len, text.splitlines())) <= 110
    assert "\x1b" in dry_run(monkeypatch, Extra(), stream=Terminal())


def test_nothing_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a dry run builds nothing")

    monkeypatch.setattr("torch.distributed.init_process_group", refuse)
    monkeypatch.setattr("torch.nn.Module.__init__", refuse)
    assert "megatron_ext.models.build_model" in sys.modules
    assert "Dry run" in dry_run(monkeypatch)

"""The evaluation's figures equal those computed by hand from whole logits and hidden states, at every parallel
layout.
"""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from megatron_ext.config.groups.parallel_config import ParallelConfig
from megatron_ext.inference.perplexity import evaluate_perplexity
from megatron_ext.models.build_model import build_model
from megatron_ext.models.costs.model_cost import model_cost
from megatron_ext.models.gpt_model import GPTModel
from megatron_ext.npt.evaluation.distribution import distribution
from megatron_ext.npt.evaluation.npt_evaluation import evaluate_npt, finite, untrained_figures
from megatron_ext.npt.modules.npt_layers import deactivated, np_modules
from megatron_ext.npt.modules.npt_module_config import NPTModuleConfig
from megatron_ext.npt.npt_family import NPTFamily
from megatron_ext.npt.weights.conversion import initialize_np_factors
from megatron_ext.platform.process_groups import initialize
from megatron_ext.testing.npt_references import reference_delta, reference_key_value_deltas
from megatron_ext.testing.run_distributed import run_distributed
from megatron_ext.testing.run_single import run_single
from megatron_ext.testing.tiny_datasets import write_dataset
from megatron_ext.testing.tiny_training import LAYOUTS, TINY, VOCAB_SIZE, WORLD_SIZES

MODEL = replace(TINY, init_method_std=0.2, hidden_dropout=0.5)
LAYERS = (1, 3)
LOW_RANK = NPTModuleConfig(
    npt_layers="1,3", np_target="gate+up+down", np_rank=4, np_residual="keep", np_init_scale=1.0
)
SETTINGS = {
    "low_rank keep": LOW_RANK,
    "key_value keep": replace(LOW_RANK, np_form="key_value"),
    "outer drop": replace(LOW_RANK, np_form="outer_product", np_residual="drop", num_np_components=2),
}
TOKENS = 75
"""74 predictions: four whole windows and one of 10 tokens."""


@pytest.fixture(scope="module")
def prefix(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = str(tmp_path_factory.mktemp("data") / "stream")
    tokens = torch.randint(0, VOCAB_SIZE, (TOKENS,), generator=torch.Generator().manual_seed(0)).tolist()
    write_dataset(path, [[tokens[:40]], [tokens[40:]]])
    return path


def _build(name: str, parallel: ParallelConfig) -> tuple[GPTModel, NPTFamily]:
    initialize(parallel, seed=1)
    family = NPTFamily(SETTINGS[name])
    chunks = build_model(MODEL, parallel, vocab_size=VOCAB_SIZE, seed=1, extensions=[family.extension()])
    return chunks[0].eval(), family


def _evaluated(name: str, parallel: ParallelConfig, prefix: str) -> dict[str, Any] | None:
    model, family = _build(name, parallel)
    return evaluate_npt(
        [model],
        [family],
        family.settings,
        prefix,
        sequence_length=MODEL.seq_length,
        micro_batch_size=2,
    )


def _run(model: GPTModel, window: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Logits [n, V] in float64, and of the NPT layers: input, output, attention output."""
    seen: dict[str, torch.Tensor] = {}
    hooks = []
    for number in LAYERS:
        layer = model.decoder.layers[number]

        def keep(_: Any, args: Any, kwargs: Any, output: Any, number: int = number) -> None:
            seen[f"input {number}"] = kwargs["hidden_states"][:, 0].double()
            seen[f"output {number}"] = output[0][:, 0].double()

        def keep_attention(_: Any, args: Any, output: Any, number: int = number) -> None:
            seen[f"attention {number}"] = output[0][:, 0].double()

        def keep_activated(_: Any, args: Any, number: int = number) -> None:
            seen[f"activated {number}"] = args[0][:, 0].double()

        hooks += [
            layer.register_forward_hook(keep, with_kwargs=True),
            layer.self_attention.register_forward_hook(keep_attention),
            layer.mlp.linear_fc2.register_forward_pre_hook(keep_activated),
        ]
    logits = model(window[None, :-1], torch.arange(len(window) - 1)[None], None)[0].double()
    for hook in hooks:
        hook.remove()
    return logits, seen


@torch.no_grad()
def _by_hand(name: str, prefix: str) -> dict[str, Any]:
    """The figures from one window at a time; same input: all NPT layers but one are off, so it gets the base's."""
    model, _ = _build(name, ParallelConfig())
    stream = torch.randint(0, VOCAB_SIZE, (TOKENS,), generator=torch.Generator().manual_seed(0))
    losses: dict[str, list[float]] = {"base": [], "npt": [], "kl": []}
    outputs: dict[str, dict[int, list[torch.Tensor]]] = {
        kind: {number: [] for number in LAYERS}
        for kind in ("base", "input", "same_input", "free_running", "attention", "activated", "free_input")
    }
    for start in range(0, TOKENS - 1, MODEL.seq_length):
        window = stream[start : start + MODEL.seq_length + 1]
        with deactivated([model]):
            base, of_base = _run(model, window)
        ours, free = _run(model, window)
        losses["base"] += F.cross_entropy(base, window[1:], reduction="none").tolist()
        losses["npt"] += F.cross_entropy(ours, window[1:], reduction="none").tolist()
        losses["kl"] += (base.softmax(-1) * (base.log_softmax(-1) - ours.log_softmax(-1))).sum(-1).tolist()
        for number in LAYERS:
            with deactivated([model], layers=[other for other in LAYERS if other != number]):
                outputs["same_input"][number].append(_run(model, window)[1][f"output {number}"])
            outputs["base"][number].append(of_base[f"output {number}"])
            outputs["input"][number].append(of_base[f"input {number}"])
            outputs["free_running"][number].append(free[f"output {number}"])
            outputs["free_input"][number].append(free[f"input {number}"])
            outputs["attention"][number].append(free[f"attention {number}"])
            outputs["activated"][number].append(free[f"activated {number}"])
    assert len(losses["base"]) == TOKENS - 1
    whole = {kind: {n: torch.cat(parts) for n, parts in layers.items()} for kind, layers in outputs.items()}
    norms = {
        (number, target): norm
        for number in LAYERS
        for target, norm in _materialised_norms(
            model.decoder.layers[number],
            *(whole[kind][number] for kind in ("free_input", "attention", "activated")),
        ).items()
    }
    loss = {kind: math.fsum(values) / len(values) for kind, values in losses.items()}
    return {"loss": loss, "layers": whole, "norms": norms}


def _materialised_norms(
    layer: Any, hidden_states: torch.Tensor, attention: torch.Tensor, activated: torch.Tensor
) -> dict[str, torch.Tensor]:
    """|delta|_F of every token by target, from the deltas themselves."""
    settings = layer.feed_forward.settings
    factors = {
        target: {name: factor.double() for name, factor in part.named_parameters()}
        for target, part in layer.feed_forward.modulations.items()
    }
    if settings.np_form == "key_value":
        base = {"norm": layer.pre_mlp_layernorm.weight.double(), "fc1": layer.mlp.linear_fc1.weight.double()}
        of_fc1 = reference_key_value_deltas(
            settings, base, factors, hidden_states, attention, MODEL.norm_epsilon
        )
        deltas = {"fc1": of_fc1["fc1"]}
    else:
        deltas = {
            target: reference_delta(settings, factors[target], attention, attention, False)
            for target in ("gate", "up")
        }
    deltas["down"] = reference_delta(settings, factors["down"], attention, activated, True)
    return {target: torch.linalg.norm(delta, dim=(1, 2)) for target, delta in deltas.items()}


@pytest.fixture(scope="module", params=SETTINGS)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def by_hand(name: str, prefix: str) -> dict[str, Any]:
    return run_single(_by_hand, name, prefix)


@pytest.fixture(scope="module")
def reports(name: str, prefix: str) -> dict[str, dict[str, Any]]:
    found = {}
    for layout in ("TP1", "TP2", "PP2", "DP2"):
        results = run_distributed(_evaluated, WORLD_SIZES[layout], name, LAYOUTS[layout], prefix)
        assert results[0] is not None and not any(results[1:]), "the first rank has the report, alone"
        found[layout] = results[0]
    return found


LAYOUT_NAMES = pytest.mark.parametrize("layout", ["TP1", "TP2", "PP2", "DP2"])


@LAYOUT_NAMES
def test_perplexity_and_kl_equal_those_of_whole_logits(
    layout: str, reports: dict[str, Any], by_hand: dict[str, Any]
) -> None:
    found, loss = reports[layout]["perplexity"], by_hand["loss"]
    assert found["tokens"] == TOKENS - 1
    assert found["base"] == pytest.approx(math.exp(loss["base"]), rel=1e-5)
    assert found["npt"] == pytest.approx(math.exp(loss["npt"]), rel=1e-5)
    assert found["perplexity_ratio"] == pytest.approx(math.exp(loss["npt"] - loss["base"]), rel=1e-5)
    assert reports[layout]["logit_kl"]["mean"] == pytest.approx(loss["kl"], rel=1e-4)
    assert loss["kl"] > 0.01, "the models differ"


@LAYOUT_NAMES
@pytest.mark.parametrize("how", ["same_input", "free_running"])
def test_layer_figures_equal_those_of_whole_hidden_states(
    layout: str, how: str, reports: dict[str, Any], by_hand: dict[str, Any]
) -> None:
    layers = reports[layout]["layer_wise_equivalence"][how]["layers"]
    assert list(layers) == [str(number) for number in LAYERS]
    for number in LAYERS:
        ours, base = by_hand["layers"][how][number], by_hand["layers"]["base"][number]
        update = base - by_hand["layers"]["input"][number]
        error = torch.linalg.norm(ours - base)
        assert layers[str(number)] == {
            "mse": pytest.approx(float(F.mse_loss(ours, base)), rel=1e-4),
            "cosine_similarity": pytest.approx(float(F.cosine_similarity(ours, base, -1).mean()), rel=1e-5),
            "relative_error": pytest.approx(float(error / torch.linalg.norm(base)), rel=1e-4),
            "update_relative_error": pytest.approx(float(error / torch.linalg.norm(update)), rel=1e-4),
        }


@LAYOUT_NAMES
def test_delta_norms_are_those_of_materialised_deltas(
    layout: str, reports: dict[str, Any], by_hand: dict[str, Any]
) -> None:
    for (number, target), values in by_hand["norms"].items():
        found, expected = reports[layout]["weight_delta"]["layers"][str(number)][target], values.numpy()
        norms = found["frobenius_norm"]
        assert norms["count"] == TOKENS - 1
        assert norms["mean"] == pytest.approx(expected.mean(), rel=1e-4)
        assert norms["std"] == pytest.approx(expected.std(), rel=1e-3)
        assert norms["max"] == pytest.approx(expected.max(), rel=1e-4)
        assert norms["percentiles"]["p50"] == pytest.approx(np.median(expected), rel=1e-4)
        assert sum(norms["histogram"]["counts"]) == TOKENS - 1
        assert found["relative_norm"]["mean"] == pytest.approx(norms["mean"] / found["weight_norm"])


def test_every_layout_gives_the_report_of_one_process(reports: dict[str, Any]) -> None:
    """Also what has no reference above: other targets, v_a and v_b, parameters."""
    one = dict(_numbers(reports["TP1"]))
    for layout, report in reports.items():
        other = dict(_numbers(report))
        assert other.keys() == one.keys(), layout
        for key, value in one.items():
            if "histogram" not in key:
                near = pytest.approx(value, rel=2e-4, abs=1e-7) if isinstance(value, float) else value
                assert other[key] == near, (layout, key)


def _numbers(value: Any, key: str = "") -> list[tuple[str, Any]]:
    if isinstance(value, dict):
        return [pair for name, inner in value.items() for pair in _numbers(inner, f"{key}/{name}")]
    return [(key, value)]


def test_parameters_are_those_of_the_accounting(name: str, reports: dict[str, Any]) -> None:
    found = reports["TP1"]["parameters"]
    assert found["np"] == NPTFamily(SETTINGS[name]).cost(MODEL).parameters
    fewer = replace(MODEL, num_layers=MODEL.num_layers - len(LAYERS))
    both = model_cost(MODEL, VOCAB_SIZE).parameters - model_cost(fewer, VOCAB_SIZE).parameters
    assert found["converted_layers"] == both
    assert found["np_share_of_converted_layers"] == found["np"] / both


def test_generated_vectors_are_told_of_outer_products_alone(name: str, reports: dict[str, Any]) -> None:
    vectors = reports["TP1"]["generated_vectors"]
    if name == "outer drop":
        assert list(vectors["layers"]["1"]) == ["gate", "up"], "v_a of down has another width than a"
        assert -1 <= vectors["layers"]["1"]["gate"]["v_a_attention_similarity"] <= 1
    else:
        assert vectors is None


def test_the_average_delta_norm_is_held_against_document_002(reports: dict[str, Any]) -> None:
    delta = reports["TP1"]["weight_delta"]
    norms = [
        target["frobenius_norm"]["mean"] for layer in delta["layers"].values() for target in layer.values()
    ]
    assert delta["average_frobenius_norm"] == pytest.approx(np.mean(norms), rel=1e-6)
    assert (delta["expected_below"], delta["as_expected"]) == (0.01, False)


def test_with_np_off_the_ratio_is_one_and_no_distance_is_left(prefix: str) -> None:
    report = run_single(_off, prefix)
    assert report["perplexity"]["perplexity_ratio"] == 1.0
    assert report["perplexity"]["base_loss"] == report["perplexity"]["npt_loss"]
    assert report["logit_kl"]["mean"] == 0.0
    for layer in report["layer_wise_equivalence"]["free_running"]["layers"].values():
        assert layer["mse"] == layer["relative_error"] == 0.0
        assert layer["cosine_similarity"] == pytest.approx(1.0, abs=1e-12)


def _off(prefix: str) -> dict[str, Any] | None:
    """The free run with all NPT layers off, which the base run's `deactivated` leaves as they were."""
    model, family = _build("low_rank keep", ParallelConfig())
    with deactivated([model]):
        return evaluate_npt(
            [model],
            [family],
            family.settings,
            prefix,
            sequence_length=MODEL.seq_length,
            micro_batch_size=2,
        )


def test_the_perplexities_are_those_of_tools_evaluate(
    prefix: str, reports: dict[str, Any], name: str
) -> None:
    base, ours = run_single(_perplexities, name, prefix)
    assert reports["TP1"]["perplexity"]["base"] == pytest.approx(base, rel=1e-6)
    assert reports["TP1"]["perplexity"]["npt"] == pytest.approx(ours, rel=1e-6)


def _perplexities(name: str, prefix: str) -> tuple[float, float]:
    model, family = _build(name, ParallelConfig())
    options: Any = {"sequence_length": MODEL.seq_length, "micro_batch_size": 4}
    with deactivated([model]):
        base = evaluate_perplexity([model], [family], prefix, **options)
    return base.perplexity, evaluate_perplexity([model], [family], prefix, **options).perplexity


@pytest.mark.parametrize("layout", ["TP1", "TP2"])
def test_drawn_again_the_model_is_the_converted_one_that_nothing_has_trained(
    layout: str, prefix: str
) -> None:
    fresh, trained, again = run_distributed(_drawn_again, WORLD_SIZES[layout], layout, prefix)[0]
    assert again == fresh != trained


def _drawn_again(layout: str, prefix: str) -> list[float]:
    """The loss of a model as it is built, with other NP factors, and after `initialize_np_factors`."""
    model, family = _build("outer drop", LAYOUTS[layout])
    losses = []
    for change in (lambda: None, lambda: _disturb(model), lambda: initialize_np_factors([model], 1)):
        change()
        found = evaluate_perplexity(
            [model], [family], prefix, sequence_length=MODEL.seq_length, micro_batch_size=4
        )
        losses.append(found.loss)
    return losses


@torch.no_grad()
def _disturb(model: GPTModel) -> None:
    for module in np_modules([model]).values():
        for parameter in module.parameters():
            parameter.add_(0.3)


def test_the_untrained_ratio_is_that_of_the_perplexities() -> None:
    found = untrained_figures(math.log(30.0), math.log(20.0), 7)
    assert found["untrained"] == pytest.approx(30) and found["untrained_ratio"] == pytest.approx(1.5)
    assert untrained_figures(1e4, 1.0, 7)["untrained_ratio"] is None


def test_what_json_cannot_hold_becomes_null() -> None:
    found = finite({1: [math.nan, (math.inf, 2.0)], "text": "nan"})
    assert json.loads(json.dumps(found, allow_nan=False)) == {"1": [None, [None, 2.0]], "text": "nan"}


def test_a_distribution_counts_what_is_not_finite() -> None:
    found = distribution(np.array([1.0, 2.0, math.inf, 3.0]), histogram=True)
    assert (found["count"], found["not_finite"], found["mean"], found["max"]) == (4, 1, 2.0, 3.0)
    assert distribution(np.array([math.nan]))["mean"] is None


def test_a_dataset_of_one_token_is_refused(tmp_path: Path) -> None:
    write_dataset(str(tmp_path / "one"), [[[7]]])
    with pytest.raises(ValueError, match="one: the dataset must have at least 2 tokens, got 1"):
        run_single(_evaluated, "outer drop", ParallelConfig(), str(tmp_path / "one"))

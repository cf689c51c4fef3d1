"""Errors of the layers per token, and the model without each of its NPT layers, against float64 and at every layout."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from megatron_ext.config.groups.parallel_config import ParallelConfig
from megatron_ext.inference.perplexity import held_out_steps
from megatron_ext.models.build_model import build_model
from megatron_ext.models.gpt_model import GPTModel
from megatron_ext.npt.evaluation.distribution import PERCENTILES
from megatron_ext.npt.evaluation.layer_ablation import ablate_layers, holding_back
from megatron_ext.npt.evaluation.npt_evaluation import evaluate_npt
from megatron_ext.npt.evaluation.replaced_mlp import without_deltas
from megatron_ext.npt.modules.npt_layers import deactivated, np_modules
from megatron_ext.npt.modules.npt_module_config import NPTModuleConfig
from megatron_ext.npt.npt_family import NPTFamily
from megatron_ext.platform.process_groups import initialize
from megatron_ext.testing.npt_references import reference_feed_forward
from megatron_ext.testing.run_distributed import run_distributed
from megatron_ext.testing.run_single import run_single
from megatron_ext.testing.tiny_datasets import write_dataset
from megatron_ext.testing.tiny_training import LAYOUTS, TINY, VOCAB_SIZE, WORLD_SIZES

MODEL = replace(TINY, init_method_std=0.2, hidden_dropout=0.5)
LAYERS = (0, 1, 3)
LOW_RANK = NPTModuleConfig(
    npt_layers="0,1,3", np_target="gate+up+down", np_rank=4, np_residual="keep", np_init_scale=1.0
)
SETTINGS = {
    "low_rank keep": LOW_RANK,
    "outer drop": replace(LOW_RANK, np_form="outer_product", np_residual="drop", num_np_components=2),
}
TOKENS = 75
"""74 predictions: four whole windows and one of 10 tokens, whose other tokens are masked."""

LAYOUT_NAMES = ("TP1", "TP2", "PP2", "PP2 interleaved", "DP2")


@pytest.fixture(scope="module")
def prefix(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = str(tmp_path_factory.mktemp("data") / "stream")
    write_dataset(path, [[_stream().tolist()]])
    return path


def _stream() -> torch.Tensor:
    return torch.randint(0, VOCAB_SIZE, (TOKENS,), generator=torch.Generator().manual_seed(0))


def _build(name: str, parallel: ParallelConfig, bf16: bool = False) -> tuple[list[GPTModel], NPTFamily]:
    initialize(parallel, seed=1)
    family = NPTFamily(SETTINGS[name])
    chunks = build_model(
        MODEL,
        parallel,
        vocab_size=VOCAB_SIZE,
        seed=1,
        precision="bf16" if bf16 else "fp32",
        extensions=[family.extension()],
    )
    return [chunk.eval() for chunk in chunks], family


def _diagnosed(name: str, parallel: ParallelConfig, prefix: str, bf16: bool = False) -> tuple[Any, Any]:
    """The errors, on the first rank alone, and the ablation."""
    chunks, family = _build(name, parallel, bf16)
    on: dict[str, Any] = {"sequence_length": MODEL.seq_length, "micro_batch_size": 2}
    report = evaluate_npt(chunks, [family], family.settings, prefix, **on)
    ablation = ablate_layers(chunks, [family], LAYERS, lambda: held_out_steps(prefix, **on))
    return report and report["mlp_error"]["layers"], ablation


def _windows() -> list[torch.Tensor]:
    stream = _stream()
    return [stream[at : at + MODEL.seq_length + 1] for at in range(0, TOKENS - 1, MODEL.seq_length)]


def _logits(model: GPTModel, window: torch.Tensor) -> torch.Tensor:
    return model(window[None, :-1], torch.arange(len(window) - 1)[None], None)[0].double()


@torch.no_grad()
def _kl(model: GPTModel, off: tuple[int, ...]) -> float:
    """Mean KL(base || NPT) with the NPT layers `off` as base layers, each run from the first layer on."""
    values = []
    for window in _windows():
        with deactivated([model]):
            base = _logits(model, window)
        with deactivated([model], off):
            ours = _logits(model, window)
        values.append((base.softmax(-1) * (base.log_softmax(-1) - ours.log_softmax(-1))).sum(-1))
    return float(torch.cat(values).mean())


def _ablated_by_hand(name: str) -> tuple[float, dict[int, float], float]:
    chunks, _ = _build(name, ParallelConfig())
    whole, without = _kl(chunks[0], ()), {layer: _kl(chunks[0], (layer,)) for layer in LAYERS}
    chosen = holding_back({layer: whole - kl for layer, kl in without.items()})
    return whole, without, _kl(chunks[0], tuple(chosen))


@torch.no_grad()
def _errors_by_hand(name: str) -> dict[int, dict[str, np.ndarray]]:
    """Norms of targets and differences of every token, from h and a of the base model and the weights, in float64."""
    chunks, family = _build(name, ParallelConfig())
    states: dict[tuple[str, int], list[torch.Tensor]] = {}
    for number in LAYERS:
        layer: Any = chunks[0].decoder.layers[number]

        def keep(_: Any, args: Any, kwargs: Any, n: int = number) -> None:
            states.setdefault(("h", n), []).append(kwargs["hidden_states"][:, 0].double())

        def keep_attention(_: Any, args: Any, output: Any, n: int = number) -> None:
            states.setdefault(("a", n), []).append(output[0][:, 0].double())

        layer.register_forward_pre_hook(keep, with_kwargs=True)
        layer.self_attention.register_forward_hook(keep_attention)
    with deactivated(chunks):
        for window in _windows():
            _logits(chunks[0], window)
    return {
        number: _norms(
            chunks[0].decoder.layers[number],
            family.settings,
            torch.cat(states["h", number]),
            torch.cat(states["a", number]),
        )
        for number in LAYERS
    }


def _norms(layer: Any, settings: NPTModuleConfig, h: torch.Tensor, a: torch.Tensor) -> dict[str, np.ndarray]:
    weights = {"norm": layer.pre_mlp_layernorm, "fc1": layer.mlp.linear_fc1, "fc2": layer.mlp.linear_fc2}
    base = {key: module.weight.double() for key, module in weights.items()}
    base |= {f"{key}_bias": torch.zeros(len(base[key])).double() for key in ("fc1", "fc2")}
    factors = {
        target: {key: factor.double() for key, factor in part.named_parameters()}
        for target, part in layer.feed_forward.modulations.items()
    }

    def mlp(hidden: torch.Tensor, attention: torch.Tensor) -> torch.Tensor:
        """MLP*(LN2(hidden)); without attention output all deltas are zero."""
        output = reference_feed_forward(settings, base, factors, hidden, attention, MODEL.norm_epsilon)
        return output - hidden - (attention if settings.np_residual == "keep" else 0)

    none = torch.zeros_like(a)
    target = mlp(h + a, none) + (a if settings.np_residual == "drop" else 0)
    differences = {"trained": mlp(h, a) - target, "untrained": mlp(h, none) - target}
    return {key: value.norm(dim=-1).numpy() for key, value in {**differences, "target": target}.items()}


@pytest.fixture(scope="module", params=SETTINGS)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def found(name: str, prefix: str) -> dict[str, list[tuple[Any, Any]]]:
    return {
        layout: run_distributed(_diagnosed, WORLD_SIZES[layout], name, LAYOUTS[layout], prefix)
        for layout in LAYOUT_NAMES
    }


@pytest.mark.parametrize("layout", LAYOUT_NAMES)
def test_errors_of_the_layers_equal_those_of_materialised_weights_in_float64(
    layout: str, name: str, found: dict[str, Any]
) -> None:
    layers = found[layout][0][0]
    assert not any(errors for errors, _ in found[layout][1:]), "the first rank has the report, alone"
    for number, norms in run_single(_errors_by_hand, name).items():
        ours, square = layers[str(number)], norms["target"] ** 2
        for key in ("trained", "untrained"):
            errors = norms[key] / norms["target"]
            assert ours[key]["count"] == TOKENS - 1, "masked tokens do not count"
            for p, value in zip(PERCENTILES, np.percentile(errors, PERCENTILES), strict=True):
                assert ours[key]["percentiles"][f"p{p}"] == pytest.approx(value, rel=1e-4)
            overall = np.sqrt((norms[key] ** 2).sum() / square.sum())
            assert ours[f"{key}_overall"] == pytest.approx(overall, rel=1e-4)
        assert ours["largest_share"] == pytest.approx(square.max() / square.sum(), rel=1e-4)
        assert ours["trained"]["mean"] != pytest.approx(ours["untrained"]["mean"], rel=1e-2)


@pytest.mark.parametrize("layout", LAYOUT_NAMES)
def test_the_model_without_a_layer_has_the_kl_of_a_run_from_the_first_layer_on(
    layout: str, name: str, found: dict[str, Any]
) -> None:
    whole, without, together = run_single(_ablated_by_hand, name)
    assert whole > 0.01, "the models differ"
    for _, ablation in found[layout]:
        assert (ablation["tokens"], ablation["kl"]) == (TOKENS - 1, pytest.approx(whole, rel=1e-4))
        for layer, kl in without.items():
            reduction = ablation["layers"][layer]["kl_reduction"]
            assert ablation["layers"][layer]["kl_without"] == pytest.approx(kl, rel=1e-4)
            assert reduction == pytest.approx(whole - kl, rel=1e-3, abs=1e-5)
        assert ablation["holding_back"]["kl_without"] == pytest.approx(together, rel=1e-4)


def test_in_bf16_the_errors_are_near_those_of_fp32(prefix: str, name: str, found: dict[str, Any]) -> None:
    rounded = run_single(_diagnosed, name, ParallelConfig(), prefix, True)[0]
    for number, layer in found["TP1"][0][0].items():
        for key in ("trained", "untrained"):
            near = pytest.approx(layer[key]["percentiles"]["p50"], rel=0.05)
            assert rounded[number][key]["percentiles"]["p50"] == near


def test_without_the_only_converted_layer_the_model_is_the_base_model(prefix: str) -> None:
    ablation = run_single(_only_one_converted, prefix)
    assert ablation["kl"] > 0.01
    assert ablation["layers"][1] == {"kl_without": 0.0, "kl_reduction": ablation["kl"]}
    assert ablation["holding_back"] == {"layers": [1], "kl_without": 0.0}


def _only_one_converted(prefix: str) -> Any:
    chunks, family = _build("low_rank keep", ParallelConfig())
    with deactivated(chunks, [0, 3]):
        return ablate_layers(
            chunks,
            [family],
            (1,),
            lambda: held_out_steps(prefix, sequence_length=MODEL.seq_length, micro_batch_size=2),
        )


@pytest.mark.parametrize("name", SETTINGS)
def test_without_deltas_a_layer_is_one_whose_output_factors_are_zero(name: str) -> None:
    without, zero, trained = run_single(_without_deltas, name)
    assert torch.equal(without, zero)
    assert not torch.allclose(without, trained)


@torch.no_grad()
def _without_deltas(name: str) -> list[torch.Tensor]:
    chunks, _ = _build(name, ParallelConfig())
    trained = _logits(chunks[0], _windows()[0])
    with without_deltas(chunks):
        without = _logits(chunks[0], _windows()[0])
    assert torch.equal(_logits(chunks[0], _windows()[0]), trained), "the deltas are back"
    for module in np_modules(chunks).values():
        for part in module.modulations.values():
            part.output_factor.zero_()
    return [without, _logits(chunks[0], _windows()[0]), trained]

"""tools/evaluate_npt.py from the command line: report and page at several layouts, adapters, and what is refused."""

import contextlib
import html
import io
import json
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_ext.config.command_line.error_lines import main_guard
from megatron_ext.config.groups.checkpoint_config import CheckpointConfig
from megatron_ext.config.groups.parallel_config import ParallelConfig
from megatron_ext.config.groups.tokenizer_config import TokenizerConfig
from megatron_ext.data.files import console
from megatron_ext.data.indexed.manifest import write_manifest
from megatron_ext.data.tokenizers.byte_and_null import ByteLevelTokenizer, NullTokenizer
from megatron_ext.inference.load_model import load_model
from megatron_ext.inference.perplexity import evaluate_perplexity
from megatron_ext.npt.evaluation.evaluation_summary import delta_expectation, held_back
from megatron_ext.npt.evaluation.paired_generation import greedy_agreement
from megatron_ext.npt.modules.npt_layers import np_modules
from megatron_ext.npt.modules.npt_module_config import NPTModuleConfig
from megatron_ext.npt.npt_family import NPTFamily
from megatron_ext.npt.weights.conversion import convert, initialize_np_factors
from megatron_ext.npt.weights.np_factors import gather_np_factors
from megatron_ext.npt.weights.np_weight_files import write_np_weights
from megatron_ext.platform import process_groups
from megatron_ext.registry.known_families import FAMILIES
from megatron_ext.testing.checkpoint_runs import RunSettings, TinyRun
from megatron_ext.testing.forked_scripts import run_script
from megatron_ext.testing.run_distributed import run_distributed
from megatron_ext.testing.run_single import run_single
from megatron_ext.testing.tiny_datasets import write_dataset
from megatron_ext.testing.tiny_training import TINY
from megatron_ext.training.interface.family_interface import Family
from tools.evaluate_npt import EvaluateNPTConfig, _regularization_weight, main

MODEL = replace(TINY, init_method_std=0.2)
SETTINGS = NPTModuleConfig(
    np_form="outer_product", np_rank=4, np_init_scale=1.0, np_residual="keep", npt_layers="1:3"
)
TEXTS = ["<script>alert('no')</script> is what it says", "the cat & the dog sat on the mat", "short"]


def _families() -> list[Family]:
    return [NPTFamily(SETTINGS)]


def _make(folder: Path) -> None:
    """A checkpoint of the base model, one with NP components, and their adapter."""
    tokenizer = ByteLevelTokenizer()
    settings = RunSettings(
        parallel=ParallelConfig(),
        checkpoint=CheckpointConfig(save=str(folder / "base")),
        model=MODEL,
        vocab_size=tokenizer.vocab_size,
        tokenizer=tokenizer.fingerprint(),
        tokenizer_config=TokenizerConfig(tokenizer_type="ByteLevelTokenizer"),
    )
    TinyRun(settings).save()
    npt = TinyRun(
        replace(settings, checkpoint=CheckpointConfig(save=str(folder / "npt")), make_families=_families)
    )
    npt.save()
    folder.joinpath("adapter").mkdir()
    write_np_weights(folder / "adapter", gather_np_factors(list(npt.chunks)), SETTINGS)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("npt")
    run_single(_make, folder)
    tokenizer = ByteLevelTokenizer()
    write_dataset(f"{folder}/held", [[[*tokenizer.tokenize(text), tokenizer.eod]] for text in TEXTS])
    write_manifest(f"{folder}/held", tool="t", tokenizer=tokenizer.describe(), inputs=["texts"])
    write_dataset(f"{folder}/other", [[[1, 2, 3]]])
    write_manifest(f"{folder}/other", tool="t", tokenizer=NullTokenizer(9).describe(), inputs=["texts"])
    return folder


def _tool(arguments: list[str]) -> str:
    """What the tool prints; the process group stays, it is the test's."""
    process_groups.shutdown = lambda: None
    sys.argv = ["tools/evaluate_npt.py", *arguments]
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        main()
    return printed.getvalue()


def _report(made: Path, name: str, world_size: int, *arguments: str) -> tuple[dict[str, Any], str]:
    output = str(made / "reports" / f"{name}.json")
    given = ["--data-path", f"{made}/held", "--output", output, "--max-new-tokens", "6", *arguments]
    printed = run_distributed(_tool, world_size, given)
    assert not any(printed[1:]), "the first rank speaks alone"
    return json.loads(Path(output).read_text()), printed[0]


@pytest.fixture(scope="module")
def one(made: Path) -> tuple[dict[str, Any], str, str]:
    """Report, what was printed, and the page, of a single process."""
    page = made / "reports" / "page.html"
    report, printed = _report(made, "one", 1, "--checkpoint", f"{made}/npt", "--html", str(page))
    return report, printed, page.read_text()


def _same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    for key in ("perplexity", "logit_kl"):
        assert found[key] == pytest.approx(expected[key], rel=1e-4, abs=1e-6)
    average = "average_frobenius_norm"
    assert found["weight_delta"][average] == pytest.approx(expected["weight_delta"][average], rel=1e-4)
    assert found["generations"] == expected["generations"]
    assert found["parameters"] == expected["parameters"]


def test_report_holds_every_documented_key_and_counts_every_token(made: Path, one: Any) -> None:
    report, printed, _ = one
    tokens = sum(len(text) + 1 for text in TEXTS) - 1
    assert report["perplexity"]["tokens"] == tokens
    assert report["npt_config"]["np_rank"] == 4
    assert report["evaluation_config"]["seq_length"] == MODEL.seq_length
    text = Path("docs/npt_evaluation.md").read_text()
    documented = set(re.findall(r"^\| `([^`]+)`", text, re.M))
    assert _keys(report) == documented
    assert "perplexity ratio" in printed
    assert f"{tokens} tokens" in printed
    untrained = report["perplexity"]["untrained_ratio"]
    assert untrained != report["perplexity"]["perplexity_ratio"], "the checkpoint's seed is another one"
    assert re.search(rf"converted, not trained .* {untrained:.6g} .*seed 1234", printed)
    assert report["weight_delta"]["regularization_weight"] is None, "the checkpoint names no training"
    assert re.search(r"mean delta norm +│ +│ +\S+ │ +│", printed), "nothing is expected of it"
    cosine = report["layer_wise_equivalence"]["same_input"]["layers"]["1"]["cosine_similarity"]
    assert "same input:" in printed and "free-running:" in printed
    assert f"{1 - cosine:.4g}" in printed


@pytest.mark.parametrize(
    ("npt", "weight"),
    [
        ({"mode": "multi_layer", "layer_losses": "document", "regularization_weight": None}, 0.01),
        ({"mode": "multi_layer", "layer_losses": "local", "regularization_weight": None}, 0.0),
        ({"mode": "lm", "layer_losses": "document", "regularization_weight": 0.5}, 0.5),
        ({"mode": "multi_layer", "regularization_weight": None}, None),
    ],
)
def test_a_delta_norm_is_expected_of_regularized_runs_only(npt: dict[str, Any], weight: float | None) -> None:
    config = EvaluateNPTConfig(checkpoint="c", data_path="d")
    assert _regularization_weight(config, {"npt": npt}) == weight
    assert _regularization_weight(replace(config, npt_weights="w.pt"), {"npt": npt}) is None
    expected = delta_expectation({"regularization_weight": weight, "expected_below": 0.01})
    assert expected == ("with regularization, expected below 0.01" if weight else "")


def _keys(value: Any, path: str = "") -> set[str]:
    """Dotted keys down to plain values; numbers of layers, targets and items of lists are no keys."""
    if path in ("npt_config", "model_config", "evaluation_config"):
        return {path}
    if isinstance(value, list):
        return set().union(*(_keys(inner, path) for inner in value)) if value else {path}
    if isinstance(value, dict) and "percentiles" in value:
        rest = value.keys() - {"histogram"}
        assert rest == {"count", "not_finite", "mean", "std", "min", "max", "percentiles"}
        return {path}
    if not isinstance(value, dict):
        return {path}
    found: set[str] = set()
    for key, inner in value.items():
        named = "LAYER" if key.isdigit() else "TARGET" if key in ("gate", "up", "down", "fc1") else key
        found |= _keys(inner, f"{path}.{named}".lstrip("."))
    return found


def test_a_pipeline_gives_the_same_report(made: Path, one: Any) -> None:
    _same(
        _report(made, "pp", 2, "--checkpoint", f"{made}/npt", "--pipeline-model-parallel-size", "2")[0],
        one[0],
    )


def test_an_adapter_beside_the_base_checkpoint_gives_the_same_report(made: Path, one: Any) -> None:
    weights = f"{made}/adapter/npt_weights.pt"
    _same(_report(made, "pt", 2, "--checkpoint", f"{made}/base", "--npt-weights", weights)[0], one[0])


def test_generations_pair_both_models_on_the_held_out_beginnings(one: Any) -> None:
    pairs = one[0]["generations"]
    assert [(pair["prompt"], pair["mode"]) for pair in pairs] == [
        (text[:16], mode) for text in TEXTS[:2] for mode in ("greedy", "sampled")
    ]
    for pair in pairs:
        assert pair["identical"] == (pair["base"] == pair["npt"])
        assert pair["first_difference"] <= pair["agreeing_tokens"] <= pair["tokens"] <= 6
        assert pair["identical"] == (pair["agreeing_tokens"] == pair["tokens"])


def test_greedy_continuations_of_a_prompts_file_are_counted_one_by_one_and_in_total(made: Path) -> None:
    path = made / "prompts.txt"
    path.write_text("".join(f"prompt {number}\n" for number in range(10)))
    given = ["--checkpoint", f"{made}/npt", "--prompts-file", str(path), "--ablation-tokens", "0"]
    report, printed = _report(made, "prompts", 1, *given)
    greedy = [pair for pair in report["generations"] if pair["mode"] == "greedy"]
    assert [pair["prompt"] for pair in greedy] == [f"prompt {number}" for number in range(10)]
    total = report["greedy_agreement"]
    assert total["prompts"] == 10
    for key in ("identical", "first_difference", "tokens", "agreeing_tokens"):
        assert total[key] == sum(pair[key] for pair in greedy)
    assert 0 < total["agreeing_tokens"] < total["tokens"], "the models differ"
    assert f"{total['agreeing_tokens']} of {total['tokens']} tokens agree" in printed
    assert re.search(r"prompt 7 .* \d+ of \d+", printed), "each prompt has its row"
    assert report["layer_ablation"] is None


def test_the_positions_with_the_same_token_are_counted_after_the_first_difference_too() -> None:
    pairs = [
        {"mode": "greedy", "identical": False, "first_difference": 1, "tokens": 4, "agreeing_tokens": 3},
        {"mode": "greedy", "identical": True, "first_difference": 2, "tokens": 2, "agreeing_tokens": 2},
        {"mode": "sampled", "identical": False, "first_difference": 0, "tokens": 9, "agreeing_tokens": 0},
    ]
    expected = {"prompts": 2, "identical": 1, "first_difference": 3, "tokens": 6, "agreeing_tokens": 5}
    assert greedy_agreement(pairs) == expected


def test_the_layers_that_hold_the_model_back_are_named_and_checked_together(made: Path, one: Any) -> None:
    report, printed, page = one
    ablation = report["layer_ablation"]
    assert ablation["tokens"] == report["perplexity"]["tokens"], "all tokens, as there are fewer than 512"
    assert ablation["kl"] == pytest.approx(report["logit_kl"]["mean"], rel=1e-5)
    assert set(ablation["layers"]) == set(report["mlp_error"]["layers"]) == {"1", "2"}
    sentence = held_back(ablation)
    assert sentence in " ".join(printed.split())
    assert html.escape(sentence) in page
    few, _ = _report(made, "few", 1, "--checkpoint", f"{made}/npt", "--ablation-tokens", "20")
    assert few["layer_ablation"]["tokens"] == 20


def test_a_calibrated_run_is_untrained_without_deltas(made: Path, one: Any) -> None:
    settings = replace(SETTINGS, np_form="key_value", np_init_strategy="calibrated", np_target="gate+up")
    run_single(_make_calibrated, made, settings)
    given = ["--checkpoint", f"{made}/base", "--npt-weights", f"{made}/calibrated/npt_weights.pt"]
    report, printed = _report(made, "calibrated", 1, *given)
    perplexity = report["perplexity"]
    assert perplexity["untrained_seed"] is None
    assert perplexity["untrained_ratio"] != pytest.approx(one[0]["perplexity"]["untrained_ratio"], rel=1e-6)
    assert perplexity["untrained_loss"] == pytest.approx(run_single(_loss_without_deltas, made), rel=1e-6)
    assert "without deltas" in printed


def _make_calibrated(folder: Path, settings: NPTModuleConfig) -> None:
    """Weights of the form key_value, whose settings say that they were calibrated."""
    loaded = load_model(f"{folder}/base", FAMILIES)
    convert([loaded.model], settings)
    initialize_np_factors([loaded.model], 5)
    folder.joinpath("calibrated").mkdir()
    write_np_weights(folder / "calibrated", gather_np_factors([loaded.model]), settings)


def _loss_without_deltas(folder: Path) -> float:
    """Loss of the converted model with output factors of zero."""
    loaded = load_model(f"{folder}/npt", FAMILIES)
    for module in np_modules([loaded.model]).values():
        for part in module.modulations.values():
            part.output_factor.data.zero_()
    options: Any = {"sequence_length": MODEL.seq_length, "micro_batch_size": 4}
    return evaluate_perplexity([loaded.model], list(loaded.families), f"{folder}/held", **options).loss


def test_the_page_opens_offline_and_escapes_what_models_say(one: Any) -> None:
    report, _, page = one
    assert "<script" not in page
    assert html.escape(TEXTS[0][:16]) in page
    assert not re.search(r"(src|href)=[\"'](?!data:)", page)
    assert page.count("data:image/svg+xml;base64,") == 6, "bars, three heat maps, two histograms"
    for name in ("perplexity_ratio", "untrained_ratio"):
        assert f"{report['perplexity'][name]:.5f}" in page


def test_a_training_configuration_gives_what_counts_here(made: Path, tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(
        "model:\n  base_model_name: meta-llama/Llama-2-7b-hf\n  npt_layers: 1,2\n  rank: 4\n"
        "training:\n  batch_size: 2\n  learning_rate: 1e-4\n  max_length: 8\n"
    )
    given = ["--checkpoint", f"{made}/npt", "--config", str(path), "--seed", "7"]
    found, _ = _report(made, "yaml", 1, *given, "--prompts", "one prompt")
    assert (found["evaluation_config"]["micro_batch_size"], found["evaluation_config"]["seq_length"]) == (
        2,
        8,
    )
    assert [pair["prompt"] for pair in found["generations"]] == 2 * ["one prompt"]
    assert {pair["seed"] for pair in found["generations"]} == {7}


REFUSED = {
    "no checkpoint": (["--checkpoint", "{made}/nowhere"], "nowhere"),
    "no NP components": (["--checkpoint", "{made}/base"], "base: has no NP components"),
    "no dataset": (["--data-path", "{made}/nothing"], "nothing"),
    "another tokenizer": (["--data-path", "{made}/other"], "tokenizer"),
    "output below a file": (["--output", "{made}/held.bin/report.json"], "--output"),
    "output is a directory": (["--html", "{made}/base"], "--html"),
    "no weights": (["--npt-weights", "{made}/none.pt"], "none.pt"),
    "weights are no tensors": (["--npt-weights", "{made}/held.bin"], "held.bin"),
    "another rank": (["--np-rank", "8"], "--np-rank 8: the checkpoint's value is 4"),
    "other layers": (["--npt-layers", "all"], "--npt-layers all: the checkpoint's NPT layers are 1, 2"),
    "no prompts": (["--prompts-file", "{made}/none.txt"], "none.txt"),
    "a wrong number": (["--max-tokens", "0"], "--max-tokens 0"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_bad_input_is_told_in_one_line_before_anything_is_loaded(
    name: str, made: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    arguments, words = REFUSED[name]
    given = {"--checkpoint": f"{made}/npt", "--data-path": f"{made}/held", "--output": f"{tmp_path}/r.json"}
    given |= dict(zip(arguments[::2], (text.format(made=made) for text in arguments[1::2]), strict=True))
    monkeypatch.setattr(sys, "argv", ["t", *(text for pair in given.items() for text in pair)])
    with pytest.raises(SystemExit) as ended:
        main_guard(main)()
    assert ended.value.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert words in lines[0]
    assert not list(tmp_path.iterdir())


def _print_every_line() -> None:
    console._LINE_SECONDS = 0.0


@pytest.mark.parametrize(
    ("tool", "model", "descriptions"),
    [("evaluate", "base", ["{held}"]), ("evaluate_npt", "npt", ["NPT and base model", "untrained NPT"])],
)
def test_a_log_of_an_evaluation_shows_how_far_it_is_once_and_not_per_process(
    made: Path, tmp_path: Path, tool: str, model: str, descriptions: list[str]
) -> None:
    given = ["--load", f"{made}/{model}", "--data-path", f"{made}/held", "--micro-batch-size", "1"]
    given += ["--tensor-model-parallel-size", "1", "--output", f"{tmp_path}/report.json"]
    done = run_script(f"tools/{tool}.py", *given, processes=2, before=_print_every_line)
    assert done.returncode == 0, done.stderr
    lines = re.findall(
        r"^(.+): ([\d,]+) of ([\d,]+) tokens \((\d+)%\)  [\d,]+ tokens/s  ETA ", done.stderr, re.M
    )
    for description in descriptions:
        mine = [line[1:] for line in lines if line[0] == description.format(held=f"{made}/held")]
        assert len(mine) > 1
        assert [int(share) for _, _, share in mine] == sorted({int(share) for _, _, share in mine})
        assert mine[-1] == (mine[0][1], mine[0][1], "100")

"""Writes the report of `npt_evaluation` as one HTML page; see docs/npt_evaluation.md."""

from typing import Any

from megatron_ext.npt.evaluation.evaluation_summary import (
    ERROR_COLUMNS,
    agreement_text,
    delta_expectation,
    error_rows,
    held_back,
    untrained_state,
)
from megatron_ext.reports.charts import bar_chart, histogram_chart, metric_heat_map
from megatron_ext.reports.page import Page

_HEADINGS = {"same_input": "same input", "free_running": "free-running"}
_LAYER_METRICS = {
    "mse": "MSE",
    "cosine_similarity": "1 - cosine",
    "relative_error": "relative\nerror",
    "update_relative_error": "relative error\nof the update",
}


def evaluation_page(report: dict[str, Any]) -> str:
    """Returns the evaluation report as an HTML page.

    Args:
        report: the result of `evaluate_npt`, with the keys that tools/evaluate_npt.py adds.
    """
    page = Page("NPT and its base model")
    page.paragraph(f"Checkpoint {report['checkpoint']}, held-out data {report['data_path']}.")
    page.key_numbers(_key_numbers(report))
    page.heading("Perplexity, free-running, on the same tokens")
    perplexity = report["perplexity"]
    bars = {name: _number(perplexity[name]) for name in ("base", "npt")}
    page.pictures([(bar_chart(bars, y_label="perplexity"), "Perplexity of the base model and of NPT.")])
    _layers(page, report)
    _errors(page, report)
    _deltas(page, report["weight_delta"])
    _generations(page, report["generations"], report["greedy_agreement"])
    page.heading("Parameters and configuration")
    page.table(["layer", "NP parameters", "base parameters"], _counts(report["parameters"]))
    for name in ("npt_config", "model_config", "evaluation_config"):
        page.paragraph(name)
        page.table(["setting", "value"], [[key, _text(value)] for key, value in report[name].items()])
    return page.html()


def _key_numbers(report: dict[str, Any]) -> list[tuple[str, str, str]]:
    perplexity, delta, counts = report["perplexity"], report["weight_delta"], report["parameters"]
    expected = delta_expectation(delta)
    return [
        ("perplexity ratio", _short(perplexity["perplexity_ratio"], ".5f"), "NPT / base; expected: 1 ± 0.05"),
        (
            "untrained ratio",
            _short(perplexity["untrained_ratio"], ".5f"),
            f"perplexity ratio of the converted model {untrained_state(perplexity)}",
        ),
        ("perplexity, base", _short(perplexity["base"]), f"{perplexity['tokens']:,} tokens"),
        ("perplexity, NPT", _short(perplexity["npt"]), f"{perplexity['tokens']:,} tokens"),
        ("KL(base || NPT)", _short(report["logit_kl"]["mean"]), "nats per token"),
        (
            "mean delta norm",
            _short(delta["average_frobenius_norm"]),
            f"{expected} (docs/design/npt_equivalence.md)" if expected else "mean of |delta|, Frobenius",
        ),
        (
            "relative delta norm",
            _short(delta["relative_norm"]["mean"]),
            "mean of |delta| / |W|, Frobenius",
        ),
        (
            "NP parameters",
            f"{counts['np']:,}",
            f"{counts['np_share_of_converted_layers']:.1%} of the base parameters of their layers",
        ),
    ]


def _layers(page: Page, report: dict[str, Any]) -> None:
    page.heading("Layers")
    delta_layers = report["weight_delta"]["layers"]
    for how, heading in _HEADINGS.items():
        measured = report["layer_wise_equivalence"][how]
        page.paragraph(f"{heading[0].upper()}{heading[1:]}. {measured['measured']}.")
        rows = list(measured["layers"])
        values = [
            [_distance(metric, measured["layers"][row][metric]) for metric in _LAYER_METRICS] for row in rows
        ]
        columns = list(_LAYER_METRICS.values())
        if how == "free_running" and delta_layers:
            targets = list(next(iter(delta_layers.values())))
            columns += [f"delta norm\n{target}" for target in targets]
            for row, numbers in zip(rows, values, strict=True):
                numbers += [delta_layers[row][target]["frobenius_norm"]["mean"] for target in targets]
        picture = metric_heat_map(rows, columns, values)
        page.pictures(
            [(picture, f"Metrics of each layer, {heading}. Each column has its own scale; dark means large.")]
        )
    vectors = report["generated_vectors"]
    if vectors is not None:
        names = ("v_a_norm", "v_b_norm", "v_a_attention_similarity")
        rows = [
            [int(layer), target, *(values[name] for name in names)]
            for layer, targets in vectors["layers"].items()
            for target, values in targets.items()
        ]
        page.table(["layer", "target", *names], rows)


def _errors(page: Page, report: dict[str, Any]) -> None:
    page.heading("Errors of the converted MLPs, and the layers that hold the model back")
    page.paragraph(
        "Error of a token: |MLP output - target| / |target|, on the layer's input in the base model. "
        f"Untrained: without deltas. Massive: |target|^2 above {report['mlp_error']['massive_above']:g} "
        "times the median; share: fraction of the sum of all |target|^2. Last column: reduction of "
        "KL(base || NPT) if this layer is replaced by its base layer."
    )
    if report["layer_ablation"] is not None:
        page.paragraph(held_back(report["layer_ablation"]))
    rows = error_rows(report)
    numbers = [[None if cell in (None, "-") else float(cell) for cell in row[1:]] for row in rows]
    columns = [name.replace(": ", ":\n").replace(", ", ",\n") for name in ERROR_COLUMNS[1:]]
    picture = metric_heat_map([str(row[0]) for row in rows], columns, numbers)
    page.pictures([(picture, "Errors of each layer. Each column has its own scale; dark means large.")])


def _deltas(page: Page, delta: dict[str, Any]) -> None:
    page.heading("Weight deltas")
    if "histogram" not in delta["frobenius_norm"]:
        page.paragraph("No delta has a finite norm.")
        return
    pictures = []
    for name, label in (("frobenius_norm", "|delta|, Frobenius norm"), ("relative_norm", "|delta| / |W|")):
        found = delta[name]
        marks = [("mean", found["mean"])]
        if name == "frobenius_norm" and delta_expectation(delta) and found["max"] >= delta["expected_below"]:
            marks.append(("expected mean", delta["expected_below"]))
        histogram = found["histogram"]
        picture = histogram_chart(histogram["edges"], histogram["counts"], x_label=label, marks=marks)
        pictures.append((picture, f"Distribution of {label} over all tokens, NPT layers and targets."))
    page.pictures(pictures)
    columns = ["mean", "std", "min", "max", "p5", "p50", "p95"]
    rows = _delta_rows(delta["layers"], columns)
    page.table(["layer", "target", *columns, "|W|", "mean relative"], rows)


def _delta_rows(layers: dict[str, Any], columns: list[str]) -> list[list[Any]]:
    rows = []
    for layer, targets in layers.items():
        for target, found in targets.items():
            norms = found["frobenius_norm"] | (found["frobenius_norm"]["percentiles"] or {})
            own = [found["weight_norm"], found["relative_norm"]["mean"]]
            rows.append([int(layer), target, *(norms.get(column) for column in columns), *own])
    return rows


def _generations(page: Page, generations: list[dict[str, Any]], agreement: dict[str, int]) -> None:
    if not generations:
        return
    page.heading("Generated texts, with the same prompt and seed")
    page.paragraph(f"Greedy: {agreement_text(agreement)}.")
    for pair in generations:
        same = f"the first {pair['first_difference']} tokens are equal"
        same += f", {pair['agreeing_tokens']} of {pair['tokens']} agree"
        same = "identical" if pair["identical"] else same
        how = pair["mode"] if pair["mode"] == "greedy" else f"sampled, temperature {pair['temperature']}"
        page.paragraph(f"{how}, seed {pair['seed']}: {same}")
        page.beside([("prompt", pair["prompt"]), ("base", pair["base"]), ("NPT", pair["npt"])])


def _counts(parameters: dict[str, Any]) -> list[list[Any]]:
    rows: list[list[Any]] = [
        [int(layer), counted["np"], counted["layer"]] for layer, counted in parameters["layers"].items()
    ]
    return [*rows, ["all converted", parameters["np"], parameters["converted_layers"]]]


def _distance(metric: str, value: float | None) -> float | None:
    """Converts a metric so that larger values mean a larger distance from the base layer."""
    return 1 - value if metric == "cosine_similarity" and value is not None else value


def _number(value: float | None) -> float:
    return float("inf") if value is None else value


def _short(value: float | None, style: str = ".4g") -> str:
    return "not finite" if value is None else format(value, style)


def _text(value: object) -> str:
    return "" if value is None else str(value)

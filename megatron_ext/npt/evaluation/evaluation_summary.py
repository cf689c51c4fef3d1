"""Prints the main figures of an NPT evaluation as tables on the terminal."""

from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table


def print_summary(report: dict[str, Any]) -> None:
    """Prints the main figures, and a table with one row per NPT layer; `report` is the result of `evaluate_npt`."""
    perplexity, delta, counts = report["perplexity"], report["weight_delta"], report["parameters"]
    table = Table(title=f"NPT and its base model on {escape(report['data_path'])}")
    for column, justify in (("", "left"), ("base", "right"), ("NPT", "right"), ("", "left")):
        table.add_column(column, justify=justify)  # type: ignore[arg-type]
    ratio, kl = perplexity["perplexity_ratio"], report["logit_kl"]["mean"]
    table.add_row(
        "perplexity", _four(perplexity["base"]), _four(perplexity["npt"]), f"{perplexity['tokens']:,} tokens"
    )
    table.add_row("perplexity ratio", "1", _four(ratio, 6), _verdict(perplexity["as_expected"], "1 ± 0.05"))
    untrained = _four(perplexity["untrained_ratio"], 6)
    is_calibrated = perplexity["untrained_seed"] is None
    # A calibrated model is not yet trained either; its reference has no deltas.
    row = (
        ("  without deltas", "1", untrained, "")
        if is_calibrated
        else ("  converted, not trained", "1", untrained, untrained_state(perplexity))
    )
    table.add_row(*row)
    table.add_row("KL(base || NPT)", "0", _four(kl), "nats per token")
    average = delta["average_frobenius_norm"]
    table.add_row(
        "mean delta norm",
        "",
        _four(average),
        delta_expectation(delta),
    )
    table.add_row("  relative to |W|", "", _four(delta["relative_norm"]["mean"]), "")
    share = f"NP / base: {counts['np_share_of_converted_layers']:.1%} in the converted layers"
    table.add_row("parameters", f"{counts['converted_layers']:,}", f"{counts['np']:,}", share)
    console = Console(width=100)
    console.print(table)
    console.print(
        "delta: the update of an MLP's weights for a token. The columns are explained in docs/npt_evaluation.md."
    )
    console.print(_layer_table(report))
    console.print(
        "same input: both layers get the layer's input in the base model; free-running: "
        "each gets its own model's."
    )
    console.print(_error_table(report))
    console.print(_ERROR_LEGEND)
    if report["layer_ablation"] is not None:
        console.print(held_back(report["layer_ablation"]))
    if report["generations"]:
        console.print(_greedy_table(report))


def untrained_state(perplexity: dict[str, Any]) -> str:
    """Describes the untrained model in words; `perplexity` is the report's section of that name."""
    seed = perplexity["untrained_seed"]
    return "without deltas" if seed is None else f"initial NP weights, seed {seed}"


def delta_expectation(delta: dict[str, Any]) -> str:
    """Describes the expected mean delta norm in words; `delta` is the report's section `weight_delta`.

    Returns "" for a run without regularization, for which nothing is expected.
    """
    regularized = bool(delta["regularization_weight"])
    return f"with regularization, expected below {delta['expected_below']}" if regularized else ""


def held_back(ablation: dict[str, Any]) -> str:
    """Returns a sentence that names the layers with the largest effect on the KL; `ablation` is the report's section
    `layer_ablation`.
    """
    found, tokens = ablation["holding_back"], f"on {ablation['tokens']:,} tokens"
    if not found["layers"]:
        return f"KL(base || NPT) {_four(ablation['kl'])} {tokens}: no layer holds the model back."
    names, one = ", ".join(map(str, found["layers"])), len(found["layers"]) == 1
    return (
        f"Held back by {'layer' if one else 'layers'} {names}: with {'it' if one else 'them'} as base "
        f"{'layer' if one else 'layers'}, KL(base || NPT) {tokens} falls from {_four(ablation['kl'])} to "
        f"{_four(found['kl_without'])}."
    )


def _layer_table(report: dict[str, Any]) -> Table:
    layers = Table(title="layer by layer: on the same input, and free-running")
    layers.add_column("layer", justify="right")
    for how in ("same input", "free-running"):
        for column in ("MSE", "1 - cosine", "relative error"):
            layers.add_column(f"{how}:\n{column.replace(' error', chr(10) + 'error')}", justify="right")
    modes = [report["layer_wise_equivalence"][how]["layers"] for how in ("same_input", "free_running")]
    for number in modes[0]:
        cells = [
            _four(value)
            for mode in modes
            for value in (
                mode[number]["mse"],
                _one_minus(
                    mode[number]["cosine_similarity"]
                ),  # four digits of the cosine itself would round to 1
                mode[number]["relative_error"],
            )
        ]
        layers.add_row(number, *cells)
    return layers


def _error_table(report: dict[str, Any]) -> Table:
    """Returns a table of the relative error per token, massive tokens, and the KL without each layer."""
    table = Table(title="error of the MLP per token, relative to its target; KL without the layer")
    for column in ERROR_COLUMNS:
        table.add_column(column, justify="right")
    for row in error_rows(report):
        table.add_row(*(cell if isinstance(cell, str) else _four(cell, 3) for cell in row))
    return table


ERROR_COLUMNS = (
    "layer",
    "without deltas: median",
    "without deltas: p99",
    "NPT: median",
    "NPT: p99",
    "massive tokens",
    "their share",
    "KL without, less by",
)
"""Column headings of `error_rows`. `their share` is the massive tokens' fraction of the sum of all |target|^2."""

_ERROR_LEGEND = (
    "massive tokens: tokens whose squared target is above 100 times the median; their share: fraction "
    "of all squared targets. KL without, less by: reduction of KL(base || NPT) if this layer is "
    "replaced by its base layer."
)


def error_rows(report: dict[str, Any]) -> list[list[str | float | None]]:
    """Returns a row per NPT layer, with the columns `ERROR_COLUMNS`."""
    ablated = (report["layer_ablation"] or {"layers": {}})["layers"]
    return [
        [
            number,
            *(
                (found[state]["percentiles"] or {}).get(mark)
                for state in ("untrained", "trained")
                for mark in ("p50", "p99")
            ),
            str(found["massive_tokens"]),
            found["massive_share"],
            ablated[number]["kl_reduction"] if number in ablated else "-",
        ]
        for number, found in report["mlp_error"]["layers"].items()
    ]


def agreement_text(total: dict[str, int]) -> str:
    """Returns the report's `greedy_agreement` in words."""
    return (
        f"{total['agreeing_tokens']:,} of {total['tokens']:,} tokens agree, {total['first_difference']:,} before the "
        f"first difference; {total['identical']} of {total['prompts']} texts are identical"
    )


def _greedy_table(report: dict[str, Any]) -> Table:
    total = report["greedy_agreement"]
    table = Table(title=f"greedy continuations: {agreement_text(total)}", show_lines=True)
    for column in ("prompt", "base", "NPT", "tokens that agree"):
        table.add_column(column, justify="right" if column.startswith("tokens") else "left")
    for pair in report["generations"]:
        if pair["mode"] == "greedy":
            texts = [escape(pair[key]) for key in ("prompt", "base", "npt")]
            table.add_row(*texts, f"{pair['agreeing_tokens']} of {pair['tokens']}")
    return table


def _verdict(holds: bool, expected: str) -> str:
    return f"expected {expected}: {'holds' if holds else 'does not hold'}"


def _one_minus(value: float | None) -> float | None:
    return None if value is None else 1 - value


def _four(value: float | None, digits: int = 4) -> str:
    return "not finite" if value is None else f"{value:.{digits}g}"

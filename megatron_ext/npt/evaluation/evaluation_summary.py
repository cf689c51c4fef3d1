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
    table.add_row(
        "  converted, not trained", "1", untrained, f"initial NP weights, seed {perplexity['untrained_seed']}"
    )
    table.add_row("KL(base || NPT)", "0", _four(kl), "nats per token")
    average = delta["average_frobenius_norm"]
    table.add_row(
        "mean delta norm",
        "",
        _four(average),
        f"with regularization, expected below {delta['expected_below']}",
    )
    table.add_row("  relative to |W|", "", _four(delta["relative_norm"]["mean"]), "")
    share = f"NP / base: {counts['np_share_of_converted_layers']:.1%} in the converted layers"
    table.add_row("parameters", f"{counts['converted_layers']:,}", f"{counts['np']:,}", share)
    console = Console(width=100)
    console.print(table)
    layers = Table(title="layer by layer: same input | free-running")
    for column in ("layer", *(2 * ("MSE", "cosine", "relative error"))):
        layers.add_column(column, justify="right")
    modes = [report["layer_wise_equivalence"][how]["layers"] for how in ("same_input", "free_running")]
    for number in modes[0]:
        cells = [
            _four(mode[number][key])
            for mode in modes
            for key in ("mse", "cosine_similarity", "relative_error")
        ]
        layers.add_row(number, *cells)
    console.print(layers)


def _verdict(holds: bool, expected: str) -> str:
    return f"expected {expected}: {'holds' if holds else 'does not hold'}"


def _four(value: float | None, digits: int = 4) -> str:
    return "not finite" if value is None else f"{value:.{digits}g}"

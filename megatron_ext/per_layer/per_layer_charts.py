"""Declares the charts for the statistics of per-layer embedding (PLE), which `per_layer_statistics` computes."""

from megatron_ext.reports.scalar_charts import ScalarChart

_SHOWN = {
    "update-ratio": (
        "Update / residual stream",
        "|update| / |residual stream|: the relative size of PLE's contribution to a layer, over all "
        "tokens of the step.",
    ),
    "gate-activation-mean": ("Gate activation, mean", "Mean of act(W_gate x) over tokens and dimensions."),
    "gate-activation-std": (
        "Gate activation, standard deviation",
        "Standard deviation of act(W_gate x) over tokens and dimensions.",
    ),
    "combination-token-share": (
        "Combination: token's share",
        "Share of the token embedding in the sum of squares of the two parts that scaled_add combines.",
    ),
    "combination-token-rms": (
        "Combination: RMS of the token part",
        "Root mean square of the token embedding's part of the combination (scaled_add).",
    ),
    "combination-context-rms": (
        "Combination: RMS of the context part",
        "Root mean square of the context projection's part of the combination (scaled_add).",
    ),
    "combination-token-norm": (
        "Combination: norm of the token half",
        "Frobenius norm of the half of W_cat that multiplies the token embedding (concat).",
    ),
    "combination-context-norm": (
        "Combination: norm of the context half",
        "Frobenius norm of the half of W_cat that multiplies the context projection (concat).",
    ),
    "combination-gate-mean": (
        "Combination gate, mean",
        "Mean of g, the weight of the token embedding against the context projection (gated).",
    ),
    "combination-gate-std": (
        "Combination gate, standard deviation",
        "Standard deviation of g, the weight of the token embedding (gated).",
    ),
    "embedding-norm": ("Embedding norm", "Frobenius norm of the layer's embedding table."),
    "embedding-gradient-norm": (
        "Gradient norm of the embedding",
        "L2 norm of the gradient of the layer's embedding table.",
    ),
    "gradient-norm": (
        "Gradient norm of the layer's PLE",
        "L2 norm of the gradient of all PLE parameters that belong to the layer.",
    ),
}

_OF_ROWS = {
    "rows-touched": (
        "Rows looked up by a step",
        "Number of distinct rows of a table that the step looks up, on all data-parallel ranks (--per-layer-sparse).",
    ),
    "rows-ever-touched-share": (
        "Share of the table looked up so far",
        "Share of a table's rows that a step has looked up since the run began or was resumed.",
    ),
    "row-gradients-mib": (
        "Gradients of the rows, MiB",
        "Size of the gradients of a step's rows in one copy of the model, in MiB; data-parallel ranks "
        "reduce these gradients.",
    ),
}


def _charts(shown: dict[str, tuple[str, str]], place: str) -> tuple[ScalarChart, ...]:
    return tuple(
        ScalarChart(section="Per-layer embedding", title=title, tags=rf"per-layer/{name}{place}", shows=shows)
        for name, (title, shows) in shown.items()
    )


PER_LAYER_CHARTS = _charts(_SHOWN, r"/layer_\d+") + _charts(_OF_ROWS, "")

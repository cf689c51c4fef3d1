"""The charts of a progressive run: losses by stack, the size of the rack, the activation cache."""

from megatron_ext.reports.scalar_charts import LOSSES, ScalarChart

_GROWTH = "Progressive growth"

PROGRESSIVE_CHARTS = (
    ScalarChart(
        section=LOSSES,
        title="Loss by stack",
        tags=r"progressive/loss_(stack_\d+|joint)",
        shows="The training loss, one line for every stack that was trained and one for the joint phase.",
    ),
    ScalarChart(
        section=LOSSES,
        title="Accuracy on masked tokens",
        tags="masked/token_accuracy (validation|test)",
        shows="Share of the masked tokens whose most likely prediction is right.",
    ),
    ScalarChart(section=_GROWTH, title="Stacks", tags="progressive/stacks", shows="Stacks in the rack."),
    ScalarChart(
        section=_GROWTH,
        title="Parameters",
        tags="progressive/(trainable|frozen)_parameters",
        shows="Number of parameters of the whole model that are trained, and that are frozen.",
    ),
    ScalarChart(
        section=_GROWTH,
        title="Tokens",
        tags="progressive/total_tokens",
        shows="Tokens used in training so far, over all phases.",
    ),
    ScalarChart(
        section=_GROWTH,
        title="Hit rate of the activation cache",
        tags="cache/hit_rate",
        shows="Share of the micro-batches whose trunk activations were read from the cache.",
    ),
    ScalarChart(
        section=_GROWTH,
        title="Size of the activation cache",
        tags="cache/bytes",
        shows="Bytes that the activation cache holds.",
    ),
)

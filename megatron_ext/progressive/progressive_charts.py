"""The charts of a progressive run: losses of each stack, size of the grown model, and the activation cache."""

from megatron_ext.reports.scalar_charts import LOSSES, ScalarChart

_GROWTH = "Progressive growth"

PROGRESSIVE_CHARTS = (
    ScalarChart(
        section=LOSSES,
        title="Loss by stack",
        tags=r"progressive/loss_(stack_\d+|joint)",
        shows="Training loss: one line for each stack during its training, and one line for the joint phase.",
    ),
    ScalarChart(
        section=LOSSES,
        title="Accuracy on masked tokens",
        tags="masked/token_accuracy (validation|test)",
        shows="Share of the masked tokens that the model predicts correctly.",
    ),
    ScalarChart(
        section=_GROWTH, title="Stacks", tags="progressive/stacks", shows="Number of stacks in the model."
    ),
    ScalarChart(
        section=_GROWTH,
        title="Parameters",
        tags="progressive/(trainable|frozen)_parameters",
        shows="Number of trained and of frozen parameters of the whole model.",
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
        shows="Share of the micro-batches for which the trunk's output was read from the cache.",
    ),
    ScalarChart(
        section=_GROWTH,
        title="Size of the activation cache",
        tags="cache/bytes",
        shows="Bytes that the activation cache holds.",
    ),
)

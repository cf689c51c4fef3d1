"""Charts of the values that every run logs: losses, learning rate, norms, speed, memory, counts."""

from megatron_ext.reports.scalar_charts import LOSSES, ScalarChart

_RATES = "Learning rate and norms"
_SPEED = "Speed and memory"
COUNTS = "Counts"
"""Section of charts that are rarely needed."""

RUN_CHARTS = (
    ScalarChart(
        section=LOSSES,
        title="Cross-entropy",
        tags=r"(\w+ )?lm loss( validation| test)?",
        shows="Cross-entropy in nats per token: of every training step, and means over the validation and test "
        "batches.",
    ),
    ScalarChart(
        section=LOSSES,
        title="Perplexity",
        tags=r"(\w+ )?lm loss( validation| test) ppl",
        shows="exp(cross-entropy) on the validation and test batches.",
    ),
    ScalarChart(
        section=_RATES, title="Learning rate", tags="learning-rate", shows="Learning rate of every step."
    ),
    ScalarChart(
        section=_RATES,
        title="Gradient norm",
        tags="grad-norm",
        shows="L2 norm of the gradient of all parameters, before clipping.",
    ),
    ScalarChart(
        section=_RATES, title="Parameter norm", tags="params-norm", shows="L2 norm of all parameters."
    ),
    ScalarChart(
        section=_RATES,
        title="Zeros in the gradient",
        tags="num-zeros",
        shows="Number of elements of the gradient that are zero.",
    ),
    ScalarChart(
        section=_RATES,
        title="Loss scale",
        tags="loss-scale",
        shows="With --fp16: factor of the loss in the backward pass.",
    ),
    ScalarChart(
        section=_SPEED,
        title="Tokens per second",
        tags="tokens-per-second",
        shows="Training tokens per second over all devices; mean over a log interval.",
    ),
    ScalarChart(
        section=_SPEED,
        title="TFLOP/s per device",
        tags="throughput",
        shows="Model FLOPs of forward and backward per second and device; mean over a log interval.",
    ),
    ScalarChart(
        section=_SPEED,
        title="MFU",
        tags="mfu",
        shows="Model FLOPs utilization: model FLOPs per second as a share of the device's peak.",
    ),
    ScalarChart(
        section=_SPEED,
        title="Seconds per step",
        tags="iteration-time",
        shows="Wall time of a step without evaluation and checkpoints; mean over a log interval.",
    ),
    ScalarChart(
        section=_SPEED,
        title="Memory",
        tags="mem-(allocated|max-allocated|reserved)-bytes",
        shows="Bytes of memory of the first process: in use, the peak so far, and reserved by the allocator.",
    ),
    ScalarChart(
        section=COUNTS, title="Batch size", tags="batch-size", shows="Sequences per step over all processes."
    ),
    ScalarChart(
        section=COUNTS,
        title="Consumed samples",
        tags="consumed-samples",
        shows="Sequences used in training so far.",
    ),
    ScalarChart(
        section=COUNTS,
        title="Skipped steps",
        tags="(skipped|nan)-iterations",
        shows="Steps since the start of the process that were skipped, and steps with a loss or gradient that is not "
        "finite.",
    ),
)

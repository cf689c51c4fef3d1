"""One step's metrics with values that are easy to check, and a stream that passes for a terminal."""

import io

from megatron_ext.training.logging.step_metrics import StepMetrics

BATCH, TOKENS = 4, 3000
FLOPS_PER_TOKEN = 1e6


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def metrics(
    iteration: int,
    *,
    loss: float | None = None,
    layer_loss: float | None = None,
    skipped: bool = False,
    params_norm: float | None = None,
) -> StepMetrics:
    losses = {"lm loss": 4.0 / iteration if loss is None else loss}
    if layer_loss is not None:
        losses["mlp loss/layer_3"] = layer_loss
    return StepMetrics(
        losses=losses,
        learning_rate=1e-3 / iteration,
        grad_norm=0.5 * iteration,
        batch_size=BATCH,
        tokens=TOKENS,
        consumed_samples=iteration * BATCH,
        seconds=0.1 if iteration % 2 else 0.2,
        flops_per_token=FLOPS_PER_TOKEN,
        skipped=skipped,
        params_norm=params_norm,
    )

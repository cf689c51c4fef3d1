"""Lists the charts of all values that any training run may log. Importing this module does not import torch."""

from megatron_ext.npt.objective.npt_charts import NPT_CHARTS
from megatron_ext.per_layer.per_layer_charts import PER_LAYER_CHARTS
from megatron_ext.progressive.progressive_charts import PROGRESSIVE_CHARTS
from megatron_ext.training.logging.run_charts import RUN_CHARTS

KNOWN_CHARTS = (*RUN_CHARTS, *PER_LAYER_CHARTS, *NPT_CHARTS, *PROGRESSIVE_CHARTS)
"""All charts, in the order in which a report page shows them."""

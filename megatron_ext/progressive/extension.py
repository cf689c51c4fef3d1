"""Progressive training as the model sees it: adapted linear layers where a layer has adapters or a precision."""

from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_ext.models.extension import Extension
from megatron_ext.progressive.adapted_layers import Plan
from megatron_ext.progressive.adapted_linear import linear_modules
from megatron_ext.progressive.precision import compute_dtype
from megatron_ext.progressive.quantization import is_packed


class ProgressiveExtension(Extension):
    """The linear layers that a plan asks for."""

    name = "progressive"

    def __init__(self, plan: Plan) -> None:
        """Args:
        plan: layer number -> what is done to it.
        """
        self.plan = plan

    def linears(self, config: TransformerConfig, layer_number: int) -> dict[str, ModuleSpec]:
        """The four linear layers of a layer; none of ours where the engine's would do."""
        settings = self.plan[layer_number]
        is_plain = compute_dtype(settings.precision, config.params_dtype) is config.params_dtype
        if not settings.adapters and is_plain and not is_packed(settings.precision):
            return {}
        return linear_modules(settings)

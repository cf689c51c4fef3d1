"""How a run is cut over processes, and what it recomputes.

Only what one process count or flag pair can tell is checked here; checks against the model and the batch are in
`validate.py`. Nothing here starts a process group.
"""

from dataclasses import dataclass
from typing import Literal

from megatron_ext.config.command_line.field_checks import (
    check_at_least,
    check_at_most,
    check_choices,
    check_numbers,
    check_positive,
)

_MINUTES_OF_A_YEAR = 365 * 24 * 60
_RECOMPUTED = ("core_attn",)


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """Tensor, pipeline, sequence and data parallelism."""

    tensor_model_parallel_size: int = 1
    """Processes that share every layer's matrices."""

    pipeline_model_parallel_size: int = 1
    """Processes among which the layers are split in stages."""

    num_layers_per_virtual_pipeline_stage: int | None = None
    """Layers in one virtual stage; turns on the interleaved pipeline schedule."""

    context_parallel_size: int = 1
    """Processes that share every sequence; must be 1, as context parallelism is not built yet."""

    sequence_parallel: bool = False
    """Split norms and dropout along the sequence among the tensor-parallel processes. No effect without them."""

    use_distributed_optimizer: bool = False
    """Split the optimizer's state among the data-parallel processes."""

    overlap_grad_reduce: bool = False
    """Reduce gradients while backward still runs."""

    overlap_param_gather: bool = False
    """Gather the distributed optimizer's parameters while forward already runs."""

    recompute_granularity: Literal["full", "selective"] | None = None
    """Recompute whole layers (full) or only --recompute-modules (selective) in backward, to save memory."""

    recompute_method: Literal["uniform", "block"] | None = None
    """With full recompute: groups of --recompute-num-layers layers (uniform), or that many layers a stage (block)."""

    recompute_num_layers: int | None = None
    """With full recompute: layers in a group (uniform), or layers recomputed in a stage (block)."""

    recompute_modules: tuple[str, ...] = _RECOMPUTED
    """With selective recompute: what is recomputed (core_attn, mlp, layernorm)."""

    distributed_backend: Literal["auto", "gloo", "nccl"] = "auto"
    """Communication library; auto takes NCCL where there is a CUDA device and gloo elsewhere."""

    distributed_timeout_minutes: int = 10
    """Minutes after which a collective that does not finish ends the run."""

    def __post_init__(self) -> None:
        check_choices(self)
        check_numbers(self)
        check_at_least(
            self, 1, "tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size"
        )
        check_at_least(self, 1, "num_layers_per_virtual_pipeline_stage", "recompute_num_layers")
        check_positive(self, "distributed_timeout_minutes")
        check_at_most(self, _MINUTES_OF_A_YEAR, "distributed_timeout_minutes")
        self._check_context()
        self._check_pipeline()
        self._check_overlap()
        self._check_recompute()

    def _check_context(self) -> None:
        # The engine alone would slice the rotary table, while batch and core attention stay whole: wrong positions.
        if self.context_parallel_size > 1:
            raise ValueError(
                f"--context-parallel-size {self.context_parallel_size}: must be 1, as context parallelism is not built "
                "yet; for long sequences use --tensor-model-parallel-size with --sequence-parallel, or recomputation"
            )

    def _check_pipeline(self) -> None:
        if self.num_layers_per_virtual_pipeline_stage is not None and self.pipeline_model_parallel_size < 2:
            raise ValueError(
                f"--num-layers-per-virtual-pipeline-stage {self.num_layers_per_virtual_pipeline_stage}: "
                f"needs --pipeline-model-parallel-size above 1, it is {self.pipeline_model_parallel_size}"
            )

    def _check_overlap(self) -> None:
        if self.overlap_param_gather and not self.use_distributed_optimizer:
            raise ValueError("--overlap-param-gather: needs --use-distributed-optimizer")
        if self.overlap_param_gather and not self.overlap_grad_reduce:
            raise ValueError("--overlap-param-gather: needs --overlap-grad-reduce")

    def _check_recompute(self) -> None:
        known = ("core_attn", "mlp", "layernorm")
        for module in self.recompute_modules:
            if module not in known:
                raise ValueError(f"--recompute-modules {module}: must be one of {', '.join(known)}")
        if self.recompute_modules != _RECOMPUTED and self.recompute_granularity != "selective":
            raise ValueError(
                f"--recompute-modules {' '.join(self.recompute_modules)}: needs --recompute-granularity selective, "
                f"it is {self.recompute_granularity}"
            )
        if self.recompute_granularity == "full":
            if self.recompute_method is None or self.recompute_num_layers is None:
                raise ValueError(
                    "--recompute-granularity full: needs --recompute-method (uniform or block) "
                    "and --recompute-num-layers"
                )
        elif self.recompute_method is not None or self.recompute_num_layers is not None:
            name = "--recompute-method" if self.recompute_method is not None else "--recompute-num-layers"
            value = self.recompute_method if self.recompute_method is not None else self.recompute_num_layers
            raise ValueError(
                f"{name} {value}: needs --recompute-granularity full, it is {self.recompute_granularity}"
            )

    @property
    def model_parallel_size(self) -> int:
        """Processes that together hold one copy of the model and of a sequence."""
        return (
            self.tensor_model_parallel_size * self.pipeline_model_parallel_size * self.context_parallel_size
        )

    def data_parallel_size(self, world_size: int) -> int:
        """Returns the number of model copies among `world_size` processes.

        Raises:
            ValueError: if the processes do not divide into whole copies.
        """
        if world_size % self.model_parallel_size:
            raise ValueError(
                f"world size {world_size}: not divisible by --tensor-model-parallel-size "
                f"{self.tensor_model_parallel_size} x --pipeline-model-parallel-size "
                f"{self.pipeline_model_parallel_size} x --context-parallel-size {self.context_parallel_size}"
            )
        return world_size // self.model_parallel_size

    def virtual_pipeline_size(self, num_layers: int) -> int | None:
        """Returns the number of virtual stages on each pipeline stage, None without interleaving (as for one)."""
        if self.num_layers_per_virtual_pipeline_stage is None:
            return None
        stages = num_layers // self.pipeline_model_parallel_size // self.num_layers_per_virtual_pipeline_stage
        return stages if stages > 1 else None

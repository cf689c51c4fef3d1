"""The parallel layout of a run, and which activations are recomputed in the backward pass.

`cross_checks` checks whether the layout fits the model and the batch size.
"""

from dataclasses import dataclass
from typing import Literal

from megatron_ext.config.command_line.field_checks import (
    check_at_least,
    check_at_most,
    check_choices,
    check_numbers,
    check_positive,
    flag_name,
)
from megatron_ext.config.groups.training_config import Precision

_MINUTES_OF_A_YEAR = 365 * 24 * 60
_RECOMPUTED = ("core_attn",)


_ENDS = ("decoder_first_pipeline_num_layers", "decoder_last_pipeline_num_layers")


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """Flags for tensor, pipeline, sequence and data parallelism, and for recomputation."""

    tensor_model_parallel_size: int = 1
    """Number of processes that share each layer's matrices."""

    pipeline_model_parallel_size: int = 1
    """Number of pipeline stages that the layers are divided into."""

    decoder_first_pipeline_num_layers: int | None = None
    """Number of layers in the first pipeline stage; the other stages share the rest. Default: as many as in the
    others.
    """

    decoder_last_pipeline_num_layers: int | None = None
    """Number of layers in the last pipeline stage; the other stages share the rest. Default: as many as in the
    others.
    """

    num_layers_per_virtual_pipeline_stage: int | None = None
    """Layers per virtual stage; turns on the interleaved pipeline schedule."""

    context_parallel_size: int = 1
    """Number N of processes that share each sequence; each process holds two of the sequence's 2 x N equal chunks."""

    sequence_parallel: bool = False
    """Split the sequence over the tensor-parallel processes in norms and dropout; no effect without tensor
    parallelism.
    """

    use_distributed_optimizer: bool = False
    """Shard the optimizer's state over the data-parallel processes."""

    overlap_grad_reduce: bool = False
    """Overlap the reduction of gradients with the backward pass."""

    overlap_param_gather: bool = False
    """Overlap the distributed optimizer's gathering of parameters with the forward pass."""

    overlap_p2p_communication: bool = False
    """With the interleaved schedule: overlap the communication between pipeline stages with computation."""

    accumulate_allreduce_grads_in_fp32: bool = False
    """With --fp16: sum gradients over micro-batches and processes in fp32. Without --fp16, this is the default."""

    grad_reduce_in_bf16: bool = False
    """With --bf16: sum gradients over micro-batches and processes in bfloat16 instead of fp32."""

    gradient_accumulation_fusion: bool = False
    """Let Transformer Engine's linear layers add their weight gradients to the sum over micro-batches themselves."""

    cross_entropy_loss_fusion: bool = False
    """With tensor parallelism: compute the cross-entropy in fewer kernels and collectives. Without tensor
    parallelism, the flag has no effect, because the computation is always fused.
    """

    cross_entropy_fusion_impl: Literal["native", "te"] = "native"
    """With --cross-entropy-loss-fusion: kernels of mcore (native), which require --bf16, or of Transformer Engine
    (te).
    """

    recompute_granularity: Literal["full", "selective"] | None = None
    """To save memory, recompute whole layers (full) or only --recompute-modules (selective) in the backward pass."""

    recompute_activations: bool = False
    """The same as --recompute-granularity selective: recompute the core attention in the backward pass."""

    recompute_method: Literal["uniform", "block"] | None = None
    """With full recompute: recompute all layers, in groups of --recompute-num-layers (uniform), or only the first
    --recompute-num-layers of each pipeline stage (block).
    """

    recompute_num_layers: int | None = None
    """With full recompute: layers per group (uniform), or recomputed layers per pipeline stage (block)."""

    recompute_modules: tuple[str, ...] = _RECOMPUTED
    """With selective recompute: modules to recompute (core_attn, mlp, layernorm)."""

    distributed_backend: Literal["auto", "gloo", "nccl"] = "auto"
    """Communication library; auto uses NCCL if there is a CUDA device, else gloo."""

    distributed_timeout_minutes: int = 10
    """Minutes after which an unfinished collective ends the run."""

    def __post_init__(self) -> None:
        check_choices(self)
        check_numbers(self)
        check_at_least(
            self, 1, "tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size"
        )
        check_at_least(self, 1, "num_layers_per_virtual_pipeline_stage", "recompute_num_layers", *_ENDS)
        check_positive(self, "distributed_timeout_minutes")
        check_at_most(self, _MINUTES_OF_A_YEAR, "distributed_timeout_minutes")
        self._check_pipeline()
        self._check_overlap()
        self._check_cross_entropy()
        self._check_recompute()

    def _check_pipeline(self) -> None:
        if self.num_layers_per_virtual_pipeline_stage is not None and self.pipeline_model_parallel_size < 2:
            raise ValueError(
                f"--num-layers-per-virtual-pipeline-stage {self.num_layers_per_virtual_pipeline_stage}: "
                f"requires --pipeline-model-parallel-size above 1 (got {self.pipeline_model_parallel_size})"
            )

        for name in _ENDS:
            number = getattr(self, name)
            if number is None:
                continue
            if self.pipeline_model_parallel_size < 2:
                raise ValueError(
                    f"{flag_name(name)} {number}: requires --pipeline-model-parallel-size above 1 "
                    f"(got {self.pipeline_model_parallel_size})"
                )
            if self.num_layers_per_virtual_pipeline_stage is not None:
                raise ValueError(
                    f"{flag_name(name)} {number}: cannot be given together with "
                    "--num-layers-per-virtual-pipeline-stage"
                )

    def stage_sizes(self, num_layers: int) -> tuple[int, ...]:
        """Returns the number of layers of every pipeline stage, summed over its chunks (virtual stages).

        Raises:
            ValueError: the layers cannot be divided among the stages.
        """
        stages, ends = self.pipeline_model_parallel_size, [getattr(self, name) for name in _ENDS]
        others = stages - sum(end is not None for end in ends)
        rest = num_layers - sum(end or 0 for end in ends)
        if rest < others or (rest % others if others else rest):
            given = [f"{flag_name(name)} {end}" for name, end in zip(_ENDS, ends, strict=True) if end]
            reason = f"must be divisible by --pipeline-model-parallel-size {stages}"
            if given:
                reason = (
                    f"with {' and '.join(given)}, {rest} layers are left, which must be divisible by {others}, the "
                    f"number of the other stages of --pipeline-model-parallel-size {stages}"
                )
            raise ValueError(f"--num-layers {num_layers}: {reason}")
        sizes = [rest // others if others else 0] * stages
        for place, end in zip((0, -1), ends, strict=True):
            sizes[place] = end or sizes[place]
        return tuple(sizes)

    def reduces_in_fp32(self, precision: Precision) -> bool:
        """Returns True if gradients are summed in fp32, False if in the precision of the weights."""
        return self.accumulate_allreduce_grads_in_fp32 or (
            precision == "bf16" and not self.grad_reduce_in_bf16
        )

    def _check_overlap(self) -> None:
        if self.accumulate_allreduce_grads_in_fp32 and self.grad_reduce_in_bf16:
            raise ValueError(
                "--grad-reduce-in-bf16: cannot be given together with --accumulate-allreduce-grads-in-fp32"
            )
        if self.overlap_param_gather and not self.use_distributed_optimizer:
            raise ValueError("--overlap-param-gather: requires --use-distributed-optimizer")
        if self.overlap_param_gather and not self.overlap_grad_reduce:
            raise ValueError("--overlap-param-gather: requires --overlap-grad-reduce")
        if self.overlap_p2p_communication and self.num_layers_per_virtual_pipeline_stage is None:
            raise ValueError("--overlap-p2p-communication: requires --num-layers-per-virtual-pipeline-stage")

    def _check_cross_entropy(self) -> None:
        if self.cross_entropy_fusion_impl != "native" and not self.cross_entropy_loss_fusion:
            raise ValueError(
                f"--cross-entropy-fusion-impl {self.cross_entropy_fusion_impl}: has no effect; it requires "
                "--cross-entropy-loss-fusion"
            )

    def _check_recompute(self) -> None:
        if self.recompute_activations:
            if self.recompute_granularity == "full":
                raise ValueError(
                    "--recompute-activations: cannot be given together with --recompute-granularity full"
                )
            object.__setattr__(self, "recompute_granularity", "selective")  # the class is frozen
        known = ("core_attn", "mlp", "layernorm")
        for module in self.recompute_modules:
            if module not in known:
                raise ValueError(f"--recompute-modules {module}: must be one of {', '.join(known)}")
        if self.recompute_modules != _RECOMPUTED and self.recompute_granularity != "selective":
            raise ValueError(
                f"--recompute-modules {' '.join(self.recompute_modules)}: requires --recompute-granularity selective "
                f"(got {self.recompute_granularity})"
            )
        if self.recompute_granularity == "full":
            if self.recompute_method is None or self.recompute_num_layers is None:
                raise ValueError(
                    "--recompute-granularity full: requires --recompute-method (uniform or block) "
                    "and --recompute-num-layers"
                )
        elif self.recompute_method is not None or self.recompute_num_layers is not None:
            name = "--recompute-method" if self.recompute_method is not None else "--recompute-num-layers"
            value = self.recompute_method if self.recompute_method is not None else self.recompute_num_layers
            raise ValueError(
                f"{name} {value}: requires --recompute-granularity full (got {self.recompute_granularity})"
            )

    @property
    def model_parallel_size(self) -> int:
        """Number of processes that together hold one copy of the model."""
        return (
            self.tensor_model_parallel_size * self.pipeline_model_parallel_size * self.context_parallel_size
        )

    def data_parallel_size(self, world_size: int) -> int:
        """Returns the number of model copies among `world_size` processes.

        Raises:
            ValueError: `world_size` is not divisible by the number of processes that hold one copy.
        """
        if world_size % self.model_parallel_size:
            raise ValueError(
                f"world size {world_size}: must be divisible by --tensor-model-parallel-size "
                f"{self.tensor_model_parallel_size} x --pipeline-model-parallel-size "
                f"{self.pipeline_model_parallel_size} x --context-parallel-size {self.context_parallel_size}"
            )
        return world_size // self.model_parallel_size

    def virtual_pipeline_size(self, num_layers: int) -> int | None:
        """Returns the number of virtual stages in each pipeline stage; None without the interleaved schedule."""
        if self.num_layers_per_virtual_pipeline_stage is None:
            return None
        stages = num_layers // self.pipeline_model_parallel_size // self.num_layers_per_virtual_pipeline_stage
        return stages if stages > 1 else None

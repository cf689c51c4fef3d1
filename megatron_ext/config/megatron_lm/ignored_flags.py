"""Flags of Megatron-LM that a training run accepts without effect, each with the reason.

A flag belongs here only if the run computes the same with and without it. If that holds only for some values of the
flag, those values are listed, and every other value is an error.
"""

import dataclasses
from collections.abc import Sequence
from typing import Literal


@dataclasses.dataclass(frozen=True)
class Ignored:
    """A flag that changes nothing here."""

    reason: str
    """Why it changes nothing; completes the sentence "it is ignored: ..."."""

    takes: Literal["nothing", "one value", "values"] = "nothing"
    """Number of values that follow the flag."""

    harmless: tuple[str, ...] = ()
    """The values that change nothing; empty if no value changes anything."""

    otherwise: str = ""
    """Why the other values are refused, or what to do instead; completes the sentence `only X is supported: ...`."""

    @property
    def limits(self) -> str:
        """The reason why a value was refused."""
        reason = f": {self.otherwise}" if self.otherwise else ""
        return f"only {' or '.join(self.harmless)} is supported{reason}"

    def allows(self, words: Sequence[str]) -> bool:
        """Returns whether the flag changes nothing with these values."""
        return not self.harmless or set(words) <= set(self.harmless)


def _one(reason: str, *harmless: str, otherwise: str = "") -> Ignored:
    return Ignored(reason, "one value", harmless, otherwise)


def _many(reason: str, *harmless: str) -> Ignored:
    return Ignored(reason, "values", harmless)


_KERNELS = Ignored("it chooses between kernels that compute the same")
_TRAFFIC = Ignored("it changes how processes exchange data, not what they compute")
_MEMORY = Ignored("it saves memory without changing the computation; here this memory is not saved")
_FILES = Ignored("it changes how checkpoint files are written and read, not what they hold")
_INDEX = Ignored("it changes how fast a dataset is opened")
_SIGNALS = Ignored("on SIGTERM, SIGINT and SIGUSR1 a run saves and exits anyway")
_OUTPUT = Ignored("it asks for output that is not written here")
_UNUSED = Ignored("Megatron-LM itself no longer reads it")
_ALREADY = "this is so anyway"
_CONVERT = "convert checkpoints with Megatron-LM's --ckpt-convert-format torch_dist"

IGNORED = {
    # Model
    "--use-mcore-models": Ignored("the models are megatron-core's"),
    "--attention-backend": _one(
        "every backend computes the same attention", "auto", "flash", "fused", "unfused"
    ),
    "--attention-softmax-in-fp32": Ignored("attention weights are computed in fp32 anyway"),
    "--apply-query-key-layer-scaling": Ignored("attention scores are summed in fp32, which cannot overflow"),
    "--no-query-key-layer-scaling": Ignored("attention scores are summed in fp32, which cannot overflow"),
    "--no-position-embedding": Ignored(
        "Megatron-LM accepts it with rotary positions only, which have no embedding"
    ),
    "--rope-type": _one(_ALREADY, "rope"),
    "--softmax-type": _one(_ALREADY, "vanilla"),
    "--glu-linear-offset": _one(_ALREADY, "0", "0.0"),
    "--onnx-safe": _one(_UNUSED.reason),
    "--enable-experimental": Ignored("it allows further flags, and changes nothing itself"),
    # Kernels
    "--use-flash-attn": _KERNELS,
    "--flash-attention-version": _one(_KERNELS.reason),
    "--no-masked-softmax-fusion": _KERNELS,
    "--no-bias-swiglu-fusion": _KERNELS,
    "--no-bias-dropout-fusion": _KERNELS,
    "--no-rope-fusion": _KERNELS,
    "--no-persist-layer-norm": _KERNELS,
    "--fused-residual-rmsnorm": _KERNELS,
    "--use-fused-weighted-squared-relu": _KERNELS,
    "--use-te-activation-func": _KERNELS,
    "--use-transformer-engine-op-fuser": _KERNELS,
    "--use-grouped-gemm-for-dense-mlp": _KERNELS,
    "--disable-jit-fuser": _KERNELS,
    "--enable-cuda-graph": _KERNELS,
    "--external-cuda-graph": _KERNELS,
    "--cuda-graph-impl": _one(_KERNELS.reason),
    "--cuda-graph-modules": _many(_KERNELS.reason),
    "--cuda-graph-scope": _many(_KERNELS.reason),
    "--cuda-graph-warmup-steps": _one(_KERNELS.reason),
    "--optimizer-cuda-graph": _KERNELS,
    "--te-rng-tracker": _KERNELS,
    # FP8
    "--fp8-param-gather": Ignored(
        "weights are gathered in bf16 and cast to FP8 for each matrix product, with more memory and traffic"
    ),
    "--fp8-interval": _one(_UNUSED.reason),
    "--fp8-margin": _one(_ALREADY, "0"),
    "--reuse-grad-buf-for-mxfp8-param-ag": _MEMORY,
    # Optimizer
    "--optimizer": _one("Adam with decoupled weight decay is the optimizer, as in Megatron-LM", "adam"),
    "--use-precision-aware-optimizer": Ignored("the optimizer's state is in fp32"),
    "--exp-avg-dtype": _one(_ALREADY, "fp32"),
    "--exp-avg-sq-dtype": _one(_ALREADY, "fp32"),
    "--main-grads-dtype": _one(_ALREADY, "fp32"),
    "--main-params-dtype": _one(_ALREADY, "fp32"),
    "--no-use-layer-wise-param-layout": Ignored("it concerns the Muon optimizer only"),
    # Initialization
    "--use-cpu-initialization": Ignored("initial weights are the same at every parallel layout anyway"),
    "--init-model-with-meta-device": _MEMORY,
    # Parallelism
    "--no-async-tensor-model-parallel-allreduce": _TRAFFIC,
    "--disable-async-tensor-model-parallel-allreduce": _TRAFFIC,
    "--async-tensor-model-parallel-allreduce": _TRAFFIC,
    "--tp-comm-overlap": _TRAFFIC,
    "--tp-comm-overlap-cfg": _one(_TRAFFIC.reason),
    "--tp-comm-overlap-rs-dgrad": _TRAFFIC,
    "--tp-comm-bootstrap-backend": _one(_TRAFFIC.reason),
    **dict.fromkeys(
        (
            f"--{no}-tp-comm-{part}"
            for no in ("no", "disable")
            for part in ("bulk-dgrad", "bulk-wgrad", "overlap-ag", "overlap-rs", "split-ag", "split-rs")
        ),
        _TRAFFIC,
    ),
    "--cp-comm-type": _many(_TRAFFIC.reason),
    "--delay-wgrad-compute": _TRAFFIC,
    "--defer-embedding-wgrad-compute": _TRAFFIC,
    "--wgrad-deferral-limit": _one(_TRAFFIC.reason),
    "--microbatch-group-size-per-virtual-pipeline-stage": _one(_TRAFFIC.reason),
    "--overlap-p2p-communication-warmup-flush": _TRAFFIC,
    "--no-scatter-gather-tensors-in-pipeline": _TRAFFIC,
    "--use-ring-exchange-p2p": _TRAFFIC,
    "--pipeline-model-parallel-comm-backend": _one(_TRAFFIC.reason),
    "--no-align-grad-reduce": _TRAFFIC,
    "--disable-align-grad-reduce": _TRAFFIC,
    "--no-align-param-gather": _TRAFFIC,
    "--delay-grad-reduce": _TRAFFIC,
    "--delay-param-gather": _TRAFFIC,
    "--overlap-param-gather-with-optimizer-step": _TRAFFIC,
    "--no-gradient-reduce-div-fusion": _TRAFFIC,
    "--ddp-average-in-collective": _TRAFFIC,
    "--ddp-bucket-size": _one(_TRAFFIC.reason),
    "--ddp-num-buckets": _one(_TRAFFIC.reason),
    "--ddp-pad-buckets-for-high-nccl-busbw": _TRAFFIC,
    "--disable-gloo-process-groups": _TRAFFIC,
    "--disable-symmetric-registration": _TRAFFIC,
    "--use-nccl-ub": _TRAFFIC,
    "--high-priority-stream-groups": _many(_TRAFFIC.reason),
    "--nccl-communicator-config-path": _one(_TRAFFIC.reason),
    "--create-all-gather-group": _TRAFFIC,
    "--use-sharp": _TRAFFIC,
    "--sharp-enabled-group": _one(_TRAFFIC.reason),
    "--use-tp-pp-dp-mapping": _TRAFFIC,
    "--train-sync-interval": _one(_TRAFFIC.reason),
    "--distribute-saved-activations": _MEMORY,
    "--no-clone-scatter-output-in-embedding": _MEMORY,
    "--disable-clone-scatter-output-in-embedding": _MEMORY,
    "--mlp-chunks-for-training": _one(_MEMORY.reason),
    "--data-parallel-sharding-strategy": _one(_ALREADY, "no_shard"),
    "--outer-dp-sharding-strategy": _one(_ALREADY, "no_shard"),
    "--num-distributed-optimizer-instances": _one(_ALREADY, "1"),
    "--expert-model-parallel-size": _one(_ALREADY, "1"),
    "--expert-tensor-parallel-size": _one(_ALREADY, "1"),
    "--DDP-impl": _one(_UNUSED.reason),
    "--lazy-mpu-init": Ignored("it changes when process groups are made, not what is computed"),
    "--local-rank": _one("torchrun sets it in the environment"),
    # Data
    "--dataloader-type": _one(
        _ALREADY,
        "single",
        otherwise="samples are shuffled by --seed; cyclic would shuffle them again, in an order that depends on the "
        "number of model copies",
    ),
    "--no-create-attention-mask-in-dataloader": Ignored("no attention mask is built"),
    "--no-mmap-bin-files": _INDEX,
    "--dataloader-defer-npy-index-mmap": _INDEX,
    "--dataloader-fast-cache-load": _INDEX,
    "--num-dataset-builder-threads": _one(_INDEX.reason),
    "--per-dataset-sequences-path": _one(_INDEX.reason),
    "--mid-level-dataset-surplus": _one(_ALREADY, "0.005"),
    "--data-impl": _one("data is always memory-mapped", "mmap"),
    "--dataset-impl": _one("data is always memory-mapped", "mmap"),
    "--sample-rate": _one(_ALREADY, "1", "1.0"),
    # Tokenizer
    "--vocab-extra-ids": _one(_ALREADY, "0"),
    "--tokenizer-hf-no-include-special-tokens": Ignored(_ALREADY),
    "--tokenizer-hf-use-fast": Ignored("Hugging Face tokenizers are always the fast ones"),
    "--tokenizer-hf-no-use-fast": Ignored("Hugging Face tokenizers are always the fast ones"),
    "--trust-remote-code": Ignored("a tokenizer's own code is never executed"),
    # Checkpoints
    "--ckpt-format": _one("checkpoints are torch_dist", "torch_dist", otherwise=_CONVERT),
    "--dist-ckpt-format": _one("checkpoints are torch_dist", "torch_dist", otherwise=_CONVERT),
    "--use-dist-ckpt": Ignored("checkpoints are torch_dist"),
    "--use-distributed-checkpoint": Ignored("checkpoints are torch_dist"),
    "--auto-detect-ckpt-format": Ignored("checkpoints are torch_dist"),
    "--verify-integrity": Ignored("the checksums of all files are compared on every load"),
    "--dist-ckpt-optim-fully-reshardable": Ignored("every checkpoint can be loaded at every parallel layout"),
    "--dist-ckpt-strictness": _one(
        "a missing or unexpected tensor is an error", "assume_ok_unexpected", "raise_unexpected", "raise_all"
    ),
    "--async-strategy": _one(_FILES.reason),
    "--async-ckpt-cpu-priority": _one(_FILES.reason),
    "--async-ckpt-io-priority": _one(_FILES.reason),
    "--async-ckpt-use-cpu-shm": _FILES,
    "--use-persistent-ckpt-worker": _FILES,
    "--ckpt-assume-constant-structure": _FILES,
    "--ckpt-drop-redundant-extra-state": _FILES,
    "--ckpt-fully-parallel-save": _FILES,
    "--no-ckpt-fully-parallel-save": _FILES,
    "--disable-ckpt-fully-parallel-save": _FILES,
    "--ckpt-fully-parallel-save-process-group": _one(_FILES.reason),
    "--ckpt-fully-parallel-load": _FILES,
    "--ckpt-fully-parallel-load-exchange-algo": _one(_FILES.reason),
    "--ckpt-fully-parallel-load-per-rank-objects": _FILES,
    "--ckpt-fully-parallel-load-process-group": _one(_FILES.reason),
    "--ckpt-pg-tensors-cache-create": _FILES,
    "--ckpt-pg-tensors-cache-path": _one(_FILES.reason),
    "--no-ckpt-load-validate-sharding-integrity": _FILES,
    "--disable-ckpt-load-validate-sharding-integrity": _FILES,
    "--dist-ckpt-save-pre-mcore-014": _FILES,
    "--dist-ckpt-workers": _one(_FILES.reason),
    "--distrib-optim-fully-reshardable-mem-efficient": _FILES,
    "--no-save-tokenizer-assets": _FILES,
    "--disable-save-tokenizer-assets": _FILES,
    "--disable-msc": _UNUSED,
    # Run
    "--no-manual-gc-eval": Ignored("--manual-gc collects at --manual-gc-interval only"),
    "--disable-manual-gc-eval": Ignored("--manual-gc collects at --manual-gc-interval only"),
    "--check-for-nan-in-loss-and-grad": Ignored(
        "a step whose loss or gradient is not finite is skipped, see --max-consecutive-nan-steps"
    ),
    "--no-check-for-nan-in-loss-and-grad": Ignored(
        "a step whose loss or gradient is not finite is skipped, see --max-consecutive-nan-steps"
    ),
    "--rerun-mode": _one(_ALREADY, "disabled"),
    "--exit-signal": _one(_SIGNALS.reason, "SIGTERM", "SIGINT", "SIGUSR1"),
    "--exit-signal-handler": _SIGNALS,
    "--exit-signal-handler-for-dataloader": _SIGNALS,
    "--exit-signal-handler-for-training": _SIGNALS,
    # Logging
    "--log-batch-size-to-tensorboard": Ignored("it is written anyway"),
    "--log-learning-rate-to-tensorboard": Ignored("it is written anyway"),
    "--tensorboard-log-learning-rate": Ignored("it is written anyway"),
    "--log-progress": _OUTPUT,
    "--timing-log-level": _one(_OUTPUT.reason),
    "--timing-log-option": _one(_OUTPUT.reason),
    "--log-timers-to-tensorboard": _OUTPUT,
    "--log-world-size-to-tensorboard": _OUTPUT,
    "--log-loss-scale-to-tensorboard": Ignored("with --fp16 it is written anyway"),
    "--no-log-loss-scale-to-tensorboard": Ignored("with --fp16 it is written anyway"),
    "--disable-log-loss-scale-to-tensorboard": Ignored("with --fp16 it is written anyway"),
    "--log-device-memory-used": _OUTPUT,
    "--log-energy": _OUTPUT,
    "--log-memory-interval": _one(_OUTPUT.reason),
    "--log-straggler": _OUTPUT,
    "--disable-straggler-on-startup": _OUTPUT,
    "--straggler-ctrlr-port": _one(_OUTPUT.reason),
    "--straggler-minmax-count": _one(_OUTPUT.reason),
    "--logging-level": _one(_OUTPUT.reason),
    "--no-barrier-with-level-1-timing": _OUTPUT,
    "--tensorboard-queue-size": _one(_OUTPUT.reason),
    "--no-one-logger": _OUTPUT,
    "--one-logger-async": _OUTPUT,
    "--one-logger-project": _one(_OUTPUT.reason),
    "--one-logger-run-name": _one(_OUTPUT.reason),
    "--app-tag-run-name": _one(_OUTPUT.reason),
    "--app-tag-run-version": _one(_OUTPUT.reason),
}

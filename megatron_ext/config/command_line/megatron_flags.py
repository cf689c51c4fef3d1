"""Says what to use instead of each Megatron-LM flag that this command line does not have.

A typical launch script for Megatron-LM's `pretrain_gpt.py` uses about a dozen such flags: some are always on here, some
have another name, some are not supported. The list follows Megatron-LM's arguments and its published examples.
"""

_ALWAYS_ON = [
    "--use-mcore-models",
    "--attention-softmax-in-fp32",
    "--log-batch-size-to-tensorboard",
    "--log-learning-rate-to-tensorboard",
    "--tensorboard-log-learning-rate",
    "--use-distributed-checkpoint",
    "--use-dist-ckpt",
    "--auto-detect-ckpt-format",
    "--no-create-attention-mask-in-dataloader",
]
_SPEED = [
    "--DDP-impl",
    "--apply-query-key-layer-scaling",
    "--async-tensor-model-parallel-allreduce",
    "--ckpt-format",
    "--ckpt-assume-constant-structure",
    "--ckpt-fully-parallel-load",
    "--ckpt-fully-parallel-save",
    "--cross-entropy-fusion-impl",
    "--cross-entropy-loss-fusion",
    "--ddp-bucket-size",
    "--defer-embedding-wgrad-compute",
    "--delay-grad-reduce",
    "--delay-param-gather",
    "--dist-ckpt-format",
    "--distribute-saved-activations",
    "--empty-unused-memory-level",
    "--fp16-lm-cross-entropy",
    "--lazy-mpu-init",
    "--local-rank",
    "--log-progress",
    "--log-timers-to-tensorboard",
    "--log-world-size-to-tensorboard",
    "--no-async-tensor-model-parallel-allreduce",
    "--no-bias-dropout-fusion",
    "--no-bias-gelu-fusion",
    "--no-bias-swiglu-fusion",
    "--no-ckpt-fully-parallel-save",
    "--no-masked-softmax-fusion",
    "--no-mmap-bin-files",
    "--no-overlap-p2p-communication",
    "--no-persist-layer-norm",
    "--no-query-key-layer-scaling",
    "--no-rope-fusion",
    "--overlap-p2p-communication",
    "--tensorboard-queue-size",
    "--timing-log-level",
    "--timing-log-option",
    "--tp-comm-overlap",
    "--use-cpu-initialization",
    "--use-sharp",
    "--use-tp-pp-dp-mapping",
]
_INSTEAD = {
    "--use-flash-attn": "leave it out: --attention-backend sdpa, the default, uses flash kernels",
    "--use-rotary-position-embeddings": "leave it out: --position-embedding-type rope is the default",
    "--no-position-embedding": "leave it out: --position-embedding-type rope is the default",
    "--log-validation-ppl-to-tensorboard": "leave it out: --log-validation-ppl is the default",
    "--checkpoint-activations": "use --recompute-granularity full --recompute-method uniform --recompute-num-layers 1",
    "--checkpoint-num-layers": "use --recompute-num-layers with --recompute-granularity full",
    "--num-virtual-stages-per-pipeline-rank": "use --num-layers-per-virtual-pipeline-stage",
    "--model-parallel-size": "use --tensor-model-parallel-size",
    "--step-batch-size-schedule": "not supported: use --global-batch-size",
    "--warmup": "use --lr-warmup-fraction",
    "--optimizer": "leave it out: AdamW is the only optimizer",
    "--apply-layernorm-1p": "not supported: it changes the meaning of a norm's weight",
    "--layernorm-epsilon": "use --norm-epsilon",
    "--rotary-scaling-factor": "use --rope-scaling-factor with --use-rope-scaling",
    "--rotary-interleaved": "not supported: the two halves of a head are rotated, as in GPT-NeoX and Llama",
    "--window-size": "not supported: attention has no window, sequences must fit into --sliding-window",
    "--cp-comm-type": "leave it out: --context-parallel-size all-gathers keys and values",
    "--hierarchical-context-parallel-sizes": "not supported: use --context-parallel-size",
    "--data-args-path": "use --data-path, or a YAML file with --config",
    "--per-split-data-args-path": "use --train-data-path, --valid-data-path and --test-data-path",
    "--data-impl": "leave it out: data is always memory-mapped",
    "--dataset-impl": "leave it out: data is always memory-mapped",
    "--full-validation": "use tools/evaluate.py",
    "--vocab-extra-ids": "use --vocab-size, the minimum number of ids",
    "--padded-vocab-size": "use --make-vocab-size-divisible-by",
    "--tiktoken-pattern": "leave it out: it is always v2",
    "--tiktoken-num-special-tokens": "leave it out: it is always 1000",
    "--tokenizer-name-or-path": "use --tokenizer-model",
    "--tensorboard-log-dir": "use --tensorboard-dir",
    "--log-num-zeros-in-grad": "not supported: see --log-params-norm; the gradient norm is always logged",
    "--log-memory-to-tensorboard": "use --log-memory",
    "--log-loss-scale-to-tensorboard": "leave it out: with --fp16 it is always on",
    "--wandb-entity": "set WANDB_ENTITY in the environment",
    "--check-for-nan-in-loss-and-grad": "always on, see --max-consecutive-nan-steps",
    "--no-check-for-nan-in-loss-and-grad": "always on, see --max-consecutive-nan-steps",
    "--rerun-mode": "not supported, see --max-consecutive-nan-steps",
    "--exit-signal-handler": "always on: on SIGTERM, SIGINT and SIGUSR1 a run saves and exits",
    "--exit-on-missing-checkpoint": "not supported: an empty --load starts a new run",
    "--save-retain-interval": "use --keep-last",
    "--pretrained-checkpoint": "use --load with --finetune",
    "--nproc-per-node": "this is an option of torchrun: put it before the script",
    "--nproc_per_node": "this is an option of torchrun: put it before the script",
    "--nnodes": "this is an option of torchrun: put it before the script",
    "--node-rank": "this is an option of torchrun: put it before the script",
    "--master-addr": "this is an option of torchrun: put it before the script",
    "--master-port": "this is an option of torchrun: put it before the script",
}
_FAMILIES = {
    "--moe-": "not supported: there is no mixture of experts",
    "--num-experts": "not supported: there is no mixture of experts",
    "--expert-": "not supported: there is no mixture of experts",
    "--fp8-": "not supported: FP8 has --fp8-format, --fp8-recipe, --fp8-amax-history-len, --fp8-amax-compute-algo",
    "--fp4-": "not supported: use --bf16",
    "--mtp-": "not supported: there is no multi-token prediction",
    "--retro-": "not supported: the models are decoder-only",
    "--encoder-": "not supported: the models are decoder-only",
    "--decoder-": "not supported: use --num-layers and --seq-length",
    "--multi-latent-attention": "not supported: use grouped-query attention (--num-query-groups)",
    "--profile": "not supported: run under torch's or NVIDIA's profiler",
    "--tp-comm-": "leave it out: it changes only speed, and is not supported",
    "--inference-": "use tools/generate.py",
}


def instead_of(flag: str) -> str | None:
    """Returns what to use instead of a Megatron-LM flag; None if Megatron-LM does not have this flag either.

    Args:
        flag: a flag with dashes that this command line does not have.
    """
    if flag in _INSTEAD:
        return _INSTEAD[flag]
    if flag in _ALWAYS_ON:
        return "leave it out: it is always on here"
    if flag in _SPEED:
        return "leave it out: it changes only speed, memory or files, and is not supported"
    return next((words for start, words in _FAMILIES.items() if flag.startswith(start)), None)

"""The flags of Megatron-LM's two public training scripts, with their values, as bash passes them on.

    examples/gpt3/train_gpt3_175b_distributed.sh      core_v0.16.1, and main (d98e8a64) where it differs
    examples/llama/train_llama3_8b_h100_fp8.sh        main (d98e8a64), with its default arguments (MOCK)

What a script takes from its user stands in capitals: paths, which `flags` fills in. The scripts do not quote their
lists, so bash splits every value at spaces, and passes the quotes of `--split '99,1,0'` on.
"""

_GPT3_175B = """
--num-layers 96 --hidden-size 12288 --num-attention-heads 96 --seq-length 2048 --max-position-embeddings 2048
--attention-backend auto
--micro-batch-size 1 --global-batch-size 1536 {growth} --train-iters 500000 --weight-decay 0.1 --adam-beta1 0.9
--adam-beta2 0.95 --init-method-std 0.006 --clip-grad 1.0 --fp16 --lr 6.0e-5 --lr-decay-style cosine --min-lr 6.0e-6
--lr-warmup-fraction .001 --lr-decay-iters 430000
--tensor-model-parallel-size 8 --pipeline-model-parallel-size 16
--data-path DATA_PATH --vocab-file VOCAB_FILE --merge-file MERGE_FILE --split 949,50,1
--log-interval 100 --save-interval 10000 --eval-interval 1000 --save CHECKPOINT_PATH --load CHECKPOINT_PATH
--eval-iters 10 --tensorboard-dir TENSORBOARD_LOGS_PATH
"""

GPT3_175B = {
    "core_v0.16.1": _GPT3_175B.format(growth="--rampup-batch-size 16 16 5859375"),
    "main": _GPT3_175B.format(
        growth="--step-batch-size-schedule 0:16 2.4B:320 4.8B:624 7.2B:928 9.6B:1232 12B:1536"
    ),
}

LLAMA3_8B_FP8 = """
--use-mcore-models --num-layers 32 --hidden-size 4096 --ffn-hidden-size 14336 --num-attention-heads 32
--group-query-attention --num-query-groups 8 --kv-channels 128 --seq-length 8192 --max-position-embeddings 8192
--position-embedding-type rope --rotary-base 1000000 --rotary-percent 1.0 --attention-dropout 0.0 --hidden-dropout 0.0
--swiglu --normalization RMSNorm --init-method-std 0.0134 --attention-backend fused --apply-layernorm-1p
--untie-embeddings-and-output-weights --disable-bias-linear
--micro-batch-size 1 --global-batch-size 128 --train-samples 1953125000 --lr-decay-samples 1949218748
--lr-warmup-samples 3906252 --lr 0.00015 --min-lr 0.00001 --decoupled-lr 5.0e-4 --decoupled-min-lr 4.5e-5
--lr-decay-style cosine --clip-grad 1.0 --weight-decay 0.1 --adam-beta1 0.9 --adam-beta2 0.95 --bf16
--grad-reduce-in-bf16 --cross-entropy-loss-fusion --calculate-per-token-loss --manual-gc
--empty-unused-memory-level 1 --exit-duration-in-mins 235
--use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather
--fp8-format hybrid --fp8-amax-history-len 1024 --fp8-amax-compute-algo max --fp8-param-gather
--tensor-model-parallel-size 1 --context-parallel-size 1 --sequence-parallel
--mock-data --tokenizer-type NullTokenizer --vocab-size 128256 --data-cache-path DATA_CACHE_PATH --tiktoken-pattern v2
--split '99,1,0' --no-create-attention-mask-in-dataloader --no-mmap-bin-files --num-workers 1
--log-interval 1 --eval-iters 32 --eval-interval 100 --save-interval 1000 --log-throughput --profile
--profile-step-start 4 --profile-step-end 6 --ckpt-format torch_dist --distributed-timeout-minutes 60
--save CHECKPOINT_PATH --load CHECKPOINT_PATH --tensorboard-dir TENSORBOARD_LOGS_PATH
"""

FP8 = "--fp8-format hybrid --fp8-amax-history-len 1024 --fp8-amax-compute-algo max --fp8-param-gather"
"""The flags that the Llama script leaves out if its variable DTYPE is not fp8."""


def flags(script: str, **paths: str) -> list[str]:
    """Returns the words of a script's command line, with the user's paths in place of the names in capitals."""
    return [paths.get(word, word) for word in script.split()]

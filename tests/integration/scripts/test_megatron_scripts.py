"""Megatron-LM's own training scripts run here with unchanged flags: planned at their size, trained at a tiny one."""

import functools
import json
import os
import re
from pathlib import Path

import pytest

from megatron_ext.platform.engine_imports import transformer_engine_problem
from megatron_ext.testing.forked_scripts import run_script
from tests.integration.scripts.megatron_scripts import FP8, GPT3_175B, LLAMA3_8B_FP8, flags

SCRIPT = ("pretrain_gpt_per_layer.py", "--defaults", "megatron")


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What the scripts take from their user; the vocabulary is as large as GPT-2's."""
    folder = tmp_path_factory.mktemp("megatron")
    letters = [chr(code) for code in (*range(33, 127), *range(161, 173), *range(174, 256), *range(256, 324))]
    tokens = [*letters, *(f"{letters[0]}{number}" for number in range(50_000)), "<|endoftext|>"]
    vocab = {token: number for number, token in enumerate(tokens)}
    assert len(vocab) == 50_257
    (folder / "gpt2-vocab.json").write_text(json.dumps(vocab), encoding="utf-8")
    (folder / "gpt2-merges.txt").write_text("#version: 0.2\n", encoding="utf-8")
    return {
        "VOCAB_FILE": str(folder / "gpt2-vocab.json"),
        "MERGE_FILE": str(folder / "gpt2-merges.txt"),
        "DATA_PATH": str(folder / "corpus_text_document"),
        "DATA_CACHE_PATH": str(folder / "cache"),
        "CHECKPOINT_PATH": str(folder / "checkpoints"),
        "TENSORBOARD_LOGS_PATH": str(folder / "logs"),
    }


def _as_one_of(processes: int) -> None:
    os.environ["WORLD_SIZE"] = str(processes)


def ignored(stderr: str) -> list[str]:
    """The flags that the line on standard error names."""
    (line,) = [line for line in stderr.splitlines() if line.startswith("flags of Megatron-LM without effect")]
    return line.split(": ")[1].removesuffix(" (docs/megatron_lm_flags.md says why)").split(", ")


@pytest.mark.parametrize(
    ("version", "growth"),
    [
        ("core_v0.16.1", "the first 19802 steps have 16 to 1536 sequences, in 96 sizes"),
        ("main", "the first 80998 steps have 16 to 1536 sequences, in 6 sizes"),
    ],
)
@pytest.mark.parametrize("world_size", [128, 1024])
def test_the_flags_of_the_gpt3_script_are_planned_unchanged(
    version: str, growth: str, world_size: int, paths: dict[str, str]
) -> None:
    words = flags(GPT3_175B[version], **paths)
    done = run_script(*SCRIPT, *words, "--dry-run", before=functools.partial(_as_one_of, world_size))
    assert done.returncode == 0, done.stderr
    assert ignored(done.stderr) == ["--attention-backend auto"]
    copies = world_size // 128
    assert f"{world_size} processes = data {copies} x tensor 8 x pipeline 16; fp16" in done.stdout
    assert f"{1536 // copies} micro-batches of 1 per data-parallel rank" in done.stdout
    assert growth in done.stdout
    # 12 h^2 + 13 h per layer, the tied embedding of 50257 + 47 ids, 2048 positions, the last norm
    hidden, layers = 12288, 96
    parameters = layers * (12 * hidden**2 + 13 * hidden) + (50304 + 2048) * hidden + 2 * hidden
    assert f"{parameters:,}" in done.stdout


def test_the_gpt3_script_says_at_its_first_number_of_processes_how_many_it_needs(
    paths: dict[str, str],
) -> None:
    words = flags(GPT3_175B["core_v0.16.1"], **paths)
    done = run_script(*SCRIPT, *words, "--dry-run", before=functools.partial(_as_one_of, 8))
    assert done.returncode == 2
    assert "world size 8: must be divisible by --tensor-model-parallel-size 8 x --pipeline" in done.stderr


LLAMA_IGNORED = [
    "--use-mcore-models",
    "--attention-backend fused",
    "--fp8-param-gather",
    "--no-create-attention-mask-in-dataloader",
    "--no-mmap-bin-files",
    "--ckpt-format torch_dist",
]


def test_the_flags_of_the_llama3_script_are_planned_unchanged(paths: dict[str, str]) -> None:
    words = flags(LLAMA3_8B_FP8, **paths)
    done = run_script(*SCRIPT, *words, "--dry-run", before=functools.partial(_as_one_of, 8))
    assert done.returncode == 0, done.stderr
    assert ignored(done.stderr) == LLAMA_IGNORED
    assert "8 processes = data 8 x tensor 1 x pipeline 1; bf16" in done.stdout
    assert (
        "one step = 128 sequences of 8192 tokens; 16 micro-batches of 1 per data-parallel rank" in done.stdout
    )
    # Llama 3 8B, with one id more than 128256 for the end of a document, padded to a multiple of 128
    hidden, key_value, wide = 4096, 1024, 14336
    layer = 2 * hidden**2 + 2 * hidden * key_value + 3 * hidden * wide + 2 * hidden
    assert f"{32 * layer + 2 * 128384 * hidden + hidden:,}" in done.stdout
    assert not Path(paths["CHECKPOINT_PATH"]).exists()


@pytest.mark.skipif(transformer_engine_problem() is None, reason="Transformer Engine can be used here")
def test_the_llama3_script_is_refused_by_name_where_fp8_cannot_be_computed(paths: dict[str, str]) -> None:
    done = run_script(*SCRIPT, *flags(LLAMA3_8B_FP8, **paths), before=functools.partial(_as_one_of, 1))
    assert done.returncode == 2
    assert f"error: --fp8-format hybrid: {transformer_engine_problem()}" in done.stderr


def test_the_llama3_script_trains_with_every_flag_but_its_sizes_and_fp8(
    paths: dict[str, str], tmp_path: Path
) -> None:
    own = {**paths, "CHECKPOINT_PATH": str(tmp_path / "run"), "TENSORBOARD_LOGS_PATH": str(tmp_path / "logs")}
    sizes = (
        "--num-layers 2 --hidden-size 64 --ffn-hidden-size 128 --num-attention-heads 4 --num-query-groups 2 "
        "--kv-channels 16 --seq-length 64 --max-position-embeddings 64 --global-batch-size 8 --train-samples 160 "
        "--lr-decay-samples 144 --lr-warmup-samples 16 --vocab-size 255 --eval-iters 2 --eval-interval 10"
    )
    words = flags(LLAMA3_8B_FP8.replace(FP8, ""), **own)
    assert len(words) == len(flags(LLAMA3_8B_FP8)) - len(FP8.split())
    done = run_script(*SCRIPT, *words, *sizes.split(), processes=2)
    assert done.returncode == 0, done.stderr
    assert ignored(done.stderr) == [each for each in LLAMA_IGNORED if each != "--fp8-param-gather"]
    steps = re.findall(r"(?m)^step +(\d+)/20\b", done.stdout)
    assert steps == [str(step) for step in range(1, 21)], done.stdout
    assert (tmp_path / "run" / "latest_checkpointed_iteration.txt").read_text().strip() == "20"

"""The layout for inference fits the model, whatever the number of processes; what the user gives is respected."""

from dataclasses import replace
from pathlib import Path

import pytest

from megatron_ext.config.groups.checkpoint_config import CheckpointConfig
from megatron_ext.config.groups.model_config import ModelConfig
from megatron_ext.config.groups.parallel_config import ParallelConfig
from megatron_ext.config.groups.tokenizer_config import TokenizerConfig
from megatron_ext.data.tokenizers.byte_and_null import ByteLevelTokenizer
from megatron_ext.inference.choose_layout import choose_layout
from megatron_ext.per_layer.per_layer_config import PerLayerConfig
from megatron_ext.per_layer.per_layer_family import PerLayerFamily
from megatron_ext.testing.checkpoint_runs import RunSettings, TinyRun
from megatron_ext.testing.forked_scripts import run_script
from megatron_ext.testing.run_single import run_single
from megatron_ext.testing.tiny_datasets import write_dataset
from megatron_ext.testing.tiny_training import TINY


def model(heads: int, layers: int) -> ModelConfig:
    return ModelConfig(
        num_layers=layers,
        hidden_size=8 * heads,
        num_attention_heads=heads,
        seq_length=32,
        ffn_hidden_size=720,
    )


@pytest.mark.parametrize(
    ("heads", "layers", "processes", "tensor", "pipeline"),
    [
        (9, 4, 1, 1, 1),
        (8, 4, 2, 2, 1),
        (9, 4, 2, 1, 2),
        (9, 5, 2, 1, 1),  # two copies
        (6, 4, 4, 2, 2),
        (9, 4, 6, 3, 2),
        (9, 30, 6, 3, 2),
        (9, 5, 6, 3, 1),
    ],
)
def test_tensor_ranks_come_before_stages_and_stages_before_copies(
    heads: int, layers: int, processes: int, tensor: int, pipeline: int
) -> None:
    found = choose_layout(model(heads, layers), [], processes)
    assert (found.tensor_model_parallel_size, found.pipeline_model_parallel_size) == (tensor, pipeline)


def test_sizes_that_are_given_are_kept_or_refused() -> None:
    assert choose_layout(model(8, 4), [], 4, tensor=1) == ParallelConfig()
    assert choose_layout(model(8, 4), [], 4, pipeline=2).tensor_model_parallel_size == 2
    assert choose_layout(model(9, 4), [], 4, pipeline=2).tensor_model_parallel_size == 1
    with pytest.raises(
        ValueError, match="--num-attention-heads 9: must be divisible by --tensor-model-parallel-size 2"
    ):
        choose_layout(model(9, 4), [], 2, tensor=2)
    with pytest.raises(
        ValueError, match="--num-layers 5: must be divisible by --pipeline-model-parallel-size 2"
    ):
        choose_layout(model(9, 5), [], 2, pipeline=2)


def test_a_family_that_cannot_be_shared_counts_too() -> None:
    settings = PerLayerConfig(
        use_per_layer_embedding=True, per_layer_preset="gemma4", per_layer_hidden_size=9
    )
    family = PerLayerFamily(settings, 100)
    assert choose_layout(model(8, 4), [family], 2).pipeline_model_parallel_size == 2


def _save(folder: str) -> None:
    tokenizer = ByteLevelTokenizer()
    TinyRun(
        RunSettings(
            parallel=ParallelConfig(),
            checkpoint=CheckpointConfig(save=folder),
            model=replace(TINY, num_attention_heads=3, num_query_groups=None, hidden_size=48, kv_channels=16),
            vocab_size=tokenizer.vocab_size,
            tokenizer=tokenizer.fingerprint(),
            tokenizer_config=TokenizerConfig(tokenizer_type="ByteLevelTokenizer"),
        )
    ).save()


def test_evaluation_and_generation_of_a_model_with_an_odd_number_of_heads_run_on_two_processes(
    tmp_path: Path,
) -> None:
    run_single(_save, str(tmp_path / "run"))
    write_dataset(str(tmp_path / "data"), [[[1, 2, 3, 4] * 20]])
    outputs = {}
    for processes in (1, 2):
        for tool in (
            ["tools/evaluate.py", "--data-path", str(tmp_path / "data")],
            ["tools/generate.py", "--prompt", "ab", "--temperature", "0", "--max-new-tokens", "6"],
        ):
            done = run_script(*tool, "--load", str(tmp_path / "run"), processes=processes)
            assert done.returncode == 0, done.stderr
            told = "2 processes: tensor parallel 1, pipeline parallel 2, 1 copy"
            assert (told in done.stderr) == (processes == 2)
            outputs[tool[0], processes] = done.stdout
    for name in ("tools/evaluate.py", "tools/generate.py"):
        assert outputs[name, 1] == outputs[name, 2]

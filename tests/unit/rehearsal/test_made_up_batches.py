"""The batches of a rehearsal have the fields, shapes and types of the run's real ones."""

from pathlib import Path

import pytest
import torch
from torch.utils.data import default_collate

from megatron_ext.config.groups.data_config import DataConfig
from megatron_ext.config.groups.optimizer_config import OptimizerSettings
from megatron_ext.config.groups.tokenizer_config import TokenizerConfig
from megatron_ext.config.groups.training_config import TrainingConfig
from megatron_ext.config.run_config import RunConfig
from megatron_ext.data.datasets.gpt_dataset import build_datasets
from megatron_ext.testing.tiny_datasets import ListTokenizer, write_dataset
from megatron_ext.testing.tiny_training import TINY
from megatron_ext.training.rehearsed_run import made_up_data


@pytest.mark.parametrize("resets", [False, True])
def test_made_up_batches_look_like_those_of_a_dataset(tmp_path: Path, resets: bool) -> None:
    prefix = str(tmp_path / "data")
    write_dataset(prefix, [[list(range(1, 20))] for _ in range(8)])
    data = DataConfig(
        data_path=(prefix,),
        split="100,0,0",
        data_cache_path=str(tmp_path / "cache"),
        reset_attention_mask=resets,
        reset_position_ids=resets,
    )
    config = RunConfig(
        model=TINY,
        training=TrainingConfig(train_iters=1, micro_batch_size=2),
        optimizer=OptimizerSettings(lr=1e-3),
        tokenizer=TokenizerConfig(tokenizer_type="NullTokenizer", vocab_size=99),
        data=data,
    )
    tokenizer = ListTokenizer([str(number) for number in range(100)])
    dataset, _, _ = build_datasets(
        data, seq_length=TINY.seq_length, seed=1, num_samples=(2, 0, 0), tokenizer=tokenizer
    )
    assert dataset is not None
    real = default_collate([dataset[0], dataset[1]])
    made_up = next(made_up_data(config, []).train(0))
    del made_up["epoch"]  # run_data adds it

    def looks(batch: dict[str, torch.Tensor]) -> dict[str, tuple[torch.Size, torch.dtype]]:
        return {name: (value.shape, value.dtype) for name, value in batch.items()}

    assert looks(made_up) == looks(real)

"""Losses of training, validation and test data with the flags of packed documents, against each document alone."""

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_ext.config.groups.data_config import DataConfig
from megatron_ext.data.datasets.gpt_dataset import build_datasets
from megatron_ext.data.tokenizers.byte_and_null import NullTokenizer
from megatron_ext.inference.load_model import load_model
from megatron_ext.registry.known_families import FAMILIES
from megatron_ext.testing.forked_scripts import run_script
from megatron_ext.testing.tiny_datasets import write_dataset
from tests.unit.interop.hf_models import alone

EOD, LENGTH, SAMPLES, SEED = 95, 32, 8, 7
RUN = (
    "--num-layers 4 --hidden-size 32 --num-attention-heads 4 --swiglu --position-embedding-type learned_absolute "
    f"--tokenizer-type NullTokenizer --vocab-size {EOD} --seq-length {LENGTH} --init-method-std 0.2 "
    "--use-per-layer-embedding --per-layer-preset gemma4 --per-layer-hidden-size 8 --window-size 6,0 "
    "--window-attn-skip-freq 2 --lr 1e-2 --hidden-dropout 0 --attention-dropout 0 --micro-batch-size 2 "
    f"--global-batch-size 4 --train-iters 2 --eval-iters 2 --num-workers 0 --seed {SEED} --split 40,30,30 "
    "--pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 1 --log-interval 1"
)
FLAGS: dict[str, Any] = {"reset_position_ids": True, "reset_attention_mask": True, "eod_mask_loss": True}


def _losses_of_documents(folder: str) -> list[float]:
    """The trained model's mean loss per token of the validation and the test samples, a document at a time."""
    loaded = load_model(f"{folder}/run", FAMILIES)
    data = DataConfig(data_path=(f"{folder}/data",), split="40,30,30", **FLAGS)
    sets = build_datasets(
        data,
        seq_length=LENGTH,
        seed=SEED,
        num_samples=(SAMPLES, SAMPLES, SAMPLES),
        tokenizer=NullTokenizer(EOD),
    )
    found = []
    for samples in sets[1:]:
        assert samples is not None
        total = weight = 0.0
        for number in range(SAMPLES):
            sample = samples[number]
            first = [*sample["document_starts"].nonzero().flatten().tolist(), LENGTH]
            for start, end in itertools.pairwise(first):
                tokens, labels, mask = (sample[n][None, start:end] for n in ("tokens", "labels", "loss_mask"))
                with torch.no_grad():
                    positions = torch.arange(end - start)[None]
                    ids = {"per_layer_ids": tokens}
                    losses = loaded.model(tokens, positions, None, auxiliary_inputs=ids, labels=labels)
                total += float((losses * mask).sum())
                weight += float(mask.sum())
        found.append(total / weight)
    return found


def test_validation_and_test_losses_are_those_of_the_documents_alone(tmp_path: Path) -> None:
    random = np.random.default_rng(1)
    lengths = random.integers(1, 40, 90)
    write_dataset(str(tmp_path / "data"), [[[*random.integers(0, EOD, n).tolist(), EOD]] for n in lengths])
    flags = [f"--{name.replace('_', '-')}" for name in FLAGS]
    where = f"--data-path {tmp_path}/data --save {tmp_path}/run --tensorboard-dir {tmp_path}/logs"
    done = run_script("pretrain_gpt_per_layer.py", *RUN.split(), *flags, *where.split(), processes=2)
    assert done.returncode == 0, done.stderr
    events = EventAccumulator(str(tmp_path / "logs"), size_guidance={"scalars": 0})
    events.Reload()
    logged = [events.Scalars(f"lm loss {split}")[-1].value for split in ("validation", "test")]
    assert logged == pytest.approx(alone(_losses_of_documents, str(tmp_path)), rel=1e-5)

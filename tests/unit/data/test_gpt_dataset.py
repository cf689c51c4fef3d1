"""Datasets of a run: against mcore's own, aligned per-layer ids, and data that must be refused."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig

from megatron_ext.config.groups.data_config import DataConfig
from megatron_ext.data.datasets import gpt_dataset
from megatron_ext.data.datasets.gpt_dataset import build_datasets
from megatron_ext.data.indexed.indexed_files import open_index
from megatron_ext.data.indexed.manifest import write_manifest
from megatron_ext.data.per_layer.ngrams import ngram_numbers, starts_after, tokens_of_ngram
from megatron_ext.data.per_layer.per_layer_ids import write_aligned
from megatron_ext.models.ops.documents.document_bounds import document_bounds, forbidden_pairs
from megatron_ext.testing.tiny_datasets import ListTokenizer, write_dataset

VOCAB = 300
TOKENIZER = ListTokenizer([f"t{number}" for number in range(VOCAB)])
TABLE = (np.random.default_rng(0).permutation(VOCAB)).astype(np.int32)
SEQ = 16


def make(
    prefix: Any, *, documents: Any = 60, seed: Any = 0, aligned: Any = True, strategy: Any = "syntax_focus"
) -> Any:
    """A random dataset whose documents end with the end-of-document token 0, and its aligned one."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 40, documents)
    write_dataset(prefix, [[[*rng.integers(1, VOCAB, length).tolist(), 0]] for length in lengths])
    if aligned:
        write_aligned(open_index(prefix), f"{prefix}_pl", TABLE, strategy, eod=0, per_layer_vocab_size=VOCAB)
    return prefix


def build(data: Any, samples: Any = (40, 10, 0), per_layer: Any = None, **more: Any) -> Any:
    return build_datasets(
        data,
        seq_length=SEQ,
        seed=7,
        num_samples=samples,
        tokenizer=TOKENIZER,
        per_layer_data_path=per_layer,
        **more,
    )


def assert_same_samples(
    ours: Any, theirs: Any, keys: Any = ("tokens", "labels", "loss_mask", "position_ids")
) -> None:
    assert len(ours) == len(theirs)
    for number in range(len(ours)):
        for key in keys:
            assert torch.equal(ours[number][key], theirs[number][key])


def test_ngrams_begin_where_position_ids_restart_and_aligned_ones_also_read_what_precedes_the_sample(
    tmp_path: Path,
) -> None:
    prefix = make(f"{tmp_path}/d", strategy="trigram_hash")
    data = DataConfig(data_path=(prefix,), split="80,20", reset_position_ids=True)
    train, _, _ = build(
        data, per_layer=(f"{prefix}_pl",), per_layer_strategy="trigram_hash", per_layer_vocab_size=9
    )
    single = (1 << 21) - 1
    reached = 0
    for number in range(len(train)):
        sample = train[number]
        tokens, aligned = sample["tokens"], sample["per_layer_ids"]
        derived = ngram_numbers(tokens, starts_after(tokens, TOKENIZER.eod), "trigram_hash")
        for place, position in enumerate(sample["position_ids"].tolist()):
            read = tokens[place - min(position, 2) : place + 1].tolist()
            assert tokens_of_ngram(int(derived[place])) == read
            # The sample's own document may have begun before it.
            assert tokens_of_ngram(int(aligned[place]))[-len(read) :] == read
            if place > 1:
                assert aligned[place] == derived[place]
        reached += int(aligned[0]) > single
    assert 0 < reached < len(train)


RESETS = {
    "none": {},
    "all": {"reset_position_ids": True, "reset_attention_mask": True, "eod_mask_loss": True},
    "attention": {"reset_attention_mask": True},
    "positions": {"reset_position_ids": True},
    "loss": {"eod_mask_loss": True},
}


@pytest.mark.parametrize("resets", RESETS)
def test_samples_are_mcores_and_marks_of_documents_stand_for_its_mask(tmp_path: Path, resets: str) -> None:
    prefix = make(f"{tmp_path}/d")
    flags: Any = dict.fromkeys(RESETS["all"], False) | RESETS[resets]
    ours = build(DataConfig(data_path=(prefix,), split="80,20", **flags), samples=(300, 10, 0))
    config = GPTDatasetConfig(
        random_seed=7,
        sequence_length=SEQ,
        blend=([prefix], None),
        split="80,20",
        tokenizer=TOKENIZER,
        path_to_cache=f"{tmp_path}/theirs",
        create_attention_mask=True,
        **flags,
    )
    theirs = BlendedMegatronDatasetBuilder(GPTDataset, [300, 10, None], lambda: True, config).build()
    keys = ("tokens", "labels", "loss_mask", "position_ids")
    marks = ("document_starts",) if flags["reset_attention_mask"] else ()
    assert set(ours[0][0]) == {*keys, *marks}
    for split in (0, 1):
        assert len(ours[split]) >= (300, 10)[split]
        assert_same_samples(ours[split], theirs[split], keys)
        for number in range(len(ours[split]) if marks else 0):
            bounds = document_bounds(ours[split][number]["document_starts"].unsqueeze(0))
            mask = forbidden_pairs(bounds, SEQ, causal=True)[0]
            assert torch.equal(mask, theirs[split][number]["attention_mask"])
    assert ours[2] is None


def test_aligned_ids_are_those_of_the_tokens_in_every_split_and_epoch(tmp_path: Path) -> None:
    prefix = make(f"{tmp_path}/d")
    train, valid, test = build(DataConfig(data_path=(prefix,), split="6,3,1"), (200, 20, 5), [f"{prefix}_pl"])
    for dataset in (train, valid, test):
        for number in range(len(dataset)):
            sample = dataset[number]
            assert sample["per_layer_ids"].dtype == torch.int64
            assert np.array_equal(sample["per_layer_ids"], TABLE[sample["tokens"]])
    assert torch.equal(train[None]["per_layer_ids"], train[0]["per_layer_ids"])


def test_positional_ids_follow_the_documents(tmp_path: Path) -> None:
    prefix = make(f"{tmp_path}/d", strategy="attention_guidance")
    train, _, _ = build(DataConfig(data_path=(prefix,)), (100, 0, 0), [f"{prefix}_pl"])
    for number in range(len(train)):
        tokens, ids = train[number]["tokens"], train[number]["per_layer_ids"]
        is_end = tokens == 0
        assert (ids[is_end] == 4).all()
        assert (ids[1:][is_end[:-1]] == 2).logical_or(is_end[1:][is_end[:-1]]).all()  # the start after an end


@pytest.mark.parametrize("weights", [None, (0.3, 0.7)])
def test_aligned_ids_follow_a_blend(tmp_path: Path, weights: Any) -> None:
    prefixes = [make(f"{tmp_path}/d{seed}", seed=seed) for seed in (1, 2)]
    flat = (
        tuple(prefixes) if weights is None else (str(weights[0]), prefixes[0], str(weights[1]), prefixes[1])
    )
    aligned = [value if value not in prefixes else f"{value}_pl" for value in flat]
    train, _, _ = build(DataConfig(data_path=flat), (60, 0, 0), aligned)
    assert len(train) == 60
    sources = [train[number]["dataset_id"] for number in range(60)]
    if weights is not None:
        assert sources.count(0) == 18
    for number in range(60):
        assert np.array_equal(train[number]["per_layer_ids"], TABLE[train[number]["tokens"]])


def test_splits_of_their_own(tmp_path: Path) -> None:
    prefixes = [make(f"{tmp_path}/d{seed}", seed=seed) for seed in (1, 2)]
    data = DataConfig(train_data_path=(prefixes[0],), valid_data_path=(prefixes[1],))
    train, valid, test = build(data, (50, 20, 0), [f"{prefix}_pl" for prefix in prefixes])
    assert test is None
    for dataset, prefix in ((train, prefixes[0]), (valid, prefixes[1])):
        text = open_index(prefix).tokens().tolist()
        documents = {tuple(part) for part in _documents(text)}
        for number in range(len(dataset)):
            inner = _documents(dataset[number]["tokens"].tolist())[1:-1]
            assert all(tuple(part) in documents for part in inner)
            assert np.array_equal(dataset[number]["per_layer_ids"], TABLE[dataset[number]["tokens"]])


def _documents(tokens: Any) -> Any:
    """Cut after every end-of-document token."""
    ends = [position + 1 for position, token in enumerate(tokens) if token == 0]
    return [tokens[a:b] for a, b in zip([0, *ends], [*ends, len(tokens)], strict=True)]


def test_missing_per_layer_data_is_named_with_the_command_that_makes_it(tmp_path: Path) -> None:
    prefix = make(f"{tmp_path}/corpus_text_document", aligned=False)
    message = (
        rf"Per-layer data file not found: {re.escape(str(tmp_path))}/pl_text_document\.bin; make it with: python"
        rf" tools/preprocess_per_layer_data\.py --output-prefix {re.escape(str(tmp_path))}/corpus"
        rf" --per-layer-output-prefix {re.escape(str(tmp_path))}/pl "
    )
    with pytest.raises(FileNotFoundError, match=message):
        build(DataConfig(data_path=(prefix,)), per_layer=[f"{tmp_path}/pl_text_document"])


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ([[[1, 2, 3]]], "it has 1 documents instead of 3"),
        ([[[1, 2, 3]], [[4]], []], "it has 2 sequences instead of 3"),
        ([[[1, 2, 3]], [[4]], [[5, 6, 7]]], "it has 7 tokens instead of 6"),
        ([[[1, 2]], [[4, 4]], [[5, 6]]], "the length of sequence 0 is 2 instead of 3"),
    ],
)
def test_per_layer_data_of_another_shape_is_refused(tmp_path: Path, other: Any, message: Any) -> None:
    prefix = f"{tmp_path}/d"
    write_dataset(prefix, [[[1, 2, 3]], [[4]], [[5, 6]]])
    write_dataset(f"{prefix}_pl", other)
    with pytest.raises(ValueError, match=rf"d_pl is not aligned with .*d: {message}"):
        build(DataConfig(data_path=(prefix,), split="1"), (2, 0, 0), [f"{prefix}_pl"])


def test_sequences_of_other_documents_are_refused(tmp_path: Path) -> None:
    prefix = f"{tmp_path}/d"
    write_dataset(prefix, [[[1], [2]], [[3]]])
    write_dataset(f"{prefix}_pl", [[[1]], [[2], [3]]])
    with pytest.raises(ValueError, match="the first sequence of document 1 is 1 instead of 2"):
        build(DataConfig(data_path=(prefix,), split="1"), (2, 0, 0), [f"{prefix}_pl"])


def test_manifests_of_another_strategy_vocabulary_or_version_are_refused(tmp_path: Path) -> None:
    prefix = make(f"{tmp_path}/d")
    data = DataConfig(data_path=(prefix,))
    write_manifest(prefix, tool="t", tokenizer=None, inputs=[])
    for checksum in ("0" * 64, None):
        per_layer = {"strategy": "syntax_focus", "vocab_size": VOCAB, "source_checksum": checksum}
        write_manifest(f"{prefix}_pl", tool="t", tokenizer=None, inputs=[], extra={"per_layer": per_layer})
        if checksum is not None:
            with pytest.raises(ValueError, match="main data was made again"):
                build(data, per_layer=[f"{prefix}_pl"])
    with pytest.raises(ValueError, match=r"--per-layer-strategy identity: .*d_pl was made with syntax_focus"):
        build(data, per_layer=[f"{prefix}_pl"], per_layer_strategy="identity")
    with pytest.raises(ValueError, match=r"--per-layer-vocab-size 10 is too small: .*d_pl has 300 ids"):
        build(data, per_layer=[f"{prefix}_pl"], per_layer_vocab_size=10)
    build(data, per_layer=[f"{prefix}_pl"], per_layer_strategy="syntax_focus", per_layer_vocab_size=VOCAB)


def test_data_that_cannot_be_used_is_refused_at_once(tmp_path: Path) -> None:
    prefix = make(f"{tmp_path}/d", documents=3, aligned=False)
    with pytest.raises(ValueError, match="the validation split has 0 of 3 documents and 0 tokens"):
        build(DataConfig(data_path=(prefix,), split="99,1"))  # mcore would loop for ever
    with pytest.raises(ValueError, match="no data: give --data-path"):
        build(DataConfig())
    with pytest.raises(FileNotFoundError, match=r"data file not found: .*nope\.idx"):
        build(DataConfig(data_path=(f"{tmp_path}/nope",)))
    with pytest.raises(ValueError, match="--per-layer-data-path has 2 prefixes, but --data-path has 1"):
        build(DataConfig(data_path=(prefix,)), per_layer=["a", "b"])
    write_manifest(prefix, tool="t", tokenizer={"fingerprint": "other"}, inputs=[])
    with pytest.raises(ValueError, match="was made with the tokenizer other"):
        build(DataConfig(data_path=(prefix,)))
    Path(f"{prefix}.json").unlink()
    Path(f"{prefix}.bin").write_bytes(Path(f"{prefix}.bin").read_bytes()[:-4])
    with pytest.raises(ValueError, match="truncated or corrupt"):
        build(DataConfig(data_path=(prefix,)))


def test_a_split_without_a_share_or_a_path_is_left_out(tmp_path: Path) -> None:
    prefix = make(f"{tmp_path}/d", aligned=False)
    for data in (DataConfig(data_path=(prefix,), split="1"), DataConfig(train_data_path=(prefix,))):
        train, valid, test = build(data, (20, 10, 10))
        assert train is not None
        assert valid is None
        assert test is None


def test_data_made_again_under_the_same_name_does_not_meet_the_old_sample_index(tmp_path: Path) -> None:
    prefix = make(f"{tmp_path}/d", documents=50, seed=1, aligned=False)
    data = DataConfig(data_path=(prefix,), split="1", data_cache_path=f"{tmp_path}/cache")
    build(data, (100, 0, 0))
    make(prefix, documents=50, seed=2, aligned=False)
    train, _, _ = build(data, (100, 0, 0))
    fresh, _, _ = build(
        DataConfig(data_path=(prefix,), split="1", data_cache_path=f"{tmp_path}/new"), (100, 0, 0)
    )
    assert_same_samples(train, fresh)


def test_an_index_that_differs_in_its_middle_alone_is_another(tmp_path: Path) -> None:
    content = bytearray(5 << 20)
    (tmp_path / "d.idx").write_bytes(content)
    before = gpt_dataset._identity(f"{tmp_path}/d")
    content[len(content) // 2] = 1
    (tmp_path / "d.idx").write_bytes(content)
    assert gpt_dataset._identity(f"{tmp_path}/d") != before


def test_a_cache_file_that_a_killed_run_left_truncated_is_made_again(tmp_path: Path) -> None:
    prefix = make(f"{tmp_path}/d", aligned=False)
    data = DataConfig(data_path=(prefix,), split="1", data_cache_path=f"{tmp_path}/cache")
    first, _, _ = build(data, (100, 0, 0))
    samples = [first[number]["tokens"].clone() for number in range(100)]
    for path in (tmp_path / "cache").glob("*.npy"):
        path.write_bytes(path.read_bytes()[:-40])
    again, _, _ = build(data, (100, 0, 0))
    assert all(torch.equal(again[number]["tokens"], samples[number]) for number in range(100))

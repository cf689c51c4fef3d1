"""What PLE's configuration accepts and what it refuses, in one line that names the flag."""

import re
from dataclasses import replace
from typing import Any

import pytest

from megatron_ext.config.command_line.parse import Found, parse
from megatron_ext.config.groups.checkpoint_config import CheckpointConfig
from megatron_ext.config.groups.optimizer_config import OptimizerSettings
from megatron_ext.config.groups.tokenizer_config import TokenizerConfig
from megatron_ext.config.groups.training_config import TrainingConfig
from megatron_ext.per_layer.per_layer_config import PerLayerConfig, PerLayerRunConfig, inherited
from megatron_ext.testing.tiny_training import TINY


def test_defaults_are_those_of_document_003() -> None:
    config = PerLayerConfig()
    assert not config.use_per_layer_embedding
    assert (config.rows(vocab_size=777), config.per_layer_hidden_size) == (10000, 1024)
    assert (config.per_layer_combination_method, config.per_layer_gate_activation) == ("scaled_add", "silu")
    assert (config.per_layer_projection_dropout, config.per_layer_stats_interval) == (0.0, 100)
    assert config.per_layer_position == "before_layer"


def test_a_run_does_not_inherit_the_place_of_the_tables_nor_an_optimizer_of_rows_without_rows() -> None:
    stored = {"per_layer_sparse": True, "per_layer_optimizer": "sgd", "per_layer_hidden_size": 8}
    found = Found(
        "checkpoint x", {"model": {"seq_length": 4}, "per_layer": {**stored, "per_layer_offload": "cpu"}}
    )
    assert inherited(found, {}).sections == {"model": {"seq_length": 4}, "per_layer": stored}
    of_whole = inherited(found, {"per_layer_sparse": False}).sections["per_layer"]
    assert of_whole == {"per_layer_sparse": True, "per_layer_hidden_size": 8}


def test_document_003s_flags_parse() -> None:
    text = """--use-per-layer-embedding --per-layer-vocab-size 5000 --per-layer-hidden-size 256
        --per-layer-combination-method gated --per-layer-gate-activation gelu --per-layer-projection-dropout 0.1
        --per-layer-strategy syntax_focus --per-layer-vocab-file vocab.json --log-per-layer-stats
        --log-per-layer-gradients --per_layer_stats_interval 10 --freeze-per-layer-embedding"""
    config = parse(PerLayerConfig, text.split())
    assert (
        config.use_per_layer_embedding
        and config.log_per_layer_gradients
        and config.freeze_per_layer_embedding
    )
    assert (config.per_layer_vocab_size, config.per_layer_stats_interval) == (5000, 10)


def test_the_gemma4_preset_sets_ids_activation_and_position() -> None:
    config = PerLayerConfig(use_per_layer_embedding=True, per_layer_preset="gemma4")
    assert config.uses_token_ids and config.has_layer_scalar
    assert (config.per_layer_gate_activation, config.per_layer_position) == ("gelu_tanh", "after_mlp")
    assert config.rows(vocab_size=777) == 777


def test_the_gemma3n_preset_allows_fewer_rows_than_ids_and_requires_several_residual_streams() -> None:
    config = PerLayerConfig(
        use_per_layer_embedding=True, per_layer_preset="gemma3n", per_layer_vocab_size=700
    )
    assert config.adds_to_inactive_streams and not config.has_layer_scalar
    assert config.rows(vocab_size=777) == 700
    with pytest.raises(
        ValueError, match="--per-layer-vocab-size 700: must be at most the vocabulary size, 500"
    ):
        config.rows(vocab_size=500)
    config.check_streams(4)
    with pytest.raises(ValueError, match="--per-layer-preset gemma3n: requires --altup-streams"):
        config.check_streams(None)
    plain = PerLayerConfig(use_per_layer_embedding=True, per_layer_preset="gemma4")
    with pytest.raises(
        ValueError, match="--altup-streams 4: per-layer embedding requires --per-layer-preset"
    ):
        plain.check_streams(4)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"per_layer_hidden_size": 0}, "--per-layer-hidden-size 0: must be at least 1"),
        ({"per_layer_vocab_size": -1}, "--per-layer-vocab-size -1: must be at least 1"),
        ({"per_layer_projection_dropout": 1.0}, "--per-layer-projection-dropout 1.0: must lie in [0, 1)"),
        ({"per_layer_embed_scale": 0.0}, "--per-layer-embed-scale 0.0: must be above 0"),
        ({"per_layer_gate_activation": "tanh"}, "--per-layer-gate-activation tanh: must be one of"),
        ({"per_layer_combination_method": "add"}, "--per-layer-combination-method add: must be one of"),
        (
            {"per_layer_preset": "gemma4", "per_layer_gate_activation": "relu"},
            "--per-layer-gate-activation relu: --per-layer-preset gemma4 sets it to gelu_tanh; omit one of the two",
        ),
        (
            {"per_layer_optimizer": "lazy_adam"},
            "--per-layer-optimizer lazy_adam: requires --per-layer-sparse",
        ),
        (
            {"per_layer_offload": "disk"},
            "--per-layer-offload disk: requires --per-layer-sparse",
        ),
        (
            {"per_layer_sparse": True, "per_layer_offload": "cpu", "per_layer_offload_dir": "/fast"},
            "--per-layer-offload-dir /fast: requires --per-layer-offload disk",
        ),
        (
            {"use_per_layer_embedding": False, "per_layer_vocab_file": "v.json"},
            "--per-layer-vocab-file v.json: requires --use-per-layer-embedding",
        ),
    ],
)
def test_a_wrong_value_is_named(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        PerLayerConfig(**{"use_per_layer_embedding": True, **values})


def test_without_the_flag_the_tables_have_as_many_rows_as_there_are_ids() -> None:
    config = PerLayerConfig(use_per_layer_embedding=True)
    assert config.rows(vocab_size=777, num_ids=359) == 359
    given = PerLayerConfig(use_per_layer_embedding=True, per_layer_vocab_size=500)
    assert given.rows(vocab_size=777, num_ids=359) == 500


def test_a_layout_that_does_not_divide_the_hidden_size_is_named() -> None:
    config = PerLayerConfig(use_per_layer_embedding=True, per_layer_hidden_size=6)
    config.check_layout(3)
    with pytest.raises(ValueError, match="--per-layer-hidden-size 6: must be divisible by"):
        config.check_layout(4)


def test_another_vocabulary_size_than_the_tokenizers_is_refused_where_token_ids_are_the_ids() -> None:
    config = PerLayerConfig(
        use_per_layer_embedding=True, per_layer_strategy="identity", per_layer_vocab_size=500
    )
    assert config.rows(500) == 500
    with pytest.raises(ValueError, match="--per-layer-vocab-size 500: must be the vocabulary size, 777"):
        config.rows(777)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"per_layer_vocab_size": None},
            "--per-layer-strategy bigram_hash: requires --per-layer-vocab-size, the number of rows that n-grams",
        ),
        (
            {"per_layer_vocab_size": 2**31},
            "--per-layer-vocab-size 2147483648: must be at most 2147483647 with",
        ),
        ({"per_layer_hashes": 0}, "--per-layer-hashes 0: must be at least 1"),
        ({"per_layer_hashes": 65}, "--per-layer-hashes 65: must be at most 64"),
        (
            {"per_layer_vocab_file": "v.json"},
            "--per-layer-vocab-file v.json: --per-layer-strategy bigram_hash does not read such",
        ),
        (
            {"per_layer_preset": "gemma4"},
            "--per-layer-strategy bigram_hash: --per-layer-preset gemma4 sets it to",
        ),
        (
            {"per_layer_strategy": "identity", "per_layer_hashes": 3},
            "--per-layer-hashes 3: requires --per-layer-strategy bigram_hash or trigram_hash (got identity)",
        ),
    ],
)
def test_settings_of_hashed_ngrams_that_do_not_fit_are_named(values: dict[str, Any], message: str) -> None:
    given: dict[str, Any] = {
        "use_per_layer_embedding": True,
        "per_layer_strategy": "bigram_hash",
        "per_layer_vocab_size": 500,
    }
    assert PerLayerConfig(**given).rows(777) == 500
    with pytest.raises(ValueError, match=re.escape(message)):
        PerLayerConfig(**{**given, **values})


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        (
            {"optimizer": OptimizerSettings(lr=1e-3, adam_beta2=0.8)},
            "--per-layer-optimizer adam: requires --adam-beta2 above the square of --adam-beta1 (got 0.8 and 0.9)",
        ),
        (
            {"optimizer": OptimizerSettings(lr=20.0, weight_decay=0.1)},
            "--per-layer-sparse: the tables' learning rate times their weight decay must be below 1 (got 20 times 0.1)",
        ),
    ],
)
def test_what_tables_by_rows_do_not_support_is_named(groups: dict[str, Any], message: str) -> None:
    given: dict[str, Any] = {
        "model": TINY,
        "training": TrainingConfig(train_iters=1),
        "optimizer": OptimizerSettings(lr=1e-3),
        "tokenizer": TokenizerConfig(tokenizer_type="NullTokenizer", vocab_size=96),
    }
    sparse = PerLayerConfig(use_per_layer_embedding=True, per_layer_sparse=True)
    with pytest.raises(ValueError, match=re.escape(message)):
        PerLayerRunConfig(**{**given, **groups}, per_layer=sparse).resolved(1)
    # Without the flag, or with frozen tables, the same groups are no contradiction.
    PerLayerRunConfig(**given, per_layer=sparse).resolved(1)
    frozen = PerLayerConfig(
        use_per_layer_embedding=True, per_layer_sparse=True, freeze_per_layer_embedding=True
    )
    PerLayerRunConfig(**{**given, **groups}, per_layer=frozen).resolved(1)


def test_tables_on_disk_are_in_the_directory_of_checkpoints_unless_another_is_given() -> None:
    given: dict[str, Any] = {
        "model": TINY,
        "optimizer": OptimizerSettings(lr=1e-3),
        "tokenizer": TokenizerConfig(tokenizer_type="NullTokenizer", vocab_size=96),
    }
    disk = PerLayerConfig(use_per_layer_embedding=True, per_layer_sparse=True, per_layer_offload="disk")
    steps = TrainingConfig(train_iters=1)

    def directory(per_layer: PerLayerConfig, **groups: Any) -> str | None:
        run = PerLayerRunConfig(**{"training": steps, **given, **groups}, per_layer=per_layer)
        return run.resolved(1).per_layer.per_layer_offload_dir

    saved = {"checkpoint": CheckpointConfig(save="/runs/a")}
    assert directory(disk, **saved) == "/runs/a"
    assert directory(replace(disk, per_layer_offload_dir="/fast"), **saved) == "/fast"
    assert directory(replace(disk, per_layer_offload="cpu"), **saved) is None
    assert directory(disk, training=replace(steps, dry_run=True)) is None
    message = "--per-layer-offload disk: requires a directory; pass --per-layer-offload-dir or --save"
    with pytest.raises(ValueError, match=message):
        directory(disk)
    with pytest.raises(ValueError, match="--async-save: does not support --per-layer-offload disk"):
        directory(disk, checkpoint=CheckpointConfig(save="/runs/a", async_save=True))

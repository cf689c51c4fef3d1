"""The command line: flags, aliases, YAML, and one line for every mistake."""

import dataclasses
import json
import re
from pathlib import Path
from typing import Annotated

import pytest

from megatron_ext.config.command_line.field_checks import flag
from megatron_ext.config.command_line.flag_table import flags_of, groups_of
from megatron_ext.config.command_line.parse import known_flags, main_guard, parse, run_main
from megatron_ext.config.groups.model_config import ModelConfig
from megatron_ext.config.groups.optimizer_config import OptimizerSettings
from megatron_ext.config.run_config import RunConfig
from megatron_ext.config.serialize import (
    config_to_dict,
    format_groups,
    group_from_dict,
    group_in,
    group_to_dict,
)

SHAPE = "--num-layers 2 --hidden-size 64 --num-attention-heads 4 --seq-length 32"
REST = "--lr 1e-3 --train-iters 10 --tokenizer-type ByteLevelTokenizer"


def parsed(line: str) -> RunConfig:
    return parse(RunConfig, f"{SHAPE} {REST} {line}".split(), prog="test")


def refused(line: str | list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """Parses and returns the message; checks that it is one line and that the exit code is 2."""
    with pytest.raises(SystemExit) as caught:
        parse(RunConfig, line.split() if isinstance(line, str) else line, prog="test")
    assert caught.value.code == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.startswith("error: ")
    assert output.err.count("\n") == 1
    return output.err


def test_megatrons_own_spelling_of_a_command_line_parses() -> None:
    config = parsed(
        "--swiglu --bf16 --disable-bias-linear --untie-embeddings-and-output-weights --group-query-attention "
        "--num-query-groups 2 --tensor-model-parallel-size 2 --sequence-parallel --use-distributed-optimizer "
        "--data-path 0.3 a 0.7 b --split 949,50,1 --micro-batch-size 4 --global-batch-size 16 --no-load-optim "
        "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1 --save /tmp/x "
        "--save-interval 5 --lr-decay-style cosine --normalization LayerNorm --log-interval 10 --clip-grad 0.5"
    )
    assert config.model.swiglu
    assert config.model.disable_bias_linear
    assert config.model.num_query_groups == 2
    assert config.parallel.recompute_method == "uniform"
    assert config.training.bf16
    assert config.data.data_path == ("0.3", "a", "0.7", "b")
    assert config.checkpoint.no_load_optim
    assert config.optimizer.clip_grad == 0.5


def test_underscores_dashes_and_equals_signs_mean_the_same() -> None:
    assert parsed("--micro_batch_size 3") == parsed("--micro-batch-size=3") == parsed("--micro-batch_size=3")


@pytest.mark.parametrize(
    ("alias", "group", "field", "value"),
    [
        ("--batch_size 3", "training", "micro_batch_size", 3),
        ("--gradient_accumulation_steps 4", "training", "gradient_accumulation_steps", 4),
        ("--mixed_precision", "training", "bf16", True),
        ("--max_grad_norm 2", "optimizer", "clip_grad", 2.0),
        ("--save x --save_steps 500", "checkpoint", "save_interval", 500),
        ("--resume_from x", "checkpoint", "load", "x"),
    ],
)
def test_the_documents_names_set_the_same_fields(alias: str, group: str, field: str, value: object) -> None:
    assert getattr(getattr(parsed(alias), group), field) == value


def test_the_documents_names_serve_for_required_flags_too() -> None:
    line = "--num-layers 2 --hidden-size 64 --num-attention-heads 4 --max_length 32"
    config = parse(
        RunConfig, f"{line} --learning_rate 1e-3 --max_steps 10 --tokenizer-type ByteLevelTokenizer".split()
    )
    assert config.model.seq_length == 32
    assert config.optimizer.lr == 1e-3
    assert config.training.train_iters == 10


def test_a_yaml_file_is_flat_or_in_sections_and_explicit_flags_win(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(
        "model:\n  num_layers: 2\n  hidden-size: 64\n  swiglu: true\n  disable_bias_linear: true\n"
        "num_attention_heads: 4\nseq_length: 32\nlearning_rate: 1e-4\ntrain_iters: 10\nlog_throughput: false\n"
        "no_save_optim: false\nnum_query_groups: null\ndata_path: [0.3, a, 0.7, b]\nvalid_data_path: null\n"
        "tokenizer_type: ByteLevelTokenizer\n",
        encoding="utf-8",
    )
    config = parse(RunConfig, ["--config", str(path), "--no-swiglu", "--lr=0.5", "--max_steps", "7"])
    assert config.model.num_layers == 2
    assert config.model.hidden_size == 64
    assert not config.model.swiglu
    assert config.model.disable_bias_linear
    assert config.optimizer.lr == 0.5
    assert config.training.train_iters == 7
    assert not config.logging.log_throughput
    assert config.data.data_path == ("0.3", "a", "0.7", "b")
    assert parse(RunConfig, [f"--config={path}"]).model.swiglu


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("model: {num_layer: 3}", ["num_layer", "section model", "did you mean num_layers?"]),
        ("num_layres: 3", ["num_layres", "did you mean num_layers?"]),
        ("model: {lr: 3}", ["unknown key lr", "section model"]),
        ("num_layers: two", ["num_layers two", "must be a whole number (got text)"]),
        ("num_layers: 2.5", ["num_layers 2.5", "must be a whole number (got a number)"]),
        ("num_layers: true", ["num_layers True", "must be a whole number (got true or false)"]),
        (
            "hidden_size: sixty",
            ["hidden_size sixty", "must be a whole number"],
        ),  # the command line gives it too
        ("hidden_dropout: high", ["hidden_dropout high", "must be a number (got text)"]),
        ("normalization: rms", ["normalization rms", "must be one of RMSNorm, LayerNorm"]),
        ("recompute_modules: [mlp, [1]]", ["recompute_modules [1]", "must be text (got a list)"]),
        (
            "frobnicate: 1\nuse_mcore_models: true\nnum_layres: 2",
            [
                "unknown keys frobnicate, use_mcore_models (leave it out",
                "num_layres (did you mean num_layers?)",
            ],
        ),
        ("micro_batch_size: [1, 2]", ["micro_batch_size", "[1, 2]"]),
        ("swiglu: 3", ["swiglu 3"]),
        ("lr: 1\nlearning_rate: 2", ["learning_rate", "twice"]),
        ("- a", ["must be a mapping"]),
        (
            "a: [1",
            [
                ", line 1, column 6: not valid YAML: expected ',' or ']', but got '<stream end>'",
                "(while parsing a flow sequence that begins at line 1, column 4)",
            ],
        ),
        ("lr: 1\n seed: 2", [", line 2, column 6: not valid YAML: mapping values are not allowed here"]),
        ("lr: 1\n\tseed: 2", [", line 2, column 1: not valid YAML: found character '\\t' that cannot start"]),
        ("lr: 1\nseed: \x00", [", line 2, column 7: not valid YAML: special characters are not allowed"]),
    ],
)
def test_a_mistake_in_a_yaml_file_names_file_and_key(
    content: str, words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(content, encoding="utf-8")
    given = "--hidden-size 64 --num-attention-heads 4 --seq-length 32 --train-iters 1"
    message = refused(
        f"--config {path} {given} --tokenizer-type ByteLevelTokenizer" + " --lr 1" * ("lr" not in content),
        capsys,
    )
    for word in [str(path), *words]:
        assert word in message


def test_the_place_in_a_yaml_file_that_is_not_utf8_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "run.yaml"
    path.write_bytes("lr: 1\nsave: \u00fc".encode() + b"\xff")
    assert f"--config {path}, line 2, column 8: not valid YAML: must be in UTF-8" in refused(
        f"--config {path}", capsys
    )


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("--num-layer 2", ["unknown flag --num-layer ", "did you mean --num-layers?"]),
        ("--swiglu --frobnicate", ["unknown flag --frobnicate"]),
        (
            "--frobnicate --num-layer 2 --num-layers two --normalization rms",
            [
                "unknown flags --frobnicate, --num-layer (did you mean --num-layers?); --num-layers 'two': must be",
                "; --normalization 'rms': must be one of RMSNorm, LayerNorm",
            ],
        ),
        (
            "--num-layers 2",
            [
                "missing required flags --hidden-size, --num-attention-heads, --seq-length, --lr, --train-iters (or",
                "--vocab-file (for --tokenizer-type GPT2BPETokenizer), --merge-file",
                " (or --tokenizer-type NullTokenizer --vocab-size N, which needs no files)",
            ],
        ),
        (f"{SHAPE} --train-iters 1 --tokenizer-type ByteLevelTokenizer", ["missing required flag --lr\n"]),
        (
            f"{SHAPE} --lr 1 --train-iters 1 --tokenizer-type NullTokenizer",
            ["missing required flag --vocab-size (for --tokenizer-type NullTokenizer)\n"],
        ),
        (f"{SHAPE} {REST} --num-layers two", ["--num-layers", "'two'"]),
        (f"{SHAPE} {REST} --kv-channels", ["--kv-channels"]),
        (f"{SHAPE} {REST} --normalization rms", ["--normalization", "'rms'", "RMSNorm"]),
        (f"{SHAPE} {REST} stray", ["stray"]),
        (f"{SHAPE} {REST} --hidden-size 63", ["--num-attention-heads 4", "--hidden-size 63"]),
        ("--config nowhere.yaml", ["nowhere.yaml", "No such file"]),
        ("--config", ["--config: requires the path of a YAML file"]),
    ],
)
def test_a_mistake_on_the_command_line_is_one_line(
    line: str, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    message = refused(line, capsys)
    for word in words:
        assert word in message


def test_help_tells_where_a_required_flag_comes_from_if_it_is_not_given(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit):
        parse(
            RunConfig, ["--help"], prog="test", supplied={"num_layers": "that of --load", "lr": "the mode's"}
        )
    text = " ".join(re.sub("[│╭╮╰╯─]", " ", capsys.readouterr().out).split())
    assert "Number of transformer layers. (default: that of --load)" in text
    required = text[text.index(" required: ") : text.index(" model options: ")]
    assert "Width of the residual stream." in required and "Number of transformer layers." not in required
    assert "Largest number of positions. Default: the sequence length." in text


def test_a_long_value_stands_whole_in_the_message(capsys: pytest.CaptureFixture[str]) -> None:
    value = "x" * 150
    assert value in refused(f"{SHAPE} {REST} --num-layers {value}", capsys)


def test_help_tells_every_field_and_its_description(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parse(RunConfig, ["--help"], prog="test")
    assert caught.value.code == 0
    text = " ".join(re.sub("[│╭╮╰╯─]", " ", capsys.readouterr().out).split())
    for each in flags_of(RunConfig):
        assert each.name in text
    assert "Width of the residual stream." in text


def test_run_main_passes_an_exit_code_on() -> None:
    for returned, code in ((None, 0), (0, 0), (3, 3)):
        with pytest.raises(SystemExit) as caught:
            run_main(lambda value=returned: value)  # type: ignore[misc]
        assert caught.value.code == code


def test_main_guard_lets_other_errors_through() -> None:
    def main() -> None:
        raise KeyError("a defect")

    with pytest.raises(KeyError):
        main_guard(main)()


def test_a_family_adds_its_own_concern_and_two_concerns_cannot_claim_one_flag() -> None:
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class FamilyConfig:
        np_rank: Annotated[int, flag(aliases=("--rank",))] = 16
        lr: float = 1.0

    fields = [("optimizer", OptimizerSettings), ("family", FamilyConfig)]
    with pytest.raises(TypeError, match="--lr is declared by two config groups: optimizer and family"):
        known_flags(dataclasses.make_dataclass("Both", fields))
    assert known_flags(FamilyConfig) >= {"--np-rank", "--rank", "--lr"}
    assert parse(FamilyConfig, ["--rank", "4"]).np_rank == 4


def test_configs_survive_json_and_the_printed_yaml(tmp_path: Path) -> None:
    config = parsed(
        "--data-path 0.3 a 0.7 b --adam-eps 1e-9 --swiglu --no-save-rng --exit-duration-in-mins 1.5"
    )
    groups = {name: getattr(config, name) for name in groups_of(RunConfig)}
    values = json.loads(json.dumps(config_to_dict(config)))
    assert {name: group_in(type(group), values, name) for name, group in groups.items()} == groups
    path = tmp_path / "effective.yaml"
    path.write_text(format_groups(groups), encoding="utf-8")
    assert parse(RunConfig, ["--config", str(path)]) == config


def test_a_configuration_from_elsewhere_is_checked() -> None:
    values = group_to_dict(parsed("").model) | {"num_layerz": 3}
    with pytest.raises(
        ValueError, match="section model of the stored configuration has the unknown key num_layerz"
    ):
        group_from_dict(ModelConfig, values, "model")
    with pytest.raises(ValueError, match="no section optimizer"):
        group_in(OptimizerSettings, {"model": {}}, "optimizer")

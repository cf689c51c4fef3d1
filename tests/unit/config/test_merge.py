"""One merge of flags, YAML, what a program finds and defaults: who wins, and what `--show-config` says of it."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from megatron_ext.config.command_line.merge import Found
from megatron_ext.config.command_line.parse import parse
from megatron_ext.config.run_config import RunConfig
from megatron_ext.npt.objective.npt_run_config import NPTRunConfig, mode_defaults
from megatron_ext.per_layer.per_layer_config import PerLayerRunConfig
from megatron_ext.progressive.settings.progressive_run_config import ProgressiveRunConfig

SHAPE = "--num-layers 2 --hidden-size 64 --num-attention-heads 4 --seq-length 32 --tokenizer-type ByteLevelTokenizer"
GIVEN = f"{SHAPE} --lr 1 --train-iters 10"


def yaml_file(folder: Path, content: str) -> str:
    path = folder / "run.yaml"
    path.write_text(content, encoding="utf-8")
    return str(path)


def test_flag_wins_over_yaml_over_the_later_found_over_the_earlier_over_default(tmp_path: Path) -> None:
    path = yaml_file(tmp_path, "eval_iters: 2\nlog_interval: 2\n")

    def find(given: Mapping[str, Any]) -> list[Found]:
        assert given["eval_iters"] == 1 and given["log_interval"] == 2 and "seed" not in given
        mode = {"training": {"eval_iters": 3, "seed": 3, "eval_interval": 3}, "logging": {"log_interval": 3}}
        return [Found("mode", mode), Found("checkpoint", {"training": {"seed": 4, "eval_iters": 4}})]

    config = parse(RunConfig, [*GIVEN.split(), "--config", path, "--eval-iters", "1"], find=find)
    assert config.training.eval_iters == 1
    assert config.logging.log_interval == 2
    assert config.training.seed == 4
    # The later one's group does not replace the earlier one's: the fields are merged one by one.
    assert config.training.eval_interval == 3
    assert config.training.max_consecutive_nan_steps == 3
    names = ("eval_iters", "log_interval", "seed", "eval_interval")
    assert [config.sources[name].text for name in names] == ["flag", path, "checkpoint", "mode"]
    assert "max_consecutive_nan_steps" not in config.sources


def test_show_config_prints_every_field_with_value_and_source_and_exits_0(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = yaml_file(tmp_path, "npt: {mode: multi_layer}\nlr: 1e-4\n")
    with pytest.raises(SystemExit) as caught:
        parse(
            NPTRunConfig,
            [*SHAPE.split(), "--train-iters", "7", "--config", path, "--show-config"],
            find=lambda given: [mode_defaults(given)],
        )
    assert caught.value.code == 0
    rows = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.split("\n") if "  " in line)
    groups = [field.type for field in dataclasses.fields(NPTRunConfig) if field.name != "sources"]
    assert rows.keys() == {field.name for group in groups for field in dataclasses.fields(group)}  # type: ignore[arg-type]
    shown = {name: row.split(maxsplit=1) for name, row in rows.items()}
    assert shown["train_iters"] == ["7", "flag"]
    assert shown["lr"] == ["0.0001", path]
    assert shown["np_rank"] == ["256", "--mode multi_layer"]
    assert shown["np_scale"] == ["1.0", "default"]


def test_a_value_that_another_flag_sets_is_shown_as_such(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(
            PerLayerRunConfig,
            [*GIVEN.split(), "--use-per-layer-embedding", "--per-layer-preset", "gemma4", "--show-config"],
        )
    (row,) = (line for line in capsys.readouterr().out.split("\n") if "per_layer_gate_activation" in line)
    assert row.split(maxsplit=1)[1].split(maxsplit=1) == ["gelu_tanh", "follows from others"]


def test_a_given_default_that_another_flag_replaces_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    given = "--use-per-layer-embedding --per-layer-preset gemma4 --per-layer-position before_layer"
    with pytest.raises(SystemExit):
        parse(PerLayerRunConfig, [*GIVEN.split(), *given.split()])
    assert "--per-layer-position before_layer: the preset sets it to after_mlp" in capsys.readouterr().err


def test_yaml_keeps_the_type_of_every_value(tmp_path: Path) -> None:
    content = (
        "lr: 1e-4\nhidden_dropout: 0\nsplit: 100\nsave: '007'\ndata_path: [1, a]\nrecompute_modules: mlp\n"
    )
    path = yaml_file(tmp_path, content + "recompute_granularity: selective\nswiglu: true\n")
    config = parse(
        RunConfig, [*SHAPE.split(), "--train-iters", "1", "--disable-bias-linear", "--config", path]
    )
    assert (config.optimizer.lr, config.model.hidden_dropout) == (1e-4, 0.0)
    assert type(config.model.hidden_dropout) is float
    assert (config.data.split, config.checkpoint.save) == ("100", "007")
    assert config.data.data_path == ("1", "a")
    assert config.parallel.recompute_modules == ("mlp",)
    assert config.model.swiglu is True


def test_all_wrong_values_of_a_yaml_file_are_reported_at_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = yaml_file(
        tmp_path, "num_layers: two\nmodel: {swiglu: 1, hidden_siz: 3}\nseed: [1]\nlr: 1\nlr: 2\n"
    )
    with pytest.raises(SystemExit) as caught:
        parse(RunConfig, ["--config", path])
    assert caught.value.code == 2
    assert capsys.readouterr().err == (
        f"error: {path}: unknown key hidden_siz in section model (did you mean hidden_size?); "
        "num_layers two: must be a whole number (got text); swiglu 1: must be true or false; "
        "seed [1]: must be a single value (got a list)\n"
    )


def test_an_error_about_a_value_names_the_yaml_file_that_gives_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = yaml_file(tmp_path, "lr_warmup_iters: 10\nmicro_batch_size: 0\n")
    with pytest.raises(SystemExit):
        parse(RunConfig, [*GIVEN.split(), "--config", path])
    assert capsys.readouterr().err == (
        f"error: --micro-batch-size 0: must be at least 1 (micro_batch_size in {path})\n"
    )
    config = parse(RunConfig, [*GIVEN.split(), "--config", path, "--micro-batch-size", "1"])
    with pytest.raises(ValueError, match=r"^--lr-warmup-iters 10: must be less") as caught:
        config.resolved(1)
    assert str(caught.value).endswith(f"(lr_warmup_iters in {path})")


def test_what_a_program_finds_is_checked_against_the_fields_type(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(RunConfig, GIVEN.split(), find=lambda _: [Found("checkpoint x", {"model": {"swiglu": 3}})])
    assert capsys.readouterr().err == "error: checkpoint x: swiglu 3: must be true or false\n"


@pytest.mark.parametrize("config_type", [RunConfig, PerLayerRunConfig, NPTRunConfig, ProgressiveRunConfig])
def test_nothing_writes_to_a_configuration_or_its_groups(config_type: type[Any]) -> None:
    config = parse(config_type, GIVEN.split())
    for field in dataclasses.fields(config_type):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(config, field.name, None)
        if field.name != "sources":
            group = getattr(config, field.name)
            with pytest.raises(dataclasses.FrozenInstanceError):
                setattr(group, dataclasses.fields(group)[0].name, None)


def test_a_length_in_epochs_is_resolved_into_steps_and_the_first_configuration_stays() -> None:
    config = parse(RunConfig, f"{SHAPE} --lr 1 --num-epochs 2.5 --global-batch-size 4".split())
    resolved = config.resolved(2, epoch_samples=16)
    assert (resolved.training.train_iters, resolved.training.num_epochs) == (10, None)
    assert (config.training.train_iters, config.training.num_epochs) == (None, 2.5)
    assert resolved.sources == config.sources


def test_sources_are_no_part_of_what_is_compared_or_written() -> None:
    from megatron_ext.config.serialize import config_to_dict

    given, default = parse(RunConfig, [*GIVEN.split(), "--seed", "1234"]), parse(RunConfig, GIVEN.split())
    assert given == default
    assert given.sources != default.sources
    assert "sources" not in config_to_dict(given)
    json.dumps(config_to_dict(given))

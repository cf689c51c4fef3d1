"""Megatron-LM's flags: each is in exactly one class, and a command line with them does what its class says.

`megatron_lm_flags.tsv` holds the facts: every flag of Megatron-LM's own parser with its values and its default.
"""

import dataclasses
import re
from pathlib import Path

import pytest

from megatron_ext.config.command_line.flag_table import Flag, flags_of
from megatron_ext.config.command_line.parse import known_flags, parse
from megatron_ext.config.groups.preprocess_config import PreprocessConfig
from megatron_ext.config.megatron_lm.ignored_flags import IGNORED
from megatron_ext.config.megatron_lm.megatron_defaults import KEPT, TAKEN
from megatron_ext.config.megatron_lm.megatron_flags import RENAMED, instead_of
from megatron_ext.config.megatron_lm.refused_flags import REFUSED, REFUSED_BEGINNINGS
from megatron_ext.config.run_config import RunConfig
from megatron_ext.npt.objective.npt_run_config import NPTRunConfig
from megatron_ext.per_layer.per_layer_config import PerLayerRunConfig
from megatron_ext.progressive.settings.progressive_run_config import ProgressiveRunConfig

ROOT = Path(__file__).parents[3]
GIVEN = (
    "--num-layers 2 --hidden-size 64 --num-attention-heads 4 --seq-length 32 --lr 1e-3 --train-iters 10 "
    "--tokenizer-type ByteLevelTokenizer"
)
KNOWN = known_flags(RunConfig)

OLDER = {
    "--DDP-impl",
    "--activations-checkpoint-granularity",
    "--activations-checkpoint-method",
    "--activations-checkpoint-num-layers",
    "--async-tensor-model-parallel-allreduce",
    "--check-for-nan-in-loss-and-grad",
    "--checkpoint-num-layers",
    "--data-impl",
    "--dataset-impl",
    "--delay-grad-reduce",
    "--delay-param-gather",
    "--force-system-message",
    "--image-tag-type",
    "--layernorm-epsilon",
    "--log-batch-size-to-tensorboard",
    "--log-learning-rate-to-tensorboard",
    "--log-loss-scale-to-tensorboard",
    "--metadata-path",
    "--no-query-key-layer-scaling",
    "--tensorboard-log-dir",
    "--tensorboard-log-learning-rate",
    "--tokenizer-name-or-path",
    "--tokenizer-prompt-format",
    "--use-distributed-checkpoint",
}
"""Flags of versions before 0.16 that scripts still have, and of Megatron-LM's data tool."""

TORCHRUN = {"--master-addr", "--master-port", "--nnodes", "--node-rank", "--nproc-per-node"}


@dataclasses.dataclass(frozen=True)
class Fact:
    """A flag of Megatron-LM."""

    flag: str
    values: str
    """Number of values, as argparse counts them: 0, 1, another number, + or *."""

    default: str
    choices: tuple[str, ...]


def facts() -> list[Fact]:
    lines = Path(__file__).with_name("megatron_lm_flags.tsv").read_text(encoding="utf-8").splitlines()
    cells = [line.split("\t") for line in lines if not line.startswith("#")]
    return [Fact(row[0], row[1], row[2], tuple(filter(None, row[3].split(",")))) for row in cells]


FACTS = {fact.flag: fact for fact in facts()}


def classes_of(name: str) -> list[str]:
    """The classes that a flag is in; a value that only Megatron-LM has may also be listed for a flag of ours."""
    begins = name not in IGNORED and any(name.startswith(start) for start in REFUSED_BEGINNINGS)
    found = {
        "the same": name in KNOWN,
        "renamed": name in RENAMED,
        "without effect": name in IGNORED and name not in KNOWN,
        "refused": name in REFUSED or begins,
    }
    return [kind for kind, holds in found.items() if holds]


def values_of(name: str) -> list[str]:
    """Values with which a flag changes nothing."""
    if IGNORED[name].takes == "nothing":
        return []
    return [*IGNORED[name].harmless[:1]] or ["1"]


def parsed(line: str) -> RunConfig:
    return parse(RunConfig, f"{GIVEN} {line}".split(), prog="test")


def error_of(line: str, capsys: pytest.CaptureFixture[str], config_type: type = RunConfig) -> str:
    """Parses a command line that must be refused; returns the one line that is printed."""
    with pytest.raises(SystemExit) as caught:
        parse(config_type, line.split(), prog="test")
    output = capsys.readouterr()
    assert (caught.value.code, output.out, output.err.count("\n")) == (2, "", 1)
    return output.err


def test_every_flag_of_megatron_is_in_exactly_one_class() -> None:
    assert len(FACTS) > 900
    assert KNOWN & {*IGNORED} == {"--attention-backend"}  # some values of Megatron-LM's have no effect here
    assert {name: classes_of(name) for name in FACTS if len(classes_of(name)) != 1} == {}


def test_every_flag_of_the_tables_is_one_of_megatrons() -> None:
    assert {*IGNORED, *REFUSED, *RENAMED} - {*FACTS} == OLDER | TORCHRUN
    assert not OLDER & {*FACTS}
    for start in REFUSED_BEGINNINGS:
        assert any(name.startswith(start) for name in FACTS), start


@pytest.mark.parametrize("script", [PerLayerRunConfig, NPTRunConfig, ProgressiveRunConfig])
def test_no_model_family_gives_another_meaning_to_a_flag_of_megatron(script: type) -> None:
    own = known_flags(script) - KNOWN
    assert own
    assert not own & {*FACTS, *IGNORED, *REFUSED, *RENAMED}
    assert not [name for name in own if instead_of(name)]


def test_a_flag_without_effect_takes_the_values_that_megatron_gives_it() -> None:
    for name in IGNORED.keys() & FACTS.keys():
        expected = {"0": "nothing", "1": "one value"}.get(FACTS[name].values, "values")
        assert IGNORED[name].takes == expected, name
        if FACTS[name].choices:
            assert {*IGNORED[name].harmless} <= {*FACTS[name].choices}, name


def test_what_the_tables_tell_the_user_to_use_exists() -> None:
    reasons = [*REFUSED.values(), *REFUSED_BEGINNINGS.values(), *(each.reason for each in IGNORED.values())]
    for words in reasons:
        for flag in re.findall(r"(?<!\w)--[\w-]+", words):
            assert flag in KNOWN, words
        for path in re.findall(r"(?:tools|docs)/\w+\.\w+|pretrain_\w+\.py", words):
            assert (ROOT / path).is_file(), words


def test_all_flags_without_effect_change_nothing_and_are_named_in_one_line(
    capsys: pytest.CaptureFixture[str],
) -> None:
    given = [" ".join([name, *values_of(name)]) for name in IGNORED]
    assert parsed(" ".join(given)) == parsed("")
    line = capsys.readouterr().err
    assert line == (
        f"flags of Megatron-LM without effect here: {', '.join(given)} (docs/megatron_lm_flags.md says why)\n"
    )


def test_only_the_first_process_names_the_flags_without_effect(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    parsed("--use_mcore_models")
    assert capsys.readouterr().err == ""


def test_all_refused_flags_are_refused_in_one_error_with_what_to_do(
    capsys: pytest.CaptureFixture[str],
) -> None:
    refused = [name for name in FACTS if classes_of(name) == ["refused"]]
    message = error_of(f"{GIVEN} {' 1 '.join(refused)}", capsys)
    for name in refused:
        assert re.search(rf"{name}( 1)? \((leave it out|use |give |set |not supported|this )", message), name


def test_a_value_that_would_change_the_run_is_refused_with_those_that_do_not(
    capsys: pytest.CaptureFixture[str],
) -> None:
    others = {
        name: next((choice for choice in fact.choices if choice not in IGNORED[name].harmless), "7")
        for name, fact in FACTS.items()
        if name in IGNORED and IGNORED[name].harmless and name not in KNOWN
    }
    assert others["--ckpt-format"] == "torch"
    message = error_of(f"{GIVEN} {' '.join(f'{name} {value}' for name, value in others.items())}", capsys)
    for name, value in others.items():
        assert f"{name} {value} (only {' or '.join(IGNORED[name].harmless)} is supported" in message


def test_everything_wrong_with_a_command_line_is_one_error(capsys: pytest.CaptureFixture[str]) -> None:
    wrong = "--num-experts 8 --ckpt-format torch --frobnicate --num-layer 3 --num-layers two --swiglu on"
    assert error_of(f"{GIVEN} {wrong}", capsys) == (
        "error: cannot be used here: --num-experts 8 (not supported: there is no mixture of experts), "
        "--ckpt-format torch (only torch_dist is supported: convert checkpoints with Megatron-LM's "
        "--ckpt-convert-format torch_dist); "
        "unknown flags --frobnicate, --num-layer (did you mean --num-layers?); "
        "--num-layers 'two': must be a whole number; unexpected argument on (--swiglu takes no value)\n"
    )


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("--use-mcore-models yes", "unexpected argument yes (--use-mcore-models takes no value)"),
        ("--ckpt-format", "--ckpt-format: requires a value"),
        ("--ckpt-format torch_dist zarr", "unexpected argument zarr (--ckpt-format takes one value)"),
    ],
)
def test_a_flag_without_effect_with_too_few_or_too_many_values_is_an_error(
    wrong: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert error_of(f"{GIVEN} {wrong}", capsys) == f"error: {message}\n"


def test_renamed_flags_set_what_they_mean() -> None:
    config = parsed(
        "--position-embedding-type none --use-rotary-position-embeddings --encoder_num_layers 3 "
        "--encoder-seq-length=64 --log-memory-to-tensorboard --no-log-validation-ppl "
        "--log-validation-ppl-to-tensorboard"
    )
    assert config.model.position_embedding_type == "rope"
    assert (config.model.num_layers, config.model.seq_length) == (3, 64)
    assert config.logging.log_memory and config.logging.log_validation_ppl


@pytest.mark.parametrize("theirs", ["auto", "flash", "fused", "unfused"])
def test_a_backend_of_attention_that_only_megatron_has_is_without_effect(
    theirs: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert parsed(f"--attention-backend {theirs}").model.attention_backend == "sdpa"
    assert f"--attention-backend {theirs}" in capsys.readouterr().err
    assert parsed("--attention-backend local").model.attention_backend == "local"
    assert capsys.readouterr().err == ""


def test_a_tool_refuses_the_flags_of_a_training_run_and_says_what_to_do(
    capsys: pytest.CaptureFixture[str],
) -> None:
    message = error_of(
        "--input a --use-mcore-models --num-experts 8 --defaults megatron", capsys, PreprocessConfig
    )
    assert "--use-mcore-models (leave it out: the models are megatron-core's)" in message
    assert "--num-experts (not supported: there is no mixture of experts)" in message
    assert "--defaults" in message


def test_a_flag_without_effect_in_a_yaml_file_is_an_error_that_says_to_leave_it_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("use_mcore_models: true\n")
    assert "use_mcore_models (leave it out: the models" in error_of(f"{GIVEN} --config {path}", capsys)
    assert instead_of("--encoder-num-layers") == "use --num-layers"


# Defaults


def differs(fact: Fact, flag: Flag) -> bool:
    """Whether a run without the flag has another value at Megatron-LM than here."""
    if flag.is_switch:
        return (fact.flag in flag.negations) != bool(flag.default)
    if fact.default == "None":
        return flag.default is not None
    try:
        return float(fact.default) != flag.default
    except ValueError:
        return fact.default != flag.default


def test_every_default_that_differs_from_megatrons_is_taken_or_kept_for_a_reason() -> None:
    flag_of = {name: flag for flag in flags_of(RunConfig) for name in flag.names + flag.negations}
    different = {
        flag_of[name].field: fact
        for name, fact in FACTS.items()
        if name in flag_of and differs(fact, flag_of[name])
    }
    taken = {field: value for values in TAKEN.values() for field, value in values.items()}
    renamed = {"log_validation_ppl"}  # its flag at Megatron-LM is --log-validation-ppl-to-tensorboard
    assert {*different} | renamed == {*taken, *KEPT}
    assert not {*taken} & {*KEPT}
    for field, fact in different.items():
        assert str(taken.get(field, fact.default)) == fact.default
        if field in KEPT:
            assert KEPT[field][0] == fact.default


def test_defaults_of_megatron_are_taken_below_every_other_source(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("normalization: RMSNorm\n")
    config = parsed("--defaults megatron")
    assert (config.model.normalization, config.model.position_embedding_type) == (
        "LayerNorm",
        "learned_absolute",
    )
    assert not config.logging.log_throughput and not config.logging.log_validation_ppl
    assert not config.training.calculate_per_token_loss
    assert parsed(f"--defaults=megatron --config {path}").model.normalization == "RMSNorm"
    assert (
        parsed("--defaults megatron --position-embedding-type none").model.position_embedding_type == "none"
    )
    with pytest.raises(SystemExit):
        parsed("--defaults megatron --show-config")
    shown = capsys.readouterr().out
    assert re.search(r"normalization +LayerNorm +Megatron-LM \(--defaults megatron\)\n", shown)


def test_key_value_heads_follow_megatrons_rules_with_its_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    assert parsed("--defaults megatron").model.num_query_groups is None
    assert parsed("--defaults megatron --group-query-attention").model.num_query_groups == 1
    both = "--defaults megatron --group-query-attention --num-query-groups 2"
    assert parsed(both).model.num_query_groups == 2
    message = error_of(f"{GIVEN} --defaults megatron --num-query-groups 2", capsys)
    assert "--num-query-groups 2: Megatron-LM ignores it without --group-query-attention" in message


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("--defaults", "--defaults: requires a value, which must be megatron"),
        ("--defaults nemo", "--defaults nemo: must be megatron"),
    ],
)
def test_other_defaults_are_refused(given: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert error_of(f"{GIVEN} {given}", capsys) == f"error: {message}\n"


@pytest.mark.parametrize(("config_type", "offers"), [(RunConfig, True), (PreprocessConfig, False)])
def test_only_the_help_of_a_training_run_offers_megatrons_defaults(
    config_type: type, offers: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        parse(config_type, ["--help"], prog="test")
    assert ("--defaults {megatron}" in capsys.readouterr().out) == offers

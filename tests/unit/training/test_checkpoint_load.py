"""What a load does with a checkpoint that is another model's, lacks something, or is wanted in part only."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_ext.config.groups.checkpoint_config import CheckpointConfig
from megatron_ext.config.groups.model_config import ModelConfig
from megatron_ext.config.groups.parallel_config import ParallelConfig
from megatron_ext.config.serialize import group_in
from megatron_ext.testing.checkpoint_runs import SCHEDULE, RunSettings, TinyRun
from megatron_ext.testing.run_single import run_single
from megatron_ext.testing.tiny_training import TINY
from megatron_ext.training.checkpoint.checkpointer import read_run_config
from megatron_ext.training.checkpoint.same_run_checks import check_same_model
from megatron_ext.training.interface.family_interface import Family

_ALONE = RunSettings(parallel=ParallelConfig(), checkpoint=CheckpointConfig())


def _tiny_run(settings: RunSettings = _ALONE, **checkpoint: Any) -> TinyRun:
    return TinyRun(replace(settings, checkpoint=CheckpointConfig(**checkpoint)))


def save_two_steps(folder: str, settings: RunSettings = _ALONE, no_save_optim: bool = False) -> None:
    run = _tiny_run(settings, save=folder, no_save_optim=no_save_optim, no_save_rng=no_save_optim)
    run.train(2)
    torch.rand(3)  # the random state to save is not the one that a run starts with
    run.save()


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = str(tmp_path_factory.mktemp("saved"))
    run_single(save_two_steps, folder)
    return folder


def _loading_errors(folder: str, runs: list[tuple[RunSettings, dict[str, Any]]]) -> list[str]:
    errors = []
    for settings, checkpoint in runs:
        with pytest.raises((ValueError, OSError)) as caught:
            _tiny_run(settings, load=folder, **checkpoint)
        errors.append(str(caught.value))
    return errors


def _with_model(**changes: Any) -> RunSettings:
    return replace(_ALONE, model=replace(TINY, **changes))


_OTHER_MODELS = {
    "--num-layers 2: .* with 4": _with_model(num_layers=2),
    "--hidden-size 64: .* with 32": _with_model(hidden_size=64),
    "--num-attention-heads 8: .* with 4": _with_model(num_attention_heads=8),
    "--num-query-groups 4: .* with 2": _with_model(num_query_groups=None),
    "--ffn-hidden-size 64: .* with 48": _with_model(ffn_hidden_size=64),
    "--swiglu False: .* with True": _with_model(swiglu=False),
    "--normalization LayerNorm: .* with RMSNorm": _with_model(normalization="LayerNorm"),
    "--position-embedding-type none: .* with rope": _with_model(position_embedding_type="none"),
    "--rotary-base 500000: .* with 10000": _with_model(rotary_base=500000),
    "--untie-embeddings-and-output-weights True: .* with False": _with_model(
        untie_embeddings_and_output_weights=True
    ),
    "--tokenizer-type: .* with another tokenizer": replace(_ALONE, tokenizer="letters"),
    "the vocabulary has 128 rows, but this run's tokenizer needs 256": replace(_ALONE, vocab_size=130),
}


def test_a_checkpoint_of_another_model_is_refused_with_the_flag_and_both_values(saved: str) -> None:
    runs: list[tuple[RunSettings, dict[str, Any]]] = [(settings, {}) for settings in _OTHER_MODELS.values()]
    for pattern, error in zip(_OTHER_MODELS, run_single(_loading_errors, saved, runs), strict=True):
        assert re.search(pattern, error), error
        assert f"{saved}/iter_0000002" in error and "\n" not in error


def _losses_and_start(folder: str, settings: RunSettings, checkpoint: dict[str, Any]) -> dict[str, Any]:
    run = _tiny_run(settings, load=folder, **checkpoint)
    inner = run.optimizer.optimizer
    return {
        "iteration": run.progress.iteration,
        "moments": float(sum(state["exp_avg"].abs().sum() for state in inner.state.values())),
        "steps": run.scheduler.num_steps,
        "lr": inner.param_groups[0]["lr"],
        "rng": torch.get_rng_state(),
        "weights": float(
            sum(p.detach().double().abs().sum() for chunk in run.chunks for p in chunk.parameters())
        ),
        "notes": run.messages,
        "loss": run.train(1)[0],
    }


def _embedding_and_moment(folder: str, settings: RunSettings) -> list[torch.Tensor]:
    run = _tiny_run(settings, load=folder)
    weight = run.chunks[0].embedding.word_embeddings.weight
    return [weight.detach(), run.optimizer.optimizer.state[weight]["exp_avg"]]


def test_a_changed_padding_of_the_same_vocabulary_still_loads(saved: str) -> None:
    wider = _with_model(make_vocab_size_divisible_by=160)
    expected = run_single(_embedding_and_moment, saved, _ALONE)
    found = run_single(_embedding_and_moment, saved, wider)
    for narrow, wide in zip(expected, found, strict=True):
        assert (len(narrow), len(wide)) == (128, 160)
        assert torch.equal(narrow, wide[:128]) and not wide[128:].any()


def test_finetune_takes_the_model_alone(saved: str) -> None:
    straight = run_single(_losses_and_start, saved, _ALONE, {})
    tuned = run_single(_losses_and_start, saved, _ALONE, {"finetune": True})
    assert straight["weights"] == tuned["weights"]
    assert (straight["iteration"], tuned["iteration"]) == (2, 0)
    assert straight["moments"] > 0 and tuned["moments"] == 0
    assert (straight["steps"], tuned["steps"]) == (8, 0)


def test_optimizer_and_random_numbers_can_be_left_out_of_a_load(saved: str) -> None:
    straight = run_single(_losses_and_start, saved, _ALONE, {})
    partial = {"no_load_optim": True, "no_load_rng": True}
    found = run_single(_losses_and_start, saved, _ALONE, partial)
    assert (found["iteration"], found["steps"], found["weights"]) == (2, 8, straight["weights"])
    assert found["moments"] == 0
    assert not torch.equal(found["rng"], straight["rng"])


def test_a_checkpoint_without_optimizer_says_how_to_load_it(tmp_path: Path) -> None:
    folder = str(tmp_path)
    run_single(save_two_steps, folder, _ALONE, True)
    error = run_single(_loading_errors, folder, [(_ALONE, {})])[0]
    assert error == f"{folder}/iter_0000002: holds no optimizer state; add --no-load-optim or --finetune"
    found = run_single(_losses_and_start, folder, _ALONE, {"no_load_optim": True})
    assert found["iteration"] == 2
    assert any("the checkpoint does not contain their state" in note for note in found["notes"])


def test_a_missing_step_is_an_error_and_an_empty_directory_of_the_run_a_start(
    saved: str, tmp_path: Path
) -> None:
    error = run_single(_loading_errors, saved, [(_ALONE, {"ckpt_step": 3})])[0]
    assert error == f"--ckpt-step 3: {saved} contains no complete checkpoint of this step (available: 2)"
    found = run_single(_losses_and_start, str(tmp_path), _ALONE, {"save": str(tmp_path)})
    assert found["iteration"] == 0
    assert found["notes"] == [f"--load {tmp_path}: no checkpoint found; the run starts from scratch"]


def _with_schedule(**changes: Any) -> RunSettings:
    return replace(_ALONE, optimizer=replace(SCHEDULE, **changes))


def test_another_schedule_needs_a_word_which_one_counts(saved: str) -> None:
    changed = _with_schedule(lr=5e-3)
    error = run_single(_loading_errors, saved, [(changed, {})])[0]
    assert error.startswith("--lr 0.005: the schedule in ") and "was made with 0.01; to continue" in error
    assert "--override-opt-param-scheduler" in error
    ours = _with_schedule(lr=5e-3, override_opt_param_scheduler=True)
    theirs = _with_schedule(lr=5e-3, use_checkpoint_opt_param_scheduler=True)
    # The warm-up of two steps is over, so the rate is the schedule's maximum.
    assert run_single(_losses_and_start, saved, ours, {})["lr"] == pytest.approx(5e-3)
    assert run_single(_losses_and_start, saved, theirs, {})["lr"] == pytest.approx(1e-2)


def test_fp32_and_bf16_runs_load_one_anothers_checkpoints(saved: str, tmp_path: Path) -> None:
    low = replace(_ALONE, precision="bf16")
    low_distributed = replace(low, parallel=ParallelConfig(use_distributed_optimizer=True))
    run_single(save_two_steps, str(tmp_path), low, False)
    straight = run_single(_losses_and_start, saved, _ALONE, {})
    for folder, settings in ((saved, low), (saved, low_distributed), (str(tmp_path), _ALONE)):
        found = run_single(_losses_and_start, folder, settings, {})
        assert found["loss"] == pytest.approx(straight["loss"], rel=1e-2)
        assert found["iteration"] == 2


def test_the_configuration_is_read_without_a_process_group(saved: str) -> None:
    stored = read_run_config(saved)
    assert group_in(ModelConfig, stored, "model") == TINY
    assert stored["vocab_size"] == 96 and stored["families"] == {}
    with pytest.raises(FileNotFoundError, match="missing: no checkpoint found"):
        read_run_config(f"{saved}/missing")
    series = Path(saved).parent
    with pytest.raises(ValueError, match="no checkpoint found, but there are some in .*"):
        read_run_config(str(series))


class _Extra(Family):
    name = "extra"
    free_on_resume = frozenset({"extra_dropout"})


def test_families_are_compared_but_for_what_they_leave_free() -> None:
    model = {"num_layers": 1, "hidden_size": 8, "num_attention_heads": 2, "seq_length": 4}
    folder = Path("checkpoints")

    def check(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
        common = {"model": model, "tokenizer_fingerprint": ""}
        families: list[Family] = [_Extra()] if "extra" in ours else []
        run, stored = ({**common, "families": part} for part in (ours, theirs))
        check_same_model(run, stored, families, folder, finetune=False)

    check(
        {"extra": {"extra_size": 4, "extra_dropout": 0.1}}, {"extra": {"extra_size": 4, "extra_dropout": 0}}
    )
    with pytest.raises(ValueError, match="--extra-size 4: the checkpoint checkpoints was made with 8"):
        check({"extra": {"settings": {"extra_size": 4}}}, {"extra": {"settings": {"extra_size": 8}}})
    with pytest.raises(ValueError, match="--table: the checkpoint checkpoints was made with another value"):
        check({"extra": {"table": [1, 2]}}, {"extra": {"table": [2, 1]}})
    with pytest.raises(
        ValueError, match="the checkpoint uses the model family extra, which this run does not use"
    ):
        check({}, {"extra": {}})
    with pytest.raises(
        ValueError, match="the checkpoint does not use the model family extra, which this run uses"
    ):
        check({"extra": {}}, {})

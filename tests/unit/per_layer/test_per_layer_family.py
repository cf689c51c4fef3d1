"""PLE's part in a run: ids, freezing, optimizer groups, cost, statistics, and the way through a checkpoint's JSON."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_ext.config.groups.model_config import ModelConfig
from megatron_ext.config.groups.optimizer_config import OptimizerSettings
from megatron_ext.config.groups.parallel_config import ParallelConfig
from megatron_ext.models.build_model import build_model
from megatron_ext.models.costs.model_cost import model_cost
from megatron_ext.models.gpt_model import GPTModel
from megatron_ext.per_layer.per_layer_config import PerLayerConfig
from megatron_ext.per_layer.per_layer_family import PerLayerFamily
from megatron_ext.platform.process_groups import initialize
from megatron_ext.testing.references import reference_rms_norm
from megatron_ext.testing.run_single import run_single
from megatron_ext.training.engine.data_parallel import wrap_model
from megatron_ext.training.engine.optimizer import build_optimizer
from megatron_ext.training.interface.family_interface import PRECEDING_TOKENS, make_batch

VOCAB, ROWS, WIDTH = 64, 20, 8
MODEL = ModelConfig(
    num_layers=3,
    hidden_size=32,
    num_attention_heads=4,
    seq_length=8,
    hidden_dropout=0.0,
    attention_dropout=0.0,
    init_method_std=0.1,
)
TABLE = [token * 7 % ROWS for token in range(VOCAB)]


def _settings(**values: Any) -> PerLayerConfig:
    defaults = {
        "use_per_layer_embedding": True,
        "per_layer_vocab_size": ROWS,
        "per_layer_hidden_size": WIDTH,
    }
    return PerLayerConfig(**{**defaults, **values})


def _build(family: PerLayerFamily) -> Any:
    initialize(ParallelConfig(), seed=7)
    chunks = build_model(MODEL, ParallelConfig(), vocab_size=VOCAB, seed=7, extensions=[family.extension()])
    family.prepare_model(chunks)
    return chunks[0]


def test_ids_come_from_the_batch_else_from_the_table_else_they_are_the_tokens() -> None:
    tokens = torch.tensor([[3, 5, 63]])
    family = PerLayerFamily(_settings(), VOCAB, TABLE)
    torch.testing.assert_close(
        family.auxiliary_inputs({"tokens": tokens})["per_layer_ids"], torch.tensor([[1, 15, 1]])
    )
    ready = torch.tensor([[9, 9, 9]])
    assert family.auxiliary_inputs({"tokens": tokens, "per_layer_ids": ready})["per_layer_ids"] is ready
    gemma = PerLayerFamily(_settings(per_layer_preset="gemma4", per_layer_vocab_size=VOCAB), VOCAB)
    assert gemma.auxiliary_inputs({"tokens": tokens})["per_layer_ids"] is tokens
    with pytest.raises(ValueError, match="the batch has no per_layer_ids"):
        PerLayerFamily(_settings(), VOCAB).auxiliary_inputs({"tokens": tokens})


def _of_ngrams(**values: Any) -> PerLayerFamily:
    return PerLayerFamily(_settings(per_layer_strategy="trigram_hash", **values), VOCAB, eod=9)


def test_rows_of_ngrams_are_the_same_from_whole_sequences_and_piece_by_piece() -> None:
    family = _of_ngrams()
    tokens = torch.randint(0, VOCAB, (3, 12), generator=torch.Generator().manual_seed(1))
    tokens[1, 4], tokens[2, 0] = 9, 9
    batch = make_batch([family], {"tokens": tokens})
    rows = family.auxiliary_inputs(batch)["per_layer_ids"]
    assert rows.shape == (3, 12, 4)
    for start, end in ((0, 1), (1, 3), (2, 12), (5, 6), (11, 12)):
        part = {"tokens": tokens[:, start:end], PRECEDING_TOKENS: tokens[:, :start]}
        assert torch.equal(family.auxiliary_inputs(part)["per_layer_ids"], rows[:, start:end])
    # Context-parallel ranks take parts of the field, whose n-grams reach beyond the part.
    part = {name: value[:, 6:9] for name, value in batch.items()}
    assert torch.equal(family.auxiliary_inputs(part)["per_layer_ids"], rows[:, 6:9])
    ready = {"tokens": tokens, "per_layer_ids": batch["per_layer_ids"] + 1}
    assert make_batch([family], ready)["per_layer_ids"] is ready["per_layer_ids"]


def test_hashed_ngrams_come_back_from_a_checkpoints_json_and_stay_fixed_when_resuming() -> None:
    family = _of_ngrams(per_layer_hashes=3)
    again = PerLayerFamily.from_configuration(json.loads(json.dumps(family.configuration())))
    assert (again.settings, again.eod, again.rows) == (family.settings, 9, ROWS)
    tokens = {"tokens": torch.arange(20).unsqueeze(0)}
    expected = family.auxiliary_inputs(tokens)["per_layer_ids"]
    assert expected.shape == (1, 20, 6)
    assert torch.equal(again.auxiliary_inputs(tokens)["per_layer_ids"], expected)
    fixed = {"per_layer_hashes", "per_layer_vocab_size", "per_layer_strategy"}
    assert not fixed & family.free_on_resume
    # Checkpoints from before the field lack it.
    assert "per_layer_hashes" in PerLayerFamily(_settings(), VOCAB, TABLE).free_on_resume


def test_a_table_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match=f"is for 3 token ids, but the tokenizer has {VOCAB}"):
        PerLayerFamily(_settings(), VOCAB, [0, 1, 2])
    message = (
        "--per-layer-vocab-size 20: too small for per-layer ids up to 20; pass at least 21, or omit the flag"
    )
    with pytest.raises(ValueError, match=message):
        PerLayerFamily(_settings(), VOCAB, [20] * VOCAB)


def test_the_family_comes_back_from_a_checkpoints_json() -> None:
    settings = _settings(per_layer_data_path=("a", "b"), per_layer_combination_method="gated")
    family = PerLayerFamily(settings, VOCAB, TABLE)
    again = PerLayerFamily.from_configuration(json.loads(json.dumps(family.configuration())))
    assert (again.settings, again.vocab_size, again.rows) == (settings, VOCAB, ROWS)
    assert again.table is not None and again.table.tolist() == TABLE


def test_statistics_are_due_only_where_a_flag_asks_for_them() -> None:
    assert PerLayerFamily(_settings(), VOCAB, TABLE).statistics_interval is None
    asked = _settings(log_per_layer_gradients=True, per_layer_stats_interval=5)
    assert PerLayerFamily(asked, VOCAB, TABLE).statistics_interval == 5


def _counts() -> list[tuple[int, int]]:
    found = []
    for method in ("scaled_add", "concat", "gated"):
        family = PerLayerFamily(_settings(per_layer_combination_method=method), VOCAB, TABLE)
        model = _build(family)
        expected = model_cost(MODEL, VOCAB).parameters + family.cost(MODEL).parameters
        found.append((sum(parameter.numel() for parameter in model.parameters()), expected))
    return found


def test_the_parameter_formula_counts_the_built_model() -> None:
    for built, formula in run_single(_counts):
        assert built == formula


def test_flops_are_six_h_p_a_layer_and_four_p_p_more_for_a_combination_matrix() -> None:
    plain = PerLayerFamily(_settings(), VOCAB, TABLE).cost(MODEL).forward_flops_per_token
    gated = PerLayerFamily(_settings(per_layer_combination_method="gated"), VOCAB, TABLE).cost(MODEL)
    assert plain == 3 * 6 * 32 * WIDTH
    assert gated.forward_flops_per_token - plain == 3 * 4 * WIDTH * WIDTH


def _freezing() -> tuple[set[str], list[dict[str, Any]]]:
    family = PerLayerFamily(
        _settings(freeze_per_layer_embedding=True, per_layer_lr_scale=0.5, per_layer_weight_decay=0.25),
        VOCAB,
        TABLE,
    )
    model = _build(family)
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    wrapped = wrap_model([model], ParallelConfig())
    optimizer = build_optimizer(OptimizerSettings(lr=1.0, min_lr=0.1), ParallelConfig(), wrapped, [family])
    groups = [
        {
            **{key: group.get(key) for key in ("max_lr", "min_lr", "start_wd", "end_wd", "wd_mult")},
            "name": names[id(p)],
        }
        for group in optimizer.param_groups
        for p in group["params"]
    ]
    return frozen, groups


def test_freezing_learning_rate_and_weight_decay_reach_the_parameters_they_are_for() -> None:
    (frozen, groups) = run_single(_freezing)
    assert frozen == {f"per_layer.layers.{number}.embedding.weight" for number in range(MODEL.num_layers)}
    mine = [
        group
        for group in groups
        if group["name"].startswith("per_layer.") or ".before_layer." in group["name"]
    ]
    assert len(mine) == MODEL.num_layers * 4 + 1
    assert len(groups) > len(mine)
    for group in groups:
        if group in mine:
            assert (group["max_lr"], group["min_lr"], group["start_wd"], group["end_wd"]) == (
                0.5,
                0.05,
                0.25,
                0.25,
            )
            assert group["wd_mult"] == (0.0 if "norm" in group["name"] else 1.0)
        else:
            assert (group["max_lr"], group["min_lr"], group["start_wd"]) == (1.0, 0.1, None)


def _statistics(method: str) -> tuple[dict[str, float], dict[str, float], bool]:
    """The family's values, and the same from hooks on the model's own tensors, in float64."""
    settings = _settings(
        per_layer_combination_method=method, log_per_layer_stats=True, log_per_layer_gradients=True
    )
    family = PerLayerFamily(settings, VOCAB, TABLE)
    model = _build(family)
    seen: dict[str, torch.Tensor] = {}
    for number, layer in enumerate(model.decoder.layers):
        block = layer.before_layer
        for name, module in {"gate": block.gate, "output": block}.items():
            module.register_forward_hook(_keep(seen, f"{name} {number}"))
        block.register_forward_pre_hook(_keep_input(seen, f"residual {number}"))
    tokens = torch.randint(VOCAB, (2, MODEL.seq_length))
    seen["ids"] = torch.tensor(TABLE)[tokens]
    seen["word embedding"] = model.embedding.word_embeddings.weight.detach().double()[tokens]
    positions = torch.arange(MODEL.seq_length).expand_as(tokens)
    family.begin_statistics([model])
    model(
        tokens, positions, None, labels=tokens, auxiliary_inputs=family.auxiliary_inputs({"tokens": tokens})
    ).mean().backward()
    for parameter in model.parameters():
        parameter.main_grad = parameter.grad
    values = family.statistics([model])
    expected: dict[str, float] = {}
    for number in range(MODEL.num_layers):
        expected |= {
            f"per-layer/{n}/layer_{number:02d}": v for n, v in _expected(model, seen, number, method).items()
        }
    still_records = any(getattr(module, "recorder", None) is not None for module in model.modules())
    return values, expected, still_records


def _keep(seen: dict[str, torch.Tensor], name: str) -> Any:
    def hook(module: Any, inputs: Any, output: Any) -> None:
        seen[name] = (output[0] if isinstance(output, tuple) else output).detach().double()

    return hook


def _keep_input(seen: dict[str, torch.Tensor], name: str) -> Any:
    def hook(module: Any, inputs: Any) -> None:
        seen[name] = inputs[0].detach().double()

    return hook


def _expected(model: Any, seen: dict[str, torch.Tensor], number: int, method: str) -> dict[str, float]:
    activation = torch.nn.functional.silu(seen[f"gate {number}"])
    residual = seen[f"residual {number}"]
    weights = model.per_layer.layers[number]
    table = weights.embedding.weight
    own = [*weights.parameters(), *model.decoder.layers[number].before_layer.parameters()]
    found = {
        "embedding-norm": float(table.detach().double().norm()),
        "gate-activation-mean": float(activation.mean()),
        "gate-activation-std": float(activation.std(correction=0)),
        "update-ratio": float((seen[f"output {number}"] - residual).norm() / residual.norm()),
        "embedding-gradient-norm": float(table.grad.double().norm()),
        "gradient-norm": math.sqrt(sum(float(p.grad.double().square().sum()) for p in own)),
    }
    if method == "concat":
        context, token = weights.combination.weight.detach().double().chunk(2, dim=1)
        found |= {
            "combination-context-norm": float(context.norm()),
            "combination-token-norm": float(token.norm()),
        }
        return found
    projected = seen["word embedding"] @ weights.context_projection.weight.detach().double().T
    norm_weight = model.per_layer.norm.weight.detach().double()
    context = reference_rms_norm(projected * MODEL.hidden_size**-0.5, norm_weight, MODEL.norm_epsilon)
    token = table.detach().double()[seen["ids"]] * WIDTH**0.5
    if method == "gated":
        gate = torch.sigmoid(torch.cat([context, token], -1) @ weights.combination.weight.detach().double().T)
        found |= {
            "combination-gate-mean": float(gate.mean()),
            "combination-gate-std": float(gate.std(correction=0)),
        }
        return found
    return found | {
        "combination-context-rms": float((context**2 / 2).mean().sqrt()),
        "combination-token-rms": float((token**2 / 2).mean().sqrt()),
        "combination-token-share": float((token**2).sum() / (token**2 + context**2).sum()),
    }


@pytest.mark.parametrize("method", ["scaled_add", "concat", "gated"])
def test_statistics_are_those_of_the_models_own_tensors(method: str) -> None:
    (values, expected, still_records) = run_single(_statistics, method)
    assert not still_records
    assert values.keys() == expected.keys()
    for tag, value in expected.items():
        assert values[tag] == pytest.approx(value, rel=1e-4), tag


def _initial(method: str) -> dict[str, float]:
    family = PerLayerFamily(_settings(per_layer_init_method=method, per_layer_init_std=0.3), VOCAB, TABLE)
    model: GPTModel = _build(family)
    return {name: float(parameter.detach().std()) for name, parameter in model.named_parameters()}


def test_the_init_method_decides_how_weights_are_drawn() -> None:
    table, context = "per_layer.layers.0.embedding.weight", "per_layer.layers.0.context_projection.weight"
    gate = "decoder.layers.1.before_layer.gate.weight"
    (normal,), (xavier,), (zeros,) = (
        [run_single(_initial, method)] for method in ("normal", "xavier_normal", "zeros")
    )
    for name in (table, context, gate):
        assert normal[name] == pytest.approx(0.3, rel=0.2)
    assert xavier[gate] == pytest.approx(math.sqrt(2 / (32 + WIDTH)), rel=0.2)
    assert (zeros[table], zeros[context]) == (0.0, pytest.approx(0.3, rel=0.2))


def test_a_configuration_without_ids_is_refused_at_the_start() -> None:
    from megatron_ext.config.groups.tokenizer_config import TokenizerConfig
    from megatron_ext.data.tokenizers import build_tokenizer

    tokenizer = build_tokenizer(TokenizerConfig(tokenizer_type="NullTokenizer", vocab_size=VOCAB))
    with pytest.raises(ValueError, match="--per-layer-data-path, or --per-layer-strategy identity"):
        PerLayerFamily.from_tokenizer(_settings(), tokenizer)
    guided = _settings(per_layer_strategy="attention_guidance")
    with pytest.raises(ValueError, match="attention_guidance: requires --per-layer-data-path"):
        PerLayerFamily.from_tokenizer(guided, tokenizer)
    aligned = dataclasses.replace(guided, per_layer_data_path=("prefix",))
    options = PerLayerFamily.from_tokenizer(aligned, tokenizer).dataset_options()
    assert options["per_layer_data_path"] == ("prefix",) and options["per_layer_vocab_size"] == ROWS


def test_rows_follow_the_table_or_the_aligned_data_and_come_back_from_a_checkpoint(tmp_path: Path) -> None:
    from megatron_ext.config.groups.tokenizer_config import TokenizerConfig
    from megatron_ext.data.indexed.manifest import write_manifest
    from megatron_ext.data.per_layer.per_layer_table import save_table
    from megatron_ext.data.per_layer.per_layer_vocab import SPECIAL, save_vocabulary
    from megatron_ext.data.tokenizers import build_tokenizer
    from megatron_ext.testing.tiny_datasets import write_dataset

    tokenizer = build_tokenizer(TokenizerConfig(tokenizer_type="NullTokenizer", vocab_size=VOCAB))
    vocab_file, aligned = str(tmp_path / "v.json"), str(tmp_path / "aligned")
    save_vocabulary(vocab_file, SPECIAL)
    table = np.arange(tokenizer.vocab_size, dtype=np.int32) % 23
    save_table(vocab_file, "syntax_focus", table, tokenizer_fingerprint=tokenizer.fingerprint(), seed=1)
    write_dataset(aligned, [[[1, 2, 3]]])
    write_manifest(aligned, tool="test", tokenizer=None, inputs=[], extra={"per_layer": {"vocab_size": 31}})
    unsized = _settings(per_layer_vocab_size=None)
    from_table = dataclasses.replace(unsized, per_layer_vocab_file=vocab_file)
    from_data = dataclasses.replace(unsized, per_layer_data_path=(aligned,))
    for settings, rows in ((from_table, 23), (from_data, 31)):
        family = PerLayerFamily.from_tokenizer(settings, tokenizer)
        again = PerLayerFamily.from_configuration(json.loads(json.dumps(family.configuration())))
        assert family.rows == again.rows == rows


def test_a_checkpoint_with_token_ids_comes_back_whatever_size_an_earlier_version_stored() -> None:
    family = PerLayerFamily(_settings(per_layer_strategy="identity", per_layer_vocab_size=None), VOCAB)
    stored = json.loads(json.dumps(family.configuration()))
    stored["settings"]["per_layer_vocab_size"] = 10_000
    assert PerLayerFamily.from_configuration(stored).rows == VOCAB
    assert "per_layer_vocab_size" in family.free_on_resume
    assert "per_layer_vocab_size" not in PerLayerFamily(_settings(), VOCAB).free_on_resume

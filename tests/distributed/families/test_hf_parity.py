"""Imported models compute what transformers computes, at any parallel layout; exported ones are the same again, to
the bit.
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from megatron_ext.config.groups.parallel_config import ParallelConfig
from megatron_ext.inference.generation import Sampling, generate, stage_logits
from megatron_ext.inference.load_model import load_model
from megatron_ext.interop import (
    base_state,
    export_checkpoint,
    export_hf,
    import_checkpoint,
    load_hf,
    load_into,
)
from megatron_ext.models.build_model import build_model
from megatron_ext.models.gpt_model import GPTModel
from megatron_ext.models.ops.rotary import rotary_frequencies
from megatron_ext.platform.process_groups import initialize
from megatron_ext.registry.known_families import FAMILIES
from megatron_ext.testing.run_distributed import run_distributed
from megatron_ext.testing.run_single import run_single
from megatron_ext.testing.tiny_training import LAYOUTS, TINY
from megatron_ext.training.interface.family_interface import Family
from tests.unit.interop.hf_models import (
    KINDS,
    SIZES,
    Kind,
    alone,
    families_of,
    logits_of,
    tensors_in,
    tokens,
)

CUT_KINDS = (
    "Llama, all biases",
    "Qwen3",
    "Qwen2, sliding windows",
    "Gemma3",
    "Gemma3, scaled and limited",
    "Gemma4",
    "Gemma4, keys are values",
    "Gemma3n",
    "Gemma3n, three streams, biases",
    "Olmo2",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every kind as Hugging Face saved it (`hf-NAME`), imported (`checkpoint-NAME`) and exported (`export-NAME`)."""
    path = tmp_path_factory.mktemp("interop")
    for name, kind in KINDS.items():
        kind.build().save_pretrained(path / f"hf-{name}", max_shard_size="30KB")
    KINDS["Llama 3 scaling"].build().bfloat16().save_pretrained(path / "hf-bf16")
    KINDS["Llama 3 scaling"].build().half().save_pretrained(path / "hf-fp16")
    alone(_convert, str(path), [*KINDS, "bf16", "fp16"])
    return path


def _convert(path: str, names: list[str]) -> None:
    for name in names:
        import_checkpoint(f"{path}/hf-{name}", f"{path}/checkpoint-{name}")
        export_checkpoint(
            f"{path}/checkpoint-{name}",
            f"{path}/export-{name}",
            max_shard_size=30_000,
            dtype="float16" if name == "fp16" else None,
        )


@pytest.fixture(scope="module")
def imported_logits(folder: Path) -> dict[str, torch.Tensor]:
    return alone(_checkpoint_logits, str(folder))


@torch.no_grad()
def _logits(model: GPTModel, families: list[Family]) -> torch.Tensor:
    """Logits on the last stage."""
    positions = torch.arange(tokens().size(1)).expand_as(tokens())
    result = stage_logits(model, families, {"tokens": tokens(), "position_ids": positions})
    return torch.empty(0) if result is None else result


def _checkpoint_logits(path: str) -> dict[str, torch.Tensor]:
    loaded = {name: load_model(f"{path}/checkpoint-{name}", FAMILIES) for name in KINDS}
    return {name: _logits(each.model, each.families) for name, each in loaded.items()}


@pytest.mark.parametrize("name", KINDS)
def test_the_logits_of_an_imported_model_are_those_of_transformers(
    name: str, imported_logits: dict[str, torch.Tensor]
) -> None:
    expected = logits_of(KINDS[name].build())
    assert expected.std() > 0.1
    torch.testing.assert_close(imported_logits[name], expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", [*KINDS, "bf16", "fp16"])
def test_an_imported_model_exports_to_the_same_tensors_to_the_bit(name: str, folder: Path) -> None:
    before, after = tensors_in(folder / f"hf-{name}"), tensors_in(folder / f"export-{name}")
    assert before.keys() == after.keys()
    for tensor_name, tensor in before.items():
        assert tensor.dtype == after[tensor_name].dtype
        assert torch.equal(tensor, after[tensor_name]), tensor_name


@pytest.mark.parametrize("name", KINDS)
def test_transformers_loads_what_is_exported_and_computes_the_same(name: str, folder: Path) -> None:
    config = json.loads((folder / f"export-{name}" / "config.json").read_text())
    assert config["architectures"] == [f"{KINDS[name].name}ForCausalLM"]
    loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(
        folder / f"export-{name}", output_loading_info=True
    )
    model, found = loaded
    assert not any(found.values()), found
    assert type(model).__name__ == f"{KINDS[name].name}ForCausalLM"
    assert torch.equal(logits_of(model.eval()), logits_of(KINDS[name].build()))


def test_an_exported_model_keeps_its_type_and_its_files_their_size(folder: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "export-bf16")
    assert model.dtype == torch.bfloat16
    files = list((folder / "export-bf16").glob("*.safetensors"))
    assert len(files) > 1 and all(file.stat().st_size < 32_000 for file in files)
    index = json.loads((folder / "export-bf16" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {file.name for file in files}
    assert index["metadata"]["total_size"] == 2 * sum(p.numel() for p in model.parameters())


def _logits_at_layouts(path: str) -> dict[tuple[str, str, str], torch.Tensor]:
    found = {}
    for layout in ("TP2", "PP2"):
        for name in CUT_KINDS:
            parallel = LAYOUTS[layout]
            loaded = load_model(
                f"{path}/checkpoint-{name}",
                FAMILIES,
                tensor_model_parallel_size=parallel.tensor_model_parallel_size,
                pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
            )
            found[layout, name, "checkpoint"] = _logits(loaded.model, loaded.families)
            source = load_hf(f"{path}/hf-{name}")
            families = families_of(source.families.configurations)
            extensions = [family.extension() for family in families]
            chunks = build_model(
                source.model, parallel, vocab_size=source.vocab_size, seed=7, extensions=extensions
            )
            load_into(chunks, source.state)
            found[layout, name, "in memory"] = _logits(chunks[0].eval(), families)
    return found


def test_a_model_loads_at_two_tensor_ranks_and_two_stages_from_a_checkpoint_and_in_memory(
    folder: Path,
) -> None:
    found = run_distributed(_logits_at_layouts, 2, str(folder))[1]
    assert len(found) == 4 * len(CUT_KINDS)
    for (layout, name, _), logits in found.items():
        expected = logits_of(KINDS[name].build())
        vocabulary = expected.size(-1)
        torch.testing.assert_close(logits[..., :vocabulary], expected, atol=1e-5, rtol=0)
        # An odd vocabulary has a row of padding at two tensor ranks, which an import leaves zero.
        assert logits.size(-1) == (98 if layout == "TP2" and name == "Llama, all biases" else vocabulary)


PAST_A_LIMIT = (
    "Mistral, sliding window",
    "Qwen2, sliding windows",
    "Gemma3",
    "Gemma3, scaled and limited",
    "Gemma4",
    "Gemma4, keys are values",
    "Gemma4, no per-layer embedding",
    "Gemma3n",
    "Gemma3n, three streams, biases",
    "Phi3",
    "Phi3, longrope",
    "Olmo3",
    "SmolLM3",
    "Llama, dynamic",
)
"""Models with sliding windows, or with frequencies that change with the length of the sequence."""

PROMPT, NEW_TOKENS = [70, 71], 38


def _generated(path: str, layouts: list[str]) -> dict[tuple[str, str], list[int]]:
    found = {}
    for layout in layouts:
        for name in PAST_A_LIMIT:
            loaded = load_model(
                f"{path}/checkpoint-{name}",
                FAMILIES,
                tensor_model_parallel_size=LAYOUTS[layout].tensor_model_parallel_size,
                pipeline_model_parallel_size=LAYOUTS[layout].pipeline_model_parallel_size,
            )
            greedy = Sampling(max_new_tokens=NEW_TOKENS, temperature=0)
            found[layout, name] = generate(loaded.model, loaded.families, [PROMPT], greedy, 96)[0]
    return found


def test_greedy_generation_far_past_window_and_original_length_is_that_of_transformers(folder: Path) -> None:
    found = alone(_generated, str(folder), ["TP1"])
    found |= run_distributed(_generated, 2, str(folder), ["TP2", "PP2"])[1]
    for name in PAST_A_LIMIT:
        prompt = torch.tensor([PROMPT])
        whole = KINDS[name].build().generate(prompt, max_new_tokens=NEW_TOKENS, do_sample=False)[0].tolist()
        expected = whole[len(PROMPT) :]
        assert len(set(expected)) > 3, "the model repeats itself"
        for layout in ("TP1", "TP2", "PP2"):
            assert found[layout, name] == expected, (layout, name)


def _through_memory(path: str) -> str:
    initialize(ParallelConfig(), seed=1)
    source = load_hf(f"{path}/hf-Qwen2")
    chunks = build_model(source.model, ParallelConfig(), vocab_size=source.vocab_size, seed=7)
    load_into(chunks, source.state)
    export_hf(source.model, source.vocab_size, base_state(chunks), f"{path}/live")
    wrong = build_model(load_hf(f"{path}/hf-Mistral").model, ParallelConfig(), vocab_size=96, seed=7)
    with pytest.raises(ValueError, match="given tensors lack|given tensors contain") as caught:
        load_into(wrong, source.state)
    return str(caught.value)


def test_a_model_in_memory_exports_to_what_it_was_loaded_from_and_refuses_another_models_tensors(
    folder: Path,
) -> None:
    error = run_single(_through_memory, str(folder))
    before, after = tensors_in(folder / "hf-Qwen2"), tensors_in(folder / "live")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert "has output_layer.weight, which the given tensors lack" in error


def test_scaled_rotary_frequencies_are_those_of_transformers() -> None:
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    llama31: dict[str, Any] = {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    for scaling in (llama31, {**llama31, "factor": 32.0, "high_freq_factor": 2.5, "rope_theta": 1e4}):
        config = transformers.LlamaConfig(**{**SIZES, "head_dim": 128, "rope_parameters": scaling})
        expected, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
        model = replace(
            TINY,
            kv_channels=128,
            rotary_base=scaling["rope_theta"],
            use_rope_scaling=True,
            rope_scaling_factor=scaling["factor"],
            rope_high_freq_factor=scaling["high_freq_factor"],
        )
        torch.testing.assert_close(rotary_frequencies(model), expected, rtol=2e-6, atol=0)


def test_a_config_of_transformers_4_means_the_same(tmp_path: Path) -> None:
    # Its words for the rotary embedding: rope_theta, and rope_scaling with `type` or `rope_type`.
    kind: Kind = KINDS["Llama, linear scaling"]
    kind.build().save_pretrained(tmp_path)
    new = load_hf(tmp_path).model
    config = json.loads((tmp_path / "config.json").read_text())
    del config["rope_parameters"]
    config |= {"rope_theta": 10000, "rope_scaling": {"type": "linear", "factor": 3}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert load_hf(tmp_path).model == new

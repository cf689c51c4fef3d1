"""Gemma 3 as Google publishes its larger models: the language model beside an image encoder; both layouts of files."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from megatron_ext.interop.formats.configs.hf_config import to_model_config
from megatron_ext.interop.formats.text_part import text_config
from megatron_ext.testing.run_single import run_single
from tests.unit.interop.hf_models import KINDS, SIZES, logits_of
from tests.unit.interop.imported_models import imported_logits

Rename = Callable[[str], str]


def _model() -> Any:
    text = {**SIZES, **KINDS["Gemma3"].changes, "tie_word_embeddings": True, "pad_token_id": 0}
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.Gemma3Config(
        text_config=text,
        vision_config={**vision, "image_size": 28, "patch_size": 14},
        mm_tokens_per_image=4,
        tie_word_embeddings=True,
    )
    torch.manual_seed(1)
    model: Any = transformers.Gemma3ForConditionalGeneration(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(0.0, 0.15 if "language_model" in name else 0.02)
    return model


LAYOUTS: dict[str, Rename] = {
    "as transformers 5 names them": lambda name: name,
    "as transformers 4 named them": lambda name: (
        name.replace("model.language_model.", "language_model.model.")
        .replace("model.vision_tower.", "vision_tower.")
        .replace("model.multi_modal_projector.", "multi_modal_projector.")
    ),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_language_model_of_a_gemma_3_with_images_is_imported_alone(layout: str, tmp_path: Path) -> None:
    model = _model()
    model.save_pretrained(tmp_path)
    tensors = {
        LAYOUTS[layout](name): tensor.clone()
        for name, tensor in model.state_dict().items()
        if name != "lm_head.weight"
    }
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    logits, messages = run_single(imported_logits, str(tmp_path))
    torch.testing.assert_close(logits, logits_of(model), atol=1e-5, rtol=0)
    others = sum("vision" in name or "projector" in name for name in tensors)
    assert any(
        f"the language model of gemma3; {others} other tensors are left out" in line for line in messages
    )


def test_transformers_own_files_are_of_one_of_these_layouts(tmp_path: Path) -> None:
    model = _model()
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors").keys()
    named = [name for name in model.state_dict() if name != "lm_head.weight"]
    assert any(saved == {rename(name) for name in named} for rename in LAYOUTS.values())


def test_fields_that_googles_files_leave_out_have_the_defaults_of_the_class() -> None:
    # The section of the 4B model.
    given: dict[str, Any] = {
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "model_type": "gemma3_text",
        "num_hidden_layers": 34,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 1024,
    }
    ours = to_model_config(text_config({"model_type": "gemma3", "text_config": given}), "config.json")
    whole = transformers.Gemma3TextConfig(**{name: given[name] for name in given if name != "model_type"})
    theirs = to_model_config(json.loads(whole.to_json_string(use_diff=False)), "config.json")
    assert ours.model == theirs.model and ours.vocab_size == theirs.vocab_size == 262_208
    empty = text_config({"model_type": "gemma3", "text_config": {}})
    defaults = transformers.Gemma3TextConfig()
    for name in (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
    ):
        assert empty[name] == getattr(defaults, name)

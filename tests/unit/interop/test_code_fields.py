"""Each field of PLE's and NPT's configuration is exported with the code, or does not change what the model computes."""

from dataclasses import fields
from typing import Any

import pytest

from megatron_ext.interop.added_parts import SECTIONS, base_config, is_extended
from megatron_ext.interop.formats.configs.hf_config import from_model_config
from megatron_ext.npt.modules.npt_module_config import NPTModuleConfig
from megatron_ext.npt.npt_family import NPTFamily
from megatron_ext.per_layer.per_layer_config import PerLayerConfig
from megatron_ext.registry.remote_code import modeling_megatron_ext
from megatron_ext.registry.remote_code.export_with_code import _parts
from megatron_ext.registry.remote_code.family_parts import (
    BASES,
    CODE,
    NPT_FIELDS,
    PER_LAYER_FIELDS,
    families_in,
    parts_of,
)
from tests.unit.interop.code_models import CASES, EOD, TOKENIZER, VOCAB, Case

WITHOUT_EFFECT = {
    # Where the ids come from: the exported table takes their place.
    "per_layer_vocab_file",
    "per_layer_data_path",
    # How the weights were trained.
    "per_layer_init_method",
    "per_layer_init_std",
    "per_layer_lr_scale",
    "per_layer_weight_decay",
    "freeze_per_layer_embedding",
    "per_layer_sparse",
    "per_layer_optimizer",
    "per_layer_offload",
    "per_layer_offload_dir",
    "np_init_scale",
    "np_init_strategy",
    # What was logged.
    "log_per_layer_stats",
    "log_per_layer_gradients",
    "per_layer_stats_interval",
}
IN_OTHER_WORDS = {
    "use_per_layer_embedding",  # the section exists
    "per_layer_vocab_size",  # the number of rows, also where it is a default
    "per_layer_hashes",  # in "ngrams", beside the functions
    "npt_layers",  # a list of numbers
    "np_rank",  # one entry for each of these layers
}


def _stored(case: Case) -> dict[str, Any]:
    return {family.name: family.configuration() for family in case.families()}


def _config(case: Case) -> dict[str, Any]:
    base = from_model_config(case.model, VOCAB, "LlamaForCausalLM", "float32")
    return parts_of(_stored(case), case.model, EOD).config(base)


@pytest.mark.parametrize(
    ("group", "exported"), [(PerLayerConfig, PER_LAYER_FIELDS), (NPTModuleConfig, NPT_FIELDS)]
)
def test_every_field_is_exported_or_has_no_effect(group: Any, exported: tuple[str, ...]) -> None:
    names = {field.name for field in fields(group)}
    assert set(exported) <= names and not set(exported) & (WITHOUT_EFFECT | IN_OTHER_WORDS)
    assert names <= {*exported, *WITHOUT_EFFECT, *IN_OTHER_WORDS}


@pytest.mark.parametrize("name", CASES)
def test_the_families_of_a_config_json_are_those_that_it_was_written_for(name: str) -> None:
    case = CASES[name]
    config, stored = _config(case), _stored(case)
    assert is_extended(config) and config["model_type"] == "megatron_ext_llama"
    assert config["auto_map"]["AutoModelForCausalLM"] == "modeling_megatron_ext.MegatronExtLlamaForCausalLM"
    buffers = parts_of(stored, case.model, EOD).buffers
    found = families_in(config, next(iter(buffers.values()), None))
    if "npt" in stored:
        # Words such as `all` become numbers.
        settings = NPTFamily.from_configuration(stored["npt"]).settings
        layers = settings.layers(case.model.num_layers)
        stored["npt"]["settings"]["npt_layers"] = ",".join(map(str, layers))
    assert found == stored


def test_the_base_of_an_extended_config_is_the_config_of_the_base() -> None:
    case = CASES["PLE and NPT"]
    base = from_model_config(case.model, VOCAB, "LlamaForCausalLM", "float32")
    extended = parts_of(_stored(case), case.model, EOD).config(base)
    assert set(extended) - set(base) == {*SECTIONS, "auto_map"}
    assert base_config(extended) == base


def test_a_base_without_a_class_in_the_code_is_refused_by_name() -> None:
    assert BASES == modeling_megatron_ext._BASES
    case = CASES["PLE and NPT"]
    base = {**from_model_config(case.model, VOCAB, "LlamaForCausalLM", "float32")}
    with pytest.raises(
        ValueError,
        match="exported as OtherForCausalLM; --architecture must be one of LlamaForCausalLM, Mistral",
    ):
        parts_of(_stored(case), case.model, EOD).config({**base, "architectures": ["OtherForCausalLM"]})


def test_the_embedding_of_gemma_3n_is_refused_by_name() -> None:
    run_config = {"families": {"per_layer": {"settings": {"per_layer_preset": "gemma3n"}}}}
    with pytest.raises(
        ValueError,
        match="--load run: cannot be exported: --per-layer-preset gemma3n requires Gemma3nForCausalLM",
    ):
        _parts("run", None, None, run_config, CASES["PLE gemma4"].model, TOKENIZER)


def test_every_setting_of_a_section_is_read_by_the_code() -> None:
    source = CODE.read_text()
    for name in ("PLE attention_guidance", "PLE and NPT"):
        for section in SECTIONS:
            for field in _config(CASES[name]).get(section, {}):
                # These two only matter when the directory is imported again.
                if field not in ("freeze_base", "np_target"):
                    assert f'"{field}"' in source, field


def test_a_rank_of_its_own_for_down_is_written_for_each_layer() -> None:
    section = _config(CASES["NPT key_value triple, ranks of layers"])["npt"]
    assert (section["npt_layers"], section["np_rank"]) == ([0, 1], [[4, 6], [2, 2]])
    assert _config(CASES["PLE and NPT"])["npt"]["npt_layers"] == [1]

"""A changed config.json before two judges: transformers' own class, and an import; in a process group of one."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file

from megatron_ext.config.groups.parallel_config import ParallelConfig
from megatron_ext.interop import export_hf, load_hf, load_into
from megatron_ext.interop.formats.configs.hf_config import to_model_config
from megatron_ext.interop.formats.hf_files import read_config
from megatron_ext.interop.formats.per_layer_layout import exported_per_layer
from megatron_ext.models.build_model import build_model
from megatron_ext.platform.process_groups import initialize
from megatron_ext.training.interface.family_interface import auxiliary_inputs
from tests.unit.interop.hf_models import SIZES, Kind, families_of, tokens


@dataclass(frozen=True)
class Verdict:
    """What became of one config.json."""

    refusal: str | None
    """The import's error, None where it was taken over."""

    theirs: str | None = None
    """transformers' error where the import takes it over; None where it loads and computes logits."""

    difference: float | None = None
    """Greatest difference of logits between the two, as a part of the largest logit above 1, where both load; over the
    positions that the import is for."""

    has_effect: bool | None = None
    """Whether transformers' logits differ from those without the change, where both load."""

    lost: frozenset[str] = frozenset()
    """Fields that transformers' configuration object has otherwise after an export, `logits` if these differ."""


def judge(path: str, kind: Kind, changes: list[dict[str, Any]]) -> list[Verdict]:
    """A verdict for each change of the configuration of `kind`.

    Args:
        path: a directory to write into.
        kind: the model without the change.
        changes: fields of config.json to add or replace; `...` removes one.
    """
    initialize(ParallelConfig(), seed=1)
    transformers.logging.set_verbosity(50)
    transformers.logging.disable_progress_bar()
    plain = _theirs(_write(Path(path, "plain"), kind, {}))
    return [_verdict(Path(path, str(i)), kind, change, plain) for i, change in enumerate(changes)]


def _verdict(folder: Path, kind: Kind, change: dict[str, Any], plain: torch.Tensor) -> Verdict:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(_content(kind, change)))
    try:
        to_model_config(read_config(folder), str(folder / "config.json"))
    except ValueError as refusal:  # what transformers makes of it is another's concern
        return Verdict(str(refusal))
    try:
        _write(folder, kind, change)
        theirs, error = _theirs(folder), None
    except Exception as refusal:  # whatever transformers raises is a refusal
        theirs, error = None, f"{type(refusal).__name__}: {refusal}"
    same_shape = theirs is not None and theirs.shape == plain.shape
    has_effect = None if theirs is None else not (same_shape and torch.equal(theirs, plain))
    try:
        source = load_hf(folder)
    except (ValueError, OSError) as refusal:
        return Verdict(str(refusal))
    if theirs is None:
        return Verdict(None, error)
    families = families_of(source.families.configurations)
    extensions = [family.extension() for family in families]
    chunks = build_model(
        source.model, ParallelConfig(), vocab_size=source.vocab_size, seed=7, extensions=extensions
    )
    load_into(chunks, source.state)
    length = min(tokens().size(1), source.model.max_position_embeddings or 0)
    ids = tokens()[:, :length] % source.vocab_size
    with torch.no_grad():
        positions, inputs = (
            torch.arange(ids.size(1)).expand_as(ids),
            auxiliary_inputs(families, {"tokens": ids}),
        )
        ours = chunks[0].eval()(ids, positions, None, auxiliary_inputs=inputs)
    largest = max(1.0, float(theirs.abs().max()))
    difference = float((ours - theirs[:, :length]).abs().max()) / largest
    per_layer = exported_per_layer(source.families.configurations)
    state, target = dict(source.state), folder / "out"
    export_hf(source.model, source.vocab_size, state, target, imported=source.imported, per_layer=per_layer)
    before, after = _configuration(folder), _configuration(folder / "out")
    lost = frozenset(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))
    if not torch.equal(_theirs(folder / "out"), theirs):
        lost |= {"logits"}
    return Verdict(None, None, difference, has_effect, lost)


def _configuration(folder: Path) -> dict[str, Any]:
    of_directory = ("_name_or_path", "architectures", "dtype", "auto_map")
    said_otherwise = (
        "hidden_act",
        "head_dim",
        "per_layer_config",
        "rope_parameters",
        "original_max_position_embeddings",
        "partial_rotary_factor",
    )
    config = transformers.AutoConfig.from_pretrained(folder).to_dict()
    config["attention_dropout"] = config["attention_dropout"] or 0.0  # null is none
    return {name: value for name, value in config.items() if name not in of_directory + said_otherwise}


def _content(kind: Kind, change: dict[str, Any]) -> dict[str, Any]:
    content = {"model_type": kind.config_class.model_type, **SIZES, **kind.changes, **change}
    return {name: value for name, value in content.items() if value is not ...}


def _write(folder: Path, kind: Kind, change: dict[str, Any]) -> Path:
    """A directory with exactly this config.json, and the weights of the model that transformers builds from it."""
    content = _content(kind, change)
    text = json.dumps(content)
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(text)
    model = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.from_pretrained(folder), dtype=torch.float32
    )
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            is_around_one = "norm" in name and kind.name != "Gemma3"
            parameter.normal_(0.0, 0.15, generator=generator).add_(1.0 if is_around_one else 0.0)
            kind.adapt(name, parameter)
    tied = model.config.tie_word_embeddings
    tensors = {name: t for name, t in model.state_dict().items() if not (tied and name == "lm_head.weight")}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@torch.no_grad()
def _theirs(folder: Path) -> torch.Tensor:
    loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    model, found = loaded
    assert not any(found.values()), found
    output = model.eval()(tokens() % model.config.vocab_size)
    logits: torch.Tensor = output[0] if isinstance(output, tuple) else output.logits
    return logits

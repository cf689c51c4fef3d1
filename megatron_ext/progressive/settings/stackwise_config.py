"""The configuration object of the Python API: `config.model.d_model`, `config.training.progressive.trunk_strategy`, ...

It can be read from a YAML file such as

    model: {vocab_size: 8192, d_model: 512, d_ff: 1536, n_heads: 8}
    training:
      lr: 1.0e-3
      progressive: {trunk_strategy: frozen, new_stack_precision: full}

The values may be changed later; `validate` checks for unknown keys and contradictions. The section `model` accepts the
names in docs/design/progressive_growth.md and all fields of `ModelConfig`; `training` accepts the fields of
`TrainingConfig` and `OptimizerSettings`, `parallel` those of `ParallelConfig`, and `progressive` those of
`ProgressiveConfig`. The number of layers follows from the stacks.
"""

import dataclasses
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, TypeVar

from megatron_ext.config.command_line.flag_table import did_you_mean
from megatron_ext.config.command_line.yaml_file import load_yaml
from megatron_ext.config.groups.model_config import ModelConfig
from megatron_ext.config.groups.optimizer_config import OptimizerSettings
from megatron_ext.config.groups.parallel_config import ParallelConfig
from megatron_ext.config.groups.tokenizer_config import TokenizerConfig
from megatron_ext.config.groups.training_config import TrainingConfig
from megatron_ext.progressive.settings.progressive_config import ProgressiveConfig
from megatron_ext.progressive.settings.progressive_run_config import ProgressiveRunConfig

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

G = TypeVar("G", bound="DataclassInstance")

_MODEL_NAMES = {"d_model": "hidden_size", "d_ff": "ffn_hidden_size", "n_heads": "num_attention_heads"}
"""Maps names in docs/design/progressive_growth.md to fields of `ModelConfig`."""

_MODEL_DEFAULTS = {"seq_length": 512, "swiglu": True, "disable_bias_linear": True, "hidden_dropout": 0.0}
_MODEL_DEFAULTS |= {"attention_dropout": 0.0, "untie_embeddings_and_output_weights": True}
_TRAINING_DEFAULTS = {"lr": 1e-3, "train_iters": 100, "eval_iters": 0}
_LISTS = ("n_blocks", "building_mode", "new_stack_precision", "stack_steps", "stack_tokens")


class StackWiseConfig:
    """The whole configuration: the sections `model`, `training` (with `progressive`) and `parallel`, as attributes."""

    def __init__(self, **sections: Mapping[str, Any]) -> None:
        """Args:
        **sections: `model`, `training`, `parallel`, and `progressive` if it is not a part of `training`.

        Raises:
            ValueError: a section is unknown, or `progressive` is given twice.
        """
        training = dict(sections.get("training") or {})
        progressive = training.pop("progressive", None)
        if progressive is not None and "progressive" in sections:
            raise ValueError("progressive is given twice, in training and as a section; remove one of them")
        _check_known("section", sections, ("model", "training", "parallel", "progressive"))
        self.model = SimpleNamespace(**_MODEL_DEFAULTS | dict(sections.get("model") or {}))
        self.training = SimpleNamespace(**_TRAINING_DEFAULTS | training)
        defaults = {field.name: field.default for field in dataclasses.fields(ProgressiveConfig)}
        own = progressive if progressive is not None else sections.get("progressive")
        self.training.progressive = SimpleNamespace(**defaults | dict(own or {}))
        self.parallel = SimpleNamespace(**dict(sections.get("parallel") or {}))

    @classmethod
    def from_yaml(cls, path: str | Path) -> "StackWiseConfig":
        """Reads a YAML file; the values are not checked until `validate` is called.

        Raises:
            ValueError: the file is not YAML, has no sections, or has an unknown section.
            OSError: the file cannot be read.
        """
        content = load_yaml(path)
        if not isinstance(content, dict) or not all(isinstance(part, dict) for part in content.values()):
            raise ValueError(f"{path}: must have sections such as model and training")
        try:
            return cls(**content)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None

    def validate(self) -> None:
        """Checks the configuration.

        Raises:
            ValueError: a key is unknown, a value is missing or wrong, or values contradict each other.
        """
        self.run_config()

    def progressive_config(self, target_stacks: int | None = None) -> ProgressiveConfig:
        """Returns the checked section `progressive`.

        Args:
            target_stacks: overrides `target_stacks` in the section `progressive`; None keeps that value.

        Raises:
            ValueError: a key is unknown, or values contradict each other.
        """
        values = vars(self.training.progressive) | (
            {} if target_stacks is None else {"target_stacks": target_stacks}
        )
        known = [field.name for field in dataclasses.fields(ProgressiveConfig)]
        _check_known("key in progressive", values, known)
        for name in _LISTS:
            value = values[name]
            if isinstance(value, list):
                values[name] = tuple(value)
            elif value is not None and not isinstance(value, tuple):
                values[name] = (value,)
        values["qlora_configs"] = _listed(values["qlora_configs"])
        return _made(ProgressiveConfig, values)

    @property
    def vocab_size(self) -> int:
        """Number of token ids of the vocabulary.

        Raises:
            ValueError: `model.vocab_size` is missing, or is not a positive integer.
        """
        size = getattr(self.model, "vocab_size", None)
        if not isinstance(size, int) or size < 1:
            raise ValueError(f"model.vocab_size {size}: must be an integer of at least 1")
        return size

    def run_config(self, target_stacks: int | None = None) -> ProgressiveRunConfig:
        """Returns the configuration of a training run that reads the caller's batches.

        Args:
            target_stacks: overrides `target_stacks` in the section `progressive`; None keeps that value.

        Raises:
            ValueError: the configuration is invalid; see `validate`.
        """
        vocab_size = self.vocab_size
        progressive = self.progressive_config(target_stacks)
        layers = sum(progressive.blocks_of(index) for index in range(progressive.num_stacks))
        model = {name: value for name, value in vars(self.model).items() if name != "vocab_size"}
        for name, ours in _MODEL_NAMES.items():
            if name in model and ours in model:
                raise ValueError(
                    f"model.{name} {model[name]}: this is another name of {ours}, which is also given; omit one of them"
                )
            if name in model:
                model[ours] = model.pop(name)
        if "num_layers" in model:
            raise ValueError(
                f"model.num_layers {model['num_layers']}: omit it; the number follows from target_stacks and n_blocks"
            )
        training = {name: value for name, value in vars(self.training).items() if name != "progressive"}
        own = _names(TrainingConfig)
        _check_known("key in training", training, [*own, *_names(OptimizerSettings)])
        return ProgressiveRunConfig(
            model=_made(ModelConfig, {**model, "num_layers": layers}, "model"),
            training=_made(TrainingConfig, {n: v for n, v in training.items() if n in own}),
            optimizer=_made(OptimizerSettings, {n: v for n, v in training.items() if n not in own}),
            parallel=_made(ParallelConfig, vars(self.parallel), "parallel"),
            tokenizer=TokenizerConfig(tokenizer_type="NullTokenizer", vocab_size=vocab_size),
            progressive=progressive,
        )


def _names(config: type[Any]) -> list[str]:
    return [field.name for field in dataclasses.fields(config)]


def _check_known(what: str, given: Iterable[str], known: Iterable[str]) -> None:
    known = list(known)
    for name in given:
        if name not in known:
            raise ValueError(f"unknown {what}: {name}{did_you_mean(name, known)}")


def _made(config: type[G], values: Mapping[str, Any], section: str | None = None) -> G:
    """Builds a dataclass from a section's values; raises `ValueError` for values of the wrong type."""
    fields = {field.name: field for field in dataclasses.fields(config)}
    if section is not None:
        _check_known(f"key in {section}", values, fields)
    for name, field in fields.items():
        is_required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if is_required and name not in values:
            theirs = next((n for n, ours in _MODEL_NAMES.items() if ours == name), name)
            raise ValueError(f"{section or 'training'}.{theirs} is missing; add it to the configuration")
    for name, value in values.items():
        default = fields[name].default
        is_number = isinstance(default, (int, float)) and not isinstance(default, bool)
        wrong = (isinstance(default, bool) and not isinstance(value, bool)) or (
            is_number and (isinstance(value, bool) or not isinstance(value, (int, float)))
        )
        if wrong:
            raise ValueError(f"{name} {value}: must be {'true or false' if not is_number else 'a number'}")
    try:
        return config(**values)
    except TypeError as error:
        raise ValueError(f"{section or 'training'}: a value has the wrong type: {error}") from None


def _listed(configs: Any) -> Any:
    """Converts `{0: {"rank": 8, "alpha": 16}, ...}` to the text of --qlora-configs."""
    if not isinstance(configs, Mapping):
        return configs
    try:
        return ",".join(f"{stack}:{shape['rank']}:{shape['alpha']}" for stack, shape in configs.items())
    except (KeyError, TypeError):
        raise ValueError(
            f"qlora_configs {configs}: must map stack indices to {{rank: ..., alpha: ...}}"
        ) from None

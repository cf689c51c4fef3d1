#!/usr/bin/env python3
"""Evaluates an NPT checkpoint against its base model on held-out text, in one process or several under `torchrun`.

The report is a JSON file and, with --html, one self-contained page: perplexity ratio, KL divergence of the next token,
each NPT layer compared with its base layer, norms of the weight deltas, and generations of both models.
docs/npt_evaluation.md explains every key. `--config` also takes a training configuration with the sections `model` and
`training`: batch_size and max_length are used, npt_layers, rank and modulation_scale must be those of the checkpoint,
and other keys are ignored.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

from megatron_ext.config.command_line.field_checks import check_at_least, flag, flag_name
from megatron_ext.config.command_line.flag_text import argument_text, read_lines
from megatron_ext.config.command_line.parse import parse, run_main
from megatron_ext.config.groups.inference_config import LoadConfig, SamplingConfig
from megatron_ext.config.groups.training_config import TrainingConfig


@dataclass(frozen=True, kw_only=True)
class EvaluateNPTConfig(LoadConfig, SamplingConfig):
    """Checkpoint and data to evaluate, and the report to write."""

    checkpoint: Annotated[str, flag(aliases=("--load",))]
    """Directory of checkpoints, or of one checkpoint: of an NPT run, or of a base model with --npt-weights."""

    data_path: str
    """Prefix of a held-out indexed dataset."""

    npt_weights: str | None = None
    """npt_weights.pt or .safetensors to load into the model. For a base checkpoint, its config.json must be beside
    it."""

    output: str = "evaluation_report.json"
    """JSON file to write the report to."""

    html: str | None = None
    """HTML file to write the report with its pictures to; requires matplotlib."""

    max_tokens: int | None = None
    """Evaluate only this many tokens. Default: all. Each takes four bytes of memory per NPT layer and target."""

    micro_batch_size: Annotated[int, flag(aliases=("--batch_size",))] = 4
    """Windows per micro-batch on each process."""

    seq_length: Annotated[int | None, flag(aliases=("--max_length",))] = None
    """Tokens per window. Default: the sequence length of the training."""

    prompts: tuple[str, ...] = ()
    """Texts that both models continue. Default: the beginnings of three held-out documents."""

    prompts_file: str | None = None
    """File with one prompt per line."""

    max_new_tokens: int = 64
    """Number of tokens to generate after each prompt; 0 generates nothing."""

    temperature: float = 0.8
    """Temperature of the sampled continuations; a greedy one is generated as well."""

    npt_layers: str | None = None
    """Fail unless these are the checkpoint's NPT layers."""

    np_rank: Annotated[int | None, flag(aliases=("--rank",))] = None
    """Fail unless this is the checkpoint's NP rank."""

    np_scale: Annotated[float | None, flag(aliases=("--modulation_scale",))] = None
    """Fail unless this is the checkpoint's NP scale."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(self, 1, "micro_batch_size", "max_tokens", "seq_length")
        check_at_least(self, 0, "max_new_tokens")


def main() -> None:
    """Evaluates; on rank 0, writes the report and prints its main figures."""
    config: EvaluateNPTConfig = parse(
        EvaluateNPTConfig,
        _with_training_file(sys.argv[1:]),
        prog="tools/evaluate_npt.py",
        description=str(__doc__),
        example="python tools/evaluate_npt.py --checkpoint runs/npt --data-path held_out_text_document "
        "--output evaluation_report.json --html report.html",
    )
    from megatron_ext.npt.evaluation.evaluation_summary import print_summary
    from megatron_ext.platform import process_groups
    from megatron_ext.reports.charts import require_matplotlib
    from megatron_ext.reports.report_files import check_report_writable, write_report

    for name, path in (("--output", config.output), ("--html", config.html)):
        if path is not None:
            check_report_writable(name, path)
    if config.html is not None:
        require_matplotlib(f"--html {config.html}")
    report = _evaluate(config)
    if report is not None:
        write_report(config.output, json.dumps(report, indent=2, allow_nan=False) + "\n")
        if config.html is not None:
            from megatron_ext.npt.evaluation.evaluation_page import evaluation_page

            write_report(config.html, evaluation_page(report))
        print_summary(report)
        print(f"{report['checkpoint']}: step {report['step']}")
        print(
            f"written: {', '.join(path for path in (config.output, config.html) if path is not None)}",
            flush=True,
        )
    process_groups.shutdown()


def _evaluate(config: EvaluateNPTConfig) -> dict[str, Any] | None:
    """Returns the report on rank 0, and None on the other ranks."""
    from megatron_ext.data.indexed.manifest import check_dataset
    from megatron_ext.inference.generation import Sampling
    from megatron_ext.inference.perplexity import evaluate_perplexity
    from megatron_ext.npt.evaluation.npt_evaluation import evaluate_npt, finite, untrained_figures
    from megatron_ext.npt.evaluation.paired_generation import held_out_prompts, paired_generations
    from megatron_ext.npt.weights.conversion import initialize_np_factors
    from megatron_ext.registry.known_families import window_begin
    from megatron_ext.training.checkpoint.checkpointer import read_run_config

    stored = read_run_config(config.checkpoint, config.ckpt_step)
    check_dataset(config.data_path, stored["tokenizer_fingerprint"])
    sampling = None
    if config.max_new_tokens:
        sampling = Sampling(**config.sampling_options())
    prompts = _prompts(config)
    loaded, families, settings = _load(config, stored)
    length = config.seq_length or loaded.config.seq_length
    loaded.model.check_length(length, f"--seq-length {length}")
    prompts = prompts or held_out_prompts(config.data_path, loaded.tokenizer)
    # Generate first: a prompt that is too long should be reported before the long evaluation.
    generations = (
        paired_generations(
            loaded.model,
            families,
            loaded.tokenizer,
            prompts,
            replace(sampling, stop_tokens=loaded.stop_tokens),
        )
        if sampling is not None and prompts
        else []
    )
    on: dict[str, Any] = {
        "sequence_length": length,
        "micro_batch_size": config.micro_batch_size,
        "max_tokens": config.max_tokens,
        "begin": window_begin(loaded),
    }
    report = evaluate_npt([loaded.model], families, settings, config.data_path, **on)
    # The untrained baseline comes last, because its weights replace the trained ones.
    seed = stored.get("training", {}).get("seed", TrainingConfig.seed)
    initialize_np_factors([loaded.model], seed)
    untrained = evaluate_perplexity([loaded.model], families, config.data_path, **on)
    if report is None:
        return None
    report["perplexity"] |= untrained_figures(untrained.loss, report["perplexity"]["base_loss"], seed)
    about = {
        "checkpoint": config.checkpoint,
        "step": loaded.step,
        "npt_weights": config.npt_weights,
        "data_path": config.data_path,
        "evaluation_config": {**asdict(config), "seq_length": length},
        "model_config": asdict(loaded.config),
    }
    return {"format": report["format"], **finite(about), **report, "generations": generations}


def _load(config: EvaluateNPTConfig, stored: dict[str, Any]) -> tuple[Any, list[Any], Any]:
    """Returns the loaded model with its NP components, the families, and NPT's settings."""
    from megatron_ext.inference.load_model import load_model
    from megatron_ext.npt.npt_family import NPTFamily
    from megatron_ext.npt.weights.conversion import attach
    from megatron_ext.npt.weights.np_factors import load_np_factors
    from megatron_ext.npt.weights.np_weight_files import read_np_weight_file, read_np_weights
    from megatron_ext.registry.known_families import FAMILIES

    own = stored["families"].get(NPTFamily.name)
    settings = NPTFamily.from_configuration(own).settings if own is not None else None
    tensors = None
    if settings is not None and config.npt_weights is not None:
        tensors = read_np_weights(config.npt_weights, settings)
    elif config.npt_weights is not None:
        tensors, settings = read_np_weight_file(config.npt_weights)
        if settings is None:
            raise ValueError(
                f"--npt-weights {config.npt_weights}: for a base checkpoint, its config.json is required beside it"
            )
    if settings is None:
        raise ValueError(
            f"--checkpoint {config.checkpoint}: has no NP components; give --npt-weights, or use tools/evaluate.py"
        )
    _check_expected(config, settings, stored["model"]["num_layers"])
    loaded = load_model(
        config.checkpoint,
        FAMILIES,
        **config.load_options(),
    )
    families = list(loaded.families)
    if own is None:
        attach([loaded.model], settings, tensors or {})
        families.append(NPTFamily(settings))
    elif tensors is not None:
        load_np_factors([loaded.model], tensors)
    return loaded, families, settings


def _check_expected(config: EvaluateNPTConfig, settings: Any, num_layers: int) -> None:
    from megatron_ext.npt.modules.npt_module_config import choose_layers

    found = settings.layers(num_layers)
    if config.npt_layers is not None and choose_layers(config.npt_layers, num_layers) != found:
        raise ValueError(
            f"--npt-layers {config.npt_layers}: the checkpoint's NPT layers are {', '.join(map(str, found))}"
        )
    for name in ("np_rank", "np_scale"):
        expected, actual = getattr(config, name), getattr(settings, name)
        if expected is not None and expected != actual:
            raise ValueError(f"{flag_name(name)} {expected}: the checkpoint's value is {actual}")


def _prompts(config: EvaluateNPTConfig) -> list[str]:
    texts = [argument_text("--prompts", text) for text in config.prompts]
    if config.prompts_file is not None:
        texts += read_lines("--prompts-file", config.prompts_file)
        if not texts:
            raise ValueError(f"--prompts-file {config.prompts_file}: has no prompt; write one per line")
    if not all(texts):
        raise ValueError(f"--prompts {texts}: a prompt must not be empty")
    return texts


_FROM_TRAINING = {
    "model": {"npt_layers": "--npt-layers", "rank": "--np-rank", "modulation_scale": "--np-scale"},
    "training": {"batch_size": "--micro-batch-size", "max_length": "--seq-length"},
}
"""Section -> key -> flag, for the values of a training configuration that are used here."""


def _with_training_file(arguments: Sequence[str]) -> list[str]:
    """Replaces `--config` with a training configuration by flags for those of its values that are used here.

    Other files, and files that cannot be read, are left to `parse`.
    """
    import yaml

    given = list(arguments)
    place = next((i for i, text in enumerate(given) if text.partition("=")[0] == "--config"), None)
    if place is None:
        return given
    _, equals, path = given[place].partition("=")
    path = path if equals else (given[place + 1] if place + 1 < len(given) else "")
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return given
    if not isinstance(content, dict) or not content.keys() & _FROM_TRAINING.keys():
        return given
    rest = given[:place] + given[place + (1 if equals else 2) :]
    named = {text.partition("=")[0].replace("_", "-") for text in rest}
    found = [
        f"{spelling}={section[key]}"
        for name, keys in _FROM_TRAINING.items()
        if isinstance(section := content.get(name), dict)
        for key, spelling in keys.items()
        if section.get(key) is not None and spelling not in named
    ]
    return found + rest


if __name__ == "__main__":
    run_main(main)

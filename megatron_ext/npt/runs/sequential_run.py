"""Sequential training: trains NPT layers one after the other, from the lowest to the highest.

While layer N is trained:

    model                 the layers trained earlier are frozen NPT layers; the layers after N are base layers
    optimizer, schedule   new for every layer, over --steps-per-layer steps, with stage 1 in the first --stage1-steps
    data                  the samples of all layers are shuffled together; each layer reads the next part
    random generators     re-seeded at the start of every layer

One command trains all layers in one process group. Each layer is a training run with its own checkpoints. The command
may be interrupted at any moment; if it is repeated, it continues, and the final weights are the same bit for bit as
without the interruption. `sequential_files` describes the files. Source: docs/design/npt_sequential.md.
"""

import gc
import time
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state

from megatron_ext.config.command_line.field_checks import flag_name
from megatron_ext.config.groups.logging_config import LoggingConfig
from megatron_ext.data.tokenizers import Tokenizer
from megatron_ext.models.gpt_model import GPTModel
from megatron_ext.npt.modules.npt_module_config import choose_layers
from megatron_ext.npt.npt_family import NPTFamily
from megatron_ext.npt.objective.npt_run_config import NPTRunConfig
from megatron_ext.npt.runs import sequential_files as store
from megatron_ext.npt.runs import start_message as start
from megatron_ext.npt.runs.sequential_files import SequentialState
from megatron_ext.npt.weights.np_factors import gather_np_factors, load_np_factors
from megatron_ext.npt.weights.np_weight_files import check_same_meaning
from megatron_ext.npt.weights.state_files import replace_final
from megatron_ext.platform.collectives import (
    on_every_rank,
    on_first_rank,
    print_on_first_rank,
)
from megatron_ext.training.checkpoint import random_state
from megatron_ext.training.checkpoint.checkpointer import TrainingProgress
from megatron_ext.training.checkpoint.run_directory import check_unused
from megatron_ext.training.interface.family_interface import Family
from megatron_ext.training.loop import EXIT_OK
from megatron_ext.training.pretrain import check_run, process_group, resolve, train
from megatron_ext.training.run_options import RunOptions
from megatron_ext.training.series import config_in


def run_sequential(config: NPTRunConfig, options: RunOptions) -> int:
    """Trains all layers; returns the process's exit code.

    Args:
        config: the configuration, already checked by `npt_run.settled`; `checkpoint.save` is the run's directory.
        options: the run's options, including the base checkpoint.

    Raises:
        ValueError, OSError: a user error; the message is one line.
    """
    _check(config)
    assert config.checkpoint.save is not None  # the mode sets a default
    folder = Path(config.checkpoint.save)
    check_unused(folder, "--mode sequential requires its own --checkpoint-dir", but_for=(store.INFO,))
    _read(folder, config, options)
    config = resolve(config)
    tokenizer = check_run(config)
    with process_group(config.parallel, config.training, config.checkpoint):
        # The default directory contains the time, which may differ between ranks.
        folder = Path(on_first_rank(lambda: str(config.checkpoint.save)))
        return _Sequence(folder, config, tokenizer, options).run()


class _Sequence:
    """A sequential run: trains the remaining layers, and keeps the run's state and the NP factors."""

    def __init__(self, folder: Path, config: NPTRunConfig, tokenizer: Tokenizer, options: RunOptions) -> None:
        self.folder = folder
        self.config = config
        self.tokenizer = tokenizer
        self.options = options
        self.started = time.monotonic()
        self.state = on_first_rank(lambda: _read(folder, config, options))
        self.tensors: dict[str, torch.Tensor] = {}
        """NP factors of the trained layers, as whole tensors."""

    def run(self) -> int:
        """Trains the remaining layers; returns the exit code."""
        on_every_rank(self._read_tensors)
        layers = _remaining(self.state, self.config)
        if not layers:
            verb = "is" if len(self.state.trained) == 1 else "are"
            print_on_first_rank(
                f"training is already complete: {_named(self.state.trained)} {verb} trained in {self.folder}"
            )
            return EXIT_OK
        for place, layer in enumerate(layers):
            print_on_first_rank(
                f"layer {layer} ({place + 1} of {len(layers)} to train), on top of trained layers: "
                f"{_listed(self.state.trained) or 'none'}"
            )
            code = self._train(layer, len(layers) - place)
            if code != EXIT_OK or layer not in self.state.trained:
                return code
            gc.collect()
        print_on_first_rank(
            f"all layers are trained; {self.folder / store.LOADER} loads the model with NP components in "
            f"{_named(self.state.trained)}"
        )
        return EXIT_OK

    def _train(self, layer: int, remaining: int) -> int:
        """Trains one layer, and records it as trained if its run completes; returns the exit code."""
        self.state = on_first_rank(lambda: self._begin(layer))
        config, steps = self._config_of(layer), self.config.npt.steps_per_layer
        family = NPTFamily(
            config.np, config.npt, total_steps=steps, trains=(layer,), tokenizer=self.tokenizer
        )
        families: list[Family] = [family]
        copies = parallel_state.get_data_parallel_world_size()
        training = config.training
        samples_in = training.batch_sizes(training.resolved_global_batch_size(copies)).samples_in
        place = len(self.state.trained)
        random_state.reseed(config.training.seed, place * steps)
        options = replace(
            self.options,
            prepare=partial(self._prepare, layer, config),
            finish=partial(self._finish, layer, config),
            first_sample=samples_in(place * steps),
            samples=samples_in((place + remaining) * steps),
        )
        return train(config, self.tokenizer, families, options)

    def _prepare(self, layer: int, config: NPTRunConfig, chunks: list[GPTModel]) -> None:
        """Loads the weights of the layers trained before, and prints the start message."""
        load_under(layer, self.tensors, chunks)
        load = config.checkpoint.load
        own = start.fresh(config.np, config.training.seed) if load is None else f"from {load}"
        earlier = f"as trained before in {_named(self.state.trained)}, " if self.state.trained else ""
        weights, steps = f"{earlier}{own} in layer {layer}", config.npt.steps_per_layer
        start.print_start(
            chunks, config, self.options.base, weights=weights, total_steps=steps, trains=(layer,)
        )

    def _read_tensors(self) -> None:
        self.tensors = store.read_accumulated(self.folder, self.state)

    def _begin(self, layer: int) -> SequentialState:
        """Records that the layer is being trained; a layer whose training was interrupted keeps its directory."""
        name = f"layer_{layer}_{time.strftime('%Y%m%d_%H%M%S')}"
        if self.state.current is not None and self.state.current[0] == layer:
            name = self.state.current[1]
        state = self.state.started(layer, name)
        self.folder.mkdir(parents=True, exist_ok=True)
        store.write_state(self.folder, state)
        return state

    def _config_of(self, layer: int) -> NPTRunConfig:
        assert self.state.current is not None
        name, settings = self.state.current[1], self.config.np
        npt = self.config.npt
        weights = npt.weights_of_layers(_layers(self.config))
        return replace(
            config_in(self.config, self.folder / name / store.CHECKPOINTS, self.started),
            np=settings.with_layers([*self.state.trained, layer]),
            npt=replace(npt, layer_weights=str(weights[layer])),
            logging=layer_logging(self.config.logging, name, layer, npt.model_size),
        )

    def _finish(
        self, layer: int, config: NPTRunConfig, chunks: list[GPTModel], progress: TrainingProgress
    ) -> None:
        """Stores the layer's weights, and then records the layer as trained."""
        save = config.checkpoint.save
        assert save is not None
        own = {
            key: value
            for key, value in gather_np_factors(chunks).items()
            if store.layer_of_np_key(key) == layer
        }
        tensors = self.tensors | own
        state = self.state.finished()

        def write() -> None:
            settings = config.np.with_layers([layer])
            more = {"global_step": progress.iteration, "consumed_samples": progress.consumed_samples}
            replace_final(Path(save), own, settings, more)
            store.write_accumulated(self.folder, state, tensors)
            store.write_state(self.folder, state)

        on_first_rank(write)
        self.tensors, self.state = tensors, state


def load_under(layer: int, tensors: Mapping[str, torch.Tensor], chunks: list[GPTModel]) -> None:
    """Loads the NP factors of all NPT layers except one, which keeps its initial factors. Collective.

    Args:
        layer: the layer that keeps its factors.
        tensors: the factors of all other NPT layers.
        chunks: this rank's model chunks, unwrapped.

    Raises:
        ValueError: the tensors do not fit the model; the message lists the differences.
    """
    own = {
        key: value for key, value in gather_np_factors(chunks).items() if store.layer_of_np_key(key) == layer
    }
    load_np_factors(chunks, {**tensors, **own})


def _read(folder: Path, config: NPTRunConfig, options: RunOptions) -> SequentialState:
    """Reads the run's state from `folder` and checks it against the flags; returns a new state if no run has begun."""
    assert options.base is not None
    settings = config.np
    found = store.read_state(folder)
    if found is None:
        state = SequentialState(settings=settings, base=options.base.as_json())
    else:
        check_same_meaning(str(folder / store.INFO), found.settings, settings)
        if found.base["sha256"] != options.base.sha256:
            raise ValueError(
                f"--base-checkpoint {options.base.folder}: the layers in {folder} were trained on "
                "another base model; "
                f"pass {found.base['path']}"
            )
        state = replace(found, settings=settings, base=options.base.as_json())
    _remaining(state, config)
    return state


def _remaining(state: SequentialState, config: NPTRunConfig) -> list[int]:
    """Returns the layers that remain to be trained, in order.

    Raises:
        ValueError: `--start-from-layer` skips layers that are not yet trained.
    """
    start = config.npt.start_from_layer
    left = [layer for layer in _layers(config) if layer not in state.trained]
    skipped = [layer for layer in left if start is not None and layer < start]
    if skipped:
        raise ValueError(
            f"--start-from-layer {start}: lower layers {_listed(skipped)} must be trained first; they are not in "
            f"--checkpoint-dir {config.checkpoint.save}"
        )
    return left


def _layers(config: NPTRunConfig) -> tuple[int, ...]:
    return choose_layers(config.np.npt_layers, config.model.num_layers)


def _check(config: NPTRunConfig) -> None:
    """Raises `ValueError` for flags that --mode sequential does not support."""
    npt = config.npt
    training, checkpoint = config.training, config.checkpoint
    steps, stage1 = npt.steps_per_layer, npt.stage1_steps
    if training.train_iters != steps:
        lengths = {name: getattr(training, name) for name in ("train_iters", "train_samples", "num_epochs")}
        name, given = next((n, v) for n, v in lengths.items() if v is not None)
        raise ValueError(
            f"{flag_name(name)} {given}: --mode sequential trains every layer for {steps} steps; set "
            "--steps-per-layer instead"
        )
    if stage1 >= steps:
        raise ValueError(f"--stage1-steps {stage1}: must be less than --steps-per-layer {steps}")
    if not config.np.freeze_base:
        raise ValueError(
            "--no-freeze-base: not supported by --mode sequential, which trains only NP components; omit the flag"
        )
    if npt.load_npt_weights is not None:
        raise ValueError(
            f"--load-npt-weights {npt.load_npt_weights}: not supported by --mode sequential, which "
            "reads trained layers from --checkpoint-dir; omit the flag"
        )
    if checkpoint.load is not None:
        raise ValueError(
            f"--load {checkpoint.load}: must be a base model in --mode sequential; to resume a run, pass its directory "
            "as --checkpoint-dir"
        )
    if checkpoint.overwrite_checkpoints:
        raise ValueError(
            "--overwrite-checkpoints: not supported by --mode sequential, which continues the run in "
            "--checkpoint-dir; omit the flag"
        )
    if training.skip_train:
        raise ValueError(
            "--skip-train: not supported by --mode sequential; evaluate with tools/evaluate_npt.py"
        )
    start, layers = npt.start_from_layer, _layers(config)
    if start is not None and start not in layers:
        raise ValueError(f"--start-from-layer {start}: must be one of the layers {_listed(layers)}")


def layer_logging(logging: LoggingConfig, name: str, layer: int, model_size: str | None) -> LoggingConfig:
    """Returns the logging configuration of one layer: its own TensorBoard directory, W&B run name and tags."""
    changes: dict[str, Any] = {}
    if logging.tensorboard_dir is not None:
        changes["tensorboard_dir"] = str(Path(logging.tensorboard_dir, name))
    if logging.wandb_project is not None:
        stamp = name.removeprefix(f"layer_{layer}_")
        run = [f"layer_{layer}", *([model_size] if model_size else []), stamp]
        changes["wandb_exp_name"] = "_".join(run)
        changes["wandb_tags"] = (*(logging.wandb_tags or ()), "sequential", f"layer_{layer}")
    return replace(logging, **changes)


def _named(layers: Mapping[int, str]) -> str:
    """Names layers in a sentence, as in "layer 3" or "layers 3, 4"."""
    return f"layer{'s' if len(layers) > 1 else ''} {_listed(layers)}"


def _listed(layers: Mapping[int, str] | list[int] | tuple[int, ...]) -> str:
    return ", ".join(map(str, sorted(layers)))

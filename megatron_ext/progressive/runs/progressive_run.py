"""Progressive training: runs the phases one after the other in one process group, each with a larger model.

The trunk consists of the stacks that earlier phases have trained. In each phase:

    model        has all layers of the phase; the trunk's weights come from the last checkpoint of the previous phase
    optimizer    new, with the old states of parameters that are still trained; the learning-rate schedule restarts
    data         the samples of all phases are shuffled together; each phase reads the next part
    random       generators are re-seeded at the start of every later phase

The command may be interrupted at any moment. If it is repeated, it continues from the newest checkpoint, and the final
weights are the same bit for bit as without the interruption. It may also continue in another parallel layout.
`training_history` describes the files.
"""

import gc
import time
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core import parallel_state

from megatron_ext.config.serialize import group_to_dict
from megatron_ext.data.datasets.epochs import epoch_samples
from megatron_ext.data.tokenizers import Tokenizer
from megatron_ext.models.gpt_model import GPTModel
from megatron_ext.platform import process_groups
from megatron_ext.platform.collectives import gather_or_raise, on_first_rank, print_on_first_rank
from megatron_ext.platform.device_memory import memory_use
from megatron_ext.progressive.cache.activation_cache import check_cache_directory
from megatron_ext.progressive.growth.phases import Phase, check_phases, config_of, list_phases
from megatron_ext.progressive.growth.training_checks import check_history, check_settings
from megatron_ext.progressive.growth.training_history import (
    Finished,
    History,
    finished_checkpoint,
    publish_rack,
    write_history,
)
from megatron_ext.progressive.growth.trunk_strategy import stack_descriptions, stack_treatments, why_uncached
from megatron_ext.progressive.objectives.stack_objective import mask_token_of, reserve_mask_token
from megatron_ext.progressive.progressive_family import ProgressiveFamily, Trunk, stack_bytes
from megatron_ext.progressive.settings.progressive_run_config import ProgressiveRunConfig
from megatron_ext.training.checkpoint import random_state
from megatron_ext.training.checkpoint.checkpointer import TrainingProgress
from megatron_ext.training.dry_run_report import planned_world_size
from megatron_ext.training.interface.family_interface import Family
from megatron_ext.training.logging.progress_line import compact
from megatron_ext.training.loop import EXIT_OK, Data
from megatron_ext.training.pretrain import MakeFamilies, check_run, pretrain, process_group, resolve, train
from megatron_ext.training.run_options import RunOptions
from megatron_ext.training.series import config_in


def run_progressive(
    config: ProgressiveRunConfig,
    make_others: MakeFamilies[ProgressiveRunConfig] = lambda config, tokenizer: [],
) -> int:
    """Runs progressive training.

    Args:
        config: the configuration of the training run.
        make_others: builds the other model families of a phase from the phase's configuration. Their parameters in the
            trunk's layers are carried over; each model family decides whether its parameters are trained.

    Returns:
        The process's exit code.

    Raises:
        ValueError, OSError: a user error; the message is one line.
    """
    if config.training.dry_run:
        phases = _phases(config, planned_world_size(config))
        if process_groups.rank() == 0:
            print(f"Dry run of the last phase: {phases[-1].title}, {phases[-1].steps} steps.")
        return pretrain(config_of(config, phases[-1]), partial(_planned_families, phases[-1]))
    phases = _phases(config, process_groups.world_size())
    check_settings(config, phases)
    tokenizer = check_run(resolve(config_of(config, phases[-1])), partial(_check_with_tokenizer, config))
    with process_group(config.parallel, config.training, config.checkpoint):
        return Growth(config, phases, tokenizer, make_others=make_others).run()


def _check_with_tokenizer(config: ProgressiveRunConfig, tokenizer: Tokenizer) -> None:
    """Raises `ValueError` if --mask-token-id is invalid, or if --cache-dir belongs to another run."""
    progressive = config.progressive
    if progressive.masks_tokens:
        mask_token_of(tokenizer, progressive.mask_token_id)
    check_cache_directory(progressive, _identity(config, tokenizer))


def _planned_families(phase: Phase, config: ProgressiveRunConfig, tokenizer: Tokenizer) -> list[Family]:
    """Returns the model family of a phase for a dry run; adds the mask token to the tokenizer."""
    own = config.progressive
    mask = reserve_mask_token(tokenizer, own.mask_token_id) if own.masks_tokens else None
    return [ProgressiveFamily(own, phase.rack, phase.trains, mask_token_id=mask)]


def _identity(config: ProgressiveRunConfig, tokenizer: Tokenizer) -> dict[str, Any]:
    """Returns the values that distinguish this run's activation cache from the caches of other runs."""
    model = group_to_dict(config.model)
    del model["num_layers"]
    return {"seed": config.training.seed, "tokenizer": tokenizer.fingerprint(), **model}


def _phases(config: ProgressiveRunConfig, world_size: int) -> list[Phase]:
    training = config.training
    copies = config.parallel.data_parallel_size(world_size)
    if training.num_epochs is not None:
        training = training.with_epochs(epoch_samples(config.data, config.model.seq_length), copies)
    phases = list_phases(
        config.progressive,
        training,
        config.optimizer,
        sizes=training.batch_sizes(training.resolved_global_batch_size(copies)),
        sequence_length=config.model.seq_length,
    )
    check_phases(config, phases, world_size)
    return phases


_RUN_PRECISION = {"fp32": "full", "bf16": "bfloat16", "fp16": "half"}
"""Maps the run's precision to the name of the same precision for a stack."""


class Growth:
    """A progressive training run in its process group: runs the phases one after the other."""

    def __init__(
        self,
        config: ProgressiveRunConfig,
        phases: list[Phase],
        tokenizer: Tokenizer,
        *,
        data: Data | None = None,
        frozen: Mapping[int, str] | None = None,
        make_others: MakeFamilies[ProgressiveRunConfig] = lambda config, tokenizer: [],
    ) -> None:
        """Collective: every rank must create an instance.

        Args:
            config: the configuration of the training run; `checkpoint.save` is its directory.
            phases: all phases.
            tokenizer: the tokenizer of the data; a mask token is added to it if the objective needs one.
            data: the caller's batches; None to read the datasets of --data-path.
            frozen: maps the index of a stack to `frozen` or `qlora`; overrides the trunk strategy for these stacks.
            make_others: see `run_progressive`.

        Raises:
            ValueError: the directory contains another training run.
        """
        self.data = data
        self.frozen = dict(frozen or {})
        self.make_others = make_others
        self.losses: dict[str, list[float]] = {}
        """Losses of the steps of each phase that this process has run, by name of the phase."""

        self.config = config
        self.phases = phases
        self.tokenizer = tokenizer
        own = config.progressive
        self.mask_token_id = reserve_mask_token(tokenizer, own.mask_token_id) if own.masks_tokens else None
        self.cache_identity = _identity(config, tokenizer)
        assert config.checkpoint.save is not None
        self.save = Path(config.checkpoint.save)
        self.started = time.monotonic()
        self.history = on_first_rank(lambda: check_history(self.save, phases))
        copies = parallel_state.get_data_parallel_world_size()
        self.batch_sizes = config.training.batch_sizes(config.training.resolved_global_batch_size(copies))

    def run(self) -> int:
        """Trains the remaining phases; returns the exit code. Collective."""
        left = [phase for phase in self.phases if self.history.of(phase.name) is None]
        if not left:
            print_on_first_rank("training is already complete; to add stacks, increase --target-stacks")
        run = _RUN_PRECISION[self.config.training.precision]
        if left and run != "full" and any(s.precision == "full" for s in left[-1].rack.stacks):
            name = self.config.training.precision
            print_on_first_rank(
                f"--{name}: stacks of precision full are stored and computed in fp32; "
                f"pass --new-stack-precision {run} for {name}"
            )
        for phase in left:
            print_on_first_rank(f"{phase.name}: {phase.title}, {phase.steps} steps")
            config = self.config.progressive
            reason = why_uncached(phase.rack, config, phase.trains) if config.cache_activations else None
            if reason is not None:
                print_on_first_rank(f"no activation cache: {reason}")
            code = self._train(phase)
            if code != EXIT_OK or self._is_stopped(phase):
                return code
            gc.collect()
        # Publish the rack even if no phase was left, because an earlier command may have been killed before it
        # published the rack.
        folder = on_first_rank(lambda: publish_rack(self.save, self.phases[-1].name))
        print_on_first_rank(f"the rack is complete: {folder}")
        return EXIT_OK

    def _is_stopped(self, phase: Phase) -> bool:
        """Returns whether the command must stop after the phase: it was interrupted, or ended at an exit interval."""
        finished = self.history.of(phase.name)
        interval = self.config.training.exit_interval
        is_last = phase is self.phases[-1]
        return finished is None or (
            not is_last and interval is not None and finished.iteration % interval == 0
        )

    def _train(self, phase: Phase) -> int:
        place = len(self.history.finished)
        before = self.history.finished[-1] if place else None
        first = before.iteration if before is not None else 0
        on_first_rank(lambda: self._begin(phase))
        config = self._config_of(phase, first)
        family = ProgressiveFamily(
            config.progressive,
            phase.rack,
            phase.trains,
            trunk=self._trunk(place),
            mask_token_id=self.mask_token_id,
            cache_identity=self.cache_identity,
            frozen=self.frozen,
            seed=config.training.seed,
            tokens_in=lambda steps: self.batch_sizes.samples_in(steps) * config.model.seq_length,
            statistics_interval=config.logging.log_interval,
        )
        # The first phase keeps the random streams of a plain run, so that --no-enabled equals plain pretraining.
        if first or self.data is not None:
            random_state.reseed(config.training.seed, first)
        options = RunOptions(
            prepare=partial(self._report, phase, family),
            begin=family.carry_optimizer_state,
            finish=partial(self._finish, phase, family, first, time.monotonic()),
            first_sample=before.consumed_samples if before is not None else 0,
            first_iteration=first,
            data=self.data,
            samples=self.batch_sizes.samples_in(sum(each.steps for each in self.phases)),
            epoch_samples=self.config.progressive.epoch_samples,
        )
        families: list[Family] = [*self.make_others(config, self.tokenizer), family]
        try:
            return train(config, self.tokenizer, families, options)
        finally:
            family.close()
            self.losses[phase.name] = family.losses

    def _begin(self, phase: Phase) -> None:
        write_history(self.save, replace(self.history, rack=phase.rack))

    def _trunk(self, place: int) -> Trunk | None:
        if not place:
            return None
        phase = self.phases[place - 1]
        folder = on_first_rank(lambda: finished_checkpoint(self.save, phase.name))
        return Trunk(folder=folder.resolve(), rack=phase.rack, trains=phase.trains)

    def _config_of(self, phase: Phase, first: int) -> ProgressiveRunConfig:
        own = config_in(config_of(self.config, phase), self.save / phase.name, self.started)
        return replace(own, training=replace(own.training, train_iters=first + phase.steps))

    def _report(self, phase: Phase, family: ProgressiveFamily, chunks: list[GPTModel]) -> None:
        """Prints the numbers of trained and frozen parameters, and each stack's precision, treatment and bytes."""
        sizes = stack_bytes(chunks, phase.rack)
        counts = family.parameters
        precision = _RUN_PRECISION[self.config.training.precision]
        found = stack_descriptions(phase.rack, family.plan, _cached_layers(family), precision)
        weights = ", ".join(
            f"stack {stack.index} ({found[stack.index]}) {compact(sizes[stack.index])}B"
            for stack in phase.rack.stacks
        )
        print_on_first_rank(
            f"{phase.name}: {counts['trainable']:,} parameters are trained, {counts['frozen']:,} are frozen; weights "
            f"per rank, from the embedding to the head: {weights}"
        )

    def _finish(
        self,
        phase: Phase,
        family: ProgressiveFamily,
        first: int,
        started: float,
        chunks: list[GPTModel],
        progress: TrainingProgress,
    ) -> None:
        sizes = stack_bytes(chunks, phase.rack)
        peak = max(gather_or_raise(lambda: memory_use().peak))
        finished = Finished(
            name=phase.name,
            first_iteration=first,
            iteration=progress.iteration,
            consumed_samples=progress.consumed_samples,
            layers=phase.rack.num_layers,
            trainable_parameters=family.parameters["trainable"],
            frozen_parameters=family.parameters["frozen"],
            stack_bytes=[sizes[index] for index in sorted(sizes)],
            peak_memory_bytes=peak,
            seconds=round(time.monotonic() - started, 3),
            stack_treatments=stack_treatments(phase.rack, family.plan, _cached_layers(family)),
            stack_precisions=[
                family.plan[phase.rack.layers_of(index).start].precision for index in sorted(sizes)
            ],
        )
        history = History(rack=phase.rack, finished=(*self.history.finished, finished))
        on_first_rank(lambda: write_history(self.save, history))
        self.history = history
        dist.barrier()


def _cached_layers(family: ProgressiveFamily) -> int:
    return family.trunk_layers if family.cache is not None else 0

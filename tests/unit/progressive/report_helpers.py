"""The files of two small trainings, written by hand: what every figure of them is can be told without the program.

grown    stack 0 for steps 1-4 (1 s, 1 s, 3 s, 3 s), stack 1 of 2 layers prepended for steps 5-8 (0.5 s each)
whole    steps 1-8 end to end, 2 s each
"""

import json
from dataclasses import replace
from pathlib import Path

from megatron_ext.progressive.growth.rack import Rack
from megatron_ext.progressive.growth.training_history import Finished, History, write_history
from megatron_ext.training.logging.tensorboard_writer import TensorBoard

RACK = Rack().grown("append", 2, "full").grown("prepend", 2, "bfloat16")
DATASET = "held_out"


def phase(name: str, first: int, last: int, stacks: list[str], *, peak: int = 300) -> Finished:
    """A finished phase of two layers and 1 MiB a stack; its peak memory in MiB."""
    return Finished(
        name=f"progressive_{name}",
        first_iteration=first,
        iteration=last,
        consumed_samples=4 * last,
        layers=2 * len(stacks),
        trainable_parameters=1000 * stacks.count("trained"),
        frozen_parameters=1000 * (len(stacks) - stacks.count("trained")),
        stack_bytes=[2**20] * len(stacks),
        peak_memory_bytes=peak * 2**20,
        seconds=7.0,
        stack_treatments=stacks,
        stack_precisions=list(("full", "bfloat16")[: len(stacks)]),
    )


GROWN = (phase("stack_0", 0, 4, ["trained"]), phase("stack_1", 4, 8, ["frozen", "trained"]))
WHOLE = (phase("end_to_end", 0, 8, ["trained", "trained"], peak=600),)


def write_grown(folder: Path) -> Path:
    """The grown training, logged every two steps in the first phase."""
    write_history(folder, History(rack=RACK, finished=GROWN))
    log = TensorBoard(str(folder / "tensorboard"))
    for step, seconds in ((2, 1.0), (4, 3.0)):
        log.scalar("iteration-time", seconds, step)
        log.scalar("lm loss", 8.0 / step, step)
    log.scalar("lm loss validation", 3.0, 4)
    log.close()
    log = TensorBoard(str(folder / "tensorboard"), iteration=4)
    for step in range(5, 9):
        log.scalar("iteration-time", 0.5, step)
        log.scalar("lm loss", 8.0 / step, step)
        log.scalar("progressive/total_tokens", 64.0 * step, step)
    log.scalar("lm loss validation", 2.0, 8)
    log.close()
    (folder / "evaluation.json").write_text(json.dumps({DATASET: {"loss": 2.25, "tokens": 500}}))
    return folder


def write_whole(folder: Path) -> Path:
    """The end-to-end training."""
    write_history(folder, History(rack=RACK, finished=WHOLE))
    log = TensorBoard(str(folder / "tensorboard"))
    for step in range(1, 9):
        log.scalar("iteration-time", 2.0, step)
    for step, loss in ((4, 4.0), (8, 2.0)):
        log.scalar("lm loss validation", loss, step)
    log.close()
    return folder


def of_before(finished: Finished) -> Finished:
    """A phase of a program that did not note what it did with each stack."""
    return replace(finished, stack_treatments=[], stack_precisions=[])

"""Prints the results of a rehearsed rank: memory, communication, waits, and an estimate of a step's time."""

from collections import Counter, defaultdict
from dataclasses import dataclass
from functools import cached_property

from rich import box
from rich.console import Console
from rich.table import Table

from megatron_ext.config.groups.model_config import ModelConfig
from megatron_ext.config.groups.parallel_config import ParallelConfig
from megatron_ext.config.groups.training_config import TrainingConfig
from megatron_ext.platform.run_phases import (
    EVALUATION,
    FORWARD_BACKWARD,
    GRADIENTS,
    MODEL,
    OPTIMIZER,
    UPDATE,
)
from megatron_ext.rehearsal.recording.activity import Activity, Call, Total
from megatron_ext.rehearsal.recording.memory_log import GRADIENTS as GRADIENT_MEMORY
from megatron_ext.rehearsal.recording.memory_log import KINDS, Peak
from megatron_ext.rehearsal.recording.recorder import Recorder
from megatron_ext.rehearsal.simulated.devices import GPUS_PER_HOST, Device
from megatron_ext.rehearsal.step_time import (
    StepTime,
    calls_in,
    seconds,
    step_time,
    traffic_of,
)
from megatron_ext.training.logging.progress_line import binary_size, compact

_PLAIN_WIDTH = 120  # columns if the output is not a terminal
_PLACES = 12
_BETWEEN_TWO = ("send", "receive")
_SCALAR_BYTES = 1024  # a smaller message is a loss, a norm or a signal, not a group's main traffic
_ROOM = 0.1  # share of the memory that CUDA, NCCL and fragmentation may take: a rule of thumb


@dataclass(frozen=True, kw_only=True)
class Rehearsal:
    """A finished rehearsal of one rank."""

    rank: int
    processes: int
    parallel: ParallelConfig
    training: TrainingConfig
    sequence_length: int
    device: Device
    kernels: str
    """Line of the report that lists the fused kernels."""

    recorder: Recorder
    seconds: float
    """Processor time of the rehearsal's process."""

    host_bytes: int
    """Largest host memory that the rehearsal's process has used."""

    @property
    def step(self) -> str:
        """The name under which the recorder counts the last step, such as `step 2`."""
        return f"step {self.recorder.activity.step}"

    @property
    def micro_batches(self) -> int:
        """Number of micro-batches that each copy of the model processes in a step."""
        copies = self.parallel.data_parallel_size(self.processes)
        batch = self.training.resolved_global_batch_size(copies)
        return batch // (self.training.micro_batch_size * copies)

    @property
    def bubble(self) -> float:
        """Idle time of the pipeline divided by its busy time: (P - 1) / (m v) for P stages, m micro-batches and v
        chunks per stage.
        """
        stages = self.parallel.pipeline_model_parallel_size
        return (stages - 1) / (self.micro_batches * max(1, self.recorder.chunks))

    @property
    def has_gradients(self) -> bool:
        """Whether the rank trains parameters."""
        return any(each.kind == GRADIENT_MEMORY for each in self.recorder.memory.allocations)

    @cached_property
    def peak(self) -> Peak:
        """The allocations at the moment of largest memory, found by replaying all allocations."""
        return self.recorder.memory.at_peak()

    def peak_of_steps(self) -> Peak:
        """Returns the allocations at the moment of largest memory within the training steps."""
        return self.recorder.memory.at_peak(
            [f"step {number + 1}" for number in range(self.recorder.activity.step)]
        )

    def time(self) -> StepTime:
        """Returns the estimated time of a step."""
        return step_time(self.recorder, self.device, self.step, self.bubble)


def fused_kernels(model: ModelConfig, parallel: ParallelConfig) -> str:
    """Returns a line that lists the fused kernels of a rehearsal, and those that Transformer Engine would add."""
    by_engine = parallel.cross_entropy_loss_fusion or parallel.tensor_model_parallel_size == 1
    own = [
        *(["attention"] if model.attention_backend == "sdpa" else []),
        "norms",
        *(["cross-entropy"] if by_engine else []),
        "bias + dropout + residual",
        "AdamW",
    ]
    line = f"fused kernels: {', '.join(own)}"
    if model.transformer_impl == "local":
        return line
    more = ["norms with the linear layers after them"]
    more += ["rotary embedding"] if model.position_embedding_type == "rope" else []
    more += ["SwiGLU"] if model.swiglu else []
    return f"{line}; also {', '.join(more)} if Transformer Engine is installed, which is not rehearsed"


def print_report(rehearsal: Rehearsal) -> None:
    """Prints the report to standard output."""
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = _PLAIN_WIDTH
    peak = rehearsal.peak
    console.print(_header(rehearsal))
    unit = "GiB" if peak.size >= 2**30 else "MiB"
    console.print(_phase_table(rehearsal.recorder, unit))
    in_steps = rehearsal.peak_of_steps()
    for each in (peak,) if peak.size == in_steps.size else (peak, in_steps):
        console.print(_place_table(each, unit))
    console.print(_verdict(rehearsal))
    console.print(_communication_table(rehearsal))
    console.print(_wait_table(rehearsal.recorder.activity, rehearsal.step))
    console.print(_time_text(rehearsal))
    console.print(_traffic_table(rehearsal))
    for line in oddities(rehearsal):
        console.print(f"note: {line}")


def place_of(rank: int, processes: int, parallel: ParallelConfig) -> tuple[int, int, int, int]:
    """Returns a rank's index in its tensor, context, data and pipeline groups, for megatron-core's order of ranks."""
    tensor, context = parallel.tensor_model_parallel_size, parallel.context_parallel_size
    copies = parallel.data_parallel_size(processes)
    return (
        rank % tensor,
        rank // tensor % context,
        rank // (tensor * context) % copies,
        rank // (tensor * context * copies),
    )


def oddities(rehearsal: Rehearsal) -> list[str]:
    """Returns lines about suspicious behaviour in a step: CPU tensors in collectives, groups that no step uses."""
    activity = rehearsal.recorder.activity
    found = [
        f"{text} ({count} times in {scope})"
        for (scope, text), count in sorted(activity.oddities.items())
        if scope in (rehearsal.step, "evaluation")
    ]
    return [*found, *(f"no step {what}" for what in _unused_groups(rehearsal))]


def _unused_groups(rehearsal: Rehearsal) -> list[str]:
    """Returns lines about parallel groups of the rank over which a step should communicate but does not."""
    parallel, copies = rehearsal.parallel, rehearsal.parallel.data_parallel_size(rehearsal.processes)
    context = parallel.context_parallel_size
    calls = [
        call
        for call, total in calls_in(rehearsal.recorder.activity, rehearsal.step).items()
        if total.bytes > _SCALAR_BYTES * total.calls
    ]
    reduced = [call for call in calls if call.operation in ("all-reduce", "reduce-scatter")]
    # With two stages, each stage receives over the group of all ranks.
    between_stages = any(call.operation in _BETWEEN_TWO for call in calls)
    done = {
        f"sends activations over TP (size {parallel.tensor_model_parallel_size})": (
            parallel.tensor_model_parallel_size == 1 or _over("TP", calls)
        ),
        f"sends activations over PP (size {parallel.pipeline_model_parallel_size})": (
            parallel.pipeline_model_parallel_size == 1 or between_stages
        ),
        f"sends keys and values over CP (size {context})": (
            context == 1 or _over("CP", [call for call in calls if call.operation == "all-gather"])
        ),
        # With one copy of the model, gradients are reduced over the same group as the context-parallel messages.
        f"reduces gradients over DP (size {copies * context})": (
            copies * context == 1
            or not rehearsal.has_gradients
            or _over("DP" if copies > 1 else "CP", reduced)
        ),
    }
    return [what for what, is_done in done.items() if not is_done]


def _over(part: str, calls: list[Call]) -> bool:
    return any(part in call.group.split(" x ") for call in calls)


def _header(rehearsal: Rehearsal) -> str:
    parallel, device, recorder = rehearsal.parallel, rehearsal.device, rehearsal.recorder
    tensor, context, copy, stage = place_of(rehearsal.rank, rehearsal.processes, parallel)
    sizes = [
        f"tensor {tensor} of {parallel.tensor_model_parallel_size}",
        f"pipeline stage {stage} of {parallel.pipeline_model_parallel_size}",
        f"data {copy} of {parallel.data_parallel_size(rehearsal.processes)}",
    ]
    if parallel.context_parallel_size > 1:
        sizes.append(f"context {context} of {parallel.context_parallel_size}")
    flops = sum(count for (scope, _, _), count in recorder.flops.items() if scope == rehearsal.step)
    return (
        f"Rehearsal of rank {rehearsal.rank} of {rehearsal.processes} ({', '.join(sizes)})\n"
        f"on a simulated {device.name} with {binary_size(device.memory)}, "
        f"{rehearsal.training.precision}; tensors have no values, so losses mean nothing\n"
        f"{recorder.parameters:,} parameters on this rank; "
        f"{rehearsal.micro_batches} x {rehearsal.training.micro_batch_size} sequences per step "
        "(micro-batches x size), "
        f"{compact(flops)} FLOPs on this rank\n"
        f"{recorder.activity.groups:,} process groups are created at the start, which takes time on a large cluster\n"
        f"{rehearsal.kernels}\n"
        f"rehearsed with {rehearsal.seconds:.1f} s of processor time and "
        f"{binary_size(rehearsal.host_bytes)} of memory"
    )


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE, safe_box=True)
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index == 0 else "right")
    return table


def _phase_table(recorder: Recorder, unit: str) -> Table:
    table = _table(f"Largest memory of each phase, in {unit}", "phase", *KINDS, "total")
    scopes = [f"step {number + 1}" for number in range(recorder.activity.step)]
    rows: list[tuple[str, list[str] | None, str]] = [
        (name, None, name) for name in (MODEL, GRADIENTS, OPTIMIZER)
    ]
    rows += [(f"{scope}, {name}", [scope], name) for scope in scopes for name in (FORWARD_BACKWARD, UPDATE)]
    rows += [(EVALUATION, [EVALUATION], EVALUATION)]
    for title, scope, phase in rows:
        peak = recorder.memory.at_peak(scope, phase)
        if peak.size:
            table.add_row(title, *(_size(peak.kinds[kind], unit) for kind in KINDS), _size(peak.size, unit))
    return table


def _place_table(peak: Peak, unit: str) -> Table:
    table = _table(f"Allocated at the peak of {', '.join(peak.moment)}, by place", "kind", unit, "place")
    table.columns[2].justify = "left"
    common = peak.places.most_common()
    for (kind, place), size in common[:_PLACES]:
        table.add_row(kind, _size(size, unit), place)
    if len(common) > _PLACES:
        rest = sum(size for _, size in common[_PLACES:])
        table.add_row("", _size(rest, unit), f"{len(common) - _PLACES} more places")
    return table


def fits(peak: int, device: Device) -> str:
    """Returns `fits`, `may not fit` (within a tenth of the device's memory) or `does not fit`."""
    if peak > device.memory:
        return "does not fit"
    return "may not fit" if peak > (1 - _ROOM) * device.memory else "fits"


def _verdict(rehearsal: Rehearsal) -> str:
    peak, device = rehearsal.peak, rehearsal.device
    found = fits(peak.size, device)
    return (
        f"Peak of torch's tensors: {_gib(peak.size)} of {_gib(device.memory)} GiB ({peak.size / device.memory:.0%}): "
        f"{found}. Not counted: the CUDA context, NCCL's and cuBLAS's buffers, fragmentation."
        + ("" if found == "fits" else f"\n{_less_memory(rehearsal)}")
    )


def _less_memory(rehearsal: Rehearsal) -> str:
    """Returns a line that lists the settings that would lower the peak and are not already set."""
    parallel = rehearsal.parallel
    has_tensor = parallel.tensor_model_parallel_size > 1
    ways = {
        "a larger --tensor-model-parallel-size or --pipeline-model-parallel-size": True,
        "--use-distributed-optimizer": not parallel.use_distributed_optimizer,
        "--sequence-parallel": has_tensor and not parallel.sequence_parallel,
        "--recompute-granularity full": parallel.recompute_granularity != "full",
        "a smaller --micro-batch-size": rehearsal.training.micro_batch_size > 1,
    }
    return f"To lower the peak: {', '.join(way for way, helps in ways.items() if helps)}; see docs/parallelism.md."


def _communication_table(rehearsal: Rehearsal) -> Table:
    columns = ("group", "ranks", "on hosts", "operation", "calls", "MiB", "s", "overlaps")
    table = _table(f"Communication in {rehearsal.step}", *columns)
    merged: dict[tuple[str, int, int, str, bool], Total] = defaultdict(Total)
    times: dict[tuple[str, int, int, str, bool], float] = defaultdict(float)
    for call, total in calls_in(rehearsal.recorder.activity, rehearsal.step).items():
        sort = f"{call.operation}{'' if call.device == 'cuda' else f' ({call.device})'}"
        key = (call.group, call.size, call.hosts, sort, call.asynchronous)
        merged[key].calls += total.calls
        merged[key].bytes += total.bytes
        times[key] += seconds(call, total, rehearsal.device)
    for key, total in sorted(merged.items()):
        group, size, hosts, sort, hidden = key
        amount = (str(total.calls), _mib(total.bytes), f"{times[key]:.4f}")
        table.add_row(group, str(size), str(hosts), sort, *amount, "yes" if hidden else "no")
    return table


def _traffic_table(rehearsal: Rehearsal) -> Table:
    table = _table(f"Other operations in {rehearsal.step}, by place", "s", "GiB", "place")
    table.columns[2].justify = "left"
    places: Counter[str] = Counter()
    for (_, place), size in traffic_of(rehearsal.recorder, rehearsal.step).items():
        places[place] += size
    common = places.most_common()
    rows = [(place, size) for place, size in common[:_PLACES]]
    if len(common) > _PLACES:
        rows.append((f"{len(common) - _PLACES} more places", sum(size for _, size in common[_PLACES:])))
    for place, size in rows:
        table.add_row(f"{size / rehearsal.device.bandwidth:.4f}", _gib(size), place)
    return table


def _wait_table(activity: Activity, scope: str) -> Table:
    waits = Counter({(kind, place): n for (of, kind, place), n in activity.waits.items() if of == scope})
    table = _table(f"Host waits for the device, {waits.total()} in {scope}", "kind", "times", "place")
    table.columns[2].justify = "left"
    for (kind, place), number in waits.most_common():
        table.add_row(kind, str(number), place)
    return table


def _time_text(rehearsal: Rehearsal) -> str:
    time, device = rehearsal.time(), rehearsal.device
    parts = (
        f"matrix products and attention {time.products:.3f} s at the peak rate",
        f"other operations {time.other:.3f} s at {device.bandwidth / 1e12:.2f} TB/s",
        f"communication {time.waited:.3f} s (another {time.hidden:.3f} s overlap with computation) at "
        f"{device.link / 1e9:.0f} GB/s within a host and {device.network / 1e9:.0f} GB/s per GPU between hosts, of "
        f"{GPUS_PER_HOST} GPUs each",
        f"pipeline bubble {time.bubble:.1%} of the time of the micro-batches, {time.idle:.3f} s, if "
        "all stages take as "
        "long as this one",
        f"update {time.update:.3f} s",
    )
    listed = "".join(f"\n  {part}" for part in parts)
    copies = rehearsal.parallel.data_parallel_size(rehearsal.processes)
    tokens = rehearsal.training.resolved_global_batch_size(copies) * rehearsal.sequence_length
    return (
        f"Step: at least {time.total:.3f} s, if every kernel reached the device's rates; at most "
        f"{tokens / time.total / rehearsal.processes:,.0f} tokens/s per GPU. Products take "
        f"{time.products / time.total:.0%} of this time:{listed}"
    )


def _mib(size: float) -> str:
    return f"{size / 2**20:,.1f}"


def _size(size: float, unit: str) -> str:
    return _gib(size) if unit == "GiB" else _mib(size)


def _gib(size: float) -> str:
    return f"{size / 2**30:,.2f}"

"""Chooses what to measure, checks every provider, and measures those that are right."""

from __future__ import annotations

import datetime
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from bmtard import build_info
from bmtard.training.report import machine

from .cuda import MAX_COPIES, CudaTimer, copies_for_cold
from .report import Measure, Record, Report
from .shapes import sweep_shapes
from .spec import DTYPES, Function, Inputs, Op, Provider, Shape, Spec
from .timing import (
    Block,
    call,
    copy_bandwidth,
    cpu_clock,
    free_memory,
    gradients,
    interleave,
    paired_ratio,
    peak_flops,
    plain_block,
    quantile,
)

REFERENCE = "bmtard"
TOLERANCE = 0.1
"""Of a ratio, relative."""
HALF_SHAPE = "imagenet"
PEERS = ("liger_kernel", "quack-kernels", "scikit-learn", "triton", "numpy")


@dataclass(frozen=True, kw_only=True)
class Preset:
    seconds: float
    """For each op, shape, dtype and pass, all providers together."""
    min_rounds: int
    dtypes: tuple[str, ...]
    half: tuple[str, ...] = ()
    """Dtypes beyond those, on the shape HALF_SHAPE alone."""
    sweep: bool
    tolerance: float = TOLERANCE
    """Measuring goes on until the intervals of the ratios are this narrow."""

    def adapted(self, selection: Selection) -> Preset:
        """With what the selection says of time and tolerance."""
        seconds = self.seconds if selection.seconds is None else selection.seconds
        return replace(self, seconds=seconds, tolerance=selection.tolerance)

    def dtypes_of(self, shape: Shape) -> tuple[str, ...]:
        return self.dtypes + (self.half if shape.name == HALF_SHAPE else ())


PRESETS = {
    "quick": Preset(seconds=0.25, min_rounds=9, dtypes=("float32",), sweep=False),
    "default": Preset(
        seconds=0.8, min_rounds=15, dtypes=("float32",), half=("bfloat16", "float16"), sweep=True
    ),
    "full": Preset(seconds=3.0, min_rounds=31, dtypes=tuple(DTYPES), sweep=True),
}
SWEEP = Preset(seconds=0.12, min_rounds=8, dtypes=("float32",), sweep=True)


@dataclass(frozen=True, kw_only=True)
class Selection:
    """What to measure; an empty tuple chooses what the preset has."""

    preset: str = "default"
    ops: tuple[str, ...] = ()
    shapes: tuple[str, ...] = ()
    """Names, or sizes such as "512x1000"."""
    dtypes: tuple[str, ...] = ()
    passes: tuple[str, ...] = ()
    providers: tuple[str, ...] = ()
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    max_memory: int | None = None
    """Bytes that one case may need; by default half of what is free."""
    seconds: float | None = None
    tolerance: float = TOLERANCE
    sweep: bool | None = None


@dataclass(frozen=True, kw_only=True)
class Group:
    """Passes that share inputs and oracle."""

    op: Op
    spec: Spec
    dtype: str
    passes: tuple[str, ...]
    providers: tuple[str, ...]
    """Those that offer the op and are not absent."""
    preset: Preset


def choose(selection: Selection, ops: dict[str, Op], providers: dict[str, Provider]) -> list[Group]:
    """The groups of a run, in order. Raises ValueError where the selection makes no sense."""
    _check_names("--op", selection.ops, ops)
    _check_names("--provider", selection.providers, providers)
    preset = PRESETS[selection.preset].adapted(selection)
    chosen = [
        op
        for op in ops.values()
        if (op.name in selection.ops if selection.ops else selection.preset in op.presets)
    ]
    known = {s.name for op in ops.values() for s in op.shapes("full", selection.device)}
    sizes = {name: _size(name) for name in selection.shapes if name not in known}
    for name, dims in sizes.items():
        if dims is None:
            raise ValueError(
                f"--shape must be one of {', '.join(sorted(known))} or a size such as 512x1000, "
                f"got {name!r}"
            )
    available = [
        name
        for name, provider in providers.items()
        if not provider.absent(selection.device)
        and (name in selection.providers or not selection.providers)
    ]
    groups = []
    for op in chosen:
        shapes = op.shapes("full" if selection.shapes else selection.preset, selection.device)
        if selection.shapes:
            shapes = [s for s in shapes if s.name in selection.shapes] + [
                Shape(name=name, dims=dims)
                for name, dims in sizes.items()
                if dims is not None and len(dims) == op.rank
            ]
        wanted = selection.passes or op.preset_passes(selection.preset)
        passes = tuple(p for p in op.passes if p in wanted)
        offered = tuple(name for name in available if providers[name].offers(op.name))
        if not (passes and offered):
            continue
        groups += [
            Group(
                op=op,
                spec=_spec(shape, dtype, selection.device),
                dtype=dtype,
                passes=passes,
                providers=offered,
                preset=preset,
            )
            for shape in shapes
            for dtype in selection.dtypes or preset.dtypes_of(shape)
            if dtype in op.dtypes
        ]
    default_sweep = preset.sweep and not selection.shapes
    if selection.sweep if selection.sweep is not None else default_sweep:
        groups += _sweep_groups(chosen, selection, available, providers)
    if not groups:
        raise ValueError(
            "nothing is left to measure: "
            + "; ".join(f"{op.name} has the passes {', '.join(op.passes)}" for op in chosen)
            + f"; available here: {', '.join(available) or 'no provider chosen'}"
        )
    return groups


def _sweep_groups(
    chosen: list[Op],
    selection: Selection,
    available: list[str],
    providers: dict[str, Provider],
) -> Iterator[Group]:
    allowed = selection.providers or (REFERENCE,)
    dtype = (selection.dtypes or SWEEP.dtypes)[0]
    for op in chosen:
        offered = tuple(n for n in available if n in allowed and providers[n].offers(op.name))
        passes = tuple(p for p in selection.passes if p in op.passes)[-1:] or op.passes[-1:]
        for shape in sweep_shapes(op) if offered else ():
            yield Group(
                op=op,
                spec=_spec(shape, dtype, selection.device),
                dtype=dtype,
                passes=passes,
                providers=offered,
                preset=SWEEP.adapted(selection),
            )


def _spec(shape: Shape, dtype: str, device: torch.device) -> Spec:
    return Spec(shape=shape, dtype=DTYPES[dtype], device=device)


def _check_names(option: str, names: Sequence[str], known: dict[str, Any]) -> None:
    for name in names:
        if name not in known:
            raise ValueError(f"{option} must be one of {', '.join(known)}, got {name!r}")


def _size(text: str) -> tuple[int, ...] | None:
    parts = text.split("x")
    if len(parts) not in (2, 4) or not all(part.isdecimal() and int(part) > 0 for part in parts):
        return None
    return tuple(map(int, parts))


Progress = Callable[[int, int, str], None]
"""(groups done, groups in all, what comes now)."""


def run(
    selection: Selection,
    ops: dict[str, Op],
    providers: dict[str, Provider],
    *,
    command: str,
    progress: Progress = lambda done, total, text: None,
    keep: Callable[[Report], None] = lambda report: None,
) -> Report:
    """Measures the selection. Wrong, failed, absent and skipped providers are records too.

    ``keep`` gets the report so far after each op, shape, dtype and pass.
    """
    groups = choose(selection, ops, providers)
    device, began = selection.device, time.perf_counter()
    quick, seconds = selection.preset == "quick", min(0.3, selection.seconds or 0.3)
    progress(0, len(groups), "copy bandwidth")
    report = Report(
        command=command,
        date=datetime.datetime.now().isoformat(timespec="seconds"),
        preset=selection.preset,
        device=device.type,
        threads=torch.get_num_threads(),
        machine=described_machine(device),
        copy_bytes_per_second=copy_bandwidth(
            device, nbytes=1 << (26 if quick else 28), seconds=seconds
        ),
        peak_flops_per_second=peak_flops(device, seconds=seconds),
    )
    report.records += absent_records(groups, selection, providers)
    timer = CudaTimer(device) if device.type == "cuda" else None
    for index, group in enumerate(groups):
        shape = group.spec.shape
        text = f"{group.op.name} {shape.name} {shape} {group.dtype}"
        progress(index, len(groups), text)
        limit = selection.max_memory or free_memory(device) // 2
        report.records += measure_group(group, providers, limit, timer)
        report.seconds = round(time.perf_counter() - began, 1)
        keep(report)
        if timer is not None:
            torch.cuda.empty_cache()
    report.seconds = round(time.perf_counter() - began, 1)
    return report


def described_machine(device: torch.device) -> dict[str, Any]:
    described = machine()
    described["load"] = round(os.getloadavg()[0], 2)  # of others, when the run began
    described |= {name: found for name in PEERS if (found := _version(name))}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        described["gpu"] = properties.name
        described["gpu_memory_bytes"] = properties.total_memory
        described["l2_bytes"] = properties.L2_cache_size
        described["cuda"] = torch.version.cuda
        described["cuda_kernels"] = ", ".join(build_info().cuda_architectures) or "none"
    return described


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def absent_records(
    groups: Sequence[Group], selection: Selection, providers: dict[str, Provider]
) -> list[Record]:
    """A record for each op that a provider would offer if it were here."""
    found = []
    for op in dict.fromkeys(group.op for group in groups):
        for name, provider in providers.items():
            if selection.providers and name not in selection.providers:
                continue
            reason = provider.absent(selection.device)
            if reason and provider.offers(op.name):
                found.append(
                    Record(
                        op=op.name,
                        shape="",
                        dims=(),
                        teachers=0,
                        dtype="",
                        pass_="",
                        provider=name,
                        status="absent",
                        reason=reason,
                    )
                )
    return found


def measure_group(
    group: Group,
    providers: dict[str, Provider],
    max_memory: int,
    timer: CudaTimer | None,
) -> list[Record]:
    op, spec = group.op, group.spec
    records = {
        (pass_, name): Record(
            op=op.name,
            shape=spec.shape.name,
            dims=spec.shape.dims,
            teachers=spec.shape.teachers,
            dtype=group.dtype,
            pass_=pass_,
            provider=name,
            sweep=spec.shape.sweep,
            ideal_bytes=op.ideal_bytes(spec, pass_),
            flops=op.flops(spec, pass_),
        )
        for pass_ in group.passes
        for name in group.providers
    }
    needed = op.memory(spec)
    if needed > max_memory:
        for record in records.values():
            record.status = "skipped"
            record.reason = (
                f"needs about {needed / 2**30:.1f} GiB, --max-memory is {max_memory / 2**30:.1f}"
            )
        return list(records.values())
    try:
        check_and_measure(group, records, providers, timer)
    except torch.OutOfMemoryError as error:  # of a device; the kernel kills on the CPU
        for record in records.values():
            if record.status == "ok" and not record.measures:
                record.status, record.reason = "skipped", _one_line(error)
    return list(records.values())


def check_and_measure(
    group: Group,
    records: dict[tuple[str, str], Record],
    providers: dict[str, Provider],
    timer: CudaTimer | None,
) -> None:
    """Fills the records, by pass and provider, of one group."""
    op, spec = group.op, group.spec
    inputs = op.inputs(spec, 0)
    expected = op.oracle(inputs)
    for pass_ in group.passes:
        functions: dict[str, Function] = {}
        for name in group.providers:
            record = records[pass_, name]
            try:
                function = providers[name].build(op.name, spec)
                record.reason = check(op, expected, inputs, function, pass_)
            except Exception as error:  # of a peer, whatever it is
                record.status, record.reason = "failed", _one_line(error)
                continue
            if record.reason:
                record.status = "wrong"
            else:
                functions[name] = function
        pass_records = {name: records[pass_, name] for name in functions}
        measure(group, functions, pass_records, inputs, pass_, timer)


def check(op: Op, expected: Any, inputs: Inputs, function: Function, pass_: str) -> str:
    """Runs the op's trials; what is wrong with the last, or an empty string."""
    differentiated = pass_ in ("backward", "both")
    with torch.set_grad_enabled(pass_ != "forward"):
        for trial in op.trials(inputs):
            outputs = function(trial)
            grads = gradients(outputs, trial) if differentiated else None
    result = getattr(function, "result", None)
    with torch.no_grad():
        if result is not None:
            outputs = result(trial, outputs)
        return op.verify(expected, inputs, outputs, grads)


def measure(
    group: Group,
    functions: dict[str, Function],
    records: dict[str, Record],
    inputs: Inputs,
    pass_: str,
    timer: CudaTimer | None,
) -> None:
    """Fills the records of the providers that are right."""

    def timed(measure: str, blocks: dict[str, Block]) -> None:
        for name, each in collect(blocks, group.preset).items():
            records[name].measures[measure] = each

    if timer is None:
        name, clock = cpu_clock()
        timed(name, {n: plain_block(f, inputs, pass_, clock) for n, f in functions.items()})
    else:
        wall, wait = time.perf_counter, timer.synchronize
        timed("wall", {n: plain_block(f, inputs, pass_, wall, wait) for n, f in functions.items()})
        for name, function in functions.items():
            once = call(function, inputs, "both" if pass_ == "backward" else pass_)
            with torch.set_grad_enabled(pass_ != "forward"):
                records[name].peak_bytes = timer.peak_bytes(once)
                try:
                    counts = timer.counts(once)
                    records[name].kernels, records[name].waits = counts.kernels, counts.waits
                except RuntimeError as error:  # profiling may be forbidden
                    records[name].notes.append(f"kernels, waits: {_one_line(error)}")
        if group.op.capturable:
            sets = cold_inputs(group, inputs, timer)
            for measure, each in (("graph_hot", [inputs]), ("graph_cold", sets)):
                timed(measure, graph_blocks(functions, records, each, measure, pass_, timer))
    for name, function in functions.items():
        phases = getattr(function, "phases", None)
        if phases is not None:
            records[name].phases_ms = phases(inputs, group.preset.seconds)


def cold_inputs(group: Group, inputs: Inputs, timer: CudaTimer) -> list[Inputs]:
    """Enough sets of inputs to outgrow the L2; none where that takes too many."""
    nbytes = sum(tensor.nbytes for tensor in inputs.tensors())
    copies = copies_for_cold(nbytes, timer.l2_bytes)
    if copies > MAX_COPIES:
        return []
    return [inputs, *(group.op.inputs(group.spec, seed) for seed in range(1, copies))]


def graph_blocks(
    functions: dict[str, Function],
    records: dict[str, Record],
    inputs: list[Inputs],
    measure: str,
    pass_: str,
    timer: CudaTimer,
) -> dict[str, Block]:
    blocks = {}
    for name, function in functions.items():
        notes = records[name].notes
        if not inputs:
            notes.append(f"{measure}: the inputs are too small to outgrow the L2")
        elif (records[name].waits or 0.0) >= 0.5:
            notes.append(f"{measure}: it waits for the device, which a graph cannot hold")
        else:
            try:
                seconds = 1e-6 * records[name].measures["wall"].median_us
                blocks[name] = timer.graph_block(function, inputs, pass_, seconds)
            except Exception as error:  # of a peer that cannot be captured
                notes.append(f"{measure}: capture failed: {_one_line(error)}")
                timer.synchronize()
    return blocks


def collect(blocks: dict[str, Block], preset: Preset) -> dict[str, Measure]:
    def precise(times: dict[str, list[float]]) -> bool:
        others = [values for name, values in times.items() if name != REFERENCE]
        return REFERENCE not in times or all(
            paired_ratio(values, times[REFERENCE]).within(preset.tolerance) for values in others
        )

    times = {}
    if blocks:
        times = interleave(
            blocks, seconds=preset.seconds, min_rounds=preset.min_rounds, precise=precise
        )
    reference = times.get(REFERENCE)
    return {
        name: Measure(
            rounds=len(values),
            median_us=1e6 * quantile(values, 0.5),
            p20_us=1e6 * quantile(values, 0.2),
            p80_us=1e6 * quantile(values, 0.8),
            min_us=1e6 * min(values),
            ratio=paired_ratio(values, reference) if reference else None,
        )
        for name, values in times.items()
    }


def _one_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"

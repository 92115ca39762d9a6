"""The options of ``bmtard bench``."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch

from . import compare, plots, table
from .report import Report, load
from .spec import DTYPES, PASSES, catalogue
from .suite import REFERENCE, TOLERANCE, Selection, run
from .timing import LAST

BUSY = 0.3
"""Load for each core, when the run begins, above which it is noted."""

DESCRIPTION = """\
Times bmtard's ops against what they replace, on this machine. Every provider is checked against
float64 before it is timed. benchmarks/README.md tells how to read the tables."""


class _Parser(argparse.ArgumentParser):
    """Without the usage before what is wrong."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


def parser(prog: str) -> argparse.ArgumentParser:
    ops, providers = catalogue()
    made = _Parser(
        prog=prog,
        description=DESCRIPTION,
        epilog=f"ops: {', '.join(ops)}; providers: {', '.join(providers)}",
    )
    made.add_argument(
        "what", nargs="?", choices=["step"], help="one whole training step instead of the ops"
    )
    size = made.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="a look, within a minute")
    size.add_argument("--full", action="store_true", help="every shape, dtype and pass")

    def several(name: str, **options: Any) -> None:
        made.add_argument(name, nargs="+", action="extend", default=[], **options)

    several("--op", metavar="OP")
    several("--shape", metavar="SHAPE", help="names, or sizes: 512x1000")
    several("--dtype", choices=list(DTYPES))
    several("--pass", dest="passes", choices=PASSES[:3])
    several("--provider", metavar="PROVIDER")
    made.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    made.add_argument("--threads", type=int, help="of the CPU; default: as torch chooses")
    made.add_argument(
        "--max-memory", type=float, metavar="GIB", help="a case may need; default: half of the free"
    )
    made.add_argument("--seconds", type=float, help="for each op, shape, dtype and pass")
    made.add_argument(
        "--sweep", action=argparse.BooleanOptionalAction, help="time along N, C and K as well"
    )
    made.add_argument(
        "--json", type=Path, metavar="FILE", help="write the result here, case by case"
    )
    made.add_argument("--plot", type=Path, metavar="DIR", help="draw it here")
    made.add_argument(
        "--compare", type=Path, nargs="+", metavar=("OLD.json", "NEW.json"),
        help="name what became slower since OLD; exit status 1 if anything did, 3 if the "
        "measurements are too uncertain to tell. With NEW nothing is measured",
    )  # fmt: skip
    made.add_argument(
        "--tolerance", type=float, default=TOLERANCE,
        help="what --compare lets pass; measuring goes on until the intervals of the ratios are as "
        f"narrow, up to {LAST} times as long; default {TOLERANCE} (10 %%)",
    )  # fmt: skip
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status; errors of the user are one line on stderr."""
    prog = "python -m benchmarks"
    try:
        return bench(list(sys.argv[1:] if arguments is None else arguments), prog)
    except (ValueError, OSError, ImportError) as error:
        print(f"{prog}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def bench(arguments: list[str], prog: str) -> int:
    """Runs the command. Exit status 1: a provider was wrong, bmtard failed or became slower; 3:
    nothing is known to be slower, but the intervals are too wide for the tolerance."""
    options = parser(prog).parse_args(arguments)
    _check(options)
    display = table.Display()
    if options.compare and len(options.compare) == 2:
        before, after = (load(path) for path in options.compare)
        return _show_comparison(display, compare.compare(before, after, options.tolerance))
    old = load(options.compare[0]) if options.compare else None
    made = None
    if options.json:  # fails now rather than after the measurement
        options.json.parent.mkdir(parents=True, exist_ok=True)
        made = None if options.json.exists() else options.json
        options.json.touch()
    if options.plot:
        plots.check()
        options.plot.mkdir(parents=True, exist_ok=True)

    threads = torch.get_num_threads()
    torch.set_num_threads(options.threads or threads)
    try:
        report = _measure(options, display, shlex.join([*prog.split(), *arguments]))
    finally:
        torch.set_num_threads(threads)
        if made and not made.stat().st_size:  # nothing was measured
            made.unlink()
    if options.json:
        report.save(options.json)
    if options.plot:
        for path in plots.draw(report, options.plot):
            display.line(f"drawn: {path}")
    status = int(bool(report.wrong) or any(r.provider == "bmtard" for r in report.failed))
    if old is not None:
        comparison = compare.compare(old, report, options.tolerance)
        compared = _show_comparison(display, comparison)
        status = status or compared
    return status


def _check(options: argparse.Namespace) -> None:
    if options.threads is not None and not 1 <= options.threads <= 1024:
        raise ValueError(f"--threads must be from 1 to 1024, got {options.threads}")
    for name in ("seconds", "max_memory"):
        value = getattr(options, name)
        if value is not None and not 0 < value < 1e9:
            raise ValueError(f"--{name.replace('_', '-')} must be > 0 and < 1e9, got {value}")
    if not 0 <= options.tolerance < 10:
        raise ValueError(f"--tolerance must lie in [0, 10), got {options.tolerance}")
    if options.compare and len(options.compare) > 2:
        raise ValueError(f"--compare takes one or two files, got {len(options.compare)}")
    if options.what == "step" and options.op:
        raise ValueError(f"step measures the step alone, got --op {' '.join(options.op)}")
    if options.device == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            f"--device cuda: torch {torch.__version__} finds no CUDA device; nothing was measured"
        )


def _measure(options: argparse.Namespace, display: table.Display, command: str) -> Report:
    ops, providers = catalogue()
    selection = Selection(
        preset="quick" if options.quick else "full" if options.full else "default",
        ops=("bmtard_step",) if options.what == "step" else tuple(options.op),
        shapes=tuple(options.shape),
        dtypes=tuple(options.dtype),
        passes=tuple(options.passes),
        providers=tuple(options.provider),
        device=torch.device(options.device),
        max_memory=None if options.max_memory is None else int(options.max_memory * 2**30),
        seconds=options.seconds,
        tolerance=options.tolerance,
        sweep=options.sweep,
    )

    def keep(report: Report) -> None:
        """What is measured survives if the run is stopped."""
        if options.json:
            report.save(options.json)

    with display:
        report = run(
            selection, ops, providers, command=command, progress=display.advance, keep=keep
        )
    _show(display, report, options.tolerance)
    return report


def _show(display: table.Display, report: Report, tolerance: float) -> None:
    machine = report.machine
    name = machine.get("gpu", f"{machine['processor']}, {report.threads} thread(s)")
    display.line(
        f"{name}; kernels {machine['kernels']}; torch {machine['torch']}; "
        f"copy {report.copy_bytes_per_second / 1e9:.1f} GB/s; load {machine['load']}\n"
    )
    if report.device == "cpu" and machine["load"] > BUSY * machine["cores"]:
        display.line(
            "note: other processes are busy, which several threads suffer from most; --threads 1 "
            "leaves the time of others out\n"
        )
    timed = [r for r in report.records if r.status != "absent"]
    for op in dict.fromkeys(r.op for r in timed):
        rows = [r for r in timed if r.op == op and not r.sweep]
        if rows:
            copy = report.copy_bytes_per_second
            display.table(table.op_table(op, rows, copy, report.device))
    if any(r.sweep for r in timed):
        display.table(table.sweep_table(timed))
    if steps := [r for r in timed if r.phases_ms]:
        display.table(table.phases_table(steps))
    for line in table.problems(report):
        display.line(line)
    ratios = [r.best.ratio for r in timed if r.measures and r.provider != REFERENCE]
    wide = sum(ratio is not None and not ratio.within(tolerance) for ratio in ratios)
    if wide:
        display.line(
            f"note: {wide} of {len(ratios)} ratios have intervals wider than "
            f"{100 * tolerance:g} %; --seconds measures longer"
        )
    display.line(
        f"{sum(bool(r.measures) for r in timed)} measurements in {report.seconds:.0f} s; "
        "ratios are times over bmtard's, with their 99 % intervals"
    )


def _show_comparison(display: table.Display, comparison: compare.Comparison) -> int:
    """Returns the exit status."""
    for note in comparison.notes():
        display.line(f"note: {note}")
    display.table(compare.comparison_table(comparison))
    for conclusion in comparison.conclusions():
        display.line(conclusion)
    return comparison.status

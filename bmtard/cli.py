"""The command ``bmtard``."""

from __future__ import annotations

import io
import os
import platform
import shlex
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from bmtard.extras import import_extra


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit status. Errors of the user are one line on stderr."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_help())
        return 0 if arguments else 2
    name, *rest = arguments
    if name not in COMMANDS:
        print(f"bmtard: no command {name!r}\n\n{_help()}", file=sys.stderr)
        return 2
    if isinstance(sys.stdout, io.TextIOWrapper):  # paths and help may not fit its encoding
        sys.stdout.reconfigure(errors="replace")
    from bmtard.training.ranks import SharedError, launched, speaks
    from bmtard.training.signals import Stopped, terminable
    from bmtard.training.trainer import NonFiniteLossError

    try:
        with terminable():
            if launched() and name not in ("train", "evaluate"):
                raise SharedError("one process does this; start it without torchrun")
            status = COMMANDS[name](rest) or 0
            if sys.stdout is not None:  # closed by the shell
                sys.stdout.flush()
            return status
    except BrokenPipeError:  # the reader of the output has seen enough, as in `bmtard info | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at exit
        return 128 + signal.SIGPIPE
    except (ValueError, OSError, ImportError, NonFiniteLossError) as error:
        if speaks() or not isinstance(error, (SharedError, NonFiniteLossError)):
            print(f"bmtard {name}: {error}", file=sys.stderr)
        return 2
    except (MemoryError, RuntimeError) as error:
        if not _out_of_memory(error):
            raise
        print(
            f"bmtard {name}: not enough memory for this model, batch size and data: "
            f"{(str(error).splitlines() or [''])[0]}",
            file=sys.stderr,
        )
        return 2
    except SystemExit as stop:  # of the option parser, which has said why
        return int(stop.code or 0)
    except KeyboardInterrupt as interrupt:
        status = interrupt.status if isinstance(interrupt, Stopped) else 130
        message = str(interrupt) or "interrupted"
        hint = {
            "train": "; --resume continues at the last checkpoint",
            "reproduce": "; the same command goes on",
            "demo": "; the same command goes on",
        }.get(name, "")
        hint = "" if "--resume" in message else hint
        if speaks():
            print(f"\nbmtard {name}: {message}{hint}", file=sys.stderr)
        return status


def _out_of_memory(error: BaseException) -> bool:
    """Of Python, or of torch on a GPU or a CPU, which has no class for it there."""
    import torch

    known = isinstance(error, (MemoryError, torch.OutOfMemoryError))
    return known or "DefaultCPUAllocator" in str(error)


def _help() -> str:
    lines = [f"  {name:10}{command.__doc__}" for name, command in COMMANDS.items()]
    return "\n".join(
        ["usage: bmtard COMMAND [OPTION ...]", "", *lines, "", "bmtard COMMAND --help: its options"]
    )


def _train(arguments: list[str]) -> None:
    """train a network: bmtard train PRESET|--config FILE [--option ...]"""
    from bmtard.training.metrics import Display, read_metrics
    from bmtard.training.ranks import speaks
    from bmtard.training.report import plot_balance
    from bmtard.training.settings import train_config
    from bmtard.training.trainer import replay, train

    config = train_config(arguments)
    if config.replay:
        with Display() as display:
            for line in replay(config, display.run()):
                display.print(line)
        return
    result = train(config)
    if not speaks():
        return
    rows = read_metrics(config.folder / "metrics.jsonl")
    if rows and "weights" in rows[0]:  # none where a finished run was only tested again
        plot_balance({config.method: [config.folder]}, config.folder / "balance.png")
    print(f"checkpoint: {result.checkpoint}")


def _evaluate(arguments: list[str]) -> None:
    """measure the accuracy of a checkpoint under attacks: bmtard evaluate CHECKPOINT"""
    tyro = import_extra("tyro", "train")
    from bmtard.training.config import EvaluateConfig
    from bmtard.training.evaluate import evaluate
    from bmtard.training.metrics import Display, Progress
    from bmtard.training.ranks import speaks
    from bmtard.training.settings import parsed

    wants_help = "-h" in arguments or "--help" in arguments
    if not wants_help and (not arguments or arguments[0].startswith("-")):
        raise ValueError("say which: bmtard evaluate CHECKPOINT [--option ...]")
    checkpoint, options = (Path(), arguments) if wants_help else (Path(arguments[0]), arguments[1:])
    prog = "bmtard evaluate CHECKPOINT"
    config = parsed(tyro.cli, EvaluateConfig, prog=prog, args=options)
    with Display() as display:
        attacks: dict[str, Progress] = {}

        def report(name: str, accuracy: float) -> None:
            attacks[name].end(f"{100 * accuracy:.2f} %")

        def progress(name: str, done: int, total: int) -> None:
            if name in attacks:
                attacks[name].advance(f"{done} of {total} batches")
            else:
                attacks[name] = display.run()
                attacks[name].begin(name, total)

        summary = evaluate(checkpoint, config, report, progress=progress)
    if not speaks():
        return
    for name, value in summary["weighted_robust_accuracy"].items():
        print(f"weighted, {name:14}{100 * value:6.2f} %")
    if summary["sanity"]:
        images = summary["sanity"]["images"]
        print(f"\nIs it to be believed? Looked at: {images} test images that are classified right.")
        for check in summary["sanity"]["checks"]:
            print(f"  {'ok ' if check['passed'] else 'NO '} {check['sentence']}")
        print(summary["sanity"]["verdict"].partition(". ")[0].rstrip(".") + ".")
    print(f"written: {config.output or checkpoint.with_name('evaluation.json')}")


def _reproduce(arguments: list[str]) -> int:
    """train teachers and all students, attack them, report: bmtard reproduce PRESET"""
    tyro = import_extra("tyro", "train")
    from bmtard.training.reproduce import REPRODUCE_PRESETS, reproduce
    from bmtard.training.settings import parsed

    cli = tyro.extras.overridable_config_cli
    config = parsed(cli, REPRODUCE_PRESETS, prog="bmtard reproduce", args=arguments)
    return 1 if reproduce(config, shlex.join(["bmtard", "reproduce", *arguments])) else 0


def _demo(arguments: list[str]) -> int:
    """the preset digits of bmtard reproduce, into runs/demo: bundled data, minutes"""
    tyro = import_extra("tyro", "train")
    from bmtard.training.reproduce import REPRODUCE_PRESETS, ReproduceConfig, reproduce
    from bmtard.training.settings import parsed

    default = replace(REPRODUCE_PRESETS["digits"][1], output=Path("runs/demo"))
    options = {"prog": "bmtard demo", "default": default, "args": arguments}
    config = parsed(tyro.cli, ReproduceConfig, **options)
    return 1 if reproduce(config, shlex.join(["bmtard", "demo", *arguments])) else 0


def _bench(arguments: list[str]) -> int:
    """time the ops against what they replace, on this machine"""
    try:
        from bmtard.benchmarks.cli import bench
    except ModuleNotFoundError as error:
        if not str(error.name).startswith("bmtard.benchmarks"):
            raise
        raise ImportError(
            f"{Path(__file__).parent} has no {error.name}: this installation is incomplete; "
            "install bmtard again"
        ) from error
    return bench(arguments, "bmtard bench")


def _info(arguments: list[str]) -> None:
    """show what a report of a bug needs: versions, kernels in use, machine"""
    import numpy
    import torch

    from bmtard import build_info
    from bmtard._library import cuda_problem, driver_version
    from bmtard.training.report import processor

    if arguments in (["-h"], ["--help"]):
        print("usage: bmtard info\n\n" + str(_info.__doc__))
        return
    if arguments:
        raise ValueError(f"takes no arguments, got {shlex.join(arguments)}")
    print(build_info())
    rows = {
        "Python": f"{platform.python_version()}, numpy {numpy.__version__}",
        "system": f"{platform.platform()}, {' '.join(platform.libc_ver()) or 'no glibc'}",
        "processor": f"{processor()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads",
        "settings": " ".join(f"{k}={v}" for k, v in sorted(os.environ.items()) if "BMTARD_" in k),
    }
    driver, gpus = driver_version(), []
    try:
        for index in range(torch.cuda.device_count()):
            major, minor = torch.cuda.get_device_capability(index)
            kernels = cuda_problem(index) or "compiled kernels"
            gpus.append(f"{torch.cuda.get_device_name(index)} ({major}.{minor}): {kernels}")
    except RuntimeError as error:  # of a driver that torch cannot use
        gpus.append(" ".join(str(error).split()))
    rows["driver"] = f"CUDA {driver // 1000}.{driver % 1000 // 10}" if driver else "none"
    rows["GPUs"] = "; ".join(gpus) or "none"
    print("\n".join(f"{name + ':':<11}{value or '-'}" for name, value in rows.items()))


COMMANDS: dict[str, Callable[[list[str]], int | None]] = {
    "train": _train,
    "evaluate": _evaluate,
    "reproduce": _reproduce,
    "demo": _demo,
    "bench": _bench,
    "info": _info,
}


if __name__ == "__main__":
    sys.exit(main())

"""What a run found, as dataclasses and as the JSON file of ``--json``."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bmtard.training.files import write_text

from .timing import Ratio

FORMAT = 1
"""Of the file; a change that an older reader would misread raises it."""

STATUSES = ("ok", "wrong", "failed", "absent", "skipped")


@dataclass(kw_only=True)
class Measure:
    """Microseconds a call, over the rounds."""

    rounds: int
    median_us: float
    p20_us: float
    p80_us: float
    min_us: float
    ratio: Ratio | None = None
    """To bmtard, from the same rounds; None where bmtard was not measured."""


@dataclass(kw_only=True)
class Record:
    """One provider on one op, shape, dtype and pass."""

    op: str
    shape: str
    dims: tuple[int, ...]
    teachers: int
    dtype: str
    pass_: str
    provider: str
    sweep: str = ""
    status: str = "ok"
    """"ok"; "wrong": not timed, its result is not right; "failed": it raised; "absent": not
    installed or not for this device; "skipped": needs more memory than allowed."""
    reason: str = ""
    ideal_bytes: int = 0
    flops: int = 0
    measures: dict[str, Measure] = field(default_factory=dict)
    """On the CPU "cpu_time" with one thread, "wall" with more; on CUDA "wall", "graph_hot" and
    "graph_cold"."""
    notes: list[str] = field(default_factory=list)
    """Why a measure is missing, and the like."""
    kernels: float | None = None
    waits: float | None = None
    peak_bytes: int | None = None
    phases_ms: dict[str, float] = field(default_factory=dict)

    @property
    def key(self) -> tuple[Any, ...]:
        """What the same measurement has in another run."""
        return (self.op, self.dims, self.teachers, self.dtype, self.pass_, self.provider)

    @property
    def case(self) -> tuple[Any, ...]:
        """What competing providers share."""
        return self.key[:-1]

    @property
    def best_measure(self) -> str:
        """The one that says most about the op itself."""
        order = ("graph_cold", "graph_hot", "cpu_time", "wall")
        return next((measure for measure in order if measure in self.measures), "")

    @property
    def best(self) -> Measure:
        return self.measures[self.best_measure]

    def bytes_per_second(self, measure: str) -> float:
        return self.ideal_bytes / (1e-6 * self.measures[measure].median_us)


@dataclass(kw_only=True)
class Report:
    command: str
    date: str
    preset: str
    device: str
    threads: int
    machine: dict[str, Any]
    copy_bytes_per_second: float
    """Measured: a copy between two large buffers, bytes read and written."""
    peak_flops_per_second: float
    """Measured: a float32 matrix product."""
    seconds: float = 0.0
    records: list[Record] = field(default_factory=list)

    @property
    def wrong(self) -> list[Record]:
        return [r for r in self.records if r.status == "wrong"]

    @property
    def failed(self) -> list[Record]:
        return [r for r in self.records if r.status == "failed"]

    def save(self, path: Path) -> None:
        """One line a record, so that two files can be compared by eye; never half a file."""
        values = {"format": FORMAT, **dataclasses.asdict(self)}
        records = [json.dumps(_rounded(record)) for record in values.pop("records")]
        head = json.dumps(values, indent=1)[:-2]
        text = f'{head},\n "records": [\n  ' + ",\n  ".join(records) + "\n ]\n}\n"
        if path.is_file() or not path.exists():
            write_text(path, text)
        else:  # such as /dev/stdout
            path.write_text(text)


def load(path: Path) -> Report:
    """Reads what ``save`` wrote. Raises ValueError, naming the file, if it is something else."""
    try:
        values = json.loads(path.read_text())
        if not isinstance(values, dict) or values.pop("format", None) != FORMAT:
            raise ValueError(f"no 'format': {FORMAT}")
        records = [_record(record) for record in values.pop("records")]
        return Report(**values, records=records)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} is not a result of bmtard bench: {error}") from error


def _record(values: dict[str, Any]) -> Record:
    measures = {name: _measure(measure) for name, measure in values.pop("measures").items()}
    record = Record(**{**values, "dims": tuple(values["dims"])}, measures=measures)
    if record.status not in STATUSES:
        raise ValueError(f"status {record.status!r}")
    return record


def _measure(values: dict[str, Any]) -> Measure:
    ratio = values.pop("ratio")
    return Measure(**values, ratio=None if ratio is None else Ratio(**ratio))


def _rounded(value: Any) -> Any:
    """Floats to five digits: more is noise."""
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, dict):
        return {name: _rounded(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_rounded(item) for item in value]
    return value

"""Two runs side by side: what became slower, and by how much more than noise.

Machines drift between runs, so the time of bmtard is compared twice: itself, and as a ratio to
another provider of the same rounds whose code has not changed (eager torch where it was measured).
That ratio has an interval in each run. bmtard is slower where its time grew by more than the
tolerance and the whole interval of the change against the other lies above it as well: either alone
is a slower machine, or a slower control. Where it was measured alone, p20 to p80 is the interval.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from .report import Measure, Record, Report
from .suite import REFERENCE
from .table import Table, duration
from .timing import Ratio

CONTROLS = ("eager", "compile", "sklearn", "liger", "quack", "compile-max-autotune")


@dataclass(frozen=True, kw_only=True)
class Change:
    record: Record
    """Of the new run."""
    measure: str
    before_us: float
    after_us: float
    control: str
    """The provider whose drift is taken out, or an empty string."""
    factor: Ratio
    """New over old time, drift taken out; above 1 is slower."""

    def verdict(self, tolerance: float) -> str:
        limit, grown = 1 + tolerance, self.after_us / self.before_us
        if self.factor.low > limit and grown > limit:
            return "slower"
        if self.factor.high < 1 / limit and grown < 1 / limit:
            return "faster"
        return "unclear" if self.factor.median > limit else "same"


@dataclass(frozen=True, kw_only=True)
class Comparison:
    changes: list[Change]
    warnings: list[str]
    tolerance: float

    def having(self, verdict: str) -> list[Change]:
        return [c for c in self.changes if c.verdict(self.tolerance) == verdict]


def compare(old: Report, new: Report, tolerance: float) -> Comparison:
    """Raises ValueError where the two have nothing in common or ran on unlike devices."""
    for name in ("device", "threads"):
        before, after = getattr(old, name), getattr(new, name)
        if before != after:
            raise ValueError(f"runs with {name} {before} and {after} cannot be compared")
    before, after = (r.machine.get("gpu") or r.machine.get("processor") for r in (old, new))
    if before != after:
        raise ValueError(f"runs on {before} and {after} cannot be compared")
    warnings = [
        f"{name} was {old.machine.get(name)} and is {new.machine.get(name)}"
        for name in ("torch", "kernels", "python")
        if old.machine.get(name) != new.machine.get(name)
    ]
    earlier = {record.key: record for record in old.records if record.measures}
    changes = []
    for record in new.records:
        if record.provider == REFERENCE and record.key in earlier:
            changes += _changes(earlier, {r.key: r for r in new.records}, record)
    if not changes:
        raise ValueError("the two runs have no measurement of bmtard in common")
    lost = [
        r for r in earlier.values()
        if r.provider == REFERENCE and not r.sweep
        and any(r.op == n.op and r.case == n.case and n.status in ("wrong", "failed")
                for n in new.records if n.provider == REFERENCE)
    ]  # fmt: skip
    warnings += [f"{_name(r)} was measured before and is wrong or failed now" for r in lost]
    return Comparison(changes=changes, warnings=warnings, tolerance=tolerance)


def _changes(
    old: dict[tuple[object, ...], Record], new: dict[tuple[object, ...], Record], record: Record
) -> list[Change]:
    found = []
    for name, after in record.measures.items():
        before = old[record.key].measures.get(name)
        if before is None:
            continue
        control, factor = "", _alone(before, after)
        for candidate in CONTROLS:
            key = (*record.case, candidate)
            pair = [
                run[key].measures[name].ratio
                for run in (old, new)
                if key in run and name in run[key].measures
            ]
            if len(pair) == 2 and pair[0] is not None and pair[1] is not None:
                # control / bmtard in both: it falls where bmtard became slower.
                control, factor = candidate, _quotient(pair[0], pair[1])
                break
        found.append(
            Change(
                record=record,
                measure=name,
                before_us=before.median_us,
                after_us=after.median_us,
                control=control,
                factor=factor,
            )
        )
    return found


def _quotient(a: Ratio, b: Ratio) -> Ratio:
    """a / b of two runs: the errors are independent, so their logarithms add in squares."""

    def spread(up: float, down: float) -> float:
        return math.exp(math.hypot(math.log(up), math.log(down)))

    median = a.median / b.median
    return Ratio(
        median=median,
        low=median / spread(a.median / a.low, b.high / b.median),
        high=median * spread(a.high / a.median, b.median / b.low),
    )


def _alone(before: Measure, after: Measure) -> Ratio:
    return Ratio(
        median=after.median_us / before.median_us,
        low=after.p20_us / before.p80_us,
        high=after.p80_us / before.p20_us,
    )


def _name(record: Record) -> str:
    dims = "x".join(map(str, record.dims))
    teachers = f" K={record.teachers}" if record.sweep == "K" else ""
    return f"{record.op} {dims}{teachers} {record.dtype} {record.pass_}"


def comparison_table(comparison: Comparison) -> Table:
    """The changes that matter, largest first."""
    rows = []
    for change in sorted(comparison.changes, key=lambda c: -c.factor.median):
        verdict = change.verdict(comparison.tolerance)
        if verdict != "same":
            factor = change.factor
            rows.append(
                [
                    _name(change.record),
                    change.measure,
                    verdict,
                    change.control or "-",
                    duration(change.before_us),
                    duration(change.after_us),
                    f"{factor.median:.2f} [{factor.low:.2f}, {factor.high:.2f}]",
                ]
            )
    same = len(comparison.changes) - len(rows)
    return Table(
        title=f"bmtard now / before, tolerance {100 * comparison.tolerance:g} %: {same} of "
        f"{len(comparison.changes)} within it",
        header=["what", "measure", "verdict", "against", "before", "now", "now / before"],
        rows=rows,
        left=4,
    )

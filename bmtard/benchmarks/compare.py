"""Two runs side by side: what became slower.

Machines drift between runs, so the verdict rests on ratios alone: bmtard's time over that of a
control, a provider of the same rounds whose code has not changed (eager torch where it was
measured). Each run has an interval of that ratio; together they give an interval of the factor by
which bmtard became slower. bmtard is slower where the whole interval lies above the tolerance, and
nothing is certain where the tolerance lies inside it. Times alone give warnings and no verdict: a
slower machine changes them too.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from .report import Measure, Record, Report
from .suite import REFERENCE
from .table import Table, duration
from .timing import FEWEST_ROUNDS, Ratio

CONTROLS = ("eager", "compile", "sklearn", "liger", "quack", "compile-max-autotune")
SLOWER, UNCLEAR = 1, 3
"""Exit statuses."""


@dataclass(frozen=True, kw_only=True)
class Change:
    record: Record
    """Of the new run."""
    measure: str
    before_us: float
    after_us: float
    factor: Ratio
    """New over old; above 1 is slower. Of the ratios to the control, or of the times without one.
    """
    control: str = ""
    """The provider that both runs compare bmtard with; empty if there is none."""
    control_before: Ratio | None = None
    """Control over bmtard in the old run; None as well if its rounds were too few."""

    @property
    def own(self) -> float:
        """The factor of the times themselves, drift of the machine included."""
        return self.after_us / self.before_us

    def verdict(self, tolerance: float) -> str:
        """ "slower", "faster", "same" or "unclear"; without a control "longer" or "same"."""
        limit = 1 + tolerance
        if self.factor.low > limit:
            return "slower" if self.control else "longer"
        if not self.control:
            return "same"
        if self.factor.high < 1 / limit:
            return "faster"
        return "unclear" if self.factor.high > limit else "same"


@dataclass(frozen=True, kw_only=True)
class Comparison:
    changes: list[Change]
    lost: list[str]
    """What was measured before, and is wrong or failed now."""
    unlike: list[str]
    """How the two runs differ in what they ran on."""
    tolerance: float

    def having(self, verdict: str) -> list[Change]:
        return [c for c in self.changes if c.verdict(self.tolerance) == verdict]

    @property
    def status(self) -> int:
        """0 only where every change that has a control is certainly within the tolerance."""
        if self.having("slower") or self.lost:
            return SLOWER
        decided = any(change.control for change in self.changes)
        return UNCLEAR if self.having("unclear") or not decided else 0

    def notes(self) -> list[str]:
        """What to know before the table is read."""
        limit = 1 + self.tolerance
        found = [
            *self.unlike,
            *(f"{name} was measured before and is lost now" for name in self.lost),
        ]
        slow_machine = [c for c in self.having("same") if c.control and c.own > limit]
        if slow_machine:
            found.append(
                f"{len(slow_machine)} measurement(s) took longer, up to "
                f"{max(c.own for c in slow_machine):.2f} x, and so did their controls: the machine "
                "was slower, not bmtard"
            )
        fast_machine = [c for c in self.having("slower") if c.own <= limit]
        if fast_machine:
            found.append(
                f"{len(fast_machine)} measurement(s) are slower than their controls say, though "
                "their own time did not grow: the machine, or the control, was faster"
            )
        if not any(change.control for change in self.changes):
            found.append(
                "nothing is decided: no other provider was measured in both runs, so a slower "
                "machine cannot be told from a slower bmtard; measure eager as well"
            )
        return found

    def conclusions(self) -> list[str]:
        """What the table comes to."""
        found = []
        if slower := self.having("slower"):
            found.append(f"{len(slower)} measurement(s) slower than before")
        if unclear := self.having("unclear"):
            text = (
                f"{len(unclear)} measurement(s) unclear: {1 + self.tolerance:g} lies in the "
                "interval; measure longer (--seconds), or on a machine with less to do"
            )
            before = [c.control_before for c in unclear]
            if old := sum(not (ratio and ratio.within(self.tolerance)) for ratio in before):
                text += f"; for {old} of them the old run is too uncertain"
            found.append(text)
        return found


def compare(old: Report, new: Report, tolerance: float) -> Comparison:
    """Raises ValueError where the two have nothing in common or ran on unlike devices."""
    for name in ("device", "threads"):
        before, after = getattr(old, name), getattr(new, name)
        if before != after:
            raise ValueError(f"runs with {name} {before} and {after} cannot be compared")
    before, after = (r.machine.get("gpu") or r.machine.get("processor") for r in (old, new))
    if before != after:
        raise ValueError(f"runs on {before} and {after} cannot be compared")
    unlike = [
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
        _name(r) for r in earlier.values()
        if r.provider == REFERENCE and not r.sweep
        and any(r.op == n.op and r.case == n.case and n.status in ("wrong", "failed")
                for n in new.records if n.provider == REFERENCE)
    ]  # fmt: skip
    return Comparison(changes=changes, lost=lost, unlike=unlike, tolerance=tolerance)


def _changes(
    old: dict[tuple[object, ...], Record], new: dict[tuple[object, ...], Record], record: Record
) -> list[Change]:
    found = []
    for name, after in record.measures.items():
        before = old[record.key].measures.get(name)
        if before is None:
            continue
        control, control_before, factor = "", None, _alone(before, after)
        for candidate in CONTROLS:
            key = (*record.case, candidate)
            pair = [
                run[key].measures[name]
                for run in (old, new)
                if key in run and name in run[key].measures
            ]
            if len(pair) == 2 and pair[0].ratio is not None and pair[1].ratio is not None:
                control, factor = candidate, _quotient(pair[0].ratio, pair[1].ratio)
                if pair[0].rounds >= FEWEST_ROUNDS:
                    control_before = pair[0].ratio
                if min(measure.rounds for measure in pair) < FEWEST_ROUNDS:
                    factor = Ratio(median=factor.median, low=0.0, high=math.inf)
                break
        found.append(
            Change(
                record=record,
                measure=name,
                before_us=before.median_us,
                after_us=after.median_us,
                factor=factor,
                control=control,
                control_before=control_before,
            )
        )
    return found


def _quotient(a: Ratio, b: Ratio) -> Ratio:
    """a / b of two runs: the errors are independent, so their logarithms add in squares.

    Of control / bmtard, old over new: it grows where bmtard became slower.
    """

    def spread(up: float, down: float) -> float:
        return math.exp(math.hypot(math.log(up), math.log(down)))

    median = a.median / b.median
    return Ratio(
        median=median,
        low=median / spread(a.median / a.low, b.high / b.median),
        high=median * spread(a.high / a.median, b.median / b.low),
    )


def _alone(before: Measure, after: Measure) -> Ratio:
    """Of the times, with p20 to p80 as the interval."""
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

"""A progress for tests; a module of its own, as spawned processes import it by its name."""

from __future__ import annotations


class Quiet:
    """A progress that keeps what it is told."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def begin(self, title: str, total: int, done: int = 0) -> None:
        self.lines.append(title)

    def advance(self, text: str) -> None:
        self.lines.append(text)

    def within(self, part: float, text: str) -> None:
        assert 0 <= part <= 1

    def note(self, text: str) -> None:
        self.lines.append(text)

    def end(self, text: str) -> None:
        self.lines.append(text)

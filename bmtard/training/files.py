"""Files that are whole or not there, and folders that one process owns."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl


def write_bytes(path: Path, content: bytes | memoryview) -> None:
    """Writes beside ``path`` and renames, so that ``path`` is never half a file.

    Raises OSError, one line that names ``path``; what was there stays.
    """
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        try:
            with open(temporary, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise OSError(f"cannot write {path}: {error.strerror or error}") from error


def write_text(path: Path, text: str) -> None:
    write_bytes(path, text.encode())


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2) + "\n")


def read_json(path: Path) -> Any:
    """The content, or None where there is no such file."""
    return json.loads(path.read_text()) if path.exists() else None


def remove_temporaries(folder: Path) -> None:
    """What a killed process had half written; only for the owner of ``folder``."""
    for path in folder.glob("*.tmp"):
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def locked(folder: Path, *, wait: bool, name: str = ".lock") -> Iterator[None]:
    """Owns ``folder`` through a lock on a file in it, which ends with the process at the latest.

    Where another process has it: waits, or raises ValueError naming the folder. Raises OSError, one
    line, where the folder cannot be made or written. A folder made here goes again if the body
    fails before it has written anything.
    """
    path, made = folder / name, not folder.exists()
    while True:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            file = open(path, "ab")  # noqa: SIM115 (closed below)
        except OSError as error:
            raise OSError(f"cannot write into {folder}: {error.strerror or error}") from error
        with file:
            while not _lock(file):
                if not wait:
                    raise ValueError(f"another process works in {folder}")
                time.sleep(0.1)
            if not _is(file, path):  # its owner has removed it meanwhile
                continue
            try:
                yield
            except BaseException:
                if made and [*folder.iterdir()] == [path]:
                    with contextlib.suppress(OSError):
                        path.unlink()
                        folder.rmdir()
                raise
            return


def _is(file: IO[bytes], path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _lock(file: IO[bytes]) -> bool:
    """Whether this process has the lock now."""
    try:
        if sys.platform == "win32":
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    return True

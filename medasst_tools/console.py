"""What a person sees while a verb works: our lines and one bar. What libraries print goes to a log file.

`V=1` in the environment shows everything instead, as it comes.
"""

import contextlib
import os
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from medasst_tools.errors import CheckFailed, UserError

TAIL = 8  # lines of a log that an error shows


def verbose() -> bool:
    """Say whether everything is to be shown."""
    return os.environ.get("V", "") not in ("", "0")


@contextlib.contextmanager
def logged(log: Path) -> Iterator[TextIO]:
    """Send stdout and stderr to `log`, also those of libraries in C, and yield the terminal; an unforeseen error becomes
    CheckFailed with the log's last lines and its path."""
    with log_of_child(log) as file, contextlib.ExitStack() as restore:
        if file is None:
            yield sys.stderr
            return
        terminal = restore.enter_context(os.fdopen(os.dup(2), "w", buffering=1, encoding="utf-8"))
        for number, stream in ((1, sys.stdout), (2, sys.stderr)):
            stream.flush()
            restore.callback(_restore, os.dup(number), number, stream)
            os.dup2(file, number)
        try:
            yield terminal
        except (UserError, CheckFailed):
            raise
        except Exception as error:
            os.write(file, traceback.format_exc().encode())
            raise CheckFailed(
                f"{type(error).__name__}: {' '.join(str(error).split())[:300]}; {end_of(log)}"
            ) from error


@contextlib.contextmanager
def log_of_child(log: Path) -> Iterator[int | None]:
    """Yield what a child process gets as stdout and stderr: the log's descriptor, or None where everything is shown."""
    if verbose():
        yield None
        return
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as file:
        yield file.fileno()


def _restore(saved: int, number: int, stream: TextIO) -> None:
    stream.flush()
    os.dup2(saved, number)
    os.close(saved)


def end_of(log: Path) -> str:
    """Return a log's path with its last lines, as an error shows them."""
    lines = log.read_text(encoding="utf-8", errors="replace").replace("\r", "\n").split("\n") if log.is_file() else []
    last = [f"  | {line[:200]}" for line in lines if line.strip()][-TAIL:]
    return "\n".join([f"more in {log}", *last])


def bar(terminal: TextIO, **options: Any):
    """Return tqdm's bar on the terminal; where that is none, no bar."""
    from tqdm import tqdm

    return tqdm(file=terminal, disable=None, dynamic_ncols=True, **options)

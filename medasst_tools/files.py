"""Whole files or none: every output is written beside its place and moved there when it is complete."""

import contextlib
import fcntl
import hashlib
import json
import os
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import orjson

from medasst_tools.errors import UserError

LFS_POINTER = b"version https://git-lfs.github.com/spec/"  # what a file is that Git LFS hasn't fetched
PROJECT_ROOT = Path(__file__).resolve().parent.parent  # dataset_info/, templates/ and factory_configs/ lie there


@contextlib.contextmanager
def atomic_writer(path: Path) -> Iterator[BinaryIO]:
    """Yield a binary file that takes the name `path` only when the block ends without an error.

    The temporary name is unique, so that two runs at once both write whole files and the last one wins.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    temporary = Path(name)
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.chmod(0o666 & ~_umask())  # mkstemp makes files that only their owner can read
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def open_permissions(folder: Path) -> None:
    """Give the files of a folder the mode of every other file: safetensors makes them readable by their owner alone."""
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(0o666 & ~_umask())


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text with LF line ends, whole or not at all."""
    with atomic_writer(path) as file:
        file.write(text.encode("utf-8"))


def write_json(path: Path, value: Any) -> None:
    """Write readable JSON (Chinese as it is, two spaces, a final newline), whole or not at all."""
    write_text(path, json.dumps(value, ensure_ascii=False, indent=2) + "\n")


@contextlib.contextmanager
def locked(path: Path, busy: str, patience: float = 0.0) -> Iterator[int]:
    """Hold the lock file while the block runs and yield its descriptor, which a child may inherit.

    UserError(busy) if another process still holds it after `patience` seconds; a killed one holds nothing. The file itself
    is empty and may lie anywhere: beside a folder that is moved, say.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        until = time.monotonic() + patience
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() >= until:
                    raise UserError(busy) from None
                time.sleep(0.1)
        yield file.fileno()


def read_json(path: Path) -> dict[str, Any] | None:
    """Return the JSON object in a file that a step wrote, None if there is no such file; UserError if it is damaged."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise UserError(f"{path} is damaged; remove it and run the step that writes it again")
    return value


HASHES = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "medasst", "sha256.json")
_WORTH_KEEPING = 1 << 20  # bytes: less is hashed sooner than looked up
_SETTLED = 2.0  # seconds without a change: a file that is just being written can change without another time stamp


def sha256_of(path: Path) -> str:
    """Return the file's sha256 in hexadecimal digits.

    Those of large files are remembered across processes under inode, size and times, as git's index does, so that a verb
    can look at gigabytes at once.
    """
    about = path.stat()
    key = f"{about.st_dev} {about.st_ino} {about.st_size} {about.st_mtime_ns} {about.st_ctime_ns}"
    known = _known_hashes() if about.st_size >= _WORTH_KEEPING else {}
    if key in known:
        return known[key]
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if about.st_size >= _WORTH_KEEPING and time.time() - about.st_ctime > _SETTLED:
        with contextlib.suppress(OSError, RuntimeError):  # no home, a full disk: hashed again then
            write_text(HASHES.expanduser(), json.dumps(_known_hashes() | {key: digest}))
    return digest


def _known_hashes() -> dict[str, str]:
    try:
        known = json.loads(HASHES.expanduser().read_text(encoding="utf-8"))
    except (OSError, ValueError, RuntimeError):
        return {}
    return known if isinstance(known, dict) else {}


def write_jsonl(path: Path, rows: Iterable[Any]) -> None:
    """Write one JSON value a line, whole or not at all."""
    with atomic_writer(path) as file:
        file.writelines(orjson.dumps(row, option=orjson.OPT_APPEND_NEWLINE) for row in rows)


def read_jsonl(
    path: Path, needs: dict[str, Any] | None = None, again: str = "run the step that writes it again"
) -> Iterator[dict[str, Any]]:
    """Yield the objects of a JSON Lines file; a byte order mark and blank lines don't count.

    needs: {key: type or types} that every object has. UserError names a line that isn't one, and says `again`.
    """
    needs = needs or {}
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except ValueError:
                record = None
            if not isinstance(record, dict) or any(
                not isinstance(record.get(key), kind) for key, kind in needs.items()
            ):
                must = f": must be a JSON object with {', '.join(needs)}" if needs else " is damaged"
                raise UserError(f"{path}, line {number}{must}; {again}")
            yield record

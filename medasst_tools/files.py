"""Whole files or none: every output is written beside its place and moved there when it is complete."""

import contextlib
import fcntl
import functools
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from medasst_tools.errors import UserError

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


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text with LF line ends, whole or not at all."""
    with atomic_writer(path) as file:
        file.write(text.encode("utf-8"))


def write_json(path: Path, value: Any) -> None:
    """Write readable JSON (Chinese as it is, two spaces, a final newline), whole or not at all."""
    write_text(path, json.dumps(value, ensure_ascii=False, indent=2) + "\n")


@contextlib.contextmanager
def only_one_run(lock: Path, busy: str) -> Iterator[None]:
    """Hold the lock file while the block runs; UserError(busy) if another process holds it. A killed run holds nothing."""
    with lock.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(busy) from None
        yield


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file; {} if there is none or it is half-written."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def sha256_of(path: Path) -> str:
    """Return the file's sha256 in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


TOKENIZER_FILES = ("tokenizer*", "vocab*", "merges*", "special_tokens_map.json", "added_tokens.json")
MODEL_FILES = ("config.json", "generation_config.json", "adapter_config.json", "tokenizer*", "*.safetensors")


@functools.lru_cache(maxsize=1024)
def _sha256_of_version(path: Path, _mtime_ns: int) -> str:
    return sha256_of(path)  # gigabytes: once a process


def model_sha256(folder: Path, patterns: tuple[str, ...] = MODEL_FILES) -> str | None:
    """Return one sha256 over a model's or adapter's config, tokenizer and weights; None if it is no folder (a hub id)."""
    if not folder.is_dir():
        return None
    files = sorted(path for pattern in patterns for path in folder.glob(pattern))
    lines = "".join(f"{path.name} {_sha256_of_version(path, path.stat().st_mtime_ns)}\n" for path in files)
    return hashlib.sha256(lines.encode()).hexdigest()


def read_jsonl(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the objects of a JSON Lines file that a step wrote; UserError names a line that isn't one."""
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            try:
                record = json.loads(line)
            except ValueError:
                record = None
            if not isinstance(record, dict):
                raise UserError(f"{path}, line {number} is damaged; run the step that writes it again")
            yield record

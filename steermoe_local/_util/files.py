"""Reading and writing files: atomic replacement, strict JSON, SHA-256, time stamps, sizes for messages."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from ..errors import FormatError, UsageError
from .file_kinds import StrPath as StrPath
from .file_kinds import refuse_pointer
from .regular_files import open_regular


@contextlib.contextmanager
def replacing(path: StrPath) -> Iterator[Path]:
    """Yield a temporary path beside `path`, which is renamed to `path` when the block succeeds.

    A reader sees the old file or the new one, never half a file. A symbolic link stays a link.
    Raises UsageError when the file cannot be written there.
    """
    target = require_writable(path)
    temporary = temporary_beside(target)
    try:
        yield temporary
        os.replace(temporary, target)
    except OSError as error:
        raise UsageError(f"{path}: cannot be written: {error.strerror or error}") from error
    finally:
        temporary.unlink(missing_ok=True)


def temporary_beside(target: Path) -> Path:
    """A new name in the folder of `target`, for a file that will replace it."""
    # not tempfile, whose files get mode 0600 whatever the umask
    return target.with_name(f".{target.name}.{secrets.token_hex(6)}.tmp")


def require_writable(path: StrPath) -> Path:
    """Check before long work that a file can be written at `path`.

    Returns the path with links followed. Raises UsageError.
    """
    target = Path(os.path.realpath(path))
    if target.is_dir():
        raise UsageError(f"{path}: is a folder; name a file in it")
    if target.exists() and not target.is_file():
        # a device like /dev/null would be replaced by a file
        raise UsageError(f"{path}: not a regular file, and would be replaced by one; name another")
    if not target.parent.is_dir():
        raise UsageError(f"{path}: the folder {target.parent} does not exist; create it first")
    if not os.access(target.parent, os.W_OK):
        raise UsageError(f"{path}: the folder {target.parent} cannot be written to; choose another")
    return target


def read_bytes(path: StrPath, what: str, limit: int) -> bytes:
    """Read a whole file of at most `limit` bytes; `what` names it in messages.

    Raises FormatError for a file that is missing, unreadable, not a file or too large.
    """
    try:
        with open_regular(path, streams=True) as file:
            data = file.read(limit + 1)
    except (OSError, ValueError) as error:  # ValueError: a name that the system cannot have
        reason = getattr(error, "strerror", None) or error
        raise FormatError(f"{path}: cannot be read as {what}: {reason}; check the path") from error
    if len(data) > limit:
        raise FormatError(f"{path}: larger than {limit >> 20} MiB, so it is not {what}; check the path")
    refuse_pointer(data, path)
    return data


def human_size(n_bytes: int) -> str:
    """A size for messages: 4.2 GB, 10.1 MB."""
    return f"{n_bytes / 1e9:,.1f} GB" if n_bytes >= 1e9 else f"{n_bytes / 1e6:,.1f} MB"


def listed(items: Iterable[str], most: int) -> str:
    """The first `most` items for a message: "a, b, ..."."""
    shown = list(items)
    return ", ".join(shown[:most]) + (", ..." if len(shown) > most else "")


def sha256_file(path: StrPath) -> str:
    """SHA-256 of a file's bytes, 64 lowercase hex digits. Raises FormatError if unreadable."""
    try:
        with open_regular(path) as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise FormatError(f"{path}: cannot be read: {error.strerror or error}") from error


def is_sha256(value: object) -> bool:
    """Tell whether `value` is a string of 64 lowercase hex digits."""
    return isinstance(value, str) and len(value) == 64 and set(value) <= set("0123456789abcdef")


def parse_json(text: str) -> Any:
    """Parse JSON more strictly than `json.loads`: no NaN or Infinity, no key twice, no surrogates.

    Raises ValueError; the caller adds the file and line.
    """

    def unique(items: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(items)
        if len(result) != len(items):
            keys = [key for key, _ in items]
            twice = next(key for key in keys if keys.count(key) > 1)
            raise ValueError(f"the key {twice!r} stands twice in one object")
        return result

    def no_constant(name: str) -> Any:
        raise ValueError(f"{name} is not a JSON number")

    try:
        value = json.loads(text, object_pairs_hook=unique, parse_constant=no_constant)
        # "\ud800" alone is legal JSON and yields a str that no UTF-8 file can hold.
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError("half of a surrogate pair (\\ud800 to \\udfff) stands alone") from None
    except RecursionError:
        raise ValueError("nested too deeply") from None
    return value


def timestamp(created: str | None = None) -> str:
    """Return `created`, else SOURCE_DATE_EPOCH, else now, as ISO 8601 UTC to the second.

    Raises UsageError when `created` or SOURCE_DATE_EPOCH cannot be read as a time.
    """
    if created is not None:
        try:
            datetime.fromisoformat(created)
        except (ValueError, TypeError):
            raise UsageError(f"created: {created!r} is not an ISO 8601 date; write 2025-01-31T12:00:00Z") from None
        return created
    epoch = os.environ.get("SOURCE_DATE_EPOCH")
    try:
        moment = datetime.now(UTC) if not epoch else datetime.fromtimestamp(int(epoch), UTC)
    except (ValueError, OverflowError, OSError):
        raise UsageError(
            f"SOURCE_DATE_EPOCH={epoch!r} is not a time; set whole seconds since 1970 or unset it"
        ) from None
    return moment.strftime("%Y-%m-%dT%H:%M:%SZ")


def tool_name() -> str:
    """Name and version of this program as files record it, e.g. "steermoe-local 1.2"."""
    try:
        return f"steermoe-local {version('steermoe-local')}"
    except PackageNotFoundError:
        return "steermoe-local"

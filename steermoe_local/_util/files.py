"""Reading files: SHA-256, time stamps, sizes for messages."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Iterable
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version

from ..errors import FormatError, UsageError
from .file_kinds import StrPath as StrPath
from .file_kinds import refuse_pointer
from .json_text import parse_json as parse_json
from .regular_files import open_regular
from .writing import replacing as replacing
from .writing import require_writable as require_writable


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


def human_duration(seconds: float, *, most: bool = False) -> str:
    """A time for people: 45 s, 2.5 min, 12 min, 3.5 h; rounded up where it is said to be the most."""
    unit, name, decimals = (1, "s", 0) if seconds < 100 else (60, "min", 1) if seconds < 6000 else (3600, "h", 1)
    if name == "min" and seconds >= 600:
        decimals = 0
    value = seconds / unit
    if most:
        value = math.ceil(round(value * 10**decimals, 6)) / 10**decimals
    return f"{value:,.{decimals}f} {name}".replace(".0 min", " min")


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

"""Downloads of models' files from the hub: byte ranges, and whole files that resume after an interruption.

The client's own `hf_hub_download` discards an interrupted file in current versions. So the file is fetched by the
client's `http_get` into a file of the cache that stays, which `hf_hub_download` then only finds there. Every file is
verified by the hub's hash (`hub_checks`): while it arrives; what an earlier run or the client itself fetched is read.
"""

from __future__ import annotations

import contextlib
import logging
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, cast

from .._util.windows import replace
from .._util.writing import require_no_link
from ..errors import ModelError
from .hub import cache_folder
from .hub_checks import Check, CheckedFile, TooLong, require_match

log = logging.getLogger("steermoe.files")

_TRIES = 3
_AT_ONCE = 0.1  # seconds; the client takes 0 for "without end"
_ETAG = re.compile(r"[A-Za-z0-9_-]{8,128}")


def read_range(repo: str, path: str, commit: str, start: int, stop: int, token: str | None) -> bytes:
    """All bytes of a file from `start` to `stop`. Raises ModelError and the client's errors."""
    import huggingface_hub as hub
    from huggingface_hub import errors

    url = hub.hf_hub_url(repo, path, revision=commit)
    for attempt in range(_TRIES):
        try:
            return _range(url, start, stop, token, f"{repo}/{path}")
        except (ModelError, errors.HfHubHTTPError):
            raise
        except Exception:  # of the client's HTTP library
            if attempt + 1 == _TRIES:
                raise
            time.sleep(1)
    raise AssertionError


def _range(url: str, start: int, stop: int, token: str | None, what: str) -> bytes:
    headers = _headers(token) | {"Range": f"bytes={start}-{stop - 1}"}
    data = bytearray()
    with _stream(url, headers) as response:
        _client().hf_raise_for_status(response)
        if response.status_code != 206 and start:
            raise ModelError(f"{what}: the server sends whole files only, so its header cannot be read before; --force")
        chunks = response.iter_bytes if hasattr(response, "iter_bytes") else response.iter_content
        for chunk in chunks(1 << 16):
            data += chunk
            if len(data) >= stop - start:
                break
    if len(data) < stop - start:
        raise ModelError(f"{what}: the server sent {len(data)} of {stop - start} bytes; try again")
    return bytes(data[: stop - start])


def _headers(token: str | None) -> dict[str, str]:
    """The client's headers, without compression, whose bytes would not be those of the file."""
    return {**_client().build_hf_headers(token=token), "Accept-Encoding": "identity"}


def _client() -> Any:
    """The client's helpers, which it exports without types."""
    from huggingface_hub import utils

    return utils


def _stream(url: str, headers: dict[str, str]) -> contextlib.AbstractContextManager[Any]:
    """A streamed GET by the client's session, of httpx, or of requests before version 1.0 of the client."""
    from huggingface_hub import constants

    session = _client().get_session()
    timeout = constants.HF_HUB_DOWNLOAD_TIMEOUT
    if callable(getattr(session, "stream", None)):  # a flag in requests
        opened: contextlib.AbstractContextManager[Any] = session.stream("GET", url, headers=headers, timeout=timeout)
        return opened
    return contextlib.closing(session.get(url, headers=headers, timeout=timeout, stream=True))


def partial_bytes(repo: str, path: str, commit: str, etag: str, folder: Path | None) -> int:
    """Bytes of a file that are on this machine: all of them, or those of an interrupted download."""
    if folder:
        paths = [folder / path, _partial(folder / path, etag)]
    else:
        root = cache_folder("models", repo)
        paths = [root / "snapshots" / commit / path, root / "blobs" / etag, root / "blobs" / f"{etag}.incomplete"]
    for found in paths:
        with contextlib.suppress(OSError):
            return found.stat().st_size
    return 0


def download(repo: str, path: str, commit: str, size: int, name: str, token: str | None) -> Path:
    """Fetch a file into the client's cache, resuming an interrupted download. Returns its path in the snapshot.

    `name` is the file's hash as the repository lists it. Raises ModelError for a file that has another one; it is
    removed.
    """
    import huggingface_hub as hub
    from huggingface_hub import constants
    from huggingface_hub.file_download import are_symlinks_supported

    root = cache_folder("models", repo)
    pointer = root / "snapshots" / commit / path
    what = f"{repo}/{path}"
    if pointer.exists():
        require_match(pointer, (name,), size, what, ModelError)
        return pointer
    etag, size = _metadata(repo, path, commit, size, token)
    names = (name, etag)
    is_verified = False
    by_http = size <= getattr(constants, "MAX_HTTP_DOWNLOAD_SIZE", size)
    if by_http and not getattr(constants, "HF_XET_HIGH_PERFORMANCE", False):
        blob = root / "blobs" / etag
        with _locked(root.parent / ".locks" / root.name / f"{etag}.lock"):  # the client's lock for this file
            if not blob.exists() and not pointer.exists():
                target = blob if are_symlinks_supported(constants.HF_HUB_CACHE) else pointer
                _transfer(repo, path, commit, blob.with_name(f"{etag}.incomplete"), target, size, names, token)
                is_verified = True
    found = Path(hub.hf_hub_download(repo, path, revision=commit, token=token))
    if not is_verified:
        require_match(found, names, size, what, ModelError)
    return found


def download_into(folder: Path, repo: str, path: str, commit: str, size: int, name: str, token: str | None) -> Path:
    """Fetch a file to `folder`/`path`, resuming an interrupted download.

    `name` is the file's hash as the repository lists it. Raises ModelError if another file is there, or arrives.
    """
    target = folder / path
    etag, size = _metadata(repo, path, commit, size, token)
    names = (name, etag)
    if target.exists():
        check = Check(names, size)
        if target.stat().st_size == size and check.read(target).matches():
            check.say_if_impossible(f"{repo}/{path}")
            return target
        raise ModelError(f"{target}: is another file than {repo}/{path}; move it away, or take another --dir")
    partial = _partial(target, etag)
    lock = partial.with_suffix(".lock")
    with _locked(lock):
        if not target.exists():
            _transfer(repo, path, commit, partial, target, size, names, token)
    with contextlib.suppress(OSError):
        lock.unlink()
    _remove_superseded(target, partial)
    return target


def _partial(target: Path, etag: str) -> Path:
    return target.with_name(f"{target.name}.{etag[:16]}.incomplete")


def _metadata(repo: str, path: str, commit: str, size: int, token: str | None) -> tuple[str, int]:
    """Etag and size of a file; the etag is the SHA-256 of large files."""
    import huggingface_hub as hub

    found = hub.get_hf_file_metadata(hub.hf_hub_url(repo, path, revision=commit), token=token)
    if not found.etag or not _ETAG.fullmatch(found.etag):  # it becomes a file's name
        raise ModelError(f"{repo}/{path}: the server gives it no usable ETag; check HF_ENDPOINT")
    return found.etag, found.size or size


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """The client's lock: another process that fetches the same file is waited for, which is said."""
    import filelock

    path.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(_client().WeakFileLock(path, timeout=_AT_ONCE))
        except filelock.Timeout:
            log.warning("%s: another process is fetching this file; waiting until it ends", path)
            stack.enter_context(_client().WeakFileLock(path))
        yield


def _remove_superseded(target: Path, partial: Path) -> None:
    """Remove what interrupted downloads left of other versions of a file, unless one is going on."""
    import filelock

    name = re.compile(rf"{re.escape(target.name)}\.[A-Za-z0-9_-]{{8,16}}\.incomplete")
    for left in [path for path in target.parent.iterdir() if name.fullmatch(path.name) and path != partial]:
        lock = left.with_suffix(".lock")
        with contextlib.suppress(OSError, filelock.Timeout):
            with _client().WeakFileLock(lock, timeout=_AT_ONCE):
                left.unlink()
            lock.unlink(missing_ok=True)


def _transfer(
    repo: str,
    path: str,
    commit: str,
    partial: Path,
    target: Path,
    size: int,
    names: tuple[str, ...],
    token: str | None,
) -> None:
    """Fill the partial file and rename it if its hash is the hub's; bytes of an earlier run are read for that."""
    import huggingface_hub as hub
    from huggingface_hub.file_download import http_get

    partial.parent.mkdir(parents=True, exist_ok=True)
    have = partial.stat().st_size if require_no_link(partial).exists() else 0
    if have > size:
        partial.unlink()
        have = 0
    check = Check(names, size)
    if have:
        check.read(partial)
    url = hub.hf_hub_url(repo, path, revision=commit)
    is_whole = False
    with open(partial, "ab") as file, contextlib.suppress(TooLong):
        http_get(
            url,
            cast(BinaryIO, CheckedFile(file, check)),
            resume_size=have,
            headers=_headers(token),
            expected_size=size,
            displayed_filename=Path(path).name,
        )
        is_whole = True
    if is_whole and check.n_bytes != size:  # the client began in the middle of it again
        check.read(partial)
    if not (is_whole and check.matches()):
        partial.unlink()
        what = "what arrived is not the file that the hub names (its SHA-256 or size)"
        if have:
            what = "what an earlier run left does not fit to it"
        raise ModelError(
            f"{repo}/{path}: {what} and was removed; run it again, without a proxy or mirror if it stays so"
        )
    check.say_if_impossible(f"{repo}/{path}")
    target.parent.mkdir(parents=True, exist_ok=True)
    replace(partial, target)

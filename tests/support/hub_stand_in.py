"""A stand-in for the Hugging Face hub on the loopback, as far as its client asks for files of data sets and models.

Written from the client's requests and the hub's documented API: a repository's files at a revision, HEAD and GET of a
file, parts of it, the error codes in headers. Large files (LFS) are redirected to a second server, as the hub does to
its content network, which must not see the token.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from time import sleep  # as it is now: tests patch it away for the client
from typing import Any
from urllib.parse import unquote, urlsplit

LFS_FROM = 1000  # bytes
Files = dict[str, dict[str, dict[str, bytes]]]


@dataclass(eq=False)
class Hub:
    """Repositories by name: {revision: {path: bytes}}; what went over the wire is kept.

    `gated` and `private` ones need `token`; `forbidden` ones refuse any. `requests` are (method, path), `ranges` the
    parts of files that were asked for, `sent` the bytes of files that were sent. `leaked` are tokens that the content
    network saw. `cuts` are numbers of bytes behind which the next transfers end; `pause` is slept through after each
    `chunk` bytes. A transfer up to the end of a file stops at its byte `hold` until that is None again, and has a bit
    changed in its bytes at `damaged`. `surplus` bytes of zero follow it. `without_hashes`: nothing says what a file's
    hash is.
    """

    datasets: Files = field(default_factory=dict)
    models: Files = field(default_factory=dict)
    gated: set[str] = field(default_factory=set)
    private: set[str] = field(default_factory=set)
    forbidden: set[str] = field(default_factory=set)
    token: str = "hf_stand_in"
    broken: bool = False
    whole_files_only: bool = False
    cuts: list[int] = field(default_factory=list)
    pause: float = 0.0
    hold: int | None = None
    damaged: tuple[int, ...] = ()
    surplus: int = 0
    without_hashes: bool = False
    chunk: int = 1 << 16
    endpoint: str = ""
    network: str = ""
    requests: list[tuple[str, str]] = field(default_factory=list)
    ranges: list[tuple[int, int]] = field(default_factory=list)
    sent: int = 0
    leaked: list[str] = field(default_factory=list)

    def of(self, kind: str) -> Files:
        """The repositories of a kind."""
        return self.datasets if kind == "datasets" else self.models

    def commit(self, name: str, revision: str, kind: str = "datasets") -> str | None:
        """Commit of a revision (a branch, or the commit itself): a hash of its files."""
        for branch, files in self.of(kind)[name].items():
            text = json.dumps({path: sha1(data) for path, data in sorted(files.items())})
            commit = hashlib.sha1(text.encode()).hexdigest()
            if revision in (branch, commit):
                return commit
        return None

    def files(self, name: str, commit: str, kind: str = "datasets") -> dict[str, bytes]:
        """Files of a commit."""
        return next(f for branch, f in self.of(kind)[name].items() if self.commit(name, branch, kind) == commit)

    def asked(self, part: str = "/") -> list[tuple[str, str]]:
        """Requests for repositories and files with this in their path."""
        known = [name for files in (self.datasets, self.models) for name in files]
        return [(m, path) for m, path in self.requests if part in path and any(name in path for name in known)]


@cache
def sha1(data: bytes) -> str:
    """What the hub names small files by: the hash of git."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


@cache
def sha256(data: bytes) -> str:
    """What it names large files by."""
    return hashlib.sha256(data).hexdigest()


@contextmanager
def running(hub: Hub) -> Iterator[Hub]:
    """Serve on free ports until the end of the block."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: Any) -> None:
            pass

        def do_HEAD(self) -> None:
            self._answer(body=False)

        def do_GET(self) -> None:
            self._answer(body=True)

        def _send(self, status: int, data: bytes, body: bool, **headers: str) -> None:
            self.send_response(status)
            for key, value in headers.items():
                self.send_header(key.replace("_", "-"), value)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            if body:
                self.wfile.write(data)

        def _refuse(self, status: int, code: str, body: bool) -> None:
            data = json.dumps({"error": code}).encode()
            self._send(status, data, body, X_Error_Code=code, X_Error_Message=code, Content_Type="application/json")

        def _send_file(self, data: bytes, body: bool, **headers: str) -> None:
            """A file or the part of it that was asked for, as slowly as the stand-in is to be."""
            wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
            start, stop = 0, len(data)
            if wanted and body and not hub.whole_files_only:
                start, stop = int(wanted[1]), min(int(wanted[2] or stop - 1) + 1, stop)
                hub.ranges.append((start, stop))
                if start >= len(data):
                    return self._refuse(416, "RangeNotSatisfiable", body)
                self.send_response(206)
                self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{len(data)}")
            else:
                self.send_response(200)
            for key, value in headers.items():
                self.send_header(key.replace("_", "-"), value)
            self.send_header("Accept-Ranges", "bytes")
            surplus = hub.surplus if stop == len(data) and data[:4] == b"GGUF" and body else 0
            self.send_header("Content-Length", str(stop - start + surplus))
            self.end_headers()
            if not body:
                return None
            end = stop
            if hub.cuts and stop == len(data) and stop - start > hub.cuts[0]:
                end = start + hub.cuts.pop(0)
            for at in range(start, end, hub.chunk):
                while stop == len(data) and hub.hold is not None and start < hub.hold <= at:
                    sleep(0.01)
                part = bytearray(data[at : min(at + hub.chunk, end)])
                for place in hub.damaged:
                    if stop == len(data) and at <= place < at + len(part):
                        part[place - at] ^= 1
                try:
                    self.wfile.write(part)
                except OSError:
                    return None  # the client has gone
                hub.sent += len(part)
                if hub.pause:
                    self.wfile.flush()
                    sleep(hub.pause)
            with suppress(OSError):
                for at in range(0, surplus, hub.chunk):
                    self.wfile.write(bytes(min(hub.chunk, surplus - at)))
                    hub.sent += min(hub.chunk, surplus - at)
            if end < stop:
                self.close_connection = True
                self.connection.close()
            return None

        def _answer(self, body: bool) -> None:
            path = unquote(urlsplit(self.path).path)
            hub.requests.append((self.command, path))
            if hub.broken:
                return self._send(500, b"out of order", body)
            authorization = self.headers.get("Authorization")
            if path.startswith("/content/"):
                if authorization:
                    hub.leaked.append(authorization)
                return self._send_file(contents()[path.removeprefix("/content/")], body)
            api = path.startswith("/api/")
            path = path.removeprefix("/api").removeprefix("/")
            kind = "datasets" if path.startswith("datasets/") else "models"
            path = path.removeprefix(f"{kind}/")
            name = next((n for n in hub.of(kind) if path.startswith(n + "/")), None)
            known_token = authorization == f"Bearer {hub.token}"
            if authorization == "Bearer hf_expired":
                text = "Invalid credentials in Authorization header"
                return self._send(401, b"{}", body, X_Error_Message=text)
            if name is None or (name in hub.private and not known_token):
                return self._refuse(401 if api else 404, "RepoNotFound", body)
            if name in hub.forbidden:
                return self._send(403, b"{}", body, X_Error_Message="no")
            # as on the hub: what a gated model has can be seen by anybody, its files cannot
            if name in hub.gated and not known_token and not (api and kind == "models"):
                return self._refuse(401, "GatedRepo", body)
            self._repository(kind, name, path.removeprefix(name + "/"), body)

        def _repository(self, kind: str, name: str, rest: str, body: bool) -> None:
            what, _, rest = rest.partition("/")
            known = [*hub.of(kind)[name], *(hub.commit(name, branch, kind) or "" for branch in hub.of(kind)[name])]
            revision = next((r for r in known if rest == r or rest.startswith(r + "/")), None)
            commit = revision and hub.commit(name, revision, kind)
            if not revision or not commit:
                return self._refuse(404, "RevisionNotFound", body)
            files = hub.files(name, commit, kind)
            if what in ("tree", "revision"):
                data = tree(files) if what == "tree" else {"id": name, "sha": commit, "siblings": siblings(files)}
                if hub.without_hashes:
                    hashes = re.compile(rf"\b([0-9a-f]{{64}}|(?!{commit})[0-9a-f]{{40}})\b")
                    data = json.loads(hashes.sub("unnamed", json.dumps(data)))
                return self._send(200, json.dumps(data).encode(), body, Content_Type="application/json")
            content = files.get(rest.removeprefix(revision + "/"))
            if content is None:
                return self._refuse(404, "EntryNotFound", body)
            if kind == "models" and len(content) >= LFS_FROM:
                place = f"{hub.network}/content/{sha256(content)}?signature=x"
                name_of_it = "of-its-own-making" if hub.without_hashes else sha256(content)
                linked = {"X_Linked_Etag": f'"{name_of_it}"', "X_Linked_Size": str(len(content))}
                return self._send(302, b"", body, Location=place, X_Repo_Commit=commit, **linked)
            return self._send_file(content, body, ETag=f'"{sha1(content)}"', X_Repo_Commit=commit)

    def contents() -> dict[str, bytes]:
        return {
            sha256(data): data for revisions in hub.models.values() for f in revisions.values() for data in f.values()
        }

    servers = [ThreadingHTTPServer(("127.0.0.1", 0), Handler) for _ in range(2)]
    threads = []
    for server in servers:
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        thread.start()
        threads.append(thread)
    hub.endpoint, hub.network = (f"http://127.0.0.1:{server.server_address[1]}" for server in servers)
    try:
        yield hub
    finally:
        for server, thread in zip(servers, threads, strict=True):
            server.shutdown()
            server.server_close()
            thread.join()


def tree(files: dict[str, bytes]) -> list[dict[str, Any]]:
    """The answer to /tree/REVISION."""
    return [{"type": "file", "path": path, "size": len(data), "oid": sha1(data)} for path, data in files.items()]


def siblings(files: dict[str, bytes]) -> list[dict[str, Any]]:
    """What /revision/REVISION says of the files."""
    return [
        {"rfilename": path, "size": len(data), "blobId": sha1(data)}
        | ({"lfs": {"size": len(data), "sha256": sha256(data), "pointerSize": 130}} if len(data) >= LFS_FROM else {})
        for path, data in files.items()
    ]

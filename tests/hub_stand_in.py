"""A stand-in for the Hugging Face hub on the loopback, as far as its client asks for the files of a data set.

Written from the client's requests and the hub's documented API: the tree of a revision, HEAD and GET of its files, the
error codes in headers.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit


class Hub:
    """Data sets by name: {revision: {path: bytes}}. `gated` ones need `token`. `requests` are those it got."""

    def __init__(self) -> None:
        self.datasets: dict[str, dict[str, dict[str, bytes]]] = {}
        self.gated: set[str] = set()
        self.token = "hf_stand_in"
        self.broken = False
        self.endpoint = ""
        self.requests: list[tuple[str, str]] = []

    def commit(self, name: str, revision: str) -> str | None:
        """Commit of a revision (a branch, or the commit itself): a hash of its files."""
        for branch, files in self.datasets[name].items():
            text = json.dumps({path: hashlib.sha1(data).hexdigest() for path, data in sorted(files.items())})
            commit = hashlib.sha1(text.encode()).hexdigest()
            if revision in (branch, commit):
                return commit
        return None

    def files(self, name: str, commit: str) -> dict[str, bytes]:
        """Files of a commit."""
        return next(f for branch, f in self.datasets[name].items() if self.commit(name, branch) == commit)


@contextmanager
def running(hub: Hub) -> Iterator[Hub]:
    """Serve on a free port until the end of the block."""

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

        def _answer(self, body: bool) -> None:
            path = unquote(urlsplit(self.path).path)
            hub.requests.append((self.command, path))
            if hub.broken:
                return self._send(500, b"out of order", body)
            api = path.startswith("/api/datasets/")
            path = path.removeprefix("/api").removeprefix("/datasets/")
            name = next((n for n in hub.datasets if path.startswith(n + "/")), None)
            if name is None:
                return self._refuse(401 if api else 404, "RepoNotFound", body)
            if name in hub.gated and self.headers.get("Authorization") != f"Bearer {hub.token}":
                return self._refuse(401, "GatedRepo", body)
            rest = path.removeprefix(name + "/").removeprefix("tree/" if api else "resolve/")
            known = [*hub.datasets[name], *(hub.commit(name, branch) or "" for branch in hub.datasets[name])]
            revision = next((r for r in known if rest == r or rest.startswith(r + "/")), None)
            commit = revision and hub.commit(name, revision)
            if not revision or not commit:
                return self._refuse(404, "RevisionNotFound", body)
            files = hub.files(name, commit)
            if api:
                entries = [
                    {"type": "file", "path": file, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                    for file, data in files.items()
                ]
                return self._send(200, json.dumps(entries).encode(), body, Content_Type="application/json")
            data = files.get(rest.removeprefix(revision + "/"))
            if data is None:
                return self._refuse(404, "EntryNotFound", body)
            etag = f'"{hashlib.sha1(data).hexdigest()}"'
            return self._send(200, data, body, ETag=etag, X_Repo_Commit=commit)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    hub.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()

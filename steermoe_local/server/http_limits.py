"""The parser of requests, h11's, with limits of its own and with the reason of a refusal."""

from __future__ import annotations

import re

import h11

HEADER_BYTES = 16 * 1024
TARGET_BYTES = 8 * 1024
HEADERS = 100
_CHUNKS = 4096  # of a body; further ones must have
_CHUNK_BYTES = 64  # on the average, as each costs as much time as a thousand bytes of a long one
_BEGINNING = re.compile(rb"[A-Za-z]{1,20} ")
_END_OF_HEADER = re.compile(rb"\n\r?\n")


class LimitedConnection(h11.Connection):
    """An h11 connection of a server which refuses what is too large, and what can be understood in two ways.

    `refused` is the error of what was refused; its `error_status_hint` is the status for it.
    """

    def __init__(self) -> None:
        super().__init__(h11.SERVER, HEADER_BYTES)
        self.refused: h11.RemoteProtocolError | None = None
        self._chunks = self._chunked = 0

    @property
    def has_begun(self) -> bool:
        """Whether a part of the next request is there, while the connection waits for one."""
        return self.their_state is h11.IDLE and bool(self.trailing_data[0])

    def next_event(self) -> h11.Event | type[h11.NEED_DATA] | type[h11.PAUSED]:
        """As h11's. Raises h11.RemoteProtocolError."""
        try:
            if self.their_state is h11.IDLE:
                self._check_length()
            event = super().next_event()
            if isinstance(event, h11.Request):
                _check(event)
                self._chunks = self._chunked = 0
            elif isinstance(event, h11.Data) and event.chunk_start:
                self._check_chunk(len(event.data))
        except h11.RemoteProtocolError as error:
            self.refused = error
            raise
        return event

    def _check_length(self) -> None:
        """Before the lines are parsed: h11 has no limit for a header that comes in one piece."""
        data = self.trailing_data[0]
        if len(data) > TARGET_BYTES and b"\n" not in data[:TARGET_BYTES]:
            if not _BEGINNING.match(data):
                raise _refusal("no request line", 400)
            raise _refusal(f"the address has more than {TARGET_BYTES} bytes", 414)
        if len(data) > HEADER_BYTES and not _END_OF_HEADER.search(data, 0, HEADER_BYTES):
            raise _refusal(f"the header has more than {HEADER_BYTES} bytes", 431)

    def _check_chunk(self, size: int) -> None:
        self._chunks += 1
        self._chunked += size
        if self._chunks > _CHUNKS + self._chunked // _CHUNK_BYTES:
            raise _refusal(f"more than {_CHUNKS} chunks of less than {_CHUNK_BYTES} bytes; send larger ones", 400)


def _check(request: h11.Request) -> None:
    if request.http_version not in (b"1.0", b"1.1"):
        version = request.http_version.decode("ascii", "replace")
        raise _refusal(f"HTTP/{version} is not spoken here; send HTTP/1.1", 505)
    if len(request.target) > TARGET_BYTES:
        raise _refusal(f"the address has more than {TARGET_BYTES} bytes", 414)
    if not request.target.isascii():
        raise _refusal("the address has characters that are not ASCII; write them as %XX", 400)
    if len(request.headers) > HEADERS:
        raise _refusal(f"the request has more than {HEADERS} headers", 431)
    names = [name for name, _ in request.headers]
    if b"transfer-encoding" in names and (b"content-length" in names or request.http_version == b"1.0"):
        raise _refusal("the length of the body is said in two ways; send Content-Length or chunks", 400)


def _refusal(message: str, status: int) -> h11.RemoteProtocolError:
    return h11.RemoteProtocolError(message, error_status_hint=status)

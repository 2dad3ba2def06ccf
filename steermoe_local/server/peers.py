"""Whether the other end of a connection within this machine is still held by a program (Linux).

A client that has closed its connection and one that has only ended its side (`shutdown(SHUT_WR)`, `nc -N`) send the
same packet. The kernel's table of sockets tells them apart without a byte being sent: the socket of a client that is
gone belongs to no file any more.
"""

from __future__ import annotations

import contextlib
import ipaddress
import socket
import struct
import sys
from collections.abc import Collection, Iterable
from pathlib import Path

try:
    import fcntl
    import termios
except ImportError:  # Windows
    fcntl = termios = None  # type: ignore[assignment]

Ends = tuple[str, str]
"""The addresses (ADDRESS:PORT, as the kernel's table writes them) of the client's end and of the server's."""

_PACKET_BYTES = 1400
_INODE = 8  # the column behind that of the client's end
_TABLES = (Path("/proc/net/tcp"), Path("/proc/net/tcp6"))


def ends_of(peer: tuple[str, int], own: tuple[str, int]) -> Ends | None:
    """The ends of a connection whose client is on this machine, else None. Addresses are (host, port)."""
    try:
        hosts = [ipaddress.ip_address(host.partition("%")[0]) for host, _ in (peer, own)]
    except ValueError:
        return None
    plain = [getattr(host, "ipv4_mapped", None) or host for host in hosts]
    # Other addresses may be those of a container, whose sockets are in another table.
    if not plain[0].is_loopback or not sys.platform.startswith("linux"):
        return None
    written = [f"{_written(host)}:{port:04X}" for host, (_, port) in zip(plain, (peer, own), strict=True)]
    return written[0], written[1]


def _written(host: ipaddress.IPv4Address | ipaddress.IPv6Address) -> str:
    words = len(host.packed) // 4
    return "".join(f"{word:08X}" for word in struct.unpack(f"={words}I", host.packed))


def open_ends(wanted: Collection[Ends]) -> set[Ends] | None:
    """Those of the connections whose client's end belongs to a program; None where that cannot be seen."""
    found: set[Ends] = set()
    for table in _TABLES:
        try:
            data = table.read_bytes()
        except OSError:
            if table is _TABLES[0]:
                return None
            continue  # a machine without IPv6
        for ends in wanted:  # not line by line: a server may have thousands of them
            at = data.find(f" {ends[0]} {ends[1]} ".encode("ascii"))
            if at >= 0 and data[at : data.find(b"\n", at)].split()[_INODE] != b"0":
                found.add(ends)
    return found


def keep_watch(sock: socket.socket) -> None:
    """Let the kernel end a connection whose client does not answer."""
    _set(sock, [(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)])
    names = ("TCP_KEEPIDLE", "TCP_KEEPINTVL")
    _set(sock, [(socket.IPPROTO_TCP, getattr(socket, name), 15) for name in names if hasattr(socket, name)])


def bound_rest(sock: socket.socket, seconds: float) -> None:
    """Bound the time for which the kernel keeps what a client has not taken of a connection that is being closed.

    Not before: Linux counts from when the client's buffer became full, also for one that reads slowly but steadily.
    """
    if hasattr(socket, "TCP_USER_TIMEOUT"):
        _set(sock, [(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(seconds * 1000))])


def _set(sock: socket.socket, options: Iterable[tuple[int, int, int]]) -> None:
    for level, option, value in options:
        with contextlib.suppress(OSError):
            sock.setsockopt(level, option, value)


def not_taken(sock: socket.socket) -> int:
    """Bytes that the kernel keeps until the client takes them (Linux); 0 where it does not say."""
    if fcntl is None or not sys.platform.startswith("linux"):
        return 0
    try:
        return int.from_bytes(fcntl.ioctl(sock.fileno(), termios.TIOCOUTQ, bytes(4)), sys.byteorder)
    except OSError:
        return 0


def send_in_packets(listening: socket.socket) -> None:
    """Send to clients of this machine, too, what fits a packet of a network (Linux).

    A client's kernel asks for more when there is room for a packet. With those of 64 KiB it may not do so for minutes
    for one that reads an answer as fast as it is spoken, and could not be told from one that does not read.
    """
    if sys.platform.startswith("linux"):
        with contextlib.suppress(OSError):
            listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, _PACKET_BYTES)

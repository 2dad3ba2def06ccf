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
from collections.abc import Collection
from pathlib import Path

Ends = tuple[str, str]
"""The addresses (ADDRESS:PORT, as the kernel's table writes them) of the client's end and of the server's."""

_TABLES = (Path("/proc/net/tcp"), Path("/proc/net/tcp6"))


def ends_of(peer: tuple[str, int], own: tuple[str, int]) -> Ends | None:
    """The ends of a connection whose client is on this machine, else None. Addresses are (host, port)."""
    try:
        hosts = [ipaddress.ip_address(host.partition("%")[0]) for host, _ in (peer, own)]
    except ValueError:
        return None
    plain = [getattr(host, "ipv4_mapped", None) or host for host in hosts]
    # Other addresses may be those of a container, whose sockets are in another table.
    if not plain[0].is_loopback or not _TABLES[0].exists():
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
        with contextlib.suppress(FileNotFoundError):  # a machine without IPv6
            try:
                lines = table.read_text().splitlines()[1:]
            except FileNotFoundError:
                raise
            except OSError:
                return None
            for line in lines:
                fields = line.split()
                if (fields[1], fields[2]) in wanted and fields[9] != "0":  # the inode
                    found.add((fields[1], fields[2]))
    return found


def keep_watch(sock: socket.socket, seconds: float) -> None:
    """Let the kernel end a connection whose client does not answer, or does not take what it was sent, for long."""
    options = [(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)]
    for name, value in (
        ("TCP_KEEPIDLE", 15),
        ("TCP_KEEPINTVL", 15),
        ("TCP_USER_TIMEOUT", int(seconds * 1000)),  # Linux: also for what is left to send after closing
    ):
        if hasattr(socket, name):
            options.append((socket.IPPROTO_TCP, getattr(socket, name), value))
    for level, option, value in options:
        with contextlib.suppress(OSError):
            sock.setsockopt(level, option, value)

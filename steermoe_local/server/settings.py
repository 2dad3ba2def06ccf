"""The settings of `steermoe serve`, checked for what would not be safe."""

from __future__ import annotations

import datetime
import ipaddress
import socket
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import UsageError
from ..generation.engine import Sampling

MIB = 1 << 20


@dataclass(frozen=True)
class ServerSettings:
    """The settings of one server. Raises UsageError for what would not be safe, and for contradictions.

    `model` is the model's name for clients, `aliases` are further names. At most `queue_limit` requests wait for a
    slot; a request may take `timeout` seconds, waiting included. A body has at most `body_limit` bytes and must arrive
    within `body_seconds`; the header of a request must arrive within `header_seconds`, an idle connection is closed
    after `idle_seconds`, and one whose client does not take its answer after `write_seconds`. Besides the requests that
    wait, there may be `connections`. After a signal, answers get `stop_seconds` to come to their end. POST /v1/steering
    writes into `maps_folder`, a folder of maps and bias files, if `maps_writable`. Requests may have steerings learnt
    (POST /v1/learn) if `learn`; None: if the address is local. Requests take their defaults from
    `sampling`, `max_tokens` (None: until the model ends), `thinking` and `template_arguments` (of the chat template),
    and `steering` (a registered name). `date` is for chat templates that print one; None: the day of the request.
    """

    model: str
    aliases: tuple[str, ...] = ()
    host: str = "127.0.0.1"
    port: int = 8080
    api_key: str | None = field(default=None, repr=False)
    no_auth: bool = False
    cors_origins: tuple[str, ...] = ()
    allowed_hosts: tuple[str, ...] = ()
    queue_limit: int = 64
    timeout: float = 600.0
    body_limit: int = 16 * MIB
    body_seconds: float = 30.0
    header_seconds: float = 10.0
    idle_seconds: float = 15.0
    write_seconds: float = 60.0
    stop_seconds: float = 30.0
    connections: int = 512
    log_prompts: bool = False
    maps_folder: Path | None = None
    maps_writable: bool = False
    learn: bool | None = None
    sampling: Sampling = field(default_factory=Sampling)
    max_tokens: int | None = None
    thinking: bool = False
    template_arguments: Mapping[str, Any] = field(default_factory=dict)
    date: datetime.date | None = None
    steering: str | None = None

    def __post_init__(self) -> None:
        """Check what would not be safe."""
        if self.api_key is not None and self.no_auth:
            raise UsageError("--api-key and --no-auth exclude each other; give one of them")
        if self.api_key is not None and not (self.api_key.isascii() and self.api_key.isprintable() and self.api_key):
            raise UsageError("--api-key: empty, or with characters that no HTTP header can hold; take printable ASCII")
        if not self.local and self.api_key is None and not self.no_auth:
            raise UsageError(
                f"--host {self.host}: others can reach this address, so a key is needed: --api-key KEY; "
                "--no-auth serves everyone who can reach it"
            )
        if self.learn and not self.local and self.api_key is None:
            raise UsageError(
                f"--learn: everyone who can reach {self.host} could have this machine compute for hours; give an "
                "--api-key, or leave out --learn"
            )
        if self.maps_writable and self.maps_folder is None:
            raise UsageError("--maps-writable: there is no folder to write to; give one with --maps DIR")
        if self.maps_folder is not None and not self.maps_folder.is_dir():
            raise UsageError(f"--maps {self.maps_folder}: no such folder; create it first")
        if any(origin == "*" for origin in self.cors_origins) and self.api_key is None:
            raise UsageError("--cors '*': every web page could use this server; name the origins, or give an --api-key")

    @property
    def local(self) -> bool:
        """Whether only programs on this machine can reach the address."""
        return is_loopback(self.host)

    @property
    def learns(self) -> bool:
        """Whether requests may have steerings learnt."""
        return self.local if self.learn is None else self.learn

    @property
    def warnings(self) -> list[str]:
        """Warnings to print when the server starts."""
        if self.local:
            return []
        if self.no_auth:
            return [f"everyone who can reach {self.host} can use this server and read its maps: --no-auth"]
        return [
            f"{self.host} is not encrypted: the key and all texts can be read on the way; put a TLS proxy before it"
        ]


def is_loopback(host: str) -> bool:
    """Whether all addresses of a host are loopback addresses."""
    try:
        return ipaddress.ip_address(host.strip("[]").partition("%")[0]).is_loopback
    except ValueError:
        pass
    try:
        found = {info[4][0] for info in socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)}
    except OSError:
        return False
    return bool(found) and all(ipaddress.ip_address(str(address).partition("%")[0]).is_loopback for address in found)

"""What the hub on loopback knows, what goes wrong with it, and what it was asked."""

from __future__ import annotations

import re
import socket
import threading
from dataclasses import dataclass, field
from typing import Literal

from tests.hub.repository import Repository


@dataclass
class Fault:
    """Something that goes wrong with requests whose ``"METHOD path"`` matches.

    ``status`` answers with it, ``cut`` breaks the connection half-way through the body (of an upload: while it is
    received), ``stall`` never answers.
    """

    pattern: str
    kind: Literal["status", "cut", "stall"]
    status: int = 503
    message: str = "Service unavailable"
    code: str | None = None
    times: int | None = None
    num_hits: int = 0

    def strikes(self, request: str) -> bool:
        if (self.times is not None and self.num_hits >= self.times) or not re.search(self.pattern, request):
            return False
        self.num_hits += 1
        return True


@dataclass(frozen=True)
class Request:
    """What the server was asked, and what it answered."""

    line: str
    host: str
    user: str | None
    status: int


@dataclass
class HubState:
    """All that the hub knows: users by token, repositories, large files."""

    endpoint: str
    tokens: dict[str, str] = field(default_factory=dict)
    repositories: dict[str, Repository] = field(default_factory=dict)
    large_files: dict[str, bytes] = field(default_factory=dict)
    faults: list[Fault] = field(default_factory=list)
    requests: list[Request] = field(default_factory=list)
    unknown_requests: list[str] = field(default_factory=list)
    lock: threading.RLock = field(default_factory=threading.RLock)
    closing: threading.Event = field(default_factory=threading.Event)
    connections: set[socket.socket] = field(default_factory=set)

"""A server on loopback that speaks the hub's protocol, and fails where a test wants it to."""

from __future__ import annotations

import contextlib
import json
import re
import socket
import threading
from collections.abc import Iterator
from http.server import ThreadingHTTPServer
from typing import Any, Literal
from urllib.parse import parse_qs, unquote, urlsplit

from tests.hub.hub_protocol import HubProtocol, Refusal
from tests.hub.hub_state import Fault, HubState, Request
from tests.hub.repository import Repository


class HubServer:
    """The running server; ``state`` may be read and changed by a test at any time.

    Args:
        endpoint: the URL that clients believe they talk to.
    """

    def __init__(self, endpoint: str) -> None:
        self.state = HubState(endpoint)
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"state": self.state}))
        self._server.daemon_threads = True
        self.port = int(self._server.server_address[1])
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop listening and break all connections; new ones are refused from now on."""
        if self.state.closing.is_set():
            return
        self.state.closing.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
        for connection in list(self.state.connections):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def fail(self, pattern: str, kind: Literal["status", "cut", "stall"] = "status", **settings: Any) -> Fault:
        """Let requests go wrong; ``times`` says how many, all by default."""
        fault = Fault(pattern, kind, **settings)
        self.state.faults.append(fault)
        return fault

    def repository(self, name: str) -> Repository:
        return self.state.repositories[name]

    def requests(self, pattern: str = "") -> list[Request]:
        return [request for request in self.state.requests if re.search(pattern, request.line)]


class _Handler(HubProtocol):
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # an answer in one piece: in two, each waits for an acknowledgement of tens of milliseconds

    def setup(self) -> None:
        super().setup()
        self.state.connections.add(self.connection)

    def finish(self) -> None:
        self.state.connections.discard(self.connection)
        super().finish()

    def log_message(self, format: str, *args: Any) -> None:
        """Quiet: ``state.requests`` tells more."""

    def do_GET(self) -> None:
        self._serve()

    def do_HEAD(self) -> None:
        self._serve()

    def do_POST(self) -> None:
        self._serve()

    def do_PUT(self) -> None:
        self._serve()

    def _serve(self) -> None:
        self.cut_body = False
        url = urlsplit(self.path)
        self.query = {key: values[0] for key, values in parse_qs(url.query).items()}
        line = f"{self.command} {unquote(url.path)}"
        with self.state.lock:
            fault = next((fault for fault in self.state.faults if fault.strikes(line)), None)
        if fault is not None and fault.kind == "stall":
            self._log(line, 0)
            self.state.closing.wait(30)
            self.close_connection = True
            return
        length = int(self.headers.get("Content-Length") or 0)
        if fault is not None and fault.kind == "cut" and self.command == "PUT":
            self.rfile.read(length // 2)
            self._log(line, 0)
            self.close_connection = True
            return
        self.body = self.rfile.read(length)
        self.cut_body = fault is not None and fault.kind == "cut"
        try:
            if fault is not None and fault.kind == "status":
                raise Refusal(fault.status, fault.message, fault.code)
            with self.state.lock:
                status, headers, content = self.route(url.path)
        except Refusal as refusal:
            content = json.dumps({"error": str(refusal)}).encode()
            status, headers = refusal.status, {"Content-Type": "application/json", **refusal.headers}
        self._log(line, status)
        self._answer(status, headers, content)

    def _log(self, line: str, status: int) -> None:
        user = self.state.tokens.get(self.token() or "")
        self.state.requests.append(Request(line, self.headers["Host"], user, status))

    def _answer(self, status: int, headers: dict[str, str], content: bytes) -> None:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content[: len(content) // 2] if self.cut_body else content)
            self.close_connection |= self.cut_body


@contextlib.contextmanager
def running_hub(endpoint: str) -> Iterator[HubServer]:
    """A server for the duration of a test."""
    server = HubServer(endpoint)
    try:
        yield server
    finally:
        server.close()

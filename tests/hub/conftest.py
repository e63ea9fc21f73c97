"""The real client of the hub, with every connection led to a server on loopback."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx2
import pytest
from huggingface_hub import close_session, constants, file_download, set_client_factory
from huggingface_hub.utils import _http

from tests.hub.hub_server import HubServer, running_hub

ME, OTHER = "hf_me", "hf_other"
"""Tokens of the users ``me`` and ``other``."""


class LoopbackTransport(httpx2.HTTPTransport):
    """Sends every request to one port of this machine, whatever host it is meant for; so none can reach another."""

    def __init__(self, port: int) -> None:
        super().__init__()
        self.port = port
        self.timeout_seconds: float | None = None

    def handle_request(self, request: httpx2.Request) -> httpx2.Response:
        """The Host header stays, and so does the URL that the client sees in the response."""
        extensions: dict[str, Any] = dict(request.extensions)
        if self.timeout_seconds is not None:
            extensions["timeout"] = dict.fromkeys(("connect", "read", "write", "pool"), self.timeout_seconds)
        led = httpx2.Request(
            request.method,
            request.url.copy_with(scheme="http", host="127.0.0.1", port=self.port),
            headers=request.headers,
            stream=request.stream,
            extensions=extensions,
        )
        return super().handle_request(led)


class Hub:
    """The server and what a test needs to change of the client."""

    def __init__(self, server: HubServer, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.server = server
        self.cache = cache
        self._transport = LoopbackTransport(server.port)
        self._monkeypatch = monkeypatch
        server.state.tokens.update({ME: "me", OTHER: "other"})

    def client(self) -> httpx2.Client:
        hooks = {"request": [_http.hf_request_event_hook]}
        return httpx2.Client(transport=self._transport, event_hooks=hooks, follow_redirects=True, timeout=None)

    def log_in(self, token: str | None) -> None:
        """What ``hf auth login`` leaves behind."""
        if token is None:
            self._monkeypatch.delenv("HF_TOKEN", raising=False)
        else:
            self._monkeypatch.setenv("HF_TOKEN", token)

    def go_offline(self) -> None:
        """As HF_HUB_OFFLINE=1 does, with the server gone as well."""
        self._monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        self._monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        self.server.close()

    def time_out_after(self, seconds: float) -> None:
        self._transport.timeout_seconds = seconds

    def use_cache(self, folder: Path) -> None:
        """Another, empty cache: another machine."""
        self.cache = folder
        self._monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder))


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub of one's own, with a cache of one's own; the user ``me`` is logged in."""
    for variable in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_OIDC_RESOURCE"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")  # PEFT looks here
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "home" / "token"))
    monkeypatch.setattr(constants, "AGENT_HARNESSES_PATH", str(tmp_path / "home" / "harnesses.json"))
    without_waiting = SimpleNamespace(sleep=lambda seconds: None, time=time.time)
    monkeypatch.setattr(_http, "time", without_waiting)  # the client waits seconds before it tries again
    monkeypatch.setattr(file_download, "time", without_waiting)
    with running_hub(constants.ENDPOINT) as server:
        hub = Hub(server, tmp_path / "cache", monkeypatch)
        hub.use_cache(tmp_path / "cache")
        hub.log_in(ME)
        set_client_factory(hub.client)
        try:
            yield hub
        finally:
            close_session()
            set_client_factory(_http.default_client_factory)
        assert not server.state.unknown_requests  # else the server has to learn more of the protocol

"""A real web server on this machine that answers as it is told."""

from __future__ import annotations

import base64
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs


@dataclass
class Web:
    """A folder on a web server, and what was asked of it."""

    folder: Path
    ranges: bool = True
    tells: str | None = "bytes"  # its header Accept-Ranges
    status: dict[str, int] = field(default_factory=dict)  # by the end of an address: refused with this status
    cut: dict[str, int] = field(default_factory=dict)  # by the end of an address: bytes at which an answer breaks off
    login: str | None = None  # user:password that it asks for
    token: str | None = None  # value of `token` in an address, accepted instead
    asked: list[tuple[str, str]] = field(default_factory=list)
    sent: int = 0
    url: str = ""

    def of(self, suffix: str) -> list[tuple[str, str]]:
        return [(method, path) for method, path in self.asked if path.endswith(suffix)]

    def forget(self) -> None:
        self.asked.clear()
        self.sent = 0


@contextmanager
def serve(folder: Path, **how: object) -> Iterator[Web]:
    """A web server on a free port of this machine that answers byte ranges."""
    web = Web(folder, **how)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            self.answer(with_body=False)

        def do_GET(self) -> None:
            self.answer(with_body=True)

        def answer(self, with_body: bool) -> None:
            web.asked.append((self.command, self.path))
            address, _, query = self.path.partition("?")
            path = web.folder / address.lstrip("/").removeprefix("ds/")
            if not self.may_read(query):
                self.send_error(401)
                return
            refused = next((code for end, code in web.status.items() if self.path.endswith(end)), None)
            if refused or not path.is_file():
                self.send_error(refused or 404)
                return
            size = path.stat().st_size
            first, last, status = 0, size - 1, 200
            if web.ranges and (wanted := re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))):
                first, last, status = int(wanted[1]), min(int(wanted[2]), size - 1), 206
                if first > last:
                    self.send_error(416)
                    return
            self.send_response(status)
            self.send_header("Content-Length", str(last + 1 - first))
            if web.tells:
                self.send_header("Accept-Ranges", web.tells)
            if status == 206:
                self.send_header("Content-Range", f"bytes {first}-{last}/{size}")
            self.end_headers()
            if not with_body:
                return
            with open(path, "rb") as file:
                file.seek(first)
                body = file.read(last + 1 - first)
            cut = next((count for end, count in web.cut.items() if self.path.endswith(end)), None)
            for start in range(0, len(body[:cut]), 1 << 14):
                try:
                    self.wfile.write(body[:cut][start : start + (1 << 14)])
                except OSError:  # the client has seen enough
                    self.close_connection = True
                    return
                web.sent += len(body[:cut][start : start + (1 << 14)])
            if cut is not None:
                self.close_connection = True

        def may_read(self, query: str) -> bool:
            if web.login is None and web.token is None:
                return True
            basic = None if web.login is None else f"Basic {base64.b64encode(web.login.encode()).decode()}"
            return basic == self.headers.get("Authorization", "") or parse_qs(query).get("token") == [web.token]

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    web.url = f"http://127.0.0.1:{server.server_port}/ds"
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield web
    finally:
        server.shutdown()
        server.server_close()
        thread.join()

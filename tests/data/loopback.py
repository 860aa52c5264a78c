"""A server on this machine that serves a few files, well or badly, and notes what it was asked."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@dataclass
class Served:
    """A file as this server gives it."""

    data: bytes
    # Bytes after which each of the next answers breaks off.
    breaks: list[int] = field(default_factory=list)
    # Whether parts can be asked for.
    ranges: bool = True
    # The answer's status, if it is an error.
    status: int = 200
    # Whether the length is sent.
    sends_length: bool = True
    # Held until this is set.
    held: threading.Event | None = None


@dataclass
class Loopback:
    """The server's address, files and log."""

    address: str
    files: dict[str, Served] = field(default_factory=dict)
    # Path and range of every request.
    log: list[tuple[str, str | None]] = field(default_factory=list)

    def add(self, path: str, data: bytes, **behaviour: object) -> str:
        """Serve a file; returns its address."""
        self.files[path] = Served(data, **behaviour)
        return f"{self.address}/{path}"


@contextlib.contextmanager
def loopback() -> Iterator[Loopback]:
    """Run a server until the block ends."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            """Answer from `served.files`."""
            path, asked = self.path.lstrip("/"), self.headers.get("Range")
            served.log.append((path, asked))
            file = served.files.get(path)
            if file is None or file.status != 200:
                self.send_error(404 if file is None else file.status)
                return
            if file.held is not None:
                file.held.wait(10)
            start = int(asked.removeprefix("bytes=").rstrip("-")) if asked and file.ranges else 0
            if start and start >= len(file.data):
                self.send_error(416)
                return
            body = file.data[start:]
            self.send_response(206 if start else 200)
            if start:
                self.send_header("Content-Range", f"bytes {start}-{len(file.data) - 1}/{len(file.data)}")
            if file.sends_length:
                self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body[: file.breaks.pop(0)] if file.breaks else body)

        def log_message(self, *_: object) -> None:
            """Nothing on standard error."""

    class Server(ThreadingHTTPServer):
        def handle_error(self, *_: object) -> None:
            """A client that hangs up is part of the tests."""

    server = Server(("127.0.0.1", 0), Handler)
    served = Loopback(f"http://127.0.0.1:{server.server_port}")
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield served
    finally:
        server.shutdown()
        server.server_close()
        thread.join()

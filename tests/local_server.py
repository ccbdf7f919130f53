"""A local HTTP server for tests of downloads."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@dataclass
class Reply:
    """A reply of the server.

    Attributes:
        status: HTTP status; 0 closes the connection without a reply.
        length: Value of Content-Length if it differs from the length of the body.
        silent: Whether to send nothing at all.
        measured: Whether to send Content-Length; otherwise the body ends with the connection.
    """

    body: bytes = b""
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    length: int | None = None
    silent: bool = False
    measured: bool = True


@dataclass
class Server:
    """The replies by path (404 for any other path) and the requests received so far."""

    url: str
    replies: dict[str, Reply] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)


@contextmanager
def serve() -> Iterator[Server]:
    """Run a server on a free port in a thread, inside the block."""
    stop = threading.Event()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            server.requests.append(f"{self.command} {self.path}")
            reply = server.replies.get(self.path, Reply(status=404))
            if reply.silent:
                stop.wait(20)
                return
            if reply.status == 0:  # close the connection without a reply
                return
            self.send_response(reply.status)
            for name, value in reply.headers.items():
                self.send_header(name, value)
            if reply.measured:
                self.send_header("Content-Length", str(len(reply.body) if reply.length is None else reply.length))
            self.end_headers()
            if self.command == "GET":
                with suppress(ConnectionError):  # the client may have closed the connection
                    self.wfile.write(reply.body)

        do_HEAD = do_GET

        def log_message(self, format: str, *args: object) -> None:
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server = Server(f"http://127.0.0.1:{http.server_port}/")
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield server
    finally:
        stop.set()
        http.shutdown()
        http.server_close()
        thread.join()

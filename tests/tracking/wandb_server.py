"""A local substitute for wandb's server that stores the history of one run and answers resume requests."""

import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class WandbServer:
    """A server for one run.

    Attributes:
        history: The rows that were sent.
        exit_code: The exit code that was sent, or None.
        silent: While set, requests are accepted but not answered.
    """

    def __init__(self) -> None:
        self.url = ""
        self.history: list[dict[str, Any]] = []
        self.exit_code: int | None = None
        self.files: list[str] = []
        self.silent = threading.Event()
        self.stopped = threading.Event()
        self._run_known = False

    def answer(self, path: str, request: Any) -> dict[str, Any]:
        """Return the answer to a POST request."""
        if path == "/graphql":
            found = re.search(r"(?:query|mutation) (\w+)", request["query"])
            return {"data": self._graphql(found[1] if found else "", request["variables"])}
        for name, part in request.get("files", {}).items():
            if name == "wandb-history.jsonl":
                rows = [json.loads(line) for line in part["content"]]
                self.history[part["offset"] :] = rows
        if request.get("complete"):
            self.exit_code = request["exitcode"]
        return {"exitcode": None, "limits": {}}

    def _graphql(self, operation: str, variables: dict[str, Any]) -> dict[str, Any]:
        owner = {"id": "owner", "name": "owner"}
        project = {"id": "project", "name": "metaformer", "entity": owner}
        match operation:
            case "RunResumeStatus":
                return {"model": project | {"bucket": self._resumed(variables["name"]) if self._run_known else None}}
            case "UpsertBucket":
                self._run_known = True
                run = {"id": "run", "name": variables["name"], "displayName": "run", "project": project, "config": "{}"}
                return {"upsertBucket": {"bucket": run | {"historyLineCount": len(self.history)}, "inserted": True}}
            case "CreateRunFiles":
                self.files += variables["files"]
                files = [{"name": name, "uploadUrl": f"{self.url}/storage/{name}"} for name in variables["files"]]
                return {"createRunFiles": {"runID": "run", "uploadHeaders": [], "files": files}}
        return {}

    def _resumed(self, name: str) -> dict[str, Any]:
        counts = {"logLineCount": 0, "eventsLineCount": 0, "historyLineCount": len(self.history)}
        tails = {"eventsTail": "[]", "historyTail": json.dumps([json.dumps(row) for row in self.history[-1:]])}
        texts: dict[str, Any] = {
            "summaryMetrics": "{}",
            "config": "{}",
            "notes": None,
            "wandbConfig": json.dumps({"t": 1}),
            "tags": [],
        }
        return {"id": "run", "name": name, "displayName": "run", **counts, **tails, **texts}


@contextmanager
def serve_wandb() -> Iterator[WandbServer]:
    """Run a server on a free port in a thread, inside the block."""
    server = WandbServer()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            while server.silent.is_set() and not server.stopped.wait(0.1):
                pass
            self._send(json.dumps(server.answer(self.path, json.loads(body))).encode())

        def do_PUT(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            self._send(b"")

        def _send(self, body: bytes) -> None:
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            pass

    class Http(ThreadingHTTPServer):
        def handle_error(self, request: Any, client_address: Any) -> None:
            pass  # tests kill clients

    http = Http(("127.0.0.1", 0), Handler)
    server.url = f"http://127.0.0.1:{http.server_port}"
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield server
    finally:
        server.stopped.set()
        http.shutdown()
        http.server_close()
        thread.join()

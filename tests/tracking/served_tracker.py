"""A program that serves a tracker which writes its calls to files, with a fault chosen by the test.

FOLDER/start-N has a line for each call to the N-th start. Creating the file FOLDER/go ends all waits.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from metaformer.tracking.service import Opened, Server
from metaformer.tracking.tracker import NullTracker


class FileTracker(NullTracker):
    """A tracker with the fault `fault`, at every start or, if it ends in "-once", at the first start only."""

    _fault, _moved = "", 0

    def open(self, folder: Path, fault: str, first_position: int | None) -> Opened:
        number = len(list(folder.glob("start-*"))) + 1
        self._folder, self._file = folder, folder / f"start-{number}"
        self._file.touch()
        tempfile.mkdtemp()  # which nobody here removes
        self._fault = "" if fault.endswith("-once") and number > 1 else fault.removesuffix("-once")
        self._record("first position", first_position)
        match self._fault:
            case "opening-raises":
                raise ValueError("a\nreason")
            case "opening-waits" | "dies-opening":
                self._wait()
            case "starts-another":
                (folder / "other").write_text(str(subprocess.Popen(["sleep", "100"], start_new_session=True).pid))
        return Opened(f"upload {self._file.name}", number)

    def metrics(self, row: dict[str, Any]) -> None:
        match self._fault:
            case "row-raises":
                raise ValueError("a\nreason")
            case "row-kills" if row["step"] == 2:
                os.kill(os.getpid(), signal.SIGKILL)
            case "row-waits":
                self._wait()
        self._record("row", row["step"])

    def message(self, text: str) -> None:
        self._record("message", text)

    def picture(self, name: str, file: Path) -> None:
        self._record("picture", name, str(file))

    def checkpoint(self, folder: Path, aliases: list[str]) -> None:
        self._record("checkpoint", str(folder), aliases)

    def close(self, failed: bool) -> None:
        match self._fault:
            case "closing-waits" | "closing-moves" | "starts-another":
                self._wait()
            case "closing-kills":
                os.kill(os.getpid(), signal.SIGKILL)
        self._record("close", failed)

    def check(self) -> None:
        if self._fault in ("dies", "dies-opening") and (self._folder / "go").exists():
            raise RuntimeError("the service died")

    def bytes_moved(self) -> int:
        if self._fault == "closing-moves":
            self._moved += 1
        return self._moved

    def _wait(self) -> None:
        while self._fault == "dies-opening" or not (self._folder / "go").exists():
            time.sleep(0.02)

    def _record(self, *call: Any) -> None:
        with self._file.open("a") as file:
            file.write(json.dumps(call) + "\n")


if __name__ == "__main__":
    Server(Connection(int(sys.argv[1])), FileTracker()).run()

"""The server of tests/warm: it imports what programs need, then forks a process for each that `python` asks for."""

import atexit
import contextlib
import fcntl
import gc
import json
import multiprocessing
import os
import runpy
import selectors
import signal
import socket
import subprocess
import sys
import threading
import traceback
import types
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

# Before the imports, since modules take it: what a program starts is started warm too.
sys.executable = str(Path(sys.argv[1]).with_name("python"))
multiprocessing.set_executable(sys.executable)  # the server of data workers

import torch.distributed.run

import metaformer.assembly.training
import metaformer.assembly.validation

__all__ = ["metaformer", "torch"]

_FIRST_FREE = 1000  # above all file numbers that a program asks for


@dataclass(frozen=True)
class Request:
    """The arguments of a call of `python`, and its open files, to whose numbers the entry `files` of them refers."""

    arguments: dict[str, Any]
    files: list[int]


@dataclass
class Server:
    """Forks a process for each connection, and reports how it ended."""

    listener: socket.socket
    selector: selectors.DefaultSelector = field(default_factory=selectors.DefaultSelector)
    processes: dict[socket.socket, int] = field(default_factory=dict)

    def serve(self) -> Request | None:
        """Return a request in each forked process, and None in this one once stdin is closed."""
        self.selector.register(sys.stdin.fileno(), selectors.EVENT_READ)
        self.selector.register(self.listener, selectors.EVENT_READ)
        while True:
            for key, _ in self.selector.select():
                if key.fileobj == sys.stdin.fileno():
                    self._kill_all()
                    return None
                if key.fileobj is self.listener:
                    connection, _ = self.listener.accept()
                    self.selector.register(connection, selectors.EVENT_READ)
                elif isinstance(key.fileobj, socket.socket):
                    request = self._receive(key.fileobj)
                    if request:
                        return request
                else:
                    self._report(key.data, int(key.fileobj))  # type: ignore[arg-type]

    def _receive(self, connection: socket.socket) -> Request | None:
        """Handle a request, a signal, or the end of `python`. Returns the request in the forked process."""
        message, files, _, _ = socket.recv_fds(connection, 100, 250)
        if message == b"run":
            with open(files[0]) as content:  # noqa: PTH123 - an open file
                content.seek(0)
                request = Request(json.load(content), files[1:])
            process = os.fork()
            if process == 0:
                return request
            for number in request.files:
                os.close(number)
            self.processes[connection] = process
            self.selector.register(os.pidfd_open(process), selectors.EVENT_READ, connection)
        elif message:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.processes[connection], int(message))
        else:
            with contextlib.suppress(ProcessLookupError, KeyError):
                os.kill(self.processes[connection], signal.SIGKILL)
            self.selector.unregister(connection)
        return None

    def _report(self, connection: socket.socket, pidfd: int) -> None:
        self.selector.unregister(pidfd)
        os.close(pidfd)
        _, status = os.waitpid(self.processes.pop(connection), 0)
        with contextlib.suppress(OSError):  # `python` was killed
            connection.send(b"%d" % os.waitstatus_to_exitcode(status))

    def _kill_all(self) -> None:
        for process in self.processes.values():
            os.kill(process, signal.SIGKILL)


def enter(request: Request) -> list[str]:
    """Take over a request's files, environment, working folder and ignored signals, and return its arguments."""
    os.setsid()
    wanted = request.arguments["files"]
    moved = [fcntl.fcntl(number, fcntl.F_DUPFD, _FIRST_FREE) for number in request.files]
    for number in [int(file.name) for file in Path("/proc/self/fd").iterdir()]:
        if number not in moved:
            with contextlib.suppress(OSError):  # the listing's own
                os.close(number)
    for number, copy in zip(wanted, moved, strict=True):
        os.dup2(copy, number)
        os.close(copy)
    for name in request.arguments["ignored"]:
        signal.signal(getattr(signal, name), signal.SIG_IGN)
    os.chdir(request.arguments["cwd"])
    os.environ.clear()
    os.environ.update(request.arguments["env"])
    arguments: list[str] = request.arguments["argv"]
    return arguments


def run(arguments: list[str]) -> None:
    """Run `-m MODULE`, `-c CODE` or a file, with its arguments and the folders of PYTHONPATH, as __main__."""
    folders = filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))
    sys.path[1:1] = [folder for folder in folders if folder not in sys.path]
    own = subprocess._args_from_interpreter_flags()  # type: ignore[attr-defined] # such as -B, which multiprocessing adds
    if arguments[: len(own)] == own:
        arguments = arguments[len(own) :]
    if arguments[0] == "-u":
        for stream in (sys.stdout, sys.stderr):
            stream.reconfigure(write_through=True)  # type: ignore[union-attr]
        arguments = arguments[1:]
    if arguments[0] == "-m":
        sys.argv, sys.path[0] = arguments[1:], str(Path.cwd())
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
        return
    if arguments[0] == "-c":
        sys.argv, sys.path[0], name, code = ["-c", *arguments[2:]], "", "<string>", arguments[1]
    else:
        sys.argv, sys.path[0], name = arguments, str(Path(arguments[0]).resolve().parent), arguments[0]
        code = Path(name).read_text()
    main = types.ModuleType("__main__")
    if arguments[0] != "-c":
        main.__file__ = name
    sys.modules["__main__"] = main
    exec(compile(code, name, "exec"), main.__dict__)


def listen(path: str) -> Server:
    """Return a server that listens on a socket, after a check that this process can be forked."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listener.bind(path)
    listener.listen(64)
    threads = len(list(Path("/proc/self/task").iterdir()))
    if threads > 1:
        sys.exit(f"error: {threads} threads after the imports; a process that has threads must not be forked")
    print("ready", flush=True)
    return Server(listener)


def run_and_exit(request: Request) -> NoReturn:
    """Run a program and exit as Python does, but without freeing each object, which takes a second."""
    code: Any = 0
    try:
        run(enter(request))
    except SystemExit as end:
        code = end.code
    except BaseException:
        traceback.print_exc()
        code = 1
    threading._shutdown()  # type: ignore[attr-defined] # joins threads, as multiprocessing's processes do at their end
    atexit._run_exitfuncs()
    if isinstance(code, str):
        print(code, file=sys.stderr)
    for stream in (sys.stdout, sys.stderr):
        if not stream.closed:
            stream.flush()
    os._exit(code if isinstance(code, int) else int(code is not None))


if __name__ == "__main__":
    gc.freeze()  # a collection in a forked process would copy the pages of all objects
    server = listen(sys.argv[1])  # stays referenced: a forked process closed its files, and reuses their numbers
    found = server.serve()
    if found:
        run_and_exit(found)

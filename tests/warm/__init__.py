"""Start Python programs in milliseconds: `python` asks a server that has already imported torch and timm to fork.

Importing them takes five seconds of CPU time, which is most of what a short program costs. In such a program
`sys.executable` is this `python` too, so that what it starts is as fast. Tests of what happens while a program starts,
of signals to its process group and of its sudden death start a real interpreter instead.
"""

import atexit
import os
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path


@cache
def python() -> str:
    """Return the path of a program that is called like `python`. The first call starts its server."""
    folder = tempfile.TemporaryDirectory(prefix="warm")
    program = Path(folder.name) / "python"  # finds the server's socket in its folder
    program.symlink_to(Path(__file__).with_name("python"))
    program.with_name("interpreter").symlink_to(sys.executable)
    server = subprocess.Popen(
        [sys.executable, str(Path(__file__).with_name("server.py")), str(program.with_name("socket"))],
        env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        stdin=subprocess.PIPE,  # the server ends when this process does, which closes it
        stdout=subprocess.PIPE,
        start_new_session=True,
    )
    assert server.stdout is not None
    assert server.stdout.readline() == b"ready\n"

    @atexit.register
    def stop() -> None:
        server.communicate()
        folder.cleanup()

    return str(program)

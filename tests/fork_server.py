"""Processes forked from the tests' own server, which has imported training.

Python has one fork server per process. Once a test has started it for the workers of a data loader, it lacks timm and
the training loop, and each process forked from it would import them anew, for seconds.
"""

from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext, ForkServerProcess
from multiprocessing.popen_forkserver import Popen
from multiprocessing.process import BaseProcess

_server = forkserver.ForkServer()
_server.set_forkserver_preload(["metaformer.assembly.training", "metaformer.assembly.validation", "tests.conftest"])


class ForkedProcess(ForkServerProcess):
    """A process forked from the tests' server."""

    @staticmethod
    def _Popen(process: BaseProcess) -> Popen:
        shared = forkserver.connect_to_new_process
        forkserver.connect_to_new_process = _server.connect_to_new_process
        try:
            return Popen(process)
        finally:
            forkserver.connect_to_new_process = shared


class _Context(ForkServerContext):
    Process = ForkedProcess


context = _Context()

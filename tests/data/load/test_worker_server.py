"""Tests of the worker server: workers are forked without threads, and end with the trainer, not by stop signals."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from metaformer.data.index.image_index import load_index
from metaformer.files import MAX_TEMPORARY_FOLDER_BYTES
from tests.conftest import BIN, QUICK, REPOSITORY

pytestmark = pytest.mark.whole

# Imported by every Python process at its start. Records each fork: the process, and its number of threads.
AT_EACH_FORK = """
import os

def note():
    threads = len(os.listdir("/proc/self/task"))
    with open(os.environ["FORKS"], "a") as file:
        file.write(f"{os.getpid()} {threads}\\n")

os.register_at_fork(before=note)
"""


# Beginning of a separate program that makes a loader of single images.
PRELUDE = """
import os, signal, sys
from multiprocessing import forkserver
from pathlib import Path
from metaformer.data.index.image_index import load_index
from metaformer.data.load.pil_reader import PilReader
from metaformer.data.plan.plan import EvaluationPlan
from metaformer.data.load.worker_loader import WorkerLoader

index = load_index(Path(sys.argv[1]), "train")

def make_loader(workers):
    plan = EvaluationPlan(num_samples=len(index), batch_size=1, rank=0, world_size=1, image_size=32, crop_pct=0.9)
    return WorkerLoader(PilReader(), index, plan, workers, prefetch_batches=1, pin_memory=False)
"""


def start(script: str, image_root: Path, *arguments: object) -> subprocess.Popen[str]:
    """Run a program in a separate process group."""
    return subprocess.Popen(
        [sys.executable, "-c", PRELUDE + script, str(image_root), *map(str, arguments)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip


@pytest.mark.parametrize("ranks", [1, 2])
def test_nothing_with_threads_is_forked(images: Path, tmp_path: Path, ranks: int) -> None:
    """When training with workers and wandb, only processes with one thread fork, and never the trainer."""
    (tmp_path / "sitecustomize.py").write_text(AT_EACH_FORK)
    forks = tmp_path / "forks"
    launcher = [sys.executable] if ranks == 1 else [str(BIN / "torchrun"), "--standalone", f"--nproc_per_node={ranks}"]
    overrides = [*QUICK, f"data.root={images}", f"run_dir={tmp_path / 'run'}", "workers=2", "tracking=offline"]
    subprocess.run(
        [*launcher, str(REPOSITORY / "train.py"), *overrides, "max_steps=2"],
        env=os.environ | {"PYTHONPATH": str(tmp_path), "FORKS": str(forks), "CUDA_VISIBLE_DEVICES": ""},
        check=True, capture_output=True, timeout=180,
    )  # fmt: skip
    notes = [tuple(map(int, line.split())) for line in forks.read_text().splitlines()]
    assert len(notes) >= 4 * ranks, "two workers for training and two for validation, on each rank"
    assert len({pid for pid, _ in notes}) == ranks, "only the server of each rank forks"
    assert {threads for _, threads in notes} == {1}


def test_stop_signals_do_not_reach_workers(image_root: Path) -> None:
    """The epoch is read to its end after SIGTERM, SIGUSR1, SIGINT and SIGHUP to the server and each worker."""
    program = start(
        """
loader = make_loader(workers=2)
batches = loader.epoch(0)
next(batches)

def descendants(pid):
    children = [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return children + [pid for child in children for pid in descendants(child)]

processes = descendants(os.getpid())
assert len(processes) >= 4, "tracker, server, two workers"
for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP):
    for pid in processes:
        os.kill(pid, number)
print(1 + sum(1 for _ in batches))
loader.close()
""",
        image_root,
    )
    stdout, stderr = program.communicate(timeout=120)
    assert (program.returncode, stdout, stderr) == (0, f"{len(load_index(image_root, 'train'))}\n", "")


@pytest.mark.parametrize("read", [1, 12], ids=["busy", "waiting"])
def test_workers_end_with_a_trainer_that_is_killed(image_root: Path, read: int) -> None:
    """After SIGKILL to the trainer only, server, tracker and workers end, whether busy or waiting."""
    program = start(
        """
loader = make_loader(workers=2)  # must exist at the kill: a deleted loader ends its workers itself
batches = loader.epoch(0)
for _ in range(int(sys.argv[2])):
    next(batches)
os.kill(os.getpid(), signal.SIGKILL)
""",
        image_root, read,
    )  # fmt: skip
    # Each process of the group has the pipes open, so they close when the last one has ended.
    assert program.communicate(timeout=120) == ("", "")
    assert program.returncode == -signal.SIGKILL


def test_a_stopped_worker_ends_with_its_trainer(image_root: Path) -> None:
    """A stopped worker, which cannot act itself, also ends with its trainer."""
    program = start(
        """
loader = make_loader(workers=1)
batches = loader.epoch(0)
next(batches)
os.kill(loader._loader._iterator._workers[0].pid, signal.SIGSTOP)
os.kill(os.getpid(), signal.SIGKILL)
""",
        image_root,
    )
    assert program.communicate(timeout=60) == ("", "")


def test_a_worker_whose_trainer_is_killed_while_it_starts_ends(image_root: Path) -> None:
    """A worker that asks for the signal of its server's death only after that death ends as well."""
    program = start(
        """
class StopWorker:
    def __reduce__(self):
        return eval, ("__import__('os').kill(__import__('os').getpid(), 19)",)

plan = EvaluationPlan(num_samples=len(index), batch_size=1, rank=0, world_size=1, image_size=32, crop_pct=0.9)
loader = WorkerLoader(StopWorker(), index, plan, workers=1, prefetch_batches=1, pin_memory=False)
batches = iter(loader._loader)
worker = batches._workers[0].pid
while Path(f"/proc/{worker}/stat").read_text().rsplit(")")[-1].split()[0] != "T":
    pass
print(worker, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
""",
        image_root,
    )
    assert program.stdout is not None
    worker = int(program.stdout.readline())
    assert program.wait(60) == -signal.SIGKILL
    os.kill(worker, signal.SIGCONT)
    assert program.communicate(timeout=60) == ("", "")


def test_a_batch_that_cannot_be_sent_ends_the_worker(image_root: Path, tmp_path: Path) -> None:
    """The worker ends with a one-line message, instead of dropping the batch while the trainer waits forever."""
    program = tmp_path / "program.py"  # a file, which workers can import
    program.write_text(
        PRELUDE
        + """
import torch
from multiprocessing.reduction import ForkingPickler

def fail(batch):
    raise OSError("AF_UNIX path too long")

class UnsendableReader(PilReader):
    def augment(self, region, plan, row):
        ForkingPickler.register(torch.Tensor, fail)
        return super().augment(region, plan, row)

if __name__ == "__main__":
    plan = EvaluationPlan(num_samples=len(index), batch_size=1, rank=0, world_size=1, image_size=32, crop_pct=0.9)
    next(WorkerLoader(UnsendableReader(), index, plan, workers=1, prefetch_batches=1, pin_memory=False).epoch(0))
"""
    )
    command = [sys.executable, str(program), str(image_root)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1
    assert "error: a loader worker cannot send a batch: AF_UNIX path too long\n" in done.stderr


def test_a_batch_is_made_in_shared_memory(image_root: Path, tmp_path: Path) -> None:
    """A worker's batch is in shared memory before it is sent, so that sending it does not copy it."""
    program = tmp_path / "program.py"
    program.write_text(
        PRELUDE
        + """
import torch
from multiprocessing.reduction import ForkingPickler
from torch.multiprocessing.reductions import reduce_tensor

def send(batch):
    if not batch.is_shared():
        raise OSError("the batch would be copied")
    return reduce_tensor(batch)

class CheckingReader(PilReader):
    def augment(self, region, plan, row):
        ForkingPickler.register(torch.Tensor, send)
        return super().augment(region, plan, row)

if __name__ == "__main__":
    plan = EvaluationPlan(num_samples=len(index), batch_size=4, rank=0, world_size=1, image_size=32, crop_pct=0.9)
    batch = next(WorkerLoader(CheckingReader(), index, plan, workers=1, prefetch_batches=1, pin_memory=False).epoch(0))
    print(tuple(batch.shape), batch.is_contiguous(memory_format=torch.channels_last), flush=True)
"""
    )
    command = [sys.executable, str(program), str(image_root)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert (done.stdout, done.stderr) == ("(4, 3, 32, 32) True\n", "")


def test_a_temporary_folder_with_too_long_a_name(image_root: Path, tmp_path: Path) -> None:
    """A path that is too long is rejected at the start in one line; the longest accepted path works."""
    base = str(tmp_path)
    for length, code in ((MAX_TEMPORARY_FOLDER_BYTES, 0), (MAX_TEMPORARY_FOLDER_BYTES + 1, 2)):
        folder = Path(base + "/" + "x" * (length - len(base) - 1))
        folder.mkdir()
        program = start(
            """
import tempfile
from metaformer.program import run_program
tempfile.tempdir = sys.argv[2]

def main():
    loader = make_loader(workers=1)
    assert sum(1 for _ in loader.epoch(0)) == len(index)
    loader.close()

run_program(main)
""",
            image_root, folder,
        )  # fmt: skip
        _, stderr = program.communicate(timeout=60)
        assert program.returncode == code, stderr
    assert stderr.startswith(f"error: TMPDIR={folder}: 76 bytes long")
    assert len(stderr.splitlines()) == 1


def test_no_server_without_workers(image_root: Path) -> None:
    """workers=0 reads in the training process and starts no other."""
    program = start(
        """
assert sum(1 for _ in make_loader(workers=0).epoch(0)) == len(index)
assert forkserver._forkserver._forkserver_pid is None
""",
        image_root,
    )
    _, stderr = program.communicate(timeout=120)
    assert (program.returncode, stderr) == (0, "")


def test_a_worker_that_is_killed_is_one_line(image_root: Path) -> None:
    """A killed worker, for example out of memory, ends the program with exit code 1 and a line that names it."""
    program = start(
        """
from metaformer.program import run_program
def read():
    loader = make_loader(workers=1)
    for _ in loader.epoch(0):
        os.kill(loader._loader._iterator._workers[0].pid, signal.SIGKILL)
run_program(read)
""",
        image_root,
    )
    stdout, stderr = program.communicate(timeout=120)
    assert stdout == ""
    which = r"\d+ \(killed by SIGKILL, probably out of memory\)"
    assert re.fullmatch(rf"error: workers=1: a loader worker process has ended: {which}; use fewer workers\n", stderr)
    assert program.returncode == 1

"""Tests of binding ranks near their GPUs, with folders that imitate sysfs."""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from metaformer.numa import describe_cpus, keep_near_gpu, shares_near_gpus
from metaformer.runtime import Runtime

GPUS = [f"0000:{bus:02x}:00.0" for bus in (0x17, 0x3D, 0x97, 0xBD)]


def write_system(folder: Path, node_lists: Sequence[str], gpu_nodes: Sequence[int], threads: int = 2) -> Path:
    """Write a sysfs for nodes with these CPUs; with 2 threads, CPUs n and n + count / 2 share a core."""

    def write(path: str, text: str) -> None:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(f"{text}\n")

    count = sum(len(cpus(text)) for text in node_lists)
    write("devices/system/cpu/online", f"0-{count - 1}")
    for cpu in range(count):
        core = cpu % (count // threads)
        siblings = ",".join(str(core + count // threads * thread) for thread in range(threads))
        write(f"devices/system/cpu/cpu{cpu}/topology/thread_siblings_list", siblings)
    for node, text in enumerate(node_lists):
        write(f"devices/system/node/node{node}/cpulist", text)
    for gpu, gpu_node in zip(GPUS, gpu_nodes, strict=False):
        write(f"bus/pci/devices/{gpu}/numa_node", str(gpu_node))
    return folder


def cpus(text: str) -> list[int]:
    """Parse a CPU list such as "0-3,8"."""
    ranges = [[int(end) for end in part.split("-")] for part in text.split(",") if part]
    return [cpu for ends in ranges for cpu in range(ends[0], ends[-1] + 1)]


def test_each_rank_gets_whole_cores_of_its_gpus_node(tmp_path: Path) -> None:
    """With two nodes of 8 cores and two GPUs each, every rank gets 4 whole cores, and no CPU is used twice."""
    system = write_system(tmp_path, ["0-7,16-23", "8-15,24-31"], [0, 0, 1, 1])
    shares = shares_near_gpus(GPUS, set(range(32)), system)
    assert shares is not None
    assert [describe_cpus(share) for share in shares] == ["0-3,16-19", "4-7,20-23", "8-11,24-27", "12-15,28-31"]


def test_order_of_gpus_and_odd_cores(tmp_path: Path) -> None:
    """GPUs may alternate between nodes; 3 cores are divided as 1 and 2 between 2 ranks."""
    system = write_system(tmp_path, ["0-2", "3-5"], [1, 0, 1, 0], threads=1)
    assert shares_near_gpus(GPUS, set(range(6)), system) == [(3,), (0,), (4, 5), (1, 2)]


@pytest.mark.parametrize(
    ("node_lists", "gpu_nodes", "ranks", "allowed"),
    [
        (["0-7"], [0, 0, 0, 0], 4, range(8)),  # one node
        (["0-7", ""], [0, 0, 0, 0], 4, range(8)),  # the second node has only memory
        (["0-3", "4-7"], [0, 0, 1, 1], 4, (0, 1, 4, 5)),  # already bound
        (["0-3", "4-7"], [-1, -1, -1, -1], 4, range(8)),  # a virtual machine that does not report nodes
        (["0-3", "4-7"], [0, 0, 1], 4, range(8)),  # an unknown GPU address
        (["0-3", "4-7"], [0], 1, range(8)),  # a single rank has the CPUs of both nodes
        (["0-3", "4-7"], [0, 0], 2, range(8)),  # two ranks with GPUs on one node would lose the other node's CPUs
        (["0-3", "4-7"], [0, 0, 0, 1], 4, range(8)),  # uneven
    ],
)
def test_nothing_is_bound_without_a_benefit(
    tmp_path: Path, node_lists: list[str], gpu_nodes: list[int], ranks: int, allowed: Sequence[int]
) -> None:
    """A single node, an existing binding, an unknown node, and too small shares leave the binding unchanged."""
    system = write_system(tmp_path, node_lists, gpu_nodes, threads=1)
    assert shares_near_gpus(GPUS[:ranks], set(allowed), system) is None


def test_no_sysfs_and_no_gpu(tmp_path: Path) -> None:
    """Without sysfs, and for training on a CPU, nothing is bound and no error is raised."""
    assert shares_near_gpus(GPUS, {0, 1}, tmp_path) is None
    before = os.sched_getaffinity(0)
    runtime = Runtime(0, 1, 0, 1, torch.device("cpu"))
    assert keep_near_gpu(runtime) is runtime
    assert os.sched_getaffinity(0) == before


PROGRAM = """
import dataclasses, os, subprocess, sys, threading
import torch
from metaformer.numa import bind
from metaformer.runtime import Runtime

print(len(os.sched_getaffinity(0)))
stop, ready = threading.Event(), threading.Event()
tids = []
def work():
    tids.append(threading.get_native_id())
    ready.set()
    stop.wait()
thread = threading.Thread(target=work)
thread.start()
ready.wait()
runtime = Runtime(0, 2, 0, 2, torch.device("cpu"))
shared = runtime.cpus_per_rank()
bind((0, 1))
bound = dataclasses.replace(runtime, bound_cpus=(0, 1))
print(shared, bound.cpus_per_rank())
bind((1,))
print(os.sched_getaffinity(0), os.sched_getaffinity(tids[0]), flush=True)
subprocess.run([sys.executable, "-c", "import os; print(os.sched_getaffinity(0))"], check=True)
stop.set()
"""


@pytest.mark.skipif({0, 1} - os.sched_getaffinity(0) != set(), reason="needs CPUs 0 and 1")
def test_threads_and_children_are_bound() -> None:
    """Existing threads and child processes are bound too; a rank's bound CPUs are not divided by the local ranks."""
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=60, check=True)
    count, shares, own, child = done.stdout.splitlines()
    assert shares == f"{int(count) // 2} 2"
    assert own == "{1} {1}"
    assert child == "{1}"


@pytest.mark.parametrize("text", ["0", "0-3", "0-1,4,6-7"])
def test_cpu_list_format(text: str) -> None:
    """Ranges and single CPUs are formatted as in Linux."""
    assert describe_cpus(tuple(cpus(text))) == text

"""Ranks on the CPUs near their GPUs: on a machine with several NUMA nodes, memory and GPUs of another node are farther.

Linux tells in /sys which is where. CPUs of one core (hyper-threads) stay together.
"""

import os
from collections.abc import Sequence, Set
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from metaformer.runtime import Runtime

SYSTEM = Path("/sys")
Cpus = tuple[int, ...]


def keep_near_gpu(runtime: Runtime) -> Runtime:
    """Bind this process, and so the loader's threads and workers, to CPUs near its GPU; see `shares_near_gpus`.

    Returns:
        The runtime with the CPUs; the same one where nothing was bound.
    """
    if runtime.device.type != "cuda":
        return runtime
    gpus = [_pci_address(local_rank) for local_rank in range(runtime.local_world_size)]
    shares = shares_near_gpus(gpus, os.sched_getaffinity(0))
    if shares is None:
        return runtime
    bind(shares[runtime.local_rank])
    return replace(runtime, bound_cpus=shares[runtime.local_rank])


def shares_near_gpus(gpus: Sequence[str], allowed: Set[int], system: Path = SYSTEM) -> list[Cpus] | None:
    """Each rank's part of the CPUs of its GPU's node, in equal parts for the ranks whose GPUs are on one node.

    Args:
        gpus: PCI address of each local rank's GPU, as 0000:17:00.0.
        allowed: CPUs that the process may run on now.
        system: where sysfs is mounted.

    Returns:
        None, to leave everything as it is: one node has all CPUs; a launcher or a container has bound the process
        already; sysfs does not know the node of a GPU; or a rank would have fewer cores than by an equal division of
        all, as where one rank has the machine or all ranks' GPUs are on one of two nodes.
    """
    try:
        if allowed != _cpu_list(system / "devices/system/cpu/online"):
            return None
        nodes = [int((system / f"bus/pci/devices/{gpu}/numa_node").read_text()) for gpu in gpus]
        all_cores = _cores(allowed, system)
        cores = {node: _cores(_cpu_list(system / f"devices/system/node/node{node}/cpulist"), system) for node in nodes}
    except (OSError, ValueError):  # no sysfs, or one of another kind; a node that is not known is -1, and has no folder
        return None
    if all_cores in cores.values():
        return None
    shares = []
    for local_rank, node in enumerate(nodes):
        ranks, place = nodes.count(node), nodes[:local_rank].count(node)
        first, last = (len(cores[node]) * part // ranks for part in (place, place + 1))
        shares.append(cores[node][first:last])
    if min(map(len, shares)) < max(1, len(all_cores) // len(gpus)):
        return None
    return [tuple(sorted(cpu for core in share for cpu in core)) for share in shares]


def bind(cpus: Cpus) -> None:
    """Let all threads of this process, and those and the processes that they start, run on these CPUs only."""
    for thread in Path("/proc/self/task").iterdir():
        with suppress(ProcessLookupError):  # it has ended
            os.sched_setaffinity(int(thread.name), cpus)


def describe_cpus(cpus: Cpus) -> str:
    """As Linux writes them: 0-3,8-11."""
    starts = [cpu for cpu in cpus if cpu - 1 not in cpus]
    ends = [cpu for cpu in cpus if cpu + 1 not in cpus]
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in zip(starts, ends, strict=True))


def _pci_address(device: int) -> str:
    properties: Any = torch.cuda.get_device_properties(device)  # whose type leaves out what follows
    return f"{properties.pci_domain_id:04x}:{properties.pci_bus_id:02x}:{properties.pci_device_id:02x}.0"


def _cores(cpus: Set[int], system: Path) -> list[Cpus]:
    """The CPUs of each core, in order."""
    siblings = {
        tuple(sorted(_cpu_list(system / f"devices/system/cpu/cpu{cpu}/topology/thread_siblings_list"))) for cpu in cpus
    }
    return sorted(siblings)


def _cpu_list(file: Path) -> set[int]:
    """What Linux writes as 0-3,8-11; nothing for a node without CPUs."""
    found: set[int] = set()
    for part in filter(None, file.read_text().strip().split(",")):
        first, _, last = part.partition("-")
        found.update(range(int(first), int(last or first) + 1))
    return found

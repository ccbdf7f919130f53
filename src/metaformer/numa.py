"""Binds ranks to the CPUs of their GPU's NUMA node, where memory and GPU are closest.

The topology is read from /sys. CPUs of one core (hyper-threads) stay together.
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
    """Bind this process, and with it the loader's threads and workers, to CPUs near its GPU; see `shares_near_gpus`.

    Returns:
        A runtime with `bound_cpus` set, or the given one if nothing was bound.
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
    """Return the CPUs for each local rank; ranks with GPUs on the same NUMA node share its cores equally.

    Args:
        gpus: PCI address of each local rank's GPU, such as 0000:17:00.0.
        allowed: CPUs that the process may run on now.
        system: Mount point of sysfs.

    Returns:
        None if nothing should be bound: one node has all CPUs; a launcher or a container has already bound the
        process; sysfs does not know the node of a GPU; or a rank would get fewer cores than by dividing all cores
        equally, as with a single rank, or when the GPUs of all ranks are on one of two nodes.
    """
    try:
        if allowed != _cpu_list(system / "devices/system/cpu/online"):
            return None
        nodes = [int((system / f"bus/pci/devices/{gpu}/numa_node").read_text()) for gpu in gpus]
        all_cores = _cores(allowed, system)
        cores = {node: _cores(_cpu_list(system / f"devices/system/node/node{node}/cpulist"), system) for node in nodes}
    except (OSError, ValueError):  # no sysfs, or an unexpected one; an unknown node is -1, which has no folder
        return None
    if all_cores in cores.values():
        return None
    shares = []
    for local_rank, node in enumerate(nodes):
        ranks, index = nodes.count(node), nodes[:local_rank].count(node)
        first, last = (len(cores[node]) * part // ranks for part in (index, index + 1))
        shares.append(cores[node][first:last])
    if min(map(len, shares)) < max(1, len(all_cores) // len(gpus)):
        return None
    return [tuple(sorted(cpu for core in share for cpu in core)) for share in shares]


def bind(cpus: Cpus) -> None:
    """Restrict all threads of this process, and all threads and processes started later, to these CPUs."""
    for thread in Path("/proc/self/task").iterdir():
        with suppress(ProcessLookupError):  # it has ended
            os.sched_setaffinity(int(thread.name), cpus)


def describe_cpus(cpus: Cpus) -> str:
    """Return CPUs in Linux's list format, such as 0-3,8-11."""
    starts = [cpu for cpu in cpus if cpu - 1 not in cpus]
    ends = [cpu for cpu in cpus if cpu + 1 not in cpus]
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in zip(starts, ends, strict=True))


def _pci_address(device: int) -> str:
    properties: Any = torch.cuda.get_device_properties(device)  # its type stub lacks these fields
    return f"{properties.pci_domain_id:04x}:{properties.pci_bus_id:02x}:{properties.pci_device_id:02x}.0"


def _cores(cpus: Set[int], system: Path) -> list[Cpus]:
    """Return the CPUs of each core, in order."""
    siblings = {
        tuple(sorted(_cpu_list(system / f"devices/system/cpu/cpu{cpu}/topology/thread_siblings_list"))) for cpu in cpus
    }
    return sorted(siblings)


def _cpu_list(file: Path) -> set[int]:
    """Read a file in Linux's list format, such as 0-3,8-11; it is empty for a node without CPUs."""
    found: set[int] = set()
    for part in filter(None, file.read_text().strip().split(",")):
        first, _, last = part.partition("-")
        found.update(range(int(first), int(last or first) + 1))
    return found

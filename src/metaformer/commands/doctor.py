"""Check a machine, or all nodes of a job, before training: one line per finding, with how to fix it.

  python scripts/doctor.py --data /path/to/imagenet
  torchrun --standalone --nproc_per_node=8 scripts/doctor.py --data /path/to/imagenet
  sbatch --nodes=2 --gpus-per-node=8 slurm/doctor.sbatch --data /path/to/imagenet

ok: nothing to do. warn: training works, but slower or with limits. fail: training will not work; the exit code is 1.
"""

import argparse
import json
import random
import socket
import sys
from collections import Counter
from collections.abc import Iterator
from datetime import timedelta
from functools import partial
from pathlib import Path

from metaformer import runtime
from metaformer.data.index.image_index import load_index
from metaformer.diagnosis import machine, network, software, storage
from metaformer.diagnosis.finding import Check, Finding, Verdict, fail, ok, run_check, warn
from metaformer.diagnosis.storage import ByteRange
from metaformer.errors import UserError
from metaformer.runtime import Runtime

IMAGENET = {"train": 1_281_167, "val": 50_000}
IMAGES_READ = 1000


def main() -> None:
    """Check every node, report on rank 0, and exit with code 1 if a check failed."""
    arguments = _parse()
    with runtime.start(timeout=timedelta(minutes=2)) as ranks:
        findings = _check_node(arguments, ranks) if ranks.local_rank == 0 else []
        gathered = ranks.gather_objects((socket.gethostname(), findings))
        exchange_findings = run_check("all-reduce", partial(network.all_reduce, ranks, arguments.mebibytes))
        findings = merge_findings(gathered) + exchange_findings
        if ranks.is_main:
            _print(findings, arguments.json)
    if any(finding.verdict is Verdict.fail for finding in findings):
        sys.exit(1)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, metavar="FOLDER", help="data set folder, as in data.root")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="folder of the run folders (runs)")
    parser.add_argument("--images-per-second", type=float, metavar="N", help="images/s that a node's GPUs need")
    parser.add_argument("--mebibytes", type=int, default=64, metavar="N", help="size of the all-reduce (64)")
    parser.add_argument("--cpu", action="store_true", help="do not expect a GPU")
    parser.add_argument("--json", action="store_true", help="print an array of objects instead of lines")
    arguments = parser.parse_args()
    if arguments.mebibytes < 1:
        parser.error(f"--mebibytes {arguments.mebibytes}: must be at least 1")
    return arguments


def _check_node(arguments: argparse.Namespace, ranks: Runtime) -> list[Finding]:
    """Run the checks of one node."""
    checks: dict[str, Check] = {
        "versions": software.versions,
        "gpu": partial(software.gpus, expect_gpu=not arguments.cpu),
        "limits": partial(machine.limits, ranks.local_world_size),
        "signals": machine.signals,
        "run folder": partial(machine.run_folder, arguments.runs),
        "data": partial(_data, arguments, ranks.cpus_per_rank() * ranks.local_world_size),
        "wandb": network.wandb,
    }
    return [finding for name, check in checks.items() for finding in run_check(name, check)]


def _data(arguments: argparse.Namespace, threads: int) -> Iterator[Finding]:
    """Check that the data set is complete, and measure how fast it is read."""
    if arguments.data is None:
        yield warn("data", "not checked", "give --data FOLDER")
        return
    images: list[ByteRange] = []
    for split, published in IMAGENET.items():
        try:
            index = load_index(arguments.data, split)
        except UserError as error:
            yield fail("data", f"{split}: {error}", "")
            continue
        message = f"{split}: {len(index):,} images of {len(index.classes):,} classes in {index.folder}"
        if len(index.classes) == 1000 and len(index) != published:
            yield warn("data", message, f"ImageNet-1K has {published:,}; see scripts/prepare_data.py")
        else:
            yield ok("data", message)
        chosen = random.Random(0).sample(range(len(index)), min(IMAGES_READ // 2, len(index)))
        images += [ByteRange(*index.byte_range(sample)) for sample in chosen]
    if images:
        yield from storage.read_speed(images, threads, arguments.images_per_second)


def merge_findings(gathered: list[tuple[str, list[Finding]]]) -> list[Finding]:
    """Merge all nodes' findings, naming the nodes of those that only some share; different versions are a failure.

    Args:
        gathered: The host name and findings of each rank, in rank order. Only the first rank of a node has findings.
    """
    nodes = _by_node_name([(host, findings) for host, findings in gathered if findings])
    names_by_finding: dict[Finding, list[str]] = {}
    for name, findings in nodes.items():
        for finding in dict.fromkeys(findings):
            names_by_finding.setdefault(finding, []).append(name)
    merged = [
        finding if len(names) == len(nodes) else finding._replace(message=f"{', '.join(names)}: {finding.message}")
        for finding, names in names_by_finding.items()
    ]
    for check in ("python", "torch", "torchvision", "timm", "dali", "nccl", "driver"):
        if len({finding.message for findings in nodes.values() for finding in findings if finding.check == check}) > 1:
            merged.append(fail("versions", f"{check} differs between nodes", "install the same version on all"))
    return merged


def _by_node_name(nodes: list[tuple[str, list[Finding]]]) -> dict[str, list[Finding]]:
    """Return findings by host name, with the node's number appended to host names that several nodes share."""
    hosts = Counter(host for host, _ in nodes)
    return {
        f"{host} (node {number})" if hosts[host] > 1 else host: findings
        for number, (host, findings) in enumerate(nodes)
    }


def _print(findings: list[Finding], as_json: bool) -> None:
    if as_json:
        rows = [
            {"check": finding.check, "verdict": finding.verdict.value, "message": finding.message, "fix": finding.fix}
            for finding in findings
        ]
        print(json.dumps(rows, indent=2))
    else:
        for finding in findings:
            print(finding)

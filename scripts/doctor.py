"""Look over a machine, or all nodes of a job, before training on it: one line for each thing, with the mend.

  python scripts/doctor.py --data /path/to/imagenet
  torchrun --standalone --nproc_per_node=8 scripts/doctor.py --data /path/to/imagenet
  sbatch --nodes=2 --gpus-per-node=8 slurm/doctor.sbatch --data /path/to/imagenet

ok: as it should be. warn: training works, but slower or with less. fail: it will not work; the exit code is then 1.
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
from metaformer.program import run_program
from metaformer.runtime import Runtime

IMAGENET = {"train": 1_281_167, "val": 50_000}
IMAGES_READ = 1000


def main() -> None:
    """Check every node, let rank 0 report, and exit with 1 where something failed."""
    arguments = _parse()
    with runtime.start(timeout=timedelta(minutes=2)) as ranks:
        own = _on_node(arguments, ranks) if ranks.local_rank == 0 else []
        everywhere = ranks.gather_objects((socket.gethostname(), own))
        exchanged = run_check("all-reduce", partial(network.all_reduce, ranks, arguments.mebibytes))
        findings = merge(everywhere) + exchanged
        if ranks.is_main:
            _print(findings, arguments.json)
    if any(finding.verdict is Verdict.fail for finding in findings):
        sys.exit(1)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, metavar="FOLDER", help="the folder that data.root names")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="where run folders lie (runs)")
    parser.add_argument("--images-per-second", type=float, metavar="N", help="what a node's GPUs ask of the storage")
    parser.add_argument("--mebibytes", type=int, default=64, metavar="N", help="exchanged between ranks at once (64)")
    parser.add_argument("--cpu", action="store_true", help="a machine without a GPU is as it should be")
    parser.add_argument("--json", action="store_true", help="print an array of objects instead of lines")
    arguments = parser.parse_args()
    if arguments.mebibytes < 1:
        parser.error(f"--mebibytes {arguments.mebibytes}: must be at least 1")
    return arguments


def _on_node(arguments: argparse.Namespace, ranks: Runtime) -> list[Finding]:
    """What is a node's own."""
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
    """Whether the data set is whole, and how fast it is read."""
    if arguments.data is None:
        yield warn("data", "not looked at", "give --data FOLDER")
        return
    images: list[ByteRange] = []
    for split, published in IMAGENET.items():
        try:
            index = load_index(arguments.data, split)
        except UserError as error:
            yield fail("data", f"{split}: {error}", "")
            continue
        said = f"{split}: {len(index):,} images of {len(index.classes):,} classes in {index.folder}"
        if len(index.classes) == 1000 and len(index) != published:
            yield warn("data", said, f"ImageNet-1K has {published:,}; see scripts/prepare_data.py")
        else:
            yield ok("data", said)
        chosen = random.Random(0).sample(range(len(index)), min(IMAGES_READ // 2, len(index)))
        images += [ByteRange(*index.byte_range(sample)) for sample in chosen]
    if images:
        yield from storage.read_speed(images, threads, arguments.images_per_second)


def merge(everywhere: list[tuple[str, list[Finding]]]) -> list[Finding]:
    """Say what all nodes found alike once, and what only some found with their names. Versions that differ fail.

    Args:
        everywhere: host name and findings of each rank, in their order; only the first rank of a node has findings.
    """
    nodes = _by_name([(host, findings) for host, findings in everywhere if findings])
    finders: dict[Finding, list[str]] = {}
    for name, findings in nodes.items():
        for finding in dict.fromkeys(findings):
            finders.setdefault(finding, []).append(name)
    lines = [
        finding if len(names) == len(nodes) else finding._replace(message=f"{', '.join(names)}: {finding.message}")
        for finding, names in finders.items()
    ]
    for check in ("python", "torch", "torchvision", "timm", "dali", "nccl", "driver"):
        if len({finding.message for findings in nodes.values() for finding in findings if finding.check == check}) > 1:
            lines.append(fail("versions", f"{check} differs between the nodes", "install the same on all"))
    return lines


def _by_name(nodes: list[tuple[str, list[Finding]]]) -> dict[str, list[Finding]]:
    """The nodes' findings by host name, with the node's number where several nodes report the same name."""
    hosts = Counter(host for host, _ in nodes)
    return {
        f"{host} (node {number})" if hosts[host] > 1 else host: findings
        for number, (host, findings) in enumerate(nodes)
    }


def _print(findings: list[Finding], as_json: bool) -> None:
    if as_json:
        rows = [
            {"check": finding.check, "verdict": finding.verdict.value, "said": finding.message, "mend": finding.fix}
            for finding in findings
        ]
        print(json.dumps(rows, indent=2))
    else:
        for finding in findings:
            print(finding)


if __name__ == "__main__":
    run_program(main)

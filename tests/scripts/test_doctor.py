"""Test doctor.py on this machine: one process, two ranks, and nodes that differ."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from metaformer.commands import doctor
from metaformer.diagnosis import machine
from metaformer.diagnosis.finding import Verdict, fail, ok
from tests.conftest import BIN, REPOSITORY, TRAIN_IMAGES, VAL_IMAGES, launch
from tests.faults.conftest import free_port
from tests.warm import python


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """Set a wandb server that refuses connections at once."""
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")


def report(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *options: str) -> list[dict[str, Any]]:
    monkeypatch.setattr(sys, "argv", ["doctor.py", "--json", "--cpu", *options])
    doctor.main()
    found: list[dict[str, Any]] = json.loads(capsys.readouterr().out)
    return found


@pytest.mark.usefixtures("offline")
def test_a_sound_machine(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """All checks run without a failure, and the images are counted."""
    found = report(monkeypatch, capsys, f"--data={images}", f"--runs={tmp_path}")
    checks = {"python", "torch", "torchvision", "timm", "dali", "apex", "cores", "shm", "open files", "memlock",
              "signals", "run folder", "disk", "data", "reading", "wandb", "all-reduce"}  # fmt: skip
    assert checks <= {finding["check"] for finding in found}
    assert not [finding for finding in found if finding["verdict"] == "fail"]
    counts = [finding["message"].split(" in ")[0] for finding in found if finding["check"] == "data"]
    assert counts == ["train: 48 images of 4 classes", f"val: {VAL_IMAGES} images of 4 classes"]


def test_shards_are_read_too(images: Path, tmp_path: Path) -> None:
    """In a data set of shards from prepare_data.py, all images are counted and their byte ranges are read."""
    shards = tmp_path / "shards"
    packing = ["folder", "--from", str(images), "--out", str(shards), "--format", "shards", "--workers=1"]
    assert launch("scripts/prepare_data", *packing).code == 0
    program = launch("scripts/doctor", "--json", "--cpu", f"--data={shards}", f"--runs={tmp_path}")
    found = json.loads(program.stdout)
    assert not [finding for finding in found if finding["verdict"] == "fail"], found
    assert [row["message"].split(" in ")[0] for row in found if row["check"] == "data"] == [
        "train: 48 images of 4 classes",
        f"val: {VAL_IMAGES} images of 4 classes",
    ]
    (reading,) = [row for row in found if row["check"] == "reading"]
    assert f"over {TRAIN_IMAGES + VAL_IMAGES} images" in reading["message"]


@pytest.mark.usefixtures("offline")
def test_a_missing_data_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A missing data set fails with the loader's message and exit code 1."""
    with pytest.raises(SystemExit) as caught:
        report(monkeypatch, capsys, f"--data={tmp_path / 'nowhere'}", f"--runs={tmp_path}")
    assert caught.value.code == 1
    found = [row for row in json.loads(capsys.readouterr().out) if row["verdict"] == "fail"]
    assert [row["check"] for row in found] == ["data", "data"]
    assert "nowhere" in found[0]["message"]


def test_two_ranks_exchange(tmp_path: Path) -> None:
    """Under torchrun a node is checked once, and the ranks' all-reduce is verified and timed."""
    program = launch("scripts/doctor", "--cpu", f"--runs={tmp_path}", "--mebibytes=4", ranks=2)
    assert program.code == 0, program.stderr
    lines = program.stdout.splitlines()
    assert len([line for line in lines if line.startswith("ok    torch ")]) == 1
    (exchange,) = [line for line in lines if " all-reduce " in line]
    assert exchange.startswith("ok    all-reduce  4 MiB over 2 ranks by gloo: ")


def test_nodes_that_differ() -> None:
    """Shared findings appear once, others name their node, and different torch versions are a failure."""
    same, old, new = ok("python", "3.12.1"), ok("torch", "2.13"), ok("torch", "2.14")
    broken = fail("shm", "64 MiB", "--ipc=host")
    merged = doctor.merge_findings([("node1", [same, old]), ("node1", []), ("node2", [same, new, broken])])
    assert [str(finding) for finding in merged] == [
        "ok    python      3.12.1",
        "ok    torch       node1: 2.13",
        "ok    torch       node2: 2.14",
        "fail  shm         node2: 64 MiB; --ipc=host",
        "fail  versions    torch differs between nodes; install the same version on all",
    ]
    assert merged[-1].verdict is Verdict.fail


def test_two_nodes_of_one_name() -> None:
    """Nodes that share a host name are distinguished by number; a unique host name is unchanged."""
    same, broken = ok("python", "3.12.1"), fail("shm", "64 MiB", "--ipc=host")
    merged = doctor.merge_findings([("box", [same, broken]), ("box", []), ("other", [same]), ("box", [same])])
    assert [str(finding) for finding in merged] == [
        "ok    python      3.12.1",
        "fail  shm         box (node 0): 64 MiB; --ipc=host",
    ]
    (only,) = doctor.merge_findings([("box", [same]), ("other", [same, broken])])[1:]
    assert only.message == "other: 64 MiB"


def test_findings_of_two_nodes_of_one_name_are_both_reported(images: Path, tmp_path: Path) -> None:
    """Two torchruns on this machine are two nodes with one host name; failures of both are reported."""
    port = free_port()
    nodes = []
    for number, data in enumerate((tmp_path / "nowhere", images)):
        command = [python(), str(BIN / "torchrun"), "--nnodes=2", f"--node-rank={number}", "--nproc-per-node=1"]
        command += ["--master-addr=127.0.0.1", f"--master-port={port}", "--no-python", python()]
        command += [str(REPOSITORY / "scripts" / "doctor.py")]
        command += ["--cpu", f"--data={data}", f"--runs={tmp_path}", "--mebibytes=1"]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "WANDB_BASE_URL": "http://127.0.0.1:9"}
        nodes.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True))
    reports = [node.communicate(timeout=180)[0] for node in nodes]
    name = socket.gethostname()
    lines = [line for line in reports[0].splitlines() if line.startswith("fail  data ")]
    assert len(lines) == 2
    assert all(f"{name} (node 0): " in line and "nowhere" in line for line in lines)
    assert f"{name} (node 1): train: 48 images of 4 classes" in reports[0]
    assert [node.returncode for node in nodes] == [1, 1]


def test_a_check_that_breaks(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A check that raises counts as failed, and the other checks still run."""

    def breaks(*_: object) -> None:
        raise RuntimeError("no such thing")

    monkeypatch.setattr(machine, "limits", breaks)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    with pytest.raises(SystemExit):
        report(monkeypatch, capsys)
    found = {row["check"]: row for row in json.loads(capsys.readouterr().out)}
    assert found["limits"]["message"] == "RuntimeError: no such thing"
    assert found["signals"]["verdict"] == "ok"

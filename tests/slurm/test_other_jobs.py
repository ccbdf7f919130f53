"""Tests of the other batch scripts and scripts/submit.py on a real SLURM, and of jobs that cannot work."""

import csv
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.conftest import QUICK
from tests.slurm.cluster import Cluster
from tests.slurm.conftest import RECIPE, Checkout, Job

SMALL = (*RECIPE, "epochs=1", "max_steps=2", "schedule.warmup_epochs=0")
ROWS = ("ablation/identity", "ablation/relu", "paper/poolformer_s12")


def test_an_array_over_rows(checkout: Checkout, images: Path) -> None:
    """An array over three rows produces three results and a table with them."""
    options = (*QUICK, f"data.root={images}", "epochs=1", "schedule.warmup_epochs=0", "workers=0")
    batch = ("--array=0-2%2", "slurm/reproduce_table.sbatch", "--runs=runs/rows", *ROWS)
    job = checkout.sbatch(*batch, "--", *options)
    for task in range(3):
        log = checkout.folder / f"slurm-{job.id}_{task}.out"
        Job(checkout.cluster, f"{job.id}_{task}", log).succeeds()
    with (checkout.folder / "runs" / "rows" / "table.csv").open(newline="") as file:
        table = {row["row"]: row for row in csv.DictReader(file)}
    trained = [row for row in table if table[row]["top-1, ours"].replace(".", "").isdigit()]
    assert sorted(trained) == sorted(ROWS)


def test_validation(checkout: Checkout) -> None:
    """validate.sbatch gives the result of the training job for its weights."""
    trained = checkout.sbatch("slurm/train.sbatch", *SMALL, "run_dir=runs/scored")
    trained.succeeds()
    options = [option for option in RECIPE if option.startswith(("model", "data", "image_size", "workers"))]
    job = checkout.sbatch("slurm/validate.sbatch", *options, "checkpoint=runs/scored", "results_csv=runs/scored.csv")
    job.succeeds()
    assert job.result()["top1"] == trained.result()["top1"]
    assert (checkout.folder / "runs" / "scored.csv").exists()


def test_a_sweep_is_frozen(checkout: Checkout) -> None:
    """submit.py submits a job per value; later edits of conf/ do not affect the jobs."""
    pytest.importorskip("submitit", reason="submitit is not installed")
    checkout.cluster.run("scontrol", "update", "PartitionName=batch", "State=DOWN")
    try:
        submitted = submit(
            checkout, "--gpus-per-node=2", "--time=10", *SMALL, "optimizer.lr=1e-3,2e-3", "run_dir=runs/s"
        )
        numbers = [line.split(":")[0].split()[1] for line in submitted.splitlines() if line.startswith("job ")]
        train = checkout.folder / "conf" / "train.yaml"
        shutil.copy(train, train.with_suffix(".kept"))
        train.write_text(train.read_text() + "\nlog_every_steps: 7\nseed: 7\n")
    finally:
        checkout.cluster.run("scontrol", "update", "PartitionName=batch", "State=UP")
    for number in numbers:
        Job(checkout.cluster, number, checkout.folder / "runs" / ".slurm" / f"{number}_0_log.out").succeeds()
    shutil.move(train.with_suffix(".kept"), train)
    kept = [
        yaml.safe_load((checkout.folder / f"runs/s-optimizer.lr={lr}" / "config.yaml").read_text())
        for lr in (0.001, 0.002)
    ]
    assert [(config["optimizer"]["lr"], config["seed"]) for config in kept] == [(0.001, 0), (0.002, 0)]


def test_an_unknown_partition(checkout: Checkout) -> None:
    """A partition that does not exist is rejected in one line, and no job stays in the queue."""
    pytest.importorskip("submitit", reason="submitit is not installed")
    output = submit(checkout, "--partition=nowhere", *SMALL, fails=True)
    (line,) = [line for line in output.splitlines() if line.startswith("error: ")]
    assert "invalid partition specified: nowhere" in line
    assert checkout.cluster.run("squeue", "--noheader").strip() == ""


def test_a_port_in_use(cluster: Cluster, checkout: Checkout) -> None:
    """If the job's port is in use, the next one is used, and the log says so."""
    listed = cluster.run("scontrol", "--oneliner", "show", "job")
    last = max(int(line.split()[0].removeprefix("JobId=")) for line in listed.splitlines() if line.startswith("JobId="))
    ports = [10000 + (last + offset) % 20000 for offset in range(1, 4)]
    listen = (
        f"import socket; sockets = [socket.create_server(('', port)) for port in {ports}]; print(flush=True); input()"
    )
    command = [*cluster.enter("node1"), sys.executable, "-c", listen]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as listener:
        assert listener.stdout is not None
        listener.stdout.readline()
        job = checkout.sbatch("--nodelist=node1", "slurm/train.sbatch", *SMALL, "run_dir=runs/other-port")
        job.succeeds()
        listener.kill()
    assert f"port {10000 + int(job.id) % 20000} is in use on node1" in job.log()


def test_a_run_folder_of_one_node(checkout: Checkout) -> None:
    """A run folder in /dev/shm, which differs between nodes, is rejected in one line that names the node."""
    job = checkout.sbatch("--nodes=2", "slurm/train.sbatch", *SMALL, "run_dir=/dev/shm/run")
    assert job.wait()["JobState"] == "FAILED"
    first = job.errors()[0]
    assert first.startswith("error: run_dir=/dev/shm/run: rank 1 on node")
    assert first.endswith("give a folder that all nodes share")


def test_a_node_with_other_code(checkout: Checkout) -> None:
    """If a site's torchrun command gives one node other code, the job is rejected in one line."""
    other = checkout.folder / "other"
    for name in ("src", "conf"):
        shutil.copytree(checkout.folder / name, other / name)
    changed = other / "src" / "metaformer" / "errors.py"
    changed.write_text(changed.read_text() + "\n# an older version\n")
    site = checkout.folder / "slurm" / "site.env"
    (other / "start.sh").write_text(
        f'[[ $(hostname) != node2 ]] || export PYTHONPATH="{other}/src:$PYTHONPATH"\nexec .venv/bin/torchrun "$@"\n'
    )
    site.write_text("METAFORMER_TORCHRUN=(bash other/start.sh)\n")
    try:
        job = checkout.sbatch("--nodes=2", "slurm/train.sbatch", *SMALL, "run_dir=runs/other-code")
        assert job.wait()["JobState"] == "FAILED"
    finally:
        site.unlink()
    assert "the code of metaformer, or the version of torch, differs from rank 0's" in job.errors()[0]


def test_not_the_repositorys_root(checkout: Checkout, tmp_path: Path) -> None:
    """A job submitted from another folder ends at once with one line that says what to do."""
    job = checkout.sbatch(f"--chdir={tmp_path}", "slurm/train.sbatch", *SMALL)
    assert job.wait()["ExitCode"] == "2:0"
    (line,) = Job(checkout.cluster, job.id, tmp_path / job.log_file.name).errors()
    assert str(tmp_path) in line
    assert "repository's root" in line


def submit(checkout: Checkout, *arguments: str, fails: bool = False) -> str:
    """Run scripts/submit.py and return its output."""
    command = (sys.executable, "scripts/submit.py", *arguments)
    return checkout.cluster.run(*command, cwd=checkout.folder, env=checkout.environment, check=not fails)

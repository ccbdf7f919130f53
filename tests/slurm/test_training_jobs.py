"""Tests of slurm/train.sbatch on a real SLURM with two nodes: runs across interruptions and requeues.

Weights are compared bit for bit. Interrupted runs have two ranks, because with more ranks the order of sums can matter.
"""

import json
import time
from collections.abc import Mapping

import torch
from torch import Tensor

from tests.slurm.cluster import Cluster, wait_for
from tests.slurm.conftest import RECIPE, STEPS, TWO_NODES, Checkout, Job, trained_on_one_node

Weights = Mapping[str, Tensor]


def equal(ours: Weights, theirs: Weights) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def was_resumed(checkout: Checkout, job: Job, run_dir: str) -> bool:
    """Return whether the run was resumed in its folder and its metrics have each step once."""
    return "resuming" in job.log() and checkout.steps(run_dir) == list(range(1, STEPS + 1))


def test_two_nodes_equal_one_node(checkout: Checkout) -> None:
    """Two nodes with two ranks give the weights of one node with four; overrides are passed on literally."""
    run_dir = "runs/it's two words; $(touch evaluated) `touch evaluated`"
    quoted = run_dir.replace("'", "\\'")
    short = (*RECIPE, "max_steps=20")
    job = checkout.sbatch(*TWO_NODES, "--gpus-per-node=2", "slurm/train.sbatch", *short, f"run_dir='{quoted}'")
    job.succeeds()
    assert job.result()["run_dir"] == run_dir
    assert "4 x CPU" in job.log()
    assert not (checkout.folder / "evaluated").exists()
    assert equal(checkout.weights(run_dir), trained_on_one_node(checkout, short, ranks=4))


def test_a_time_limit(checkout: Checkout, reference: Weights) -> None:
    """A job warned before its time limit saves and is requeued; it stays one run in wandb."""
    run_dir = "runs/time-limit"
    options = ("tracking=offline", "report.enabled=true", f"run_dir={run_dir}")
    job = checkout.sbatch(*TWO_NODES, "slurm/train.sbatch", *RECIPE, *options)
    checkout.wait_for_step(job, run_dir, 20)
    checkout.cluster.run("scancel", "--batch", "--signal=USR1", job.id)  # as SLURM does at the time of --signal
    job.succeeds()
    assert job.fields()["Restarts"] == "1"
    assert was_resumed(checkout, job, run_dir)
    assert equal(checkout.weights(run_dir), reference)
    folder = checkout.folder / run_dir
    (number,) = {file.name.rsplit("-", 1)[1] for file in (folder / "wandb").glob("offline-run-*")}
    assert (folder / "wandb_id").read_text().strip() == number


def test_a_preemption(cluster: Cluster, checkout: Checkout, reference: Weights) -> None:
    """When a job of a higher partition takes the nodes, the run saves within the grace time and resumes later."""
    run_dir = "runs/preempted"
    job = checkout.sbatch(*TWO_NODES, "slurm/train.sbatch", *RECIPE, f"run_dir={run_dir}")
    checkout.wait_for_step(job, run_dir, 20)
    urgent = cluster.run(
        "sbatch", "--partition=urgent", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=sleep 1"
    )
    job.succeeds()
    assert Job(cluster, urgent.split()[-1], checkout.folder).fields()["JobState"] == "COMPLETED"
    assert job.fields()["Restarts"] == "1"
    assert was_resumed(checkout, job, run_dir)
    assert equal(checkout.weights(run_dir), reference)


def test_a_lost_node(cluster: Cluster, checkout: Checkout, reference: Weights) -> None:
    """When a node loses power, SLURM requeues the job, which resumes from its last checkpoint."""
    run_dir = "runs/lost-node"
    options = ("checkpoint.every_steps=20", f"run_dir={run_dir}")
    job = checkout.sbatch(*TWO_NODES, "slurm/train.sbatch", *RECIPE, *options)
    checkout.wait_for_step(job, run_dir, 45)
    cluster.crash("node2")
    wait_for(lambda: job.fields()["Restarts"] == "1", 90, "the requeue")
    wait_for(lambda: cluster.node_states()["node1"] == "idle", 60, "the end of what ran on the other node")
    cluster.boot("node2")
    job.succeeds()
    assert was_resumed(checkout, job, run_dir)
    assert equal(checkout.weights(run_dir), reference)


def test_the_last_requeue(checkout: Checkout) -> None:
    """When the limit of requeues is reached, an interrupted job ends with exit code 75 and says why."""
    checkout.environment["METAFORMER_MAX_REQUEUES"] = "0"
    run_dir = "runs/capped"
    options = ("epochs=1000", f"run_dir={run_dir}")
    try:
        job = checkout.sbatch("--time=10", "slurm/train.sbatch", *RECIPE, *options)
    finally:
        del checkout.environment["METAFORMER_MAX_REQUEUES"]
    checkout.wait_for_step(job, run_dir, 2)
    checkout.cluster.run("scancel", "--batch", "--signal=USR1", job.id)
    ended = job.wait()
    assert (ended["JobState"], ended["ExitCode"], ended["Restarts"]) == ("FAILED", "75:0", "0")
    assert "METAFORMER_MAX_REQUEUES=0" in job.log()
    assert json.loads((checkout.folder / run_dir / "status.json").read_text())["state"] == "interrupted"


def test_a_cancelled_job(checkout: Checkout) -> None:
    """After scancel the run saves, and the job is not requeued."""
    run_dir = "runs/cancelled"
    job = checkout.sbatch("--time=10", "slurm/train.sbatch", *RECIPE, "epochs=1000", f"run_dir={run_dir}")
    checkout.wait_for_step(job, run_dir, 2)
    checkout.cluster.run("scancel", job.id)
    wait_for(lambda: "interrupted and cancelled" in job.log(), 30, "the job's last message")
    time.sleep(8)  # longer than a requeue takes
    ended = job.fields()
    assert (ended["JobState"], ended["Restarts"]) == ("CANCELLED", "0")
    assert json.loads((checkout.folder / run_dir / "status.json").read_text())["state"] == "interrupted"


def test_a_bad_override(checkout: Checkout) -> None:
    """A bad override fails at once with one line in the log, and the job is not requeued."""
    job = checkout.sbatch("slurm/train.sbatch", *RECIPE, "optimizer.lrr=1")
    ended = job.wait()
    assert (ended["JobState"], ended["Restarts"]) == ("FAILED", "0")
    assert job.errors() == ["error: optimizer.lrr: no such field; did you mean optimizer.lr?"]

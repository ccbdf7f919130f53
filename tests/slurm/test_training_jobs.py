"""slurm/train.sbatch on a real SLURM of two nodes: what becomes of a run that jobs carry through interruptions.

Weights are compared bit by bit. Interrupted runs have two ranks: with more, the sums of a resumed run's first step are
taken in another order, for DistributedDataParallel orders its buckets anew after its first step.
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
    """Whether the run went on in the same folder, each of its steps trained once as far as its metrics go."""
    return "resuming" in job.log() and checkout.steps(run_dir) == list(range(1, STEPS + 1))


def test_two_nodes_train_what_one_does(checkout: Checkout) -> None:
    """Two nodes of two ranks end with the very weights of one node of four; overrides arrive as they were given."""
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
    """Warned before its limit, the job saves and is requeued until the run is done: one run for wandb, too."""
    run_dir = "runs/time-limit"
    options = ("tracking=offline", f"run_dir={run_dir}")
    job = checkout.sbatch(*TWO_NODES, "slurm/train.sbatch", *RECIPE, *options)
    checkout.wait_for_step(job, run_dir, 20)
    checkout.cluster.run("scancel", "--batch", "--signal=USR1", job.id)  # what SLURM does at --signal's time
    job.succeeds()
    assert job.fields()["Restarts"] == "1"
    assert was_resumed(checkout, job, run_dir)
    assert equal(checkout.weights(run_dir), reference)
    folder = checkout.folder / run_dir
    (number,) = {file.name.rsplit("-", 1)[1] for file in (folder / "wandb").glob("offline-run-*")}
    assert (folder / "wandb_id").read_text().strip() == number


def test_a_preemption(cluster: Cluster, checkout: Checkout, reference: Weights) -> None:
    """A job of a higher partition takes the nodes: the run saves within the grace time and goes on after it."""
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
    """A node loses power: SLURM requeues the job, which goes on from its last checkpoint when the node is back."""
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
    """Where the cap is reached, an interrupted job ends with its own exit code and says why."""
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
    """scancel lets the run save; the job is gone then, for its user means it."""
    run_dir = "runs/cancelled"
    job = checkout.sbatch("--time=10", "slurm/train.sbatch", *RECIPE, "epochs=1000", f"run_dir={run_dir}")
    checkout.wait_for_step(job, run_dir, 2)
    checkout.cluster.run("scancel", job.id)
    wait_for(lambda: "interrupted and cancelled" in job.log(), 30, "the job's last words")
    time.sleep(8)  # longer than a requeued job waits
    ended = job.fields()
    assert (ended["JobState"], ended["Restarts"]) == ("CANCELLED", "0")
    assert json.loads((checkout.folder / run_dir / "status.json").read_text())["state"] == "interrupted"


def test_a_bad_override(checkout: Checkout) -> None:
    """It fails at once, in one line of the job's log, and is not requeued."""
    job = checkout.sbatch("slurm/train.sbatch", *RECIPE, "optimizer.lrr=1")
    ended = job.wait()
    assert (ended["JobState"], ended["Restarts"]) == ("FAILED", "0")
    assert job.errors() == ["error: optimizer.lrr: no such field; did you mean optimizer.lr?"]

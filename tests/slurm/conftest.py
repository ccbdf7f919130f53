"""Fixtures for SLURM tests: one cluster for all tests, and a copy of the repository from which jobs are submitted."""

import json
import os
import re
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from torch import Tensor

from tests.conftest import REPOSITORY
from tests.slurm.cluster import Cluster, find_missing_requirement, running_cluster, wait_for

# 2 x 50 steps of a small network on the sample data: about ten seconds, and another ten to start.
STEPS = 100
RECIPE = (
    "model=timm", "model.name=test_resnet", "model.drop_path_rate=null", "data=sample", "augmentation=light",
    "image_size=32",
    "precision=fp32", "epochs=2", "schedule.warmup_epochs=1", "schedule.cooldown_epochs=0", "global_batch_size=80",
    "eval_batch_size=125", "workers=0", "log_every_steps=1", "tracking=local", "optimizer.lr=1e-3",
    "report.enabled=false",
)  # fmt: skip
TWO_NODES = ("--nodes=2", "--time=10")
ENDED = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED", "OUT_OF_MEMORY"}


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark these tests, and skip them with a reason if no cluster can run; with make test-slurm they fail instead."""
    here = [item for item in items if Path(__file__).parent in item.path.parents]
    missing = None if "METAFORMER_REQUIRE_SLURM" in os.environ or not here else find_missing_requirement()
    for item in here:
        item.add_marker(pytest.mark.slurm)
        item.add_marker(pytest.mark.timeout(600))
        if missing is not None:
            item.add_marker(pytest.mark.skip(reason=missing))


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """A cluster with two idle nodes."""
    with running_cluster() as running:
        yield running


@dataclass
class Job:
    """A SLURM job, or a task of a job array."""

    cluster: Cluster
    id: str
    log_file: Path

    def fields(self) -> dict[str, str]:
        """Return the job's fields in `scontrol show job`."""
        shown = self.cluster.run("scontrol", "--oneliner", "show", "job", self.id)
        return dict(re.findall(r"(\w+)=(\S*)", shown))

    def log(self) -> str:
        """Return the job's output so far, without the lines about steps."""
        text = self.log_file.read_text() if self.log_file.exists() else ""
        return "\n".join(line for line in text.splitlines() if not line.startswith("epoch "))

    def wait(self, seconds: float = 240) -> dict[str, str]:
        """Wait until the job has ended, and return its fields."""
        try:
            wait_for(lambda: self.fields()["JobState"] in ENDED, seconds, f"the end of job {self.id}")
        except Exception as error:
            raise AssertionError(f"{self.fields()}\n{self.log()}") from error
        return self.fields()

    def succeeds(self, seconds: float = 240) -> None:
        """Wait until the job has ended, and check that it has succeeded."""
        ended = self.wait(seconds)
        assert (ended["JobState"], ended["ExitCode"]) == ("COMPLETED", "0:0"), self.log()

    def errors(self) -> list[str]:
        """Return the error lines in the job's log."""
        return [line for line in self.log().splitlines() if line.startswith("error: ")]

    def result(self) -> dict[str, Any]:
        """Return the last JSON object that the program printed."""
        lines = [line for line in self.log().splitlines() if line.startswith("{")]
        found: dict[str, Any] = json.loads(lines[-1])
        return found


class Checkout:
    """A copy of the repository on storage shared by all nodes, and a user's actions in it."""

    def __init__(self, cluster: Cluster, folder: Path) -> None:
        self.cluster = cluster
        self.folder = folder
        for name in ("src", "conf", "scripts", "slurm", "train.py", "validate.py"):
            source = REPOSITORY / name
            ignore = shutil.ignore_patterns("site.env")
            shutil.copytree(source, folder / name, ignore=ignore) if source.is_dir() else shutil.copy(source, folder)
        (folder / ".venv").symlink_to(Path(sys.executable).parents[1])
        self.environment = cluster.environment | {
            "PYTHONPATH": os.pathsep.join([str(folder / "src"), os.environ.get("PYTHONPATH", "")]),
            "OMP_NUM_THREADS": "1",
        }

    def sbatch(self, *arguments: str) -> Job:
        """Submit a job whose log is in the working folder, as for a user."""
        answer = self.cluster.run("sbatch", *arguments, cwd=self.folder, env=self.environment)
        number = answer.split()[-1]
        return Job(self.cluster, number, self.folder / f"slurm-{number}.out")

    def steps(self, run_dir: str) -> list[int]:
        """Return the steps of a run's train rows so far."""
        file = self.folder / run_dir / "metrics.jsonl"
        lines = file.read_text().splitlines(keepends=True) if file.exists() else []
        rows = [json.loads(line) for line in lines if line.endswith("\n")]
        return [row["step"] for row in rows if row["kind"] == "train"]

    def wait_for_step(self, job: Job, run_dir: str, step: int) -> None:
        """Wait until training has reached a step."""
        try:
            wait_for(lambda: max(self.steps(run_dir), default=0) >= step, 150, f"step {step}")
        except Exception as error:
            raise AssertionError(job.log()) from error

    def weights(self, run_dir: str) -> dict[str, Tensor]:
        """Return the run's last weights."""
        return load_file(self.folder / run_dir / "checkpoints" / "last" / "model.safetensors")


@pytest.fixture(scope="session")
def checkout(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Checkout:
    """The working folder of all jobs."""
    return Checkout(cluster, tmp_path_factory.mktemp("checkout"))


@pytest.fixture(scope="session")
def reference(checkout: Checkout) -> dict[str, Tensor]:
    """The final weights of an uninterrupted run of the recipe on one node with two ranks."""
    return trained_on_one_node(checkout, RECIPE, ranks=2)


def trained_on_one_node(checkout: Checkout, recipe: Sequence[str], ranks: int) -> dict[str, Tensor]:
    """Return a recipe's final weights from an uninterrupted job on one node."""
    checkout.environment["NPROC_PER_NODE"] = str(ranks)
    run_dir = f"runs/reference-{ranks}"
    try:
        job = checkout.sbatch("--nodes=1", "--time=10", "slurm/train.sbatch", *recipe, f"run_dir={run_dir}")
    finally:
        del checkout.environment["NPROC_PER_NODE"]
    job.succeeds()
    return checkout.weights(run_dir)

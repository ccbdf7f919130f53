"""Test submit.py without a cluster; tests/slurm submits to one."""

import json
import re
import sys
from pathlib import Path

import pytest

from metaformer.composing import compose, compose_training, freeze
from metaformer.config import TrainConfig, fingerprint
from metaformer.errors import UserError
from scripts import submit
from tests.conftest import QUICK
from tests.warm import python


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["submit.py", *arguments])
    submit.main()


def test_a_job_for_each_combination() -> None:
    """Comma-separated values are combined, lists and quoted text are not split, and each job has its own folder."""
    jobs = submit.expand_sweep(
        [
            "optimizer.lr=1e-3,2e-3",
            "model=poolformer_s12",
            "seed=0,1",
            "optimizer.betas=[0.9,0.99]",
            "run_dir='runs/a, b'",
        ]
    )
    assert [job.swept_values for job in jobs] == [
        ["optimizer.lr=0.001", "seed=0"], ["optimizer.lr=0.001", "seed=1"],
        ["optimizer.lr=0.002", "seed=0"], ["optimizer.lr=0.002", "seed=1"],
    ]  # fmt: skip
    assert jobs[1].config.run_dir == "runs/a, b-optimizer.lr=0.001,seed=1"
    assert (jobs[1].config.optimizer.lr, jobs[1].config.seed) == (0.001, 1)
    assert jobs[1].config.optimizer.betas == [0.9, 0.99]
    assert len({job.name for job in jobs}) == 4


def test_folders_that_differ_stay_as_they_are() -> None:
    """Run folders that already differ keep the names that train.py gives them."""
    jobs = submit.expand_sweep(["model=poolformer_s12,poolformer_s24", "experiment=demo"])
    assert [job.config.run_dir for job in jobs] == [
        "runs/poolformer_s12-demo",
        "runs/poolformer_s24-demo",
    ]


def test_a_frozen_file_is_the_configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """train.py composes the same configuration from the frozen file as from the overrides, without reading conf/."""
    config = compose_training(["experiment=demo", "optimizer=lamb", "optimizer.lr=3e-3", "run_dir='runs/a: \"b\" $c'"])
    (tmp_path / "frozen.yaml").write_text(freeze(config))
    monkeypatch.setattr("metaformer.composing.CONF_FOLDER", tmp_path)  # a conf/ without files
    monkeypatch.setattr(sys, "argv", ["train.py", f"--config-dir={tmp_path}", "--config-name=frozen"])
    again = compose("train", TrainConfig)
    assert fingerprint(again) == fingerprint(config)
    assert again.run_dir == 'runs/a: "b" $c'


def test_a_secret_is_not_frozen(monkeypatch: pytest.MonkeyPatch) -> None:
    """A value from the environment is stored as the name of its variable."""
    monkeypatch.setenv("PLACE", "/secret/place")
    text = freeze(compose_training(["init_weights=${oc.env:PLACE}"]))
    assert "/secret/place" not in text
    assert "${oc.env:PLACE}" in text


def test_a_dry_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A dry run prints the jobs, and the sbatch options of the script and the user; it neither submits nor writes."""
    monkeypatch.setattr(submit, "_make_submit", lambda *_: pytest.fail("it has been submitted"))
    monkeypatch.setattr(submit, "REPOSITORY", tmp_path)
    run(monkeypatch, "--dry-run", "--nodes=2", "--gpus-per-node=8", "--time=1-0", "--sbatch=account=x", "seed=0,1")
    first, second, last = capsys.readouterr().out.splitlines()
    assert first.startswith("runs/poolformer_s12-default-seed=0 (seed=0): ")
    assert second.startswith("runs/poolformer_s12-default-seed=1 (seed=1): ")
    for option in ("--nodes=2", "--gpus-per-node=8", "--time=1-0", "--account=x", "--signal=B:USR1@180", "--requeue"):
        assert option in last.split()
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("options", [["--local", "--dry-run"], ["--local", "--nodes=2"], ["--keep-going"]])
def test_options_that_exclude_each_other(
    options: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Options of jobs are refused for trainings on this machine, and the other way round, before any training."""
    monkeypatch.setattr(submit, "run_here", lambda *_: pytest.fail("it has been trained"))
    with pytest.raises(SystemExit) as caught:
        run(monkeypatch, *options, "seed=0")
    assert caught.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith(f"submit.py: error: {options[0]} ")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["optimizer.lr=1e-3,fast"], "optimizer.lr=fast: must be a number"),
        (["optimizer.lrr=1"], "optimizer.lrr: no such field"),
        (["--gpus-per-node=3"], "global_batch_size=1024: not divisible by 3 ranks"),
        (["seed=1,1", "--local"], "two jobs would train in the same run folder"),
        (["seed=1,1"], "two jobs would train in the same run folder"),
        (["a b=c,("], "cannot be parsed"),
    ],
)
def test_invalid_sweeps_are_refused(arguments: list[str], words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An invalid sweep gives a one-line error."""
    with pytest.raises(UserError) as caught:
        run(monkeypatch, *arguments)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("keep_going", [False, True])
def test_a_sweep_on_this_machine(
    keep_going: bool, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Trainings run one after the other; a failure ends the sweep, or is passed over; the table has their top-1."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "executable", python())
    small = ["model=metaformer", "model.depths=[1]", "model.dims=[32]", "epochs=1", "workers=0"]
    options = ["--local", *(["--keep-going"] if keep_going else []), *QUICK, *small, "schedule.warmup_epochs=0"]
    roots = f"data.root={tmp_path / 'nowhere'},{images}" if keep_going else f"data.root={images},{tmp_path},{images}/."
    failed = 1 if keep_going else 2
    with pytest.raises(UserError, match=rf"^{failed} of {2 if keep_going else 3} trainings are not done; "):
        run(monkeypatch, *options, roots)
    out, error = capfd.readouterr()
    table = [line for line in out.splitlines() if re.match("(done|exit code|not started) ", line)]
    assert [line.split("  ")[0] for line in table] == (
        ["exit code 2", "done"] if keep_going else ["done", "exit code 2", "not started"]
    )
    (done,) = (line for line in table if line.startswith("done"))
    row = json.loads(next((tmp_path / "runs").glob("*/metrics.jsonl")).read_text().splitlines()[-1])
    assert f"{row['top1']:.2f}" in done
    assert error.count("error: data.root=") == 1


def test_accuracies_of_a_run(tmp_path: Path) -> None:
    """A run that was killed while it wrote has its complete rows; one that is damaged, or has not begun, has none."""
    rows = [{"kind": "validation", "epoch": epoch, "step": 9, "samples": 72, "top1": 30.0 - epoch} for epoch in (1, 2)]
    file = tmp_path / "metrics.jsonl"
    assert submit._accuracies(tmp_path) == ("-", "-")
    file.write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"kind": "val')
    assert submit._accuracies(tmp_path) == ("28.00", "29.00")
    file.write_text("damaged\n" + json.dumps(rows[0]))
    assert submit._accuracies(tmp_path) == ("-", "-")


def test_no_slurm(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Without SLURM on the PATH, an error says so."""
    pytest.importorskip("submitit", reason="submitit is not installed")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(submit, "REPOSITORY", tmp_path)
    with pytest.raises(UserError, match=r"^SLURM is not on the PATH"):
        run(monkeypatch, "seed=0")

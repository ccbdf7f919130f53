"""Tests of the report: what it says, and that hostile, damaged and missing files do not stop it."""

import json
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from timm.data import ImageNetInfo

from metaformer.errors import UserError
from metaformer.evaluation.class_counts import ClassTotals
from metaformer.evaluation.class_files import write_confusion, write_per_class
from metaformer.reporting.run_record import read_record
from metaformer.reporting.run_report import find_paper_row, format_value, make_report, write_report

EVIL = "</style><script>alert(1)</script><img src=x onerror=alert(1)>&\"'$x_1$"
# Holds the lock of a run until stdin is closed; a process does not see its own locks.
HOLD_LOCK = """
import fcntl, sys
with open(sys.argv[1], "w") as lock:
    fcntl.lockf(lock, fcntl.LOCK_EX)
    print("x", end="", flush=True)
    sys.stdin.read()
"""
CONFIG = """
epochs: 3
image_size: 224
model: {name: poolformer_s12}
data: {name: imagenet}
optimizer: {lr: 0.001}
schedule: {cooldown_epochs: 0}
report: {price_per_hour: 2.5}
"""


def train_row(step: int, **figures: Any) -> dict[str, Any]:
    return {
        "kind": "train", "epoch": 1 + step // 10, "step": step, "samples": 8 * step, "loss": 2 / step, "lr": 1e-3,
        "grad_norm": 0.5, "images_per_second": 160.0, "data_wait": 0.25, "skipped_steps": 0, "memory_gib": 0.0,
    } | figures  # fmt: skip


def validation_row(epoch: int, top1: float | None, **figures: Any) -> dict[str, Any]:
    scores = {"top1": top1, "top5": 90.0, "loss": 1.5, "images": 400, "ema_top1": 61.25}
    return {"kind": "validation", "epoch": epoch, "step": 10 * epoch, "samples": 80 * epoch} | scores | figures


def write_run(folder: Path, rows: list[dict[str, Any]], config: str = CONFIG) -> Path:
    folder.mkdir()
    (folder / "config.yaml").write_text(config)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    seconds = {"training": 3600.0, "validation": 600.0, "starting": 3000.0}
    status = {"state": "done", "step": 20, "reason": "", "starts": 2, "seconds": seconds}
    (folder / "status.json").write_text(json.dumps(status))
    (folder / "environment.json").write_text(json.dumps({"command": ["train.py", "x=1"], "derived": {"ranks": 4}}))
    (folder / "overrides.yaml").write_text('- "experiment=paper/poolformer_s12"\n')
    changes = {"step": 10, "time": "2026-11-27T10:00:00+0000", "changes": {"optimizer.lr": [0.002, 0.001]}}
    (folder / "changes.jsonl").write_text(json.dumps(changes) + "\n")
    log = ("model        x", f"resuming     {folder}/checkpoints/epoch-001, step 10", "time         training 50 %")
    (folder / "log.txt").write_text("".join(f"2026-11-27 10:00:00 {line}\n" for line in log))
    return folder


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run of two epochs that resumed once."""
    rows = [train_row(5), train_row(10), validation_row(1, 50.0), train_row(20), validation_row(2, 60.0)]
    return write_run(tmp_path / "run", rows)


class Checker(HTMLParser):
    """Records the elements, their attributes and the text, and fails where elements are not nested properly."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""
        self.feed(html)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes += attrs
        if tag not in ("meta", "link", "img"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += f"{data} "


def report(*folders: Path) -> Checker:
    """Return the report of runs, which must need neither network nor scripts."""
    html = make_report([read_record(folder) for folder in folders])
    checker = Checker(html)
    ids = [value for name, value in checker.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    for name, value in checker.attributes:
        assert not name.startswith("on")
        assert name not in ("src", "href", "xlink:href") or str(value).startswith(("#", "data:"))
    assert not checker.tags & {"script", "iframe", "object"}
    assert "url(" not in re.sub(r"url\(#\w+\)", "", html)
    return checker


def text(*folders: Path) -> str:
    return " ".join(report(*folders).text.split())


def test_figures(run: Path) -> None:
    """The report has the results, the paper's number, the time, the cost, the change and the resume."""
    found = text(run)
    assert "Best top-1 61.25 % epoch 1 (EMA)" in found
    assert "The paper's top-1 77.2 % -15.95 here" in found
    assert "paper, 77.2 %" in found
    assert "Goodput 50.0 % of 2 h 00 min" in found
    assert "Process hours 8.00 4 ranks Cost 20.00 at 2.5 an hour" in found
    assert "validation 8.3 % 10 min 00 s" in found
    assert "10 optimizer.lr 0.002 0.001" in found
    assert "step 10" in found
    assert "Starts 2 1 resumed" in found
    for chart in ("Top-1", "Top-5", "Loss", "Learning rate", "Gradient norm", "Throughput", "Waiting for data"):
        assert f" {chart} " in found
    assert "Skipped steps" not in found
    assert "GPU memory" not in found


def test_best_is_after_a_whole_epoch(tmp_path: Path) -> None:
    """As for checkpoints/best, a better result within an epoch is not the best, unless there is no other."""
    within = validation_row(2, 70.0, kind="final", step=15)
    found = text(write_run(tmp_path / "run", [validation_row(1, 62.0), within]))
    assert "Best top-1 62.00 % epoch 1" in found
    assert "Last top-5 90.00 % epoch 2" in found
    assert "Best top-1 70.00 % epoch 2" in text(write_run(tmp_path / "short", [within]))


def test_figures_of_gpus(tmp_path: Path) -> None:
    """Memory makes process hours GPU hours; skipped steps are shown where there were any."""
    rows = [train_row(5, memory_gib=20.0), train_row(10, memory_gib=30.5, skipped_steps=3)]
    found = text(write_run(tmp_path / "run", rows))
    assert "GPU memory 30.5 GiB" in found
    assert "GPU hours 8.00" in found
    assert "Skipped steps 3" in found
    assert "images seen" in found, "there is no epoch yet"


def test_file(run: Path) -> None:
    """write_report writes report.html, which needs less than 200 kB, and replaces it."""
    write_report(run)
    write_report(run)
    assert 10_000 < (run / "report.html").stat().st_size < 200_000
    assert not list(run.glob(".report*"))


def test_long_run(tmp_path: Path) -> None:
    """30,000 log rows give a small report."""
    rows = [train_row(step) for step in range(1, 30_001)]
    run = write_run(tmp_path / "run", rows)
    write_report(run)
    assert (run / "report.html").stat().st_size < 300_000


def test_several_runs(run: Path, tmp_path: Path) -> None:
    """Runs beside each other: a line for each, and only the settings that differ."""
    other = write_run(tmp_path / "other", [validation_row(1, 40.0)], CONFIG.replace("lr: 0.001", "lr: 0.5"))
    found = text(run, other)
    assert "2 runs" in found
    assert "run done 2 20 61.25 % 60.00 % 160 8.00 20.00" in found
    assert "optimizer.lr 0.001 0.5" in found
    assert "image_size" not in found


def test_hostile_text(tmp_path: Path) -> None:
    """Text of any file is shown as text, wherever it stands."""
    rows = [validation_row(1, 50.0) | {EVIL: 1.0}, train_row(5) | {EVIL: 1.0}]
    run = write_run(tmp_path / EVIL.replace("/", "-"), rows, json.dumps({EVIL: EVIL, "model": {"name": EVIL}}))
    (run / "status.json").write_text(json.dumps({"state": EVIL, "reason": EVIL, "seconds": {EVIL: 1.0}}))
    environment = {"command": [EVIL], "devices": [EVIL], "git": {"commit": EVIL}, "packages": {EVIL: EVIL}}
    (run / "environment.json").write_text(json.dumps(environment))
    (run / "changes.jsonl").write_text(json.dumps({"step": 1, "time": EVIL, "changes": {EVIL: [EVIL, EVIL]}}))
    (run / "log.txt").write_text(f"2026-11-27 10:00:00 ALARM        {EVIL}\n2026-11-27 10:00:00 ALARM \x1b[31m\x00\n")
    assert report(run).text.count(EVIL) >= 12
    assert report(run, run).text.count(EVIL) >= 2


FILES = ("config.yaml", "status.json", "environment.json", "overrides.yaml", "changes.jsonl", "log.txt")


@pytest.mark.parametrize("content", ["", "[1]", "{", '"x"', "null", "\x00\xff", "- 1\n- [", "{}", '{"a": ' * 5000])
def test_damaged_files(run: Path, content: str) -> None:
    """A damaged file costs its own part of the report only."""
    for name in FILES:
        whole = (run / name).read_text()
        (run / name).write_text(content)
        record = read_record(run)
        assert len(record.rows) == 5
        assert all(problem.startswith(f"{name}: ") for problem in record.problems)
        assert len(record.problems) <= 1
        (run / name).write_text(whole)
    for name in FILES:
        (run / name).write_text(content)
    assert "Top-1" in text(run)


def test_missing_files(run: Path) -> None:
    """metrics.jsonl alone makes a report."""
    for name in FILES:
        (run / name).unlink()
    assert "Top-1" in text(run)


ROWS: list[Any] = [
    [], 1, None, "x", {}, {"kind": "train"}, train_row(5) | {"step": "5"}, train_row(5) | {"samples": 10**400},
    train_row(5) | {"epoch": True}, train_row(5) | {"step": -1}, train_row(5) | {"kind": "other"},
]  # fmt: skip


def test_broken_rows(run: Path) -> None:
    """Rows that cannot be used are counted and left out; figures that are not numbers interrupt their curve only."""
    odd = [
        dict.fromkeys(train_row(1)) | {"kind": "train", "epoch": 1, "step": 6, "samples": 48},
        train_row(7, loss="x", lr=[], grad_norm={}, images_per_second=True, data_wait=10**400, memory_gib="x"),
        validation_row(2, None, top5="x", ema_top1=None, loss=None),
        validation_row(0, 50.0, step=0, samples=0),
    ]
    lines = [json.dumps(row) for row in (*ROWS, *odd)]
    with (run / "metrics.jsonl").open("a") as file:
        file.write("\n".join([*lines, '{"kind": "train", "ep']))
    found = text(run)
    assert f"metrics.jsonl: {len(ROWS) + 1} lines are damaged and left out" in found
    assert "Best top-1 61.25 %" in found


def test_a_run_that_goes_on_or_was_killed(run: Path) -> None:
    """A run whose status says that it is running was killed if no process holds its lock."""
    (run / "status.json").write_text(json.dumps({"state": "running"}))
    assert read_record(run).state == "killed", "there is no lock file"
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD_LOCK, str(run / "lock")], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    with holder:
        assert holder.stdout is not None
        assert holder.stdout.read(1) == b"x"
        assert read_record(run).state == "running"
        assert "running" in text(run)
        holder.communicate()
    assert read_record(run).state == "killed", "nobody holds the lock"
    assert "killed" in text(run)


def test_no_rows_yet(tmp_path: Path) -> None:
    """A run that has just started has a report without curves."""
    assert "No rows to draw yet." in text(write_run(tmp_path / "run", []))


def test_not_a_run_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not a run folder"):
        read_record(tmp_path)


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (lambda run: None, "paper/poolformer_s12"),
        (lambda run: (run / "overrides.yaml").unlink(), "paper/poolformer_s12"),
        (lambda run: (run / "overrides.yaml").write_text('- "experiment=demo"\n'), None),
        (lambda run: (run / "overrides.yaml").write_text('- "experiment=ablation/identity"\n'), "ablation/identity"),
    ],
)
def test_paper_row(run: Path, change: Callable[[Path], None], name: str | None) -> None:
    """The paper's number is that of the recipe, or of the network on ImageNet with the defaults; else there is none."""
    change(run)
    row = find_paper_row(read_record(run))
    assert (row and row.name) == name


@pytest.mark.parametrize(
    ("value", "shown"), [(0.0015, "0.0015"), (1 / 3, "0.3333"), (123456.0, "123,456"), (None, "null"), (True, "true"),
                         ([1, "a"], '[1, "a"]'), ("a\nb", "a\\nb")],
)  # fmt: skip
def test_values(value: Any, shown: str) -> None:
    assert format_value(value) == shown


def write_classes(run: Path, classes: int, prefix: str = "", names: list[str] | None = None) -> None:
    """Write the results by class: class n has n % 11 wrong of 20, all as the class after it; 3 of class 0 as 2."""
    names = names or [f"kind {number}" for number in range(classes)]
    counts = np.zeros((classes, classes), np.int64)
    for label in range(classes):
        counts[label, label] = 20 - label % 11
        counts[label, (label + 1) % classes] = label % 11
    counts[0] = 0
    counts[0, [0, 2]] = 17, 3
    top1 = counts.diagonal()
    totals = ClassTotals(counts.sum(1), top1, np.full(classes, 19), counts)
    write_per_class(run / f"{prefix}per_class.csv", names, totals)
    write_confusion(run / "validation" / f"{prefix}confusion.npz", names, totals, 20)


def section(found: str, title: str, end: str) -> str:
    return found.split(f" {title} ", 1)[1].split(f" {end} ", 1)[0]


def test_few_classes(run: Path) -> None:
    """Few classes are in one table, the worst first; confused pairs are those with most images. The EMA is better."""
    write_classes(run, 4, "ema_")
    found = text(run)
    assert "Classes EMA in the last validation, step 20 All 4, worst first Class" in found
    rows = "kind 0 20 85.0 % 95.0 % kind 3 20 85.0 % 95.0 % kind 2 20 90.0 % 95.0 % kind 1 20 95.0 % 95.0 %"
    assert rows in found
    assert section(found, "of the class", "Validations") == (
        "kind 0 kind 2 3 15.0 % kind 3 kind 0 3 15.0 % kind 2 kind 3 2 10.0 % kind 1 kind 2 1 5.0 %"
    )


def test_many_classes(run: Path) -> None:
    """With 1000 classes, the 20 worst and best, a folded table of all, and 20 pairs are shown; wnids are explained."""
    rows = [validation_row(1, 62.0)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    wnids = ImageNetInfo("imagenet-1k").label_names()
    write_classes(run, 1000, names=wnids)
    found = text(run)
    assert "Classes weights in the last validation, step 20 Worst 20 Class" in found
    best = section(found, "Best 20 Class images top-1 top-5", "Most confused")
    assert best.count(" 100.0 % 95.0 %") == 20
    worst = section(found, "Worst 20 Class images top-1 top-5", "Best 20")
    assert worst.count(" 50.0 % 95.0 %") == 20
    assert "(n01440764)" in section(found, "All 1,000, worst first Class", "Validations")
    pairs = section(found, "of the class", "All 1,000, worst first")
    assert pairs.count(" 10 50.0 %") == 20
    write_report(run)
    assert (run / "report.html").stat().st_size < 500_000


def test_classes_without_confusion(run: Path) -> None:
    """More classes than a confusion matrix has are shown without it and without the table of all."""
    write_classes(run, 1200, "ema_")
    (run / "validation" / "ema_confusion.npz").unlink()
    found = text(run)
    assert "Worst 20" in found
    assert "Most confused" not in found
    assert "1,200, worst first" not in found


def test_perfect_and_hostile_classes(run: Path) -> None:
    """Without confusions the report says so; names are shown as text."""
    totals = ClassTotals(np.full(2, 5), np.full(2, 5), np.full(2, 5), np.diag([5, 5]))
    write_per_class(run / "ema_per_class.csv", [EVIL, "b"], totals)
    write_confusion(run / "validation" / "ema_confusion.npz", [EVIL, "b"], totals, 20)
    assert "every image was predicted correctly" in text(run)
    write_confusion(
        run / "validation" / "ema_confusion.npz", [EVIL, "b"], replace(totals, confusion=np.array([[4, 1], [0, 5]])), 20
    )
    assert report(run).text.count(EVIL) == 2


def write_examples(run: Path, picture: Any = None, loss: Any = 3.0, name: str = "cat", count: int = 1) -> None:
    """Write the list of the EMA's worst and best images."""
    worst = {"image": f"{name}/1.jpg", "sample": 3, "class": name, "predicted": "dog", "loss": loss}
    best = worst | {"predicted": name, "loss": 0.001}
    pictures = {} if picture is None else {"picture": picture}
    content = {"step": 20, "worst": [worst | pictures] * count, "best": [best | pictures] * count}
    (run / "validation").mkdir(exist_ok=True)
    (run / "validation" / "ema_images.json").write_text(json.dumps(content))


def test_worst_and_best_images(run: Path) -> None:
    """Images have the probability of their class, and what was predicted instead; pictures are in the file itself."""
    write_examples(run)
    found = text(run)
    assert "Images EMA in the validation after step 20; with the probability of the right class" in found
    assert "Worst cat 5.0 % predicted as dog cat/1.jpg Best cat 99.9 % cat/1.jpg" in found
    assert "pictures are added at the end of the run" in found
    assert ("src", None) not in report(run).attributes
    write_examples(run, "/9j+", count=30)
    found = text(run)
    assert "Grad-CAM" in found
    assert report(run).attributes.count(("src", "data:image/jpeg;base64,/9j+")) == 16, "eight of each"
    write_examples(run, name=EVIL)
    assert report(run).text.count(EVIL) == 4


@pytest.mark.parametrize(
    "damage", [{"picture": '"><script>'}, {"picture": "a" * 50_000}, {"picture": 3}, {"loss": None}, {"loss": "x"}]
)
def test_damaged_images(run: Path, damage: dict[str, Any]) -> None:
    """A damaged list costs its own part of the report only, and is named."""
    write_examples(run, **damage)
    assert [problem.split(": ")[0] for problem in read_record(run).problems] == ["validation/ema_images.json"]
    assert "Worst" not in text(run)


@pytest.mark.parametrize(
    "content", [b"", b"PK\x03\x04", b"class,images\nx,1\n", b"class,images,top1,top5\nx,1,nan,2\n", b"\xff"]
)
def test_damaged_classes(run: Path, content: bytes) -> None:
    """A damaged file by class costs its own part of the report only, and is named."""
    for name in ("ema_per_class.csv", "validation/ema_confusion.npz"):
        write_classes(run, 4, "ema_")
        whole = (run / name).read_bytes()
        (run / name).write_bytes(content)
        record = read_record(run)
        assert [problem.split(": ")[0] for problem in record.problems] == [name]
        assert "Top-1" in text(run)
        (run / name).write_bytes(whole[: len(whole) // 2] if name.endswith("npz") else whole)
    assert [problem.split(": ")[0] for problem in read_record(run).problems] == ["validation/ema_confusion.npz"]
    np.savez(run / "validation" / "ema_confusion.npz", counts=np.zeros((2, 3), int), classes=np.array(["a"]), step=1)
    assert "not a confusion matrix" in read_record(run).problems[0]

"""Tests with randomly damaged files of a run folder: they are read, or rejected in one line without a traceback."""

import json
import random
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from metaformer.assembly.adoption import find_run
from metaformer.errors import UserError
from metaformer.goodput import Goodput
from metaformer.reporting.outcomes import read_run
from metaformer.tracking.jsonl import JsonlTracker
from metaformer.tracking.run_folder import open_run_folder
from metaformer.tracking.status import FAILED, StatusFile

MUTATIONS = 150  # per file
CONFIG = """model:
  name: poolformer_s12
  library: metaformer
  mean: null
data:
  name: imagenet
  root: \\${x}/${oc.env:HOME}
image_size: 224
epochs: 3
optimizer:
  lr: 0.001
"""
ROWS = [
    {"kind": "train", "epoch": 1, "step": 1, "samples": 8, "loss": 1.5},
    {"kind": "validation", "epoch": 1, "step": 1, "samples": 8, "top1": 12.5},
    {"kind": "train", "epoch": 2, "step": 2, "samples": 16, "loss": 0.5},
]
CHANGE = {"step": 1, "time": "2026-11-27T00:00:00+0000", "changes": {"optimizer.lr": [0.1, 0.001]}}
TOKENS = [b"\0", b"\xff\xfe", b"\n", b"{", b"[", b"[" * 5000, b"${", b"]", b"null", b"1e999", b"- ", b": ", b"\t", b'"',
          b"true", b"9" * 5000, b"&a *a", b"!!python/object:os.system", b"\xc2\x85", b"-1"]  # fmt: skip


def mutate(rng: random.Random, content: bytes) -> bytes:
    """Cut, insert or replace parts of a content, once or a few times."""
    for _ in range(rng.choice((1, 1, 1, 3))):
        start, end = sorted(rng.randrange(len(content) + 1) for _ in range(2))
        token = rng.choice(TOKENS)
        match rng.randrange(6):
            case 0:
                content = content[:start]
            case 1:
                content = content[:start] + content[end:]
            case 2:
                content = content[:start] + token + content[start:]
            case 3:
                content = content[:start] + token + content[min(end, start + 9) :]
            case 4:
                words = content.split(b" ")
                words[rng.randrange(len(words))] = token
                content = b" ".join(words)
            case 5:
                content = token
    return content


def error_of(use: Callable[[], None]) -> str | None:
    try:
        use()
    except UserError as error:
        return str(error)
    return None


def resume_config(run: Path) -> None:
    open_run_folder(run, CONFIG.replace("0.001", "0.002"), 2)


def resume_metrics(run: Path) -> None:
    tracker = JsonlTracker(run, 1)
    tracker.metrics({"kind": "validation", "epoch": 2, "step": 2, "samples": 16, "top1": 1.0})
    tracker.close(failed=False)


def resume_status(run: Path) -> None:
    StatusFile(run, None, Goodput()).start(1, 3)


def validate(run: Path) -> None:
    find_run(str(run))


@pytest.mark.parametrize(
    ("name", "use"),
    [
        ("config.yaml", resume_config),
        ("config.yaml", validate),
        ("changes.jsonl", resume_config),
        ("metrics.jsonl", resume_metrics),
        ("status.json", resume_status),
    ],
)
def test_random_damage(tmp_path: Path, name: str, use: Callable[[Path], None], monkeypatch: pytest.MonkeyPatch) -> None:
    """With 150 seeded mutations per file, the reader continues, or ends with one line that names the file."""
    monkeypatch.setattr("metaformer.tracking.run_folder.describe_environment", dict)
    monkeypatch.setattr("metaformer.files.fsync", lambda path: None)  # not needed for thousands of temporary files
    rng, rejected = random.Random(7), 0
    for number in range(MUTATIONS):
        run = tmp_path / str(number)
        (run / "checkpoints").mkdir(parents=True)
        (run / "config.yaml").write_text(CONFIG)
        (run / "changes.jsonl").write_text(json.dumps(CHANGE) + "\n")
        (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
        status = StatusFile(run, None, Goodput())
        status.start(1, 3)
        status.end(FAILED, 1, "KeyError: 'x'")
        damaged = mutate(rng, (run / name).read_bytes())
        (run / name).write_bytes(damaged)
        error = error_of(partial(use, run))
        if error is not None:
            rejected += 1
            assert len(error.splitlines()) == 1
            assert error.startswith(f"{run / name}: ")
            assert (run / name).read_bytes() == damaged, "a rejected file is not changed"
        outcome = read_run(run, {"data": {"name": "imagenet"}, "optimizer": {"lr": 0.001}})
        assert len(outcome.note.splitlines()) == 1
    assert rejected > MUTATIONS // 10, "too few mutations do damage"

"""The benchmark of training steps from the command line: real measurements of small networks, and what it refuses."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from benchmarks import train
from benchmarks.train import count_work
from metaformer.errors import UserError
from metaformer.models import create_model
from tests.conftest import Finished, launch_module

SMALL = ("--size=32", "--batch=2", "--precision=fp32", "--steps=1", "--uncounted=1", "--repeats=1", "--loaded")


def benchmark(*arguments: str) -> Finished:
    return launch_module("benchmarks.train", *SMALL, *arguments)


def test_training_from_jpegs(images: Path, tmp_path: Path) -> None:
    """Table, file, plot, trace and operators of each variant; the figures agree with each other."""
    file, plot, profile = tmp_path / "found.json", tmp_path / "bars.png", tmp_path / "profile"
    only = ("--only", "eager", "timm-eager")
    options = (f"--data={images / 'train'}", f"--json={file}", f"--plot={plot}", f"--profile={profile}", *only)
    done = benchmark(*options)
    assert done.code == 0, done.stderr
    found = json.loads(file.read_text())
    assert list(found["variants"]) == ["eager", "timm-eager"]
    for variant, row in found["variants"].items():
        speed = row["images_per_second"]["fastest_quartile"]
        assert speed == pytest.approx(2 / row["step_seconds"])
        assert f"{speed:.1f}" in done.stdout
        assert row["peak_memory_mib"] > 100
        assert json.loads((profile / variant / "trace.json").read_text())["traceEvents"]
        assert "aten::" in (profile / variant / "operators.txt").read_text()
    assert plot.read_bytes().startswith(b"\x89PNG")
    roof = found["roofline"]
    for rate, limit, work in (("flops", "compute", "flops"), ("bytes", "memory", "bytes")):
        per_image = roof[f"{rate}_per_second"] / roof[f"{limit}_images_per_second"]
        assert per_image == pytest.approx(count_work("poolformer_s12", 32, "fp32", inference=False)[work])


def test_inference_on_noise(tmp_path: Path) -> None:
    """The title says so; there is one image's forward pass of work, not three."""
    done = benchmark("--inference", "--only", "eager", f"--json={tmp_path / 'found.json'}")
    assert done.code == 0, done.stderr
    assert "inference" in done.stdout
    row = json.loads((tmp_path / "found.json").read_text())["variants"]["eager"]
    work = count_work("poolformer_s12", 32, "fp32", inference=True)
    assert row["tflops_per_second"] == pytest.approx(2 * work["flops"] / row["step_seconds"] / 1e12)


def test_work_of_an_image() -> None:
    """The paper's 1.8 G multiply-adds of S12 at 224 px, three times for training; bytes from the stages' sizes."""
    inference, training = (count_work("poolformer_s12", 224, "bf16", inference=only) for only in (True, False))
    assert inference["flops"] / 2 == pytest.approx(1.8e9, rel=0.03)
    assert training["flops"] == 3 * inference["flops"]
    model = create_model("poolformer_s12").eval()
    elements = 0
    with torch.no_grad():
        x = model.stem(torch.zeros(1, 3, 224, 224))
        for stage in model.stages:
            x = stage(x)
            elements += len(stage.get_submodule("blocks")) * x.numel()  # type: ignore[arg-type]
    assert training["bytes"] == elements * (15 * 4 + 59 * 2)
    assert inference["bytes"] == elements * (5 * 4 + 20 * 2)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("--steps=0", "--steps=0: must be at least 1"),
        ("--batch=3", "--batch=3: mixing needs an even size"),
        ("--model=poolformer_s13", "--model=poolformer_s13"),
        ("--only=fast", "--only=fast"),
        ("--only=fused", "--only=fused: needs a GPU"),
    ],
)
def test_bad_options(monkeypatch: pytest.MonkeyPatch, given: str, message: str) -> None:
    """Refused before anything is measured."""
    monkeypatch.setattr(sys, "argv", ["train.py", given])
    monkeypatch.setattr(train, "_measure", lambda *_: pytest.fail("it measures"))
    with pytest.raises(UserError) as caught:
        train.main()
    assert str(caught.value).startswith(message)


def test_a_loaded_machine(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """It is refused, or its figures are marked: the fastest quartile of all steps, and the range of the means."""
    measured = {"step_seconds": [0.2, 0.1, 0.5, 0.3, 0.4], "images_per_second": 10 / 1.5}
    measured |= {"first_step_seconds": 1.0, "peak_memory_mib": 1.0}
    monkeypatch.setattr(train, "measure", lambda *_: dict(measured))
    limits = {f"{name}_images_per_second": 99.0 for name in ("compute", "memory")}
    monkeypatch.setattr(train, "_roofline", lambda *_: limits)
    command = ["train.py", "--batch=2", "--size=32", "--only=eager", "--repeats=1"]
    with spinning():
        monkeypatch.setattr(sys, "argv", command)
        with pytest.raises(UserError, match=r"^this machine is loaded: other programs take \d+% of its processors"):
            train.main()
        monkeypatch.setattr(sys, "argv", [*command, "--loaded"])
        train.main()
    table = capsys.readouterr().out
    assert "LOADED MACHINE" in table
    assert "10.0" in table
    assert "6.7 to 6.7" in table


@contextmanager
def spinning() -> Iterator[None]:
    """Let one process per processor calculate."""
    loop = [sys.executable, "-c", "while True: pass"]
    processes = [subprocess.Popen(loop) for _ in os.sched_getaffinity(0)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def test_a_measurement_that_fails(tmp_path: Path) -> None:
    """The folder has no images: one line with the variant and the reason of its process."""
    done = benchmark(f"--data={tmp_path}", "--only", "eager")
    assert done.code == 2
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert line.startswith("error: eager: its process ended with exit code 2: ")

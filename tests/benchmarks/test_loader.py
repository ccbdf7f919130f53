"""The benchmark of loaders from the command line, and the library that delays openings."""

import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from benchmarks import loader as loader_benchmark
from benchmarks.loader import main
from metaformer.data.index.image_index import load_index
from metaformer.data.prepare.shard_writer import Packing, write_shards
from metaformer.data.prepare.source_images import list_source_images
from metaformer.errors import UserError
from tests.conftest import REPOSITORY, Finished, launch_module

JOBS = ("training, crop and flip", "training, RandAugment", "evaluation, crop .9")
needs_compiler = pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")

# Opens a file in each way and prints for each how long that took, in milliseconds.
OPEN_IN_EACH_WAY = """
import ctypes, os, sys, time
libc = ctypes.CDLL(None)
file = os.fsencode(sys.argv[1])
ways = [lambda name=name: libc[name](file, 0) for name in ("open", "open64")]
ways += [lambda name=name: libc[name](-100, file, 0) for name in ("openat", "openat64")]
ways += [lambda name=name: libc[name](file, b"r") for name in ("fopen", "fopen64")]
for way in (*ways, lambda: open(file, "rb")):
    started = time.perf_counter()
    assert way() != -1
    print(1000 * (time.perf_counter() - started))
"""


def benchmark(*arguments: str) -> Finished:
    return launch_module("benchmarks.loader", *arguments)


@needs_compiler
def test_table_and_json_have_each_loader_on_each_job_with_slow_openings(images: Path, tmp_path: Path) -> None:
    """Figures are positive, ratios are to timm, the table shows JSON's figures; no loader escapes the latency."""
    latency_ms, workers = 40, 2
    sizes = ("--images=40", "--batch=4", "--repeats=1", f"--workers={workers}", f"--open-latency-ms={latency_ms}")
    file = tmp_path / "found.json"
    done = benchmark(str(images / "train"), *sizes, "--only", "timm", "torch", f"--json={file}")
    assert done.code == 0, done.stderr
    found = json.loads(file.read_text())
    assert (found["images"], found["batch"], found["repeats"], found["open_latency_ms"]) == (40, 4, 1, latency_ms)
    assert found["machine"]["cores"] == os.cpu_count()
    assert all(found["versions"][name] for name in ("torch", "torchvision", "timm", "pillow"))
    assert tuple(found["jobs"]) == JOBS
    for job in JOBS:
        rows = found["jobs"][job]
        assert list(rows) == ["torch", "timm"]
        torch_speed, timm_speed = (rows[loader]["images_per_second"]["median"] for loader in rows)
        assert rows["torch"]["ratio_to_timm"] == pytest.approx(torch_speed / timm_speed)
        for loader, row in rows.items():
            speed = row["images_per_second"]
            # 40 images wait for their file in `workers` at a time; a batch of each may have waited before the window.
            assert 0 < speed["median"] < 40 / ((40 - 4 * workers) * latency_ms / 1000 / workers)
            assert speed["min"] == speed["max"] == speed["median"]
            assert row["cpu_ms_per_image"] > 0
            assert 100 < row["peak_memory_mib"] < 10_000
            table = done.stdout[done.stdout.index(job) :]
            (cells, *_) = [line.split("│")[1:-1] for line in table.splitlines() if f"│ {loader} " in line]
            assert float(cells[1]) == round(speed["median"])
            assert float(cells[4]) == pytest.approx(row["cpu_ms_per_image"], abs=0.006)


def test_shards_are_measured_for_loaders_that_read_them(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A folder of shards is measured with this project's loaders; others are skipped, or rejected if they are named."""
    folder = tmp_path / "train"
    with ThreadPoolExecutor(1) as pool:
        write_shards(list_source_images(load_index(images, "train")), folder, Packing(30_000), pool, lambda *step: None)
    monkeypatch.setattr(sys, "argv", ["loader.py", str(folder), "--only", "torch", "timm"])
    with pytest.raises(
        UserError, match=r"^--only: timm cannot read shards, and \S+train contains shards; give a folder of images$"
    ):
        main()
    found = []
    monkeypatch.setattr(loader_benchmark, "_measure_all", lambda arguments, loaders, *others: found.extend(loaders))
    monkeypatch.setattr(loader_benchmark, "_summary", lambda *others: {})
    monkeypatch.setattr(sys, "argv", ["loader.py", str(folder), "--images=4", "--batch=4"])
    main()
    assert found == ["torch", "pil", "dali"]
    assert capsys.readouterr().err == f"{folder} contains shards: skipping timm, torchvision, which read folders only\n"
    done = benchmark(str(folder), "--images=4", "--batch=4", "--repeats=1", "--workers=1", "--only", "torch")
    assert done.code == 0, done.stderr
    assert all(job in done.stdout for job in JOBS)


@needs_compiler
def test_only_files_below_the_folder_open_slowly(tmp_path: Path) -> None:
    """Each way to open a file takes the latency longer below the folder, and not beside it."""
    library, folder, beside = tmp_path / "slow.so", tmp_path / "data", tmp_path / "data2"
    source = str(REPOSITORY / "benchmarks" / "slow_open.c")
    subprocess.run(["cc", "-shared", "-fPIC", "-Wall", "-Werror", source, "-o", str(library), "-ldl"], check=True)
    settings = {"LD_PRELOAD": str(library), "SLOW_OPEN_FOLDER": str(folder), "SLOW_OPEN_MICROSECONDS": "50000"}
    taken = {}
    for place in (folder, beside):
        place.mkdir()
        (place / "file").write_text("x")
        command = [sys.executable, "-c", OPEN_IN_EACH_WAY, str(place / "file")]
        done = subprocess.run(command, env=os.environ | settings, capture_output=True, text=True, check=True)
        taken[place] = [float(line) for line in done.stdout.split()]
    assert len(taken[folder]) == len(taken[beside]) == 7
    assert min(taken[folder]) >= 50
    assert max(taken[beside]) < 50


def test_a_missing_folder_ends_in_one_line(tmp_path: Path) -> None:
    """An error is one line on stderr, with exit code 2."""
    refused = benchmark(str(tmp_path / "none"))
    assert refused.code == 2
    assert refused.stderr.splitlines() == [f"error: {tmp_path / 'none'}: no such folder"]


def test_what_cannot_be_measured_is_refused(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Images without class folders, unknown loaders, odd counts, no compiler, no place for the JSON, a bad image."""
    folder, broken = str(images / "train"), tmp_path / "broken" / "class_0"
    broken.mkdir(parents=True)
    (broken / "0.JPEG").write_text("not an image")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    for arguments, words in (
        ((str(images / "train" / "class_0"),), "without class folders"),
        ((folder, "--only", "torc"), "--only=torc: unknown; did you mean torch"),
        ((folder, "--images=40", "--batch=16"), "multiple of --batch=16"),
        ((folder, "--workers=0"), "--workers=0: must be at least 1"),
        ((folder, f"--json={tmp_path / 'none' / 'found.json'}"), "cannot be written (No such file or directory)"),
        ((str(broken.parent), "--only", "torch", "--images=1", "--batch=1"), "0.JPEG: cannot be read as an image"),
        ((folder, "--open-latency-ms=1"), "needs a C compiler"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(sys, "argv", ["loader.py", *arguments])
            if "compiler" in words:
                patch.setenv("PATH", str(tmp_path))
            with pytest.raises(UserError) as refused:
                main()
        assert words in str(refused.value)
        assert "\n" not in str(refused.value)

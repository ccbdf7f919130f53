"""Tests of the report of real runs, opened in a real Chromium, and of scripts/report.py."""

import base64
import io
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from metaformer.errors import UserError
from metaformer.reporting.run_record import read_record
from scripts import report
from tests.conftest import QUICK, launch

TINY = (*QUICK, "image_size=64", "workers=0", "model=timm", "model.name=test_resnet", "model.drop_path_rate=null")
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")


@pytest.fixture(scope="module")
def run_dir(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two ranks with an EMA, stopped and resumed with another learning rate; it has written its report."""
    folder = tmp_path_factory.mktemp("runs") / "first <b>"
    options = (
        f"data.root={images}", *TINY, "report.enabled=true", "report.price_per_hour=3", "ema=enabled",
        f"run_dir='{folder}'",
    )  # fmt: skip
    for change in (("max_steps=3", "epochs=2"), ("epochs=2", "optimizer.lr=2e-3")):
        done = launch("train", *options, *change, ranks=2)
        assert done.code == 0, done.stderr
        assert "report" not in done.stderr
    return folder


def see(file: Path, screenshot: Path, width: int, *options: str) -> str:
    """Return the page's elements as Chromium sees them; fail if it reports an error."""
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        pytest.skip("no Chromium is installed: the report was not opened in a browser (apt-get install chromium)")
    flags = (
        "--headless=new", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--v=0", "--hide-scrollbars",
        "--virtual-time-budget=2000", f"--window-size={width},2000", f"--user-data-dir={screenshot.parent}/profile",
        "--host-resolver-rules=MAP * ~NOTFOUND", *options,
    )  # fmt: skip
    outputs = []
    for action in ("--dump-dom", f"--screenshot={screenshot}"):
        done = subprocess.run(
            [browser, *flags, action, file.absolute().as_uri()], capture_output=True, text=True, timeout=120, check=True
        )
        assert "CONSOLE" not in done.stderr, done.stderr
        outputs.append(done.stdout)
    assert screenshot.stat().st_size > 20_000, "the page is not blank"
    return outputs[0]


@pytest.mark.parametrize(
    ("width", "options"), [(1200, ()), (1200, ("--blink-settings=preferredColorScheme=0",)), (390, ())]
)
def test_in_a_browser(run_dir: Path, tmp_path: Path, width: int, options: tuple[str, ...]) -> None:
    """The report that training wrote opens without an error in the console, light, dark and on a phone."""
    page = see(run_dir / "report.html", tmp_path / "page.png", width, *options)
    assert page.count("<svg") == 7
    assert page.count('<img src="data:image/jpeg;base64,') == 16
    words = " ".join(re.sub(r"<[^>]*>", " ", page).split())
    assert "first &lt;b&gt;" in words
    assert "done" in words
    assert "optimizer.lr 0.001 0.002" in words
    assert "Starts 2 1 resumed" in words
    assert "Cost" in words
    assert (run_dir / "report.html").stat().st_size < 400_000


def test_console_errors_are_seen(tmp_path: Path) -> None:
    """The test above can fail: an error in the console of another page is found."""
    page = tmp_path / "page.html"
    page.write_text("<script>missing()</script>")
    with pytest.raises(AssertionError, match="missing is not defined"):
        see(page, tmp_path / "page.png", 400)


Report = Callable[..., Path]


@pytest.fixture
def write(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Report:
    """Return a function that runs the script in an empty folder and returns the path that it prints."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: Any) -> Path:
        monkeypatch.setattr(sys, "argv", ["report.py", *map(str, arguments)])
        report.main()
        return Path(capsys.readouterr().out.removesuffix("\n"))

    return run


def test_any_run(run_dir: Path, tmp_path: Path, write: Report) -> None:
    """The script writes RUN/report.html again, comparison.html for several runs, or another file."""
    copy = tmp_path / "copy"
    shutil.copytree(run_dir, copy)
    assert write(copy) == copy / "report.html"
    assert "Cost" in write(run_dir, "--output", "one.html", "--price-per-hour", "2").read_text()
    comparison = write(run_dir, copy)
    assert comparison == Path("comparison.html")
    assert "2 runs" in comparison.read_text()
    assert write(run_dir, copy) == comparison, "a report is replaced"


def listed(run_dir: Path) -> tuple[Path, dict[str, Any]]:
    """Return the list of the worst and best images that the report shows, and its content."""
    file = run_dir / read_record(run_dir).examples_file
    return file, json.loads(file.read_text())


def test_pictures_of_a_run_that_was_killed(
    run_dir: Path, tmp_path: Path, write: Report, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The script adds the pictures that training adds at its end; without the data it says why there are none."""
    copy = tmp_path / "copy"
    shutil.copytree(run_dir, copy, symlinks=True)
    file, whole = listed(copy)
    without = whole | {kind: [{**entry} for entry in whole[kind]] for kind in ("worst", "best")}
    for entry in (*without["worst"], *without["best"]):
        del entry["picture"]
    file.write_text(json.dumps(without))
    assert write(copy).read_text().count("<img ") == 16
    _, again = listed(copy)
    for before, now in zip([*whole["worst"], *whole["best"]], [*again["worst"], *again["best"]], strict=True):
        assert [before[name] for name in ("image", "loss")] == [now[name] for name in ("image", "loss")]
        assert difference(before["picture"], now["picture"]) < 4, "the same network and image"
    file.write_text(json.dumps(without))
    config = copy / "config.yaml"
    config.write_text(re.sub(r"(?m)^  root: .*", "  root: /nowhere", config.read_text()))
    warnings: list[str] = []
    monkeypatch.setattr("metaformer.commands.report.warn", warnings.append)
    assert "<img " not in write(copy).read_text()
    (warning,) = warnings
    assert warning.startswith("the worst and best images are listed without pictures: data.root=/nowhere: no folder")


def difference(one: str, other: str) -> float:
    """Return the mean difference of two pictures in base64, of 255."""
    pixels = [np.asarray(Image.open(io.BytesIO(base64.b64decode(each))), np.float32) for each in (one, other)]
    assert pixels[0].shape == pixels[1].shape == (112, 224, 3), "the image and its heat map"
    return float(np.abs(pixels[0] - pixels[1]).mean())


def test_errors(run_dir: Path, tmp_path: Path, write: Report) -> None:
    """Another file is never replaced, and what is not a run is named."""
    (tmp_path / "notes.html").write_text("mine")
    with pytest.raises(UserError, match=r"notes\.html: exists and is not a report"):
        write(run_dir, "--output", "notes.html")
    assert (tmp_path / "notes.html").read_text() == "mine"
    with pytest.raises(UserError, match="not a run folder"):
        write(tmp_path)
    with pytest.raises(UserError, match=r"missing/x\.html: cannot be written"):
        write(run_dir, "--output", "missing/x.html")
    with pytest.raises(UserError, match=r"report\.price_per_hour=-1: must be"):
        write(run_dir, "--price-per-hour", "-1")

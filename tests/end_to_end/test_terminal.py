"""Tests of the programs in a terminal of 80 columns."""

import json
import re
from pathlib import Path

from tests.conftest import QUICK, REPOSITORY, VAL_IMAGES
from tests.tracking.test_console import drawn_bars, in_terminal

MODEL = ("model=timm", "model.name=test_resnet", "model.drop_path_rate=null")


def shown_lines(program: str, *options: str) -> tuple[list[str], list[str]]:
    """Return the lines that stay in the terminal, and each drawing of the bar."""
    text = in_terminal(80, str(REPOSITORY / f"{program}.py"), *options)
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text).replace("\r\n", "\n")
    lines = [line.rpartition("\r")[2] for line in plain.removesuffix("\n").split("\n")]
    return [line for line in lines if "\u2501" not in line], drawn_bars(text)


def too_long(lines: list[str], *folders: Path) -> list[str]:
    """Return the lines that wrap, not counting the names of the test's folders."""
    shortened = [re.sub("|".join(f"{folder}" for folder in folders), "", line) for line in lines]
    return [line for line in shortened if len(line) > 80]


def test_train_and_validate(images: Path, tmp_path: Path) -> None:
    """The start is announced, both programs draw bars, and the last line is the result, after a summary of train.py."""
    data, run_dir = f"data.root={images}", tmp_path / "run"
    lines, bars = shown_lines("train", data, *QUICK, *MODEL, "max_steps=3", f"run_dir={run_dir}")
    assert lines[0] == "starting: 1 rank, importing torch"
    assert any(re.match(" *epoch  step +eta ", line) for line in lines)
    assert any(re.match(r" *1/300     2  ", line) for line in lines)
    assert any(re.match(r"training +[\u2501\u2578\u257a]+ \d/3", bar) for bar in bars), bars
    assert any(re.match(r"validation +[\u2501\u2578\u257a]+ \d/5", bar) for bar in bars), bars
    labels = [line.split(" ", 1)[0] for line in lines[-6:-1]]
    assert labels == ["result", "trained", "files", "time", "time"]
    assert json.loads(lines[-1])["step"] == 3
    assert too_long(lines[:-1], tmp_path, images) == []

    lines, bars = shown_lines("validate", data, f"checkpoint={run_dir}", "precision=fp32", "eval_batch_size=32")
    assert lines[0] == "starting: 1 rank, importing torch"
    assert any(re.match(r"validation +[\u2501\u2578\u257a]+ \d/5", bar) for bar in bars), bars
    assert json.loads(lines[-1])["images"] == VAL_IMAGES
    assert too_long(lines[:-1], tmp_path, images) == []

    own = ("model=metaformer", "model.depths=[1,1,1,1]", "model.dims=[8,8,16,16]", "dry_run=true")
    lines, _ = shown_lines("train", data, *QUICK, *own, f"run_dir={tmp_path / 'other'}")
    assert any(line.startswith("dry run  ") for line in lines)
    assert too_long(lines[:-1], tmp_path, images) == []

    image = str(next((images / "val").rglob("*.JPEG")))
    lines, _ = shown_lines("scripts/predict", image, f"checkpoint={run_dir}", "precision=fp32")
    assert lines[0] == "starting: 1 rank, importing torch"
    assert any(line.startswith("classes  ") for line in lines)
    assert too_long(lines, tmp_path, images) == []

"""init_head=from_21k through train.py."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from timm.data import ImageNetInfo

from metaformer.errors import UserError
from metaformer.models import create_model, save_weights
from metaformer.models.composition import Composition
from metaformer.models.record import Record
from tests.conftest import QUICK

WNIDS = ("n01440764", "n02123045", "n03272010", "n04399382")  # of ImageNet-1K; ImageNet-21K does not have the last one
NETWORK = ("model=metaformer", "model.depths=[1,1]", "model.dims=[4,8]")


def test_training_starts_from_21841_classes(
    images: Path, tmp_path: Path, run_program: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A network of four classes trains from weights of 21,841; without the option, the classes do not fit."""
    root, file = tmp_path / "data", tmp_path / "w.safetensors"
    for split in ("train", "val"):
        (root / split).mkdir(parents=True)
        for number, wnid in enumerate(WNIDS):
            (root / split / wnid).symlink_to(images / split / f"class_{number}")
    composition = Composition(depths=(1, 1), dims=(4, 8))
    save_weights(create_model(composition, num_classes=21841), file, Record("metaformer", composition=composition))
    assert len(ImageNetInfo("imagenet-22k").label_names()) == 21841
    warnings: list[str] = []
    monkeypatch.setattr(sys.modules["metaformer.assembly.training"], "warn", warnings.append)
    common = ("train", *NETWORK, f"data.root={root}", *QUICK, "max_steps=1", "workers=0", f"run_dir={tmp_path / 'run'}")
    with pytest.raises(UserError, match=r"^init_head=from_21k: nothing to convert; give init_weights too$"):
        run_program(*common, "init_head=from_21k")
    with pytest.raises(UserError, match="has 21841 classes"):
        run_program(*common, f"init_weights={file}")
    result = run_program(*common, f"init_weights={file}", "init_head=from_21k")
    assert result["images"] == 403
    assert warnings == [
        "init_head=from_21k: ImageNet-21K has no n04399382; the classifier's rows start at the mean of all"
    ]
    config = (tmp_path / "run" / "config.yaml").read_text()
    assert "init_head: from_21k" in config
    assert json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])["step"] == 1

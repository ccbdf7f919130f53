"""The loop: divergence, clipping, accumulation."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.conftest import QUICK


def test_time(images: Path, tmp_path: Path, run_program: Callable[..., dict[str, Any]]) -> None:
    import time
    t=time.time()
    run_program("train", f"data.root={images}", "epochs=2", *QUICK, f"run_dir={tmp_path/'a'}")
    print("A",time.time()-t); t=time.time()
    run_program("train", f"data.root={images}", "epochs=1", *QUICK, "workers=0","model=timm","model.name=test_resnet","model.drop_path_rate=null",f"run_dir={tmp_path/'b'}")
    print("B",time.time()-t)

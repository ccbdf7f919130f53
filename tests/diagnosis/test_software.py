"""The versions installed here, and simulated findings of other machines."""

import pytest
import torch

from metaformer.diagnosis import software
from metaformer.diagnosis.finding import Verdict

NVLINK = """\tGPU0\tGPU1\tCPU Affinity\tNUMA Affinity
GPU0\t X \tNV18\t0-55\t0
GPU1\tNV18\t X \t0-55\t0
"""
PCIE = NVLINK.replace("NV18", "PIX")
SOCKETS = NVLINK.replace("NV18", "SYS")


def test_this_installation_passes() -> None:
    """The packages that run the tests pass all checks."""
    found = list(software.versions())
    assert [finding.check for finding in found] == ["python", "torch", "torchvision", "timm", "dali", "apex"]
    assert all(finding.verdict is Verdict.ok for finding in found), found


def test_an_old_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """A torch older than this project supports fails."""
    monkeypatch.setattr(torch, "__version__", "2.9.1+cu128")
    found = {finding.check: finding for finding in software.versions()}
    assert found["torch"].verdict is Verdict.fail
    assert "2.11" in found["torch"].fix


def test_a_driver_without_a_gpu_in_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """A driver without a GPU in torch is a mismatch and fails, even where no GPU is expected."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(software, "driver_version", lambda: (12, 2))
    (found,) = software.gpus(expect_gpu=False)
    assert found.verdict is Verdict.fail
    assert "CUDA 12.2" in found.message


def test_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A missing GPU gives a warning, unless none is expected."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(software, "driver_version", lambda: None)
    assert [finding.verdict for finding in software.gpus(expect_gpu=True)] == [Verdict.warn]
    assert [finding.verdict for finding in software.gpus(expect_gpu=False)] == [Verdict.ok]


@pytest.mark.parametrize(
    ("topology", "verdict"), [(NVLINK, Verdict.ok), (PCIE, Verdict.ok), (SOCKETS, Verdict.warn), ("", Verdict.warn)]
)
def test_links(topology: str, verdict: Verdict) -> None:
    """Links through the host give a warning, and so does a tool that prints nothing."""
    assert software.links(2, topology).verdict is verdict

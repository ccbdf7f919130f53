"""The model of a training step on GPUs: the budgets, what it records, and its command."""

import json
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException

from metaformer.errors import UserError
from metaformer.models import create_model, fused
from tests.conftest import Finished, launch_module

pytest.importorskip("triton", reason="torch's CPU builds do not include triton")
from benchmarks.gpu import budgets
from benchmarks.gpu.__main__ import main
from benchmarks.gpu.compiling import KernelFacts
from benchmarks.gpu.model import GPUS, SHORTEST_LAUNCH, predict, step_seconds
from benchmarks.gpu.recording import (
    Launch,
    Setting,
    _only_allocates_or_views,
    as_on_a_gpu,
    record_randaugment,
    record_step,
)


@pytest.fixture(scope="module")
def step() -> list[Launch]:
    """The launches of a training step of S12 with 1024 images."""
    return record_step(Setting(), budgets.ARCH)


def command(*arguments: str) -> Finished:
    """Run `python -m benchmarks.gpu`."""
    return launch_module("benchmarks.gpu", *arguments, timeout=900)


def test_budgets_are_kept(step: list[Launch]) -> None:
    """Bytes, launches and each kernel's figures equal the budgets; `make gpu-budgets` writes new ones.

    The figures depend on the compiler, so they are compared with its pinned version only.
    """
    assert budgets.read_versions() == {name: version(name) for name in ("torch", "triton")}, "use the pinned versions"
    steps = {
        setting: step if setting == Setting() else record_step(setting, budgets.ARCH) for setting in budgets.SETTINGS
    }
    augmentation = record_randaugment(budgets.SETTINGS[0], budgets.ARCH)
    found = budgets.differences(budgets.read(), budgets.figures_of(steps, augmentation))
    assert not found, "\n".join(found)


def test_differences_in_both_directions() -> None:
    """A worse figure says by how much, a better one asks to lower the budget, new and lost ones are named."""
    kept: budgets.Figures = {"kernel a": {"registers": 100, "stack_bytes": 0}, "kernel b": {"registers": 8}}
    assert budgets.differences(kept, kept) == []
    worse = budgets.differences(kept, kept | {"kernel a": {"registers": 110, "stack_bytes": 8}})
    assert worse == [
        "kernel a: registers is 110, and its budget is 100 (+10.0%): worse",
        "kernel a: stack_bytes is 8, and its budget is 0: worse",
    ]
    (better,) = budgets.differences(kept, kept | {"kernel b": {"registers": 4}})
    assert better == "kernel b: registers is 4, and its budget is 8 (-50.0%): better; lower the budget in budgets.json"
    changed = budgets.differences(kept, {"kernel a": kept["kernel a"] | {"loads": 1}, "kernel c": {}})
    assert changed == [
        "kernel a: loads has no budget; add it to budgets.json",
        "kernel b: no longer exists; remove it from budgets.json",
        "kernel c: has no budget; add it to budgets.json",
    ]


def test_what_a_step_records(step: list[Launch]) -> None:
    """Products are counted exactly, and the hidden layer once for each kernel that reads or writes it."""
    by_name: dict[str, list[Launch]] = {}
    for launch in step:
        by_name.setdefault(launch.name, []).append(launch)
    model = create_model("poolformer_s12")
    weights = [
        parameter.numel() for name, parameter in model.named_parameters() if ".mlp." in name and "weight" in name
    ]
    positions = [56**2] * 4 + [28**2] * 4 + [14**2] * 12 + [7**2] * 4
    products = [1024 * 2 * weight * count for weight, count in zip(weights, positions, strict=True)]
    forward, of_mlp = sum(products), sum(products[:4])  # the first stage's MLPs are one kernel
    classifier = 2 * 1024 * 512 * 1000
    assert sum(launch.flops for launch in by_name["addmm"]) == forward - of_mlp + classifier
    assert sum(launch.flops for launch in by_name["mm"]) == 2 * (forward + classifier) - of_mlp / 2
    for name in ("mlp.mlp", "mlp.mlp_backward"):  # whole tiles of 64 positions; the backward pass has as many products
        assert of_mlp <= sum(launch.flops for launch in by_name[name]) < 1.02 * of_mlp
    elements = [1024 * 2 * count for count in (56**2 * 64, 28**2 * 128, 14**2 * 320 * 3, 7**2 * 512)]  # 2 blocks
    hidden = 4 * 2 * sum(elements[1:])  # bytes in bf16
    assert sum(launch.bytes for launch in by_name["elementwise.activation"]) == 2 * hidden
    sums = sum(launch.bytes for launch in by_name["elementwise.activation_backward"]) / hidden - 3
    assert 0 < sums < 0.02  # the partial sums of the bias's gradient
    # The second block returns bf16: 10 and 8 bytes for each element of its input, and 20 backward.
    for name, count in (("mlp.mlp", 9), ("mlp.mlp_backward", 20)):
        assert count < sum(launch.bytes for launch in by_name[name]) / elements[0] < 1.02 * count, name
    assert len(by_name["_fused_adamw_"]) >= 2
    parameters = sum(p.numel() for p in model.parameters())
    assert sum(launch.bytes for launch in by_name["_fused_adamw_"]) == pytest.approx(7 * 4 * parameters, rel=1e-3)


def test_a_cast_is_a_launch() -> None:
    """Operators that may return a view count where they return a copy."""
    tensor, to = torch.empty(4, 4), torch.ops.aten.to.dtype
    assert not _only_allocates_or_views(to, [tensor], [tensor.to(torch.bfloat16)])
    assert _only_allocates_or_views(to, [tensor], [tensor.to(torch.float32)])
    assert _only_allocates_or_views(torch.ops.aten.t.default, [tensor], [tensor.t()])
    assert not _only_allocates_or_views(torch.ops.aten.mul_.Tensor, [tensor], [tensor])


def test_start_check_runs_the_binaries_of_training(step: list[Launch], monkeypatch: pytest.MonkeyPatch) -> None:
    """All specialisations of a step's kernels of the network are among those that the check before a run compares."""
    model = create_model("poolformer_s12")
    # It compares values, which fake tensors do not have.
    monkeypatch.setattr(torch.nn.init, "trunc_normal_", lambda weight, std: weight)
    with as_on_a_gpu(budgets.ARCH) as (launches, _):
        for shape in fused._stage_shapes(model, 224):
            with pytest.raises(DataDependentOutputException):  # at the comparison
                fused._relative_difference(torch.device("cpu"), torch.bfloat16, shape)
    checked = {launch.facts.digest for launch in launches if launch.facts is not None}
    trained = [launch for launch in step if launch.facts is not None and launch.name != "kernel.transform"]
    assert len(trained) > 100
    assert {launch.name for launch in trained if launch.facts and launch.facts.digest not in checked} == set()


def test_the_longest_limit_counts() -> None:
    """A launch takes the time of its bytes, instructions or products, whichever is longest, and a step the host's."""
    gpu = GPUS["H200"]
    facts = KernelFacts("k", (), "", 90, 4, 32, 0, 0, 1000, 16, (), 0, 0, frozenset(), frozenset())
    assert predict([Launch("tiny", 1)], gpu).seconds == SHORTEST_LAUNCH
    assert predict([Launch("copy", 4_300_000_000)], gpu).seconds == pytest.approx(1e-3 / 0.92)
    assert predict([Launch("mm", 1, 790_000_000_000)], gpu).seconds == pytest.approx(1e-3 / 0.85)
    issue = predict([Launch("k", 1, 0, facts, 132 * 1755)], gpu)
    assert issue.seconds == issue.issue_seconds == pytest.approx(132 * 1755 * 4 * 1000 / (132 * 1.755e9 * 3))
    assert step_seconds(predict([Launch("tiny", 1)] * 100, gpu)) == pytest.approx(100 * 34e-6)


@pytest.mark.slow
def test_table_and_measured_figures(tmp_path: Path) -> None:
    """Each line says that it is predicted, and a measured figure of the same setting stands beside it."""
    file = tmp_path / "train.json"
    setting = {"model": "poolformer_s12", "size": 224, "batch": 128, "precision": "bf16"}
    variants: dict[str, Any] = {"fused": {"images_per_second": {"fastest_quartile": 1234.0}}}
    file.write_text(json.dumps({"device": "NVIDIA H200", **setting, "variants": variants}))
    done = command("--batch", "128", "--measured", str(file))
    assert done.code == 0, done.stderr
    assert "PREDICTED, not measured" in done.stdout
    lines = [line for line in done.stdout.splitlines() if "images/s" in line]
    assert [line.partition(" S12")[0] for line in lines] == ["H200", "H200", "H100", "A100", "RTX 4090"]
    assert lines[0].startswith("H200 S12 224 px batch 128 bf16: ")
    assert all("(predicted" in line for line in lines if line != lines[1])
    assert "1,234 images/s (measured, -" in lines[1]


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["--model=resnet"], "--model=resnet"),
        (["--batch=0"], "--batch=0: must be at least 1"),
        (["--size=8"], "--size=8: must be at least 32"),
        (
            ["--measured=missing.json"],
            "--measured=missing.json: is not a file that benchmarks.train --json wrote",
        ),
    ],
)
def test_refused_arguments(arguments: list[str], error: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An argument that cannot work is named."""
    monkeypatch.setattr(sys, "argv", ["gpu", *arguments])
    with pytest.raises(UserError) as raised:
        main()
    assert str(raised.value).startswith(error)

"""Test which fused operators a run uses, and that all ranks use the same."""

from dataclasses import replace

import pytest
import torch

from metaformer.assembly import fusion
from metaformer.assembly.fusion import choose_randaugment, choose_transform, fuse_blocks
from metaformer.composing import compose_training
from metaformer.data.device import choice
from metaformer.data.device.choice import augment_by_triton, transform_by_triton
from metaformer.data.device.randaugment import apply_to_batch
from metaformer.data.device.transform import transform_plainly
from metaformer.data.load.config import LoaderName
from metaformer.models import create_model, create_timm_model, fused
from metaformer.models.config import Preprocessing, ResizeFilter
from metaformer.models.metaformer import MetaFormer, Stage, run_plain
from metaformer.runtime import Runtime
from tests.ranks import on_ranks

ALONE = Runtime(0, 1, 0, 1, torch.device("cpu"))
ON_GPU = replace(ALONE, device=torch.device("cuda"))
FAULT = "they differ"
IMAGES = Preprocessing(32, 0.9, ResizeFilter.bicubic, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


@pytest.fixture
def no_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out what would run on the GPU."""
    monkeypatch.setattr(fused, "find_fault", lambda *_: None)
    monkeypatch.setattr(fusion, "check_pooling", lambda _: None)


def status_of(name: str, *overrides: str, runtime: Runtime = ON_GPU) -> str:
    """Return the status text of `fuse_blocks` for a network."""
    config = compose_training(["data.root=.", f"model={name}", "image_size=32", *overrides])
    model = create_model(name, 2, image_size=32)
    status = fuse_blocks(config, IMAGES, runtime, model, None)
    assert is_plain(model) == status.startswith("off")
    return status


@pytest.mark.usefixtures("no_checks")
def test_status_of_the_blocks() -> None:
    """The status says by what the blocks are fused, or why they are not; on a CPU they never are."""
    assert status_of("poolformer_s12", runtime=ALONE) == "off (CPU)"
    assert status_of("poolformer_s12") == "on (Triton)"
    assert status_of("poolformerv2_s12") == "on (Triton)"
    assert status_of("metaformer_s12_ppff") == "on (Triton, MLPs in 4 of 4 stages, token mixers in 2)"
    assert status_of("caformer_s18") == "on (Triton, MLPs in 4 of 4 stages, token mixers in 0)"
    assert status_of("metaformer_s12_batch_norm") == "off (no stage has the papers' MLPs)"
    assert status_of("poolformer_s12", "model.fused=false") == "off (model.fused=false)"
    assert status_of("poolformer_s12", "channels_last=false") == "off (channels_last=false)"
    config = compose_training(["data.root=.", "model=timm", "model.name=resnet18"])
    model = create_timm_model("resnet18", 2, None, 224)
    assert fuse_blocks(config, IMAGES, ON_GPU, model, None) == "off (not a network of this project)"


def test_choice_of_transform(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton is chosen on a GPU with channels_last if its check passes for the image size."""
    config = compose_training(["data.root=."])
    sizes = []
    monkeypatch.setattr(choice, "find_fault", lambda device, size: sizes.append(size))
    assert choose_transform(config, IMAGES, ON_GPU) == (transform_by_triton, "on (Triton)")
    assert sizes == [32]
    assert choose_transform(config, IMAGES, ALONE) == (transform_plainly, "off (CPU)")
    contiguous = compose_training(["data.root=.", "channels_last=false"])
    assert choose_transform(contiguous, IMAGES, ON_GPU) == (transform_plainly, "off (channels_last=false)")
    monkeypatch.setattr(choice, "find_fault", lambda device, size: FAULT)
    assert choose_transform(config, IMAGES, ON_GPU) == (transform_plainly, f"off ({FAULT})")


def test_choice_of_randaugment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton is chosen for DALI's images on a GPU if its check passes, and a failed check is reported."""
    config = compose_training(["data.root=."])
    sizes = []
    monkeypatch.setattr(choice, "find_randaugment_fault", lambda device, size: sizes.append(size))
    on_triton = (augment_by_triton, ["RandAugment on (Triton)"])
    assert choose_randaugment(config, IMAGES, ON_GPU, LoaderName.dali) == on_triton
    assert sizes == [32]
    assert choose_randaugment(config, IMAGES, ON_GPU, LoaderName.torch) == (apply_to_batch, [])
    assert choose_randaugment(config, IMAGES, ALONE, LoaderName.dali) == (apply_to_batch, [])
    without = compose_training(["data.root=.", "augmentation.randaugment.num_ops=0"])
    assert choose_randaugment(without, IMAGES, ON_GPU, LoaderName.dali) == (apply_to_batch, [])
    assert sizes == [32], "what is not used is not checked"
    monkeypatch.setattr(choice, "find_randaugment_fault", lambda device, size: FAULT)
    plain = (apply_to_batch, [f"RandAugment in plain torch ({FAULT})"])
    assert choose_randaugment(config, IMAGES, ON_GPU, LoaderName.dali) == plain


def choose_where_rank_1_fails(runtime: Runtime) -> tuple[str, bool, str, bool]:
    """Return a rank's status and use of blocks and transform, chosen as if on a GPU."""
    fault = FAULT if runtime.rank == 1 else None
    vars(fused)["find_fault"] = lambda *_: fault
    vars(choice)["find_fault"] = lambda *_: fault
    vars(fusion)["check_pooling"] = lambda _: None
    config = compose_training(["data.root=.", "image_size=32"])
    model = create_model("poolformer_s12", 2, image_size=32)
    on_gpu = replace(runtime, device=torch.device("cuda"))
    blocks = fuse_blocks(config, IMAGES, on_gpu, model, None)
    transform, status = choose_transform(config, IMAGES, on_gpu)
    return blocks, is_plain(model), status, transform is transform_plainly


def is_plain(model: MetaFormer) -> bool:
    """Return whether no stage uses the fused operators."""
    return all(stage.run_blocks is run_plain for stage in model.stages if isinstance(stage, Stage))


def test_ranks_agree() -> None:
    """If the check fails on one rank, no rank uses the kernels, and every rank reports which rank failed."""
    off = f"off (rank 1: {FAULT})"
    assert on_ranks(choose_where_rank_1_fails) == [(off, True, off, True)] * 2

"""Weight files of this project, of timm and of the paper's authors, and invalid files."""

import io
import os
import pickle
import tracemalloc
import warnings
import zipfile
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

from metaformer.errors import UserError
from metaformer.models import MetaFormer, create_model, load_weights, save_weights
from metaformer.models.metaformer import Architecture, BlockParts
from metaformer.models.norms import ChannelLayerNorm
from metaformer.models.token_mixers import Attention, Identity, Pooling, SpatialFC
from metaformer.models.weight_formats import metaformer_to_official
from tests.models.released import RELEASED_SLOTS, SMALL_DEPTHS, SMALL_DIMS, released_logits, released_state

S12_DEPTHS, S12_DIMS = (2, 2, 6, 2), (64, 128, 320, 512)
MIXERS = {"pool": Pooling, "attention": Attention, "fc": SpatialFC, "none": Identity}


def small(num_classes: int = 5, depth: int = 1) -> MetaFormer:
    return MetaFormer(Architecture((1, 1, depth, 1), (4, 8, 12, 16), [Pooling] * 4), num_classes)


def small_released(name: str, num_classes: int = 5, image_size: int = 64) -> MetaFormer:
    """Return this project's network with the slots of a released one, in the sizes of `released_state`."""
    slots = [slot for slot in RELEASED_SLOTS[name] if slot in MIXERS]
    hybrid = "attention" in slots
    architecture = Architecture(
        SMALL_DEPTHS,
        SMALL_DIMS,
        [MIXERS[slot] for slot in slots],
        parts=BlockParts(norm=ChannelLayerNorm) if hybrid else BlockParts(),
        position_embedding_stage=slots.index("attention") if hybrid else None,
    )
    return MetaFormer(architecture, num_classes, image_size)


def perturb(model: nn.Module) -> Any:
    """Set random weights with which every tensor affects the output, including LayerScales and norms."""
    random = torch.Generator().manual_seed(0)
    for key, tensor in model.state_dict().items():
        scale = 0.5 if tensor.ndim == 1 else tensor[0].numel() ** -0.5
        tensor.copy_(torch.randn(tensor.shape, generator=random) * scale + key.endswith("norm.weight"))
    return model.eval()


def message(model: nn.Module, path: Path, use_ema: bool = False) -> str:
    with pytest.raises(UserError) as refusal:
        load_weights(model, path, use_ema)
    text = str(refusal.value)
    assert text.startswith(f"{path}: ")
    assert text.isprintable()
    assert len(text) < 1000
    return text


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    save_weights(small(), path, "a_small_network")
    return path


def test_round_trip(tmp_path: Path) -> None:
    """Saved weights load bit-identically, whatever the memory format, and replace different weights."""
    saved = small().to(memory_format=torch.channels_last)
    save_weights(saved, tmp_path / "w", "a_small_network")
    loaded = small()
    assert not torch.equal(loaded.stem.conv.weight, saved.stem.conv.weight)
    load_weights(loaded, str(tmp_path / "w"))
    for key, tensor in saved.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], tensor), key


def paper_head(reference: Any, images: Tensor) -> Tensor:
    """Compute timm's features with the paper's head: norm, then the mean over space, then the classifier."""
    norm, fc = reference.head.norm, reference.head.fc
    features = functional.group_norm(reference.forward_features(images), 1, norm.weight, norm.bias, eps=1e-5)
    return functional.linear(features.mean((2, 3)), fc.weight, fc.bias)


@torch.no_grad()
def test_file_permissions_follow_the_umask(tmp_path: Path) -> None:
    """A weights file has the permissions of any other new file, even if it replaces one."""
    before = os.umask(0o027)
    try:
        for _ in range(2):
            save_weights(small(), tmp_path / "model.safetensors", "a_small_network")
    finally:
        os.umask(before)
    assert (tmp_path / "model.safetensors").stat().st_mode & 0o777 == 0o640


def test_timms_weights_give_the_same_function(tmp_path: Path) -> None:
    """timm's poolformer_s12 with the paper's head computes the same function as this project's network.

    timm's own head is another function of the same weights, so its logits differ.
    """
    reference = perturb(timm.create_model("poolformer_s12", num_classes=7))
    save_file(reference.state_dict(), tmp_path / "timm.safetensors")
    model = create_model("poolformer_s12", num_classes=7).eval()
    load_weights(model, tmp_path / "timm.safetensors")
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    logits = model(images)
    torch.testing.assert_close(logits, paper_head(reference, images), rtol=1e-4, atol=1e-4 * logits.std().item())
    assert (reference(images) - logits).abs().max() > 0.1 * logits.std()


@torch.no_grad()
def test_timm_loads_this_projects_files(tmp_path: Path) -> None:
    """A file from `save_weights` loads strictly into timm's network of the same name, with equal features."""
    model = perturb(create_model("poolformer_s12", num_classes=7))
    save_weights(model, tmp_path / "ours", "poolformer_s12")
    reference = timm.create_model("poolformer_s12", num_classes=7).eval()
    reference.load_state_dict(load_file(tmp_path / "ours"), strict=True)
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    features = model.stages(model.stem(images))
    spread = features.std().item()
    torch.testing.assert_close(reference.forward_features(images), features, rtol=1e-4, atol=1e-4 * spread)


@pytest.mark.parametrize("name", RELEASED_SLOTS)
def test_released_weights_give_the_released_function(tmp_path: Path, name: str) -> None:
    """Files with the keys of the paper's authors compute the authors' function, including position embeddings."""
    state = released_state(name)
    torch.save(state, tmp_path / f"{name}.pth.tar")
    model = small_released(name).eval()
    load_weights(model, tmp_path / f"{name}.pth.tar")
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    expected = released_logits(name, {key: tensor.requires_grad_() for key, tensor in state.items()}, images)
    torch.testing.assert_close(model(images), expected, rtol=1e-4, atol=1e-4 * expected.std().item())
    # The comparison depends on every tensor, except biases that cancel out in pooling minus its input.
    for key, gradient in zip(state, torch.autograd.grad(expected.square().sum(), list(state.values())), strict=True):
        pooled = key.endswith("norm1.bias") and RELEASED_SLOTS[name][int(key.split(".")[1])] == "pool"
        assert pooled or gradient.abs().max() > 1e-2, key


@pytest.mark.parametrize(
    ("name", "ours"),
    [
        ("poolformer_s12", "poolformer_s12"),
        ("metaformer_id_s12", "metaformer_s12_identity"),
        ("metaformer_pppa_s12_224", "metaformer_s12_pppa"),
        ("metaformer_ppaa_s12_224", "metaformer_s12_ppaa"),
        ("metaformer_pppf_s12_224", "metaformer_s12_pppf"),
        ("metaformer_ppff_s12_224", "metaformer_s12_ppff"),
    ],
)
def test_released_sizes_fit_the_named_networks(tmp_path: Path, name: str, ours: str) -> None:
    """The released S12 networks at 224 pixels load into this project's networks of the corresponding names."""
    torch.save(released_state(name, S12_DIMS, S12_DEPTHS, image_size=224, num_classes=10), tmp_path / "w")
    load_weights(create_model(ours, num_classes=10), tmp_path / "w")


# Options that programs save beside the weights.
OPTIONS = Namespace(
    output_dir=Path("/x"),
    others=[PurePosixPath("x"), PureWindowsPath("c:/x")],
    lr=np.float32(1e-3),
    best={"epoch": np.int64(3), "is": np.bool_(True), "name": np.str_("x")},
    mean=np.arange(6.0).reshape(2, 3),
    classes=np.array(["a", None], dtype=object),
    dtype=np.dtype("f2"),
)

Writer = Callable[[dict[str, Tensor], Path], None]
WRITERS: dict[str, Writer] = {
    "safetensors": save_file,
    "torch": torch.save,
    "torch before 1.6": lambda state, path: torch.save(state, path, _use_new_zipfile_serialization=False),
    "official": lambda state, path: torch.save(metaformer_to_official(state), path),
    "official safetensors": lambda state, path: save_file(metaformer_to_official(state), path),
    "ddp": lambda state, path: torch.save(prefixed(state, "module."), path),
    "ddp safetensors": lambda state, path: save_file(prefixed(state, "module."), path),
    "compiled safetensors": lambda state, path: save_file(prefixed(state, "_orig_mod."), path),
    "compiled, before 1.6": lambda state, path: torch.save(
        {"state_dict": prefixed(state, "_orig_mod.")}, path, _use_new_zipfile_serialization=False
    ),
    "ddp of compiled": lambda state, path: torch.save({"state_dict": prefixed(state, "module._orig_mod.")}, path),
    "compiled ddp, official": lambda state, path: save_file(
        prefixed(metaformer_to_official(state), "_orig_mod.module."), path
    ),
    "averaged": lambda state, path: torch.save(
        {"n_averaged": torch.tensor(3), **prefixed(state, "module.module._orig_mod.")}, path
    ),
    "averaged safetensors": lambda state, path: save_file(
        {"n_averaged": torch.tensor(3), **prefixed(state, "module.")}, path
    ),
    "torchvision": lambda state, path: torch.save(
        {"model": state, "epoch": 3, "args": OPTIONS, "model_ema": {"n_averaged": torch.tensor(3)}}, path
    ),
    "DeiT, before 1.6": lambda state, path: torch.save(
        {"model": prefixed(state, "module."), "max_accuracy": np.float64(72.2), "args": OPTIONS},
        path,
        _use_new_zipfile_serialization=False,
    ),
    "timm": lambda state, path: torch.save(training_checkpoint(state), path),
    "timm ddp, official": lambda state, path: torch.save(
        training_checkpoint(prefixed(metaformer_to_official(state), "module.")), path
    ),
}


def prefixed(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {prefix + key: tensor for key, tensor in state.items()}


def training_checkpoint(state: dict[str, Tensor], **entries: Any) -> dict[str, Any]:
    """Return a training checkpoint as timm's program writes it, with additional entries."""
    optimizer = torch.optim.AdamW([nn.Parameter(torch.zeros(2))])
    options = Namespace(model="small", lr=1e-3, mean=[0.5], aug_splits=0, resume="")
    return {
        "epoch": 7,
        "arch": "a_timm_network",
        "state_dict": state,
        "optimizer": optimizer.state_dict(),
        "version": 2,
        "args": options,
        "metric": 71.5,
        **entries,
    }


@pytest.mark.parametrize("ending", ["safetensors", "pth.tar", "txt"])
@pytest.mark.parametrize("layout", WRITERS)
def test_every_format_under_every_name(tmp_path: Path, layout: str, ending: str) -> None:
    """The format is detected from the bytes and keys, not from the file's name."""
    saved = small()
    WRITERS[layout](saved.state_dict(), tmp_path / f"w.{ending}")
    loaded = small()
    load_weights(loaded, tmp_path / f"w.{ending}")
    for key, tensor in saved.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], tensor), key


def test_average_of_a_training_checkpoint(tmp_path: Path) -> None:
    """use_ema loads `state_dict_ema` or torchvision's `model_ema`, and refuses files without them."""
    state, average = small().state_dict(), small().state_dict()
    torch.save(training_checkpoint(state, state_dict_ema=average), tmp_path / "both")
    torch.save(training_checkpoint(state), tmp_path / "one")
    save_file(state, tmp_path / "safetensors")
    model = small()
    load_weights(model, tmp_path / "both")
    assert torch.equal(model.stem.conv.weight, state["stem.conv.weight"])
    load_weights(model, tmp_path / "both", use_ema=True)
    assert torch.equal(model.stem.conv.weight, average["stem.conv.weight"])
    for name in ("one", "safetensors"):
        assert "use_ema=false" in message(model, tmp_path / name, use_ema=True)
    torch.save(
        {"model": average, "model_ema": {"n_averaged": torch.tensor(9), **prefixed(state, "module.")}}, tmp_path / "w"
    )
    load_weights(model, tmp_path / "w", use_ema=True)
    assert torch.equal(model.stem.conv.weight, state["stem.conv.weight"])
    torch.save({"model": state, "state_dict": average}, tmp_path / "w")
    assert "contains several state dicts (state_dict, model)" in message(model, tmp_path / "w")


def test_networks_of_timm(tmp_path: Path) -> None:
    """timm's networks load their own keys, unwrapped; official keys are converted only for this project's networks."""
    saved = timm.create_model("poolformer_s12", num_classes=3)
    torch.save(training_checkpoint({f"module.{k}": v for k, v in saved.state_dict().items()}), tmp_path / "w")
    loaded = timm.create_model("poolformer_s12", num_classes=3)
    load_weights(loaded, tmp_path / "w")
    assert torch.equal(loaded.state_dict()["stem.conv.weight"], saved.state_dict()["stem.conv.weight"])
    torch.save(metaformer_to_official(saved.state_dict()), tmp_path / "w")
    assert "unexpected patch_embed.proj.weight" in message(loaded, tmp_path / "w")
    resnet = timm.create_model("resnet10t", num_classes=3)
    save_weights(timm.create_model("resnet10t", num_classes=8), tmp_path / "r", "resnet10t")
    assert "has 8 classes (fc.weight), but this model has 3; set num_classes=8" in message(resnet, tmp_path / "r")


def test_missing_file_is_named(tmp_path: Path) -> None:
    """A missing file, or a folder in its place, gives an error with its path."""
    assert "no such" in message(small(), tmp_path / "nothing")
    assert "no such" in message(small(), tmp_path)


@pytest.mark.parametrize("layout", ["safetensors", "torch", "torch before 1.6"])
@pytest.mark.parametrize("keep", [0, 3, 7, 60, 0.1, 0.5, 0.99, -1])
def test_truncated_file_is_named(tmp_path: Path, layout: str, keep: float) -> None:
    """A file of any format that is truncated anywhere gives an error with its path."""
    WRITERS[layout](small().state_dict(), tmp_path / "w")
    whole = (tmp_path / "w").read_bytes()
    (tmp_path / "w").write_bytes(whole[: int(keep * len(whole)) if 0 < keep < 1 else int(keep)])
    text = message(small(), tmp_path / "w")
    assert "incomplete or damaged" in text or "not a weights file" in text or "torch did not write" in text


@pytest.mark.parametrize("layout", ["torch", "torch before 1.6"])
def test_damaged_pickle_is_named(tmp_path: Path, layout: str) -> None:
    """A changed byte among a torch file's keys gives a one-line error, unless it has no effect."""
    WRITERS[layout](small().state_dict(), tmp_path / "w")
    whole = (tmp_path / "w").read_bytes()
    key = whole.index(b"stem.conv.weight")
    refusals = []
    for place in range(key - 20, key + 80):
        (tmp_path / "w").write_bytes(whole[:place] + b"\xff" + whole[place + 1 :])
        try:
            load_weights(small(), tmp_path / "w")
        except UserError as error:
            refusals.append(str(error))
    assert len(refusals) > 50
    assert all(text.startswith(f"{tmp_path / 'w'}: ") and len(text.splitlines()) == 1 for text in refusals)


def archive_of(entries: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as out:
        for name, content in entries.items():
            out.writestr(name, content)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("content", "part"),
    [
        (b"not weights at all, but text\n" * 9, "neither safetensors nor torch's format"),
        (b"<!DOCTYPE html><html>", "neither safetensors nor torch's format"),
        (pickle.dumps({"a": 1}), "refused, not executed"),
        (archive_of({"x.txt": b"text"}), "a zip archive without a state dict"),
        (archive_of({"x/data.pkl": b"", "x/constants.pkl": b""}), "a zip archive without a state dict"),
        (archive_of({"x/data.pkl": b"text"}), "incomplete or damaged torch file"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, content: bytes, part: str) -> None:
    """Text, other pickles and other archives give an error that describes them."""
    (tmp_path / "w").write_bytes(content)
    assert part in message(small(), tmp_path / "w")


class Malicious:
    """An object that creates a folder when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.mark),)


@pytest.mark.parametrize("wrap", ["zip", "old", "pickle"])
def test_pickle_that_runs_code_is_refused(tmp_path: Path, wrap: str) -> None:
    """A pickle that contains a call is refused with the function's name and not executed, in any packing."""
    mark, path = tmp_path / "mark", tmp_path / "w"
    contents = {"state_dict": small().state_dict(), "args": Malicious(mark)}
    if wrap == "pickle":
        path.write_bytes(pickle.dumps(contents))
        assert "refused, not executed" in message(small(), path)
    else:
        torch.save(contents, path, _use_new_zipfile_serialization=wrap == "zip")
        assert "refused, and not executed: it would call posix.mkdir" in message(small(), path)
    assert not mark.exists()
    if wrap != "pickle":
        torch.load(path, weights_only=False)  # proves that the pickle would have run code
        assert mark.exists()


class Call:
    """An object that is pickled as a call of `function`."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.reduced = function, arguments

    def __reduce__(self) -> Any:
        return self.reduced


def test_options_are_not_constructed(tmp_path: Path) -> None:
    """Pickled paths and arrays call neither pathlib nor numpy, so even invalid arguments are accepted."""
    rebuild = np.ndarray.__reduce__(np.zeros(1))[0]
    options = [Call(PurePosixPath, 3), Call(np.dtype, "no type"), Call(rebuild, np.ndarray, (2**62,), b"b")]
    torch.save({"state_dict": small().state_dict(), "args": options}, tmp_path / "w")
    load_weights(small(), tmp_path / "w")
    torch.save({"state_dict": small().state_dict(), "args": Call(np.load, "x", None, True)}, tmp_path / "w")
    assert "refused, and not executed: it would call numpy.load" in message(small(), tmp_path / "w")


def test_compressed_archive_is_refused(tmp_path: Path) -> None:
    """A zip archive that is compressed or has overlapping entries is refused before it is unpacked."""
    state = {"weight": torch.zeros(2**24), "bias": torch.zeros(2**24)}
    torch.save(state, tmp_path / "w")
    with zipfile.ZipFile(tmp_path / "w") as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    (tmp_path / "w").write_bytes(archive_of(entries, zipfile.ZIP_DEFLATED))
    assert (tmp_path / "w").stat().st_size < 2**20
    tracemalloc.start()
    try:
        assert "a compressed zip archive" in message(small(), tmp_path / "w")
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()
    whole = archive_of({"x/data.pkl": b"", **{f"x/data/{number}": bytes(1000) for number in range(9)}})
    (tmp_path / "w").write_bytes(with_shared_entries(whole))
    assert "its entries are larger than the file" in message(small(), tmp_path / "w")


def with_shared_entries(whole: bytes) -> bytes:
    """Return the archive with a directory whose entries all point to the bytes of the last entry."""
    directory = whole.index(b"PK\x01\x02")
    start = whole.rindex(b"PK\x03\x04", 0, directory)
    changed = bytearray(whole[start:])
    place = -1
    while (place := changed.find(b"PK\x01\x02", place + 1)) >= 0:
        changed[place + 42 : place + 46] = bytes(4)  # the entry's offset
    end = changed.rindex(b"PK\x05\x06")
    changed[end + 16 : end + 20] = (directory - start).to_bytes(4, "little")
    return bytes(changed)


def unusual(make: Callable[[], Tensor]) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about deprecated and experimental kinds of tensors
        return make()


UNUSUAL: dict[str, Callable[[], Tensor]] = {
    "a complex tensor": lambda: torch.ones(12, 8, 3, 3, dtype=torch.complex64),
    "a meta tensor": lambda: torch.ones(12, 8, 3, 3, device="meta"),
    "a sparse (sparse_coo) tensor": lambda: torch.ones(12, 8, 3, 3).to_sparse(),
    "a sparse (sparse_csr) tensor": lambda: torch.ones(12, 8).to_sparse_csr(),
    "a quantized tensor": lambda: torch.quantize_per_tensor(torch.ones(12, 8, 3, 3), 0.1, 0, torch.qint8),
    "a nested tensor": lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
    "is int8, not float32": lambda: torch.ones(12, 8, 3, 3, dtype=torch.int8),
    "is bool, not float32": lambda: torch.ones(12, 8, 3, 3, dtype=torch.bool),
    "is [], not [12, 8, 3, 3]": lambda: torch.ones(()),
}


@pytest.mark.parametrize("part", UNUSUAL)
def test_unusual_tensors_are_refused(tmp_path: Path, part: str) -> None:
    """Meta, sparse, quantized, nested, complex and integer tensors are refused for weights, not cast."""
    key, tensor = "stages.2.downsample.conv.weight", unusual(UNUSUAL[part])
    torch.save(small().state_dict() | {key: tensor}, tmp_path / "w")
    text = message(small(), tmp_path / "w")
    assert key in text
    assert part in text
    if "complex" in part or "int8" in part:
        save_file(small().state_dict() | {key: tensor}, tmp_path / "w")
        assert part in message(small(), tmp_path / "w")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_are_loaded(tmp_path: Path, dtype: torch.dtype) -> None:
    """Weights in another precision load into float32; counters remain integers."""
    saved = timm.create_model("resnet10t", num_classes=3)
    save_file({k: v.to(dtype) if v.is_floating_point() else v for k, v in saved.state_dict().items()}, tmp_path / "w")
    loaded = timm.create_model("resnet10t", num_classes=3)
    load_weights(loaded, tmp_path / "w")
    torch.testing.assert_close(loaded.state_dict(), saved.state_dict(), rtol=1e-2, atol=1e-3)


UGLY = ["line\nbreak", "\x1b[31mred", "right\u202eleft", "x" * 2**21, "stages.0.blocks.0\r.mlp", "\x00"]


@pytest.mark.parametrize("ugly", UGLY, ids=[text[:9].encode("unicode_escape").decode() for text in UGLY])
def test_messages_are_one_printable_line(tmp_path: Path, ugly: str) -> None:
    """Control characters and very long text in a file's keys and names are escaped and shortened."""
    state, path = small().state_dict(), tmp_path / "w"
    for save in (torch.save, save_file):
        save(state | {ugly: torch.ones(1)}, path)
        assert "not a valid tensor name" in message(small(), path)
    deeper = small(depth=2).state_dict()
    save_weights(small(depth=2), path, ugly)
    message(small(), path)
    torch.save({"arch": ugly, "state_dict": deeper}, path)
    message(small(), path)
    for contents in ({ugly: 3}, {f"{ugly}{number}": state for number in range(9)}, {(ugly,): state}, {3: ugly}):
        torch.save(contents, path)
        assert "contains no state dict, but " in message(small(), path)
    name = ugly[:1000].replace("\n", "\v")  # torch takes minutes for its own message with a name of megabytes
    call = b"\x80\x02c" + name.encode() + b"\n" + name.encode() + b"\n."
    path.write_bytes(archive_of({"x/data.pkl": call, "x/version": b"3\n"}))
    assert "refused, and not executed" in message(small(), path)
    (tmp_path / "w").write_bytes((2**16).to_bytes(8, "little") + b'{"' + ugly.encode()[:60000] + b'": 3')
    message(small(), path)


def test_shape_of_many_dimensions(tmp_path: Path) -> None:
    """A very long shape is shortened in the message."""
    torch.save(small().state_dict() | {"head.fc.bias": torch.ones([1] * 1000)}, tmp_path / "w")
    assert "head.fc.bias is [1, 1, 1" in message(small(), tmp_path / "w")


def test_pickled_model_is_refused(tmp_path: Path) -> None:
    """A torch file with a module instead of a state dict gives an error with the module's class."""
    torch.save(nn.Linear(1, 1), tmp_path / "w")
    assert "refused, and not executed: it would call torch.nn.modules.linear.Linear" in message(small(), tmp_path / "w")


def test_file_without_a_state_dict(tmp_path: Path) -> None:
    """A torch file without a state dict gives an error with its entries."""
    torch.save({"epoch": 3, "step": 4}, tmp_path / "w")
    assert "contains no state dict, but epoch, step" in message(small(), tmp_path / "w")


@pytest.mark.parametrize("layout", ["safetensors", "official"])
def test_other_class_count_is_named(tmp_path: Path, layout: str) -> None:
    """Weights for another number of classes give an error with both numbers and the field to set."""
    WRITERS[layout](small().state_dict(), tmp_path / "w")
    text = message(small(num_classes=6), tmp_path / "w")
    assert text.endswith(": has 5 classes (head.fc.weight), but this model has 6; set num_classes=5")


def test_other_image_size_is_named(tmp_path: Path) -> None:
    """Position-dependent weights for another image size give an error with both sizes and the field to set."""
    for name in ("metaformer_pppa_s12_224", "metaformer_ppaa_s12_224", "metaformer_ppff_s12_224"):
        torch.save(released_state(name, image_size=96), tmp_path / "w")
        text = message(small_released(name, image_size=64), tmp_path / "w")
        assert "is for images of 96 pixels (stages." in text
        assert text.endswith("but this model is for 64; set image_size=96")
        text = message(small_released(name, num_classes=9), tmp_path / "w")
        assert "num_classes=5, and is for images of 96 pixels" in text


def test_other_network_leaves_the_model_unchanged(file: Path) -> None:
    """The error names one missing or unexpected key, and nothing is loaded."""
    deeper = small(depth=2)
    before = deeper.stem.conv.weight.clone()
    text = message(deeper, file)
    assert "weights of a_small_network" in text
    assert "missing stages.2.blocks.1." in text
    assert torch.equal(deeper.stem.conv.weight, before)
    save_weights(deeper, file, "a_deeper_network")
    assert "unexpected stages.2.blocks.1." in message(small(), file)


def test_other_shapes_are_named(tmp_path: Path) -> None:
    """A wider network with the same keys gives an error with the first tensor and both shapes."""
    wider = MetaFormer(Architecture((1, 1, 1, 1), (8, 8, 12, 16), [Pooling] * 4), num_classes=5)
    torch.save(training_checkpoint(wider.state_dict()), tmp_path / "w")
    text = message(small(), tmp_path / "w")
    assert "weights of a_timm_network" in text
    assert "stem.conv.weight is [8, 3, 7, 7], not [4, 3, 7, 7] and " in text


def test_unknown_official_key_is_named(tmp_path: Path) -> None:
    """A file of the paper's program with an unknown key is refused."""
    torch.save(released_state("poolformer_s12") | {"head2.bias": torch.zeros(1)}, tmp_path / "w")
    assert "head2.bias" in message(small_released("poolformer_s12"), tmp_path / "w")


def test_file_without_metadata(tmp_path: Path) -> None:
    """The error for a safetensors file without metadata still describes the difference."""
    save_file({"x": torch.zeros(1)}, tmp_path / "w")
    assert "missing stem.conv.weight and" in message(small(), tmp_path / "w")

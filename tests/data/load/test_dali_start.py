"""Tests of what DALI's loader does at its start for a GPU: how much it preallocates, and whether it decodes equally."""

from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import torch

from metaformer.data.index.image_index import load_index
from metaformer.data.load.config import LoaderConfig
from metaformer.data.load.dali_loader import DaliLoader
from metaformer.data.load.dali_pipeline import MAX_PREALLOCATED, preallocated_size
from metaformer.data.load.image_bytes import ImageBytes
from metaformer.data.load.image_file import StoredImage
from metaformer.errors import UserError
from tests.data.load.test_loaders import read_epoch, same, training_plan

CPU = torch.device("cpu")
GIB = 2**30


@pytest.mark.parametrize("memory", [16 * GIB, 80 * GIB])
@pytest.mark.parametrize("batch_size", [1, 32, 128, 1024])
def test_preallocated_memory_is_bounded(batch_size: int, memory: int) -> None:
    """The hardware decoder's share of a batch takes at most a part of the memory; small batches keep the given size."""
    config = LoaderConfig()
    width, height = preallocated_size(config, batch_size, memory)
    images = np.ceil(batch_size * config.hw_decoder_load)
    assert 3 * width * height * images <= MAX_PREALLOCATED * memory
    assert width / height == pytest.approx(5980 / 6430, abs=0.01)
    if 3 * 5980 * 6430 * images <= MAX_PREALLOCATED * memory:
        assert (width, height) == (5980, 6430)
    else:
        assert 3 * (width + 1) * (height + 1) * images > MAX_PREALLOCATED * memory


def test_nothing_to_preallocate() -> None:
    """Without a hardware decoder, or without a size, there is nothing to bound."""
    assert preallocated_size(LoaderConfig(hw_decoder_load=0.0), 1024, GIB) == (5980, 6430)
    assert preallocated_size(LoaderConfig(preallocate_width=0, preallocate_height=0), 1024, GIB) == (0, 0)


def test_equal_decoding_passes(image_root: Path) -> None:
    """The check passes on a CPU; the epochs after it are those without it."""
    index, plan = load_index(image_root, "train"), training_plan()
    with closing(DaliLoader(index, plan, LoaderConfig(), CPU, threads=1)) as loader:
        loader.check_decoding()
        assert same(list(loader.epoch(0)), read_epoch("dali", index, plan))
        loader.check_decoding()
        assert same(list(loader.epoch(1, 1)), read_epoch("dali", index, plan, epoch=1)[1:])


def test_unequal_decoding_is_refused(image_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An image of the batch that decodes to other pixels the second time is counted, and the error says what to do."""
    index, plan = load_index(image_root, "train"), training_plan()
    sample, seen = int(plan.batch(0, 0).samples[2]), list[int]()
    read = ImageBytes.read

    def read_another(stored: ImageBytes, number: int) -> StoredImage:
        seen.append(number)
        return read(stored, (number + 1) % len(index) if seen.count(sample) == 2 and number == sample else number)

    monkeypatch.setattr(ImageBytes, "read", read_another)
    with (
        closing(DaliLoader(index, plan, LoaderConfig(), CPU, threads=1)) as loader,
        pytest.raises(UserError, match=r"^loader=dali: 1 of 4 images had other pixels .*loader\.check_decoding=false$"),
    ):
        loader.check_decoding()

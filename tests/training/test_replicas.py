"""Test the comparison of weights between ranks."""

from typing import Any

import torch

from metaformer.errors import Diverged
from metaformer.runtime import Runtime
from metaformer.training.replicas import check_replicas, checksum
from tests.ranks import on_ranks
from tests.training.conftest import tiny_network


def compare(runtime: Runtime) -> list[Any]:
    """Return the errors while ranks are equal, after a bit is flipped on the last rank, and after it is restored."""
    found: list[Any] = []
    model = tiny_network()
    weight = model.get_parameter("2.weight")
    model.get_buffer("1.running_mean").fill_(runtime.rank)  # buffers may differ between ranks
    for flip in (0, 1, 1):
        if runtime.rank == runtime.world_size - 1:
            weight.detach().view(torch.int32)[1, 2] ^= flip
        try:
            check_replicas(model, runtime, step=7)
            found.append(None)
        except Diverged as error:
            found.append(str(error))
    return found


def test_one_bit_on_one_rank_is_named_on_all() -> None:
    """Equal weights pass; a flipped lowest bit on one rank is an error on all ranks that names parameter and rank."""
    for found in on_ranks(compare):
        assert found[0] is None
        assert found[1].startswith("step 7: 2.weight on rank 1 is not what it is on rank 0;")
        assert "\n" not in found[1]
        assert found[2] is None


def test_checksum_sees_every_single_change() -> None:
    """Any flipped bit, including the sign of zero, and any two swapped values change the checksum; a copy does not."""
    numbers = torch.randn(5, 7, generator=torch.Generator().manual_seed(0))
    numbers[0, 0] = 0.0
    expected = checksum(numbers)
    assert expected.dtype == torch.int64
    assert expected.shape == ()
    assert checksum(numbers.clone()) == expected
    seen = {int(expected)}
    for place in range(numbers.numel()):
        for bit in range(32):
            other = numbers.clone()
            other.view(-1).view(torch.int32)[place] ^= torch.tensor(1 << bit).to(torch.int32)
            assert checksum(other) != expected
            seen.add(int(checksum(other)))
    assert len(seen) > 0.9 * 32 * numbers.numel()
    for place in range(1, numbers.numel()):
        other = numbers.clone()
        other.view(-1)[[0, place]] = other.view(-1)[[place, 0]]
        assert checksum(other) != expected


def test_checksum_ignores_the_memory_format() -> None:
    """A parameter has the same checksum in channels-last and in contiguous memory format."""
    numbers = torch.randn(4, 3, 5, 5)
    assert checksum(numbers.to(memory_format=torch.channels_last)) == checksum(numbers)

"""Tests of communication among ranks, with gloo between real processes, and of the start of a rank."""

import multiprocessing
import os
import resource
import socket
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from metaformer.errors import UserError
from metaformer.program import keep_freed_memory, run_program
from metaformer.runtime import Process, Runtime, start
from tests.ranks import on_ranks

ALONE = Runtime(0, 1, 0, 1, torch.device("cpu"))
FORK = multiprocessing.get_context("fork")


def vote(runtime: Runtime) -> list[int]:
    """Vote with no, one and two ranks in favour; other communication happens during each vote."""
    found = []
    for value in (False, runtime.rank == 1, True):
        started = runtime.start_vote(value)
        assert [int(other) for other in runtime.gather(torch.tensor(runtime.rank))] == [0, 1]
        assert runtime.sum(torch.ones(1)) == 2
        found.append(started.result())
    return found


def test_votes_are_counted() -> None:
    """Every rank gets the number of ranks that voted yes."""
    assert on_ranks(vote) == [[0, 1, 2]] * 2


def late_vote(runtime: Runtime) -> float:
    """Return how long starting a vote takes while the other rank is late."""
    runtime.sum(torch.ones(1))
    if runtime.rank == 1:
        time.sleep(1)
    began = time.monotonic()
    started = runtime.start_vote(True)
    seconds = time.monotonic() - began
    assert started.result() == 2
    return seconds


def test_starting_a_vote_does_not_wait() -> None:
    """Only `result` waits for the other ranks."""
    assert on_ranks(late_vote)[0] < 0.5


def gather(runtime: Runtime) -> Any:
    """Gather tensors of several dtypes and layouts, and the processes of the ranks."""
    numbers = [
        runtime.gather(torch.full((2, 3), runtime.rank + 0.5, dtype=torch.float64)),
        runtime.gather(torch.tensor(2**62 + runtime.rank)),
        runtime.gather(torch.arange(6).view(2, 3).T + runtime.rank),
    ]
    return (
        [[(tensor.dtype, tensor.tolist()) for tensor in everyone] for everyone in numbers],
        runtime.processes(),
        (os.getpid()),
    )


def test_every_rank_gets_all_tensors_in_order() -> None:
    """Values and dtypes are preserved, for a non-contiguous tensor too; `processes` returns each rank's process."""
    (first, places, pid), (second, same, other) = on_ranks(gather)
    assert first == second
    assert [tensor[1] for tensor in first[0]] == [[[0.5] * 3] * 2, [[1.5] * 3] * 2]
    assert first[1] == [(torch.int64, 2**62), (torch.int64, 2**62 + 1)]
    assert [tensor[1] for tensor in first[2]] == [[[0, 3], [1, 4], [2, 5]], [[1, 4], [2, 5], [3, 6]]]
    assert places == same == [Process(0, socket.gethostname(), pid), Process(0, socket.gethostname(), other)]


def test_one_rank_alone() -> None:
    """A single rank needs no process group."""
    numbers = torch.arange(3)
    assert torch.equal(torch.stack(ALONE.gather(numbers)), numbers[None])
    assert ALONE.processes() == [Process(0, socket.gethostname(), os.getpid())]
    ALONE.check_agreement("anything", "value")


def disagree(runtime: Runtime) -> None:
    """Compare equal values, then different ones."""
    runtime.check_agreement("the weather", "fine")
    runtime.check_agreement("the configuration", f"of rank {runtime.rank}")


def test_ranks_that_differ_are_rejected() -> None:
    """All ranks raise the error, which names the rank and what differs."""
    for error in on_ranks(disagree):
        assert isinstance(error, UserError)
        assert str(error).startswith("rank 1: the configuration differs from rank 0's;")


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"WORLD_SIZE": "x"}, "WORLD_SIZE=x: not a whole number"),
        ({"RANK": "1.5"}, "RANK=1.5: not a whole number"),
        ({"LOCAL_WORLD_SIZE": "two"}, "LOCAL_WORLD_SIZE=two: not a whole number"),
        ({"GROUP_RANK": "a"}, "GROUP_RANK=a: not a whole number"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK=2, WORLD_SIZE=2: ranks count from 0"),
        ({"WORLD_SIZE": "0"}, "RANK=0, WORLD_SIZE=0: ranks count from 0"),
        ({"WORLD_SIZE": "2", "RANK": "0"}, "WORLD_SIZE=2: .* MASTER_ADDR expected"),
        ({"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "x"}, "WORLD_SIZE=2: .*'x'"),
    ],
)
def test_invalid_launcher_variables(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], message: str) -> None:
    """The one-line error names the variable, its value and the fix."""
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=message) as caught, start():
        pass
    assert "start with torchrun" in str(caught.value)
    assert "\n" not in str(caught.value)


def report_bad_rank(folder: Path) -> None:
    """Run a program with RANK=x."""
    sys.stderr = (folder / "stderr").open("w")
    os.environ["RANK"] = "x"

    def program() -> None:
        with start():
            pass

    run_program(program)


def test_an_error_about_the_rank_itself(tmp_path: Path) -> None:
    """An invalid RANK is reported like any other error, although the report itself reads RANK."""
    process = FORK.Process(target=report_bad_rank, args=(tmp_path,))
    process.start()
    process.join()
    assert process.exitcode == 2
    (line,) = (tmp_path / "stderr").read_text().splitlines()
    assert line.startswith("error: RANK=x: not a whole number; start with torchrun")


def average_gradients(runtime: Runtime) -> dict[bool, Tensor]:
    """Average the gradients 1 and 1 + 2^-7 + 2^-20, the last bit of which bfloat16 cannot represent."""
    found = {}
    for in_bf16 in (False, True):
        model = nn.Linear(1, 1, bias=False)
        distributed = runtime.distribute(model, torch.zeros(1, 1), in_bf16)
        distributed(torch.tensor([[1 + runtime.rank * (2**-7 + 2**-20)]])).sum().backward()
        assert model.weight.grad is not None
        found[in_bf16] = model.weight.grad
    return found


def test_gradients_in_bf16() -> None:
    """Gradients are averaged in float32 by default and in bfloat16 on request; the result is float32 on all ranks."""
    first, second = on_ranks(average_gradients)
    exact = torch.tensor([[1 + 2**-8 + 2**-21]])
    assert torch.equal(first[False], exact)
    assert first[True].dtype == torch.float32
    assert torch.equal(first[True], first[True].bfloat16().float())
    assert 0 < (first[True] - exact).abs() < 2**-7
    assert all(torch.equal(first[kind], second[kind]) for kind in first)


def count_page_faults(keep_memory: bool) -> int:
    """Return the page faults of four 64 MiB tensors, each freed, after enough others for glibc's memory to settle."""
    if keep_memory:
        keep_freed_memory()
    for _ in range(40):
        torch.ones(2**24)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(4):
        torch.ones(2**24)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def test_freed_memory_is_kept() -> None:
    """Four tensors of 16,384 pages of 4 KiB (or 32 of 2 MiB) use new pages, or reuse those of earlier tensors."""
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as processes:
        returned, kept = processes.map(count_page_faults, [False, True], chunksize=1)
    assert returned >= 4 * 32
    assert kept < returned / 10


def count_compiled_parts(runtime: Runtime) -> int:
    """Return the number of compiled graphs for three 1 MiB layers, one of which fills DDP's first bucket."""
    parts: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:
        parts.append(graph)
        return graph

    model = nn.Sequential(*(nn.Linear(512, 512) for _ in range(3)))
    model.compile(backend=backend)
    network = runtime.distribute(model, torch.zeros(2, 512))
    assert not parts, "arranging the buckets compiles nothing"
    network(torch.zeros(2, 512)).sum().backward()
    assert next(iter(model.state_dict())) == "0.weight"
    return len(parts)


def test_compiled_networks_send_gradients_while_they_compute() -> None:
    """A network compiled in place is split at DDP's buckets, so that communication overlaps the backward pass."""
    assert on_ranks(count_compiled_parts) == [2, 2]

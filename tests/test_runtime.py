"""Ranks that agree, over gloo between real processes."""

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
    """Nobody, the last, both; other exchanges begin and end while a vote is under way."""
    found = []
    for value in (False, runtime.rank == 1, True):
        started = runtime.start_vote(value)
        assert [int(other) for other in runtime.gather(torch.tensor(runtime.rank))] == [0, 1]
        assert runtime.sum(torch.ones(1)) == 2
        found.append(started.result())
    return found


def test_votes_are_counted() -> None:
    """Every rank gets the number of ranks that said yes."""
    assert on_ranks(vote) == [[0, 1, 2]] * 2


def late_vote(runtime: Runtime) -> float:
    """How long beginning a vote takes while the other rank has not begun."""
    runtime.sum(torch.ones(1))
    if runtime.rank == 1:
        time.sleep(1)
    began = time.monotonic()
    started = runtime.start_vote(True)
    seconds = time.monotonic() - began
    assert started.result() == 2
    return seconds


def test_beginning_a_vote_waits_for_nobody() -> None:
    """It runs beside the step: only its result waits."""
    assert on_ranks(late_vote)[0] < 0.5


def gather(runtime: Runtime) -> Any:
    """Tensors of several kinds, and where the ranks run."""
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
    """Each kind of number as it was, also of a tensor that does not lie in order; and each rank's process."""
    (first, places, pid), (second, same, other) = on_ranks(gather)
    assert first == second
    assert [tensor[1] for tensor in first[0]] == [[[0.5] * 3] * 2, [[1.5] * 3] * 2]
    assert first[1] == [(torch.int64, 2**62), (torch.int64, 2**62 + 1)]
    assert [tensor[1] for tensor in first[2]] == [[[0, 3], [1, 4], [2, 5]], [[1, 4], [2, 5], [3, 6]]]
    assert places == same == [Process(0, socket.gethostname(), pid), Process(0, socket.gethostname(), other)]


def test_one_rank_alone() -> None:
    """No group is needed for what one rank says to itself."""
    numbers = torch.arange(3)
    assert torch.equal(torch.stack(ALONE.gather(numbers)), numbers[None])
    assert ALONE.processes() == [Process(0, socket.gethostname(), os.getpid())]
    ALONE.check_agreement("anything", "value")


def disagree(runtime: Runtime) -> None:
    """Equal first, then not."""
    runtime.check_agreement("the weather", "fine")
    runtime.check_agreement("the configuration", f"of rank {runtime.rank}")


def test_ranks_that_differ_are_refused() -> None:
    """On all of them, with the rank and what differs."""
    for error in on_ranks(disagree):
        assert isinstance(error, UserError)
        assert str(error).startswith("rank 1: the configuration differs from rank 0's;")


@pytest.mark.parametrize(
    ("variables", "said"),
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
def test_variables_that_no_launcher_sets(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], said: str) -> None:
    """One line that names the variable, its value, and what to do."""
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=said) as caught, start():
        pass
    assert "start with torchrun" in str(caught.value)
    assert "\n" not in str(caught.value)


def report_bad_rank(folder: Path) -> None:
    """A program of a rank that is no number."""
    sys.stderr = (folder / "stderr").open("w")
    os.environ["RANK"] = "x"

    def program() -> None:
        with start():
            pass

    run_program(program)


def test_an_error_about_the_rank_itself(tmp_path: Path) -> None:
    """It is reported like any other, though a report begins with asking for the rank."""
    process = FORK.Process(target=report_bad_rank, args=(tmp_path,))
    process.start()
    process.join()
    assert process.exitcode == 2
    (line,) = (tmp_path / "stderr").read_text().splitlines()
    assert line.startswith("error: RANK=x: not a whole number; start with torchrun")


def average_gradients(runtime: Runtime) -> dict[bool, Tensor]:
    """Ranks 0 and 1 have the gradients 1 and 1 + 2^-7 + 2^-20: the last bit is beyond bfloat16's."""
    found = {}
    for in_bf16 in (False, True):
        model = nn.Linear(1, 1, bias=False)
        distributed = runtime.distribute(model, torch.zeros(1, 1), in_bf16)
        distributed(torch.tensor([[1 + runtime.rank * (2**-7 + 2**-20)]])).sum().backward()
        assert model.weight.grad is not None
        found[in_bf16] = model.weight.grad
    return found


def test_gradients_in_bf16() -> None:
    """Averaged in float32 by default, in bfloat16 where that is asked for: equal on all ranks, and float32 again."""
    first, second = on_ranks(average_gradients)
    exact = torch.tensor([[1 + 2**-8 + 2**-21]])
    assert torch.equal(first[False], exact)
    assert first[True].dtype == torch.float32
    assert torch.equal(first[True], first[True].bfloat16().float())
    assert 0 < (first[True] - exact).abs() < 2**-7
    assert all(torch.equal(first[kind], second[kind]) for kind in first)


def count_page_faults(kept: bool) -> int:
    """Of a tensor of 64 MiB, made and freed four times, when what glibc holds has settled: some ten times before."""
    if kept:
        keep_freed_memory()
    for _ in range(40):
        torch.ones(2**24)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(4):
        torch.ones(2**24)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def test_freed_memory_is_kept() -> None:
    """Four tensors of 16,384 pages of 4 KiB (or 32 of 2 MiB): all new, or those of the tensor before them."""
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as processes:
        given_back, kept = processes.map(count_page_faults, [False, True], chunksize=1)
    assert given_back >= 4 * 32
    assert kept < given_back / 10


def count_compiled_parts(runtime: Runtime) -> int:
    """Graphs that the compiler gets of three layers, one MiB each: DDP's first bucket is full after one."""
    parts: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:
        parts.append(graph)
        return graph

    model = nn.Sequential(*(nn.Linear(512, 512) for _ in range(3)))
    model.compile(backend=backend)
    network = runtime.distribute(model, torch.zeros(2, 512))
    assert not parts  # arranging the buckets compiles nothing
    network(torch.zeros(2, 512)).sum().backward()
    assert next(iter(model.state_dict())) == "0.weight"
    return len(parts)


def test_compiled_networks_send_gradients_while_they_compute() -> None:
    """A network compiled in place is cut at DDP's buckets: the last gradients are sent before the first exist."""
    assert on_ranks(count_compiled_parts) == [2, 2]

"""The process group: this rank, its device, and communication among the ranks."""

import os
import socket
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.nn.parallel import DistributedDataParallel

from metaformer.errors import UserError, one_line
from metaformer.files import to_json
from metaformer.program import LAUNCHER_ADVICE, keep_freed_memory, launcher_variable

T = TypeVar("T")


class Process(NamedTuple):
    """The node, host and process id of a rank."""

    node: int
    host: str  # for display only: two nodes may have the same name
    pid: int


class Vote:
    """An asynchronous sum over the ranks."""

    def __init__(self, value: Tensor, work: Any) -> None:
        self._value, self._work = value, work

    def result(self) -> int:
        """Wait for the sum and return it."""
        self._work.wait()
        return int(self._value)


@dataclass(frozen=True)
class Runtime:
    """This rank, its device and its communication with the other ranks.

    Attributes:
        rank, world_size: Rank and number of ranks over all nodes.
        local_rank, local_world_size: Rank and number of ranks on this node.
        device: Device on which this rank computes.
        control: Process group on CPUs, separate from the gradients' communication; None with one rank.
        bound_cpus: CPUs near its GPU that only this rank uses; empty if it shares CPUs with the other local ranks.
        node: The launcher's number for this node.
        pause_watchdog: Returns a context that all ranks enter while they wait for one rank, without a time limit.
    """

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    device: torch.device
    control: dist.ProcessGroup | None = None
    bound_cpus: tuple[int, ...] = ()
    node: int = 0
    pause_watchdog: Callable[[], AbstractContextManager[None]] = nullcontext

    @property
    def is_main(self) -> bool:
        """Whether this rank writes files and prints messages; only rank 0 does."""
        return self.rank == 0

    def cpus_per_rank(self) -> int:
        """Return the number of CPU cores available to this rank, at least 1."""
        return len(self.bound_cpus) or max(1, len(os.sched_getaffinity(0)) // self.local_world_size)

    def peak_memory_gib(self) -> float:
        """Return this rank's peak GPU memory in GiB, or 0 on a CPU."""
        return torch.cuda.max_memory_allocated(self.device) / 2**30 if self.device.type == "cuda" else 0.0

    def sum(self, values: Tensor) -> Tensor:
        """Return the sum of a tensor over all ranks, on every rank."""
        if self.world_size > 1:
            values = values.clone()
            dist.all_reduce(values)
        return values

    def start_vote(self, value: bool) -> Vote:
        """Start to count the ranks on which `value` is true, without synchronizing with a GPU.

        All ranks must start their votes in the same order.
        """
        own = torch.tensor(int(value))
        return Vote(own, dist.all_reduce(own, group=self.control, async_op=True))

    def gather(self, values: Tensor) -> list[Tensor]:
        """Return the tensors of all ranks, on the CPU. They must have the same shape."""
        values = values.cpu()
        if self.world_size == 1:
            return [values]
        everyone = [torch.empty_like(values) for _ in range(self.world_size)]
        dist.all_gather(everyone, values, group=self.control)
        return everyone

    def gather_objects(self, value: T) -> list[T]:
        """Return the values of all ranks in rank order, on every rank."""
        if self.world_size == 1:
            return [value]
        everyone: list[T] = [value] * self.world_size
        dist.all_gather_object(everyone, value)
        return everyone

    def processes(self) -> list[Process]:
        """Return the process of each rank."""
        return self.gather_objects(Process(self.node, socket.gethostname(), os.getpid()))

    def share_buffers(self, model: nn.Module) -> None:
        """Broadcast rank 0's buffers (BatchNorm's running statistics), which checkpoints store, to all ranks."""
        if self.world_size > 1:
            for buffer in model.buffers():
                dist.broadcast(buffer, src=0)

    def from_main(self, make: Callable[[], T]) -> T:
        """Run `make` on rank 0 only and return its result on every rank; a UserError is raised on every rank too.

        While rank 0 works, no rank has a time limit. When its result is there, late ranks have the watchdog's.
        """
        outcome: list[T | UserError | None] = [None]
        if self.is_main:
            with self.pause_watchdog():
                try:
                    outcome[0] = make()
                except UserError as error:
                    outcome[0] = error
        if self.world_size > 1:
            with nullcontext() if self.is_main else self.pause_watchdog():
                dist.broadcast_object_list(outcome, src=0)
        result = outcome[0]
        if isinstance(result, UserError):
            raise result
        return result  # type: ignore[return-value]

    def main_only(self, make: Callable[[], T], otherwise: T) -> T:
        """Run `make` on rank 0 and return its result there. The other ranks wait for it and return `otherwise`."""
        result = otherwise

        def make_and_keep() -> None:
            nonlocal result
            result = make()

        self.from_main(make_and_keep)
        return result

    def main_first(self, make: Callable[[], T]) -> T:
        """Run `make` on rank 0, then on the other ranks, which can use the files that rank 0 wrote."""
        result = self.main_only(make, otherwise=None)
        with self.pause_watchdog():
            if result is None:
                result = make()
            self.gather_objects(None)  # rank 0 waits here for the others' work, without a time limit
        return result

    def print_result(self, result: dict[str, Any]) -> None:
        """Print a result as one line of JSON on stdout, on rank 0 only; numbers that are not finite become null."""
        if self.is_main:
            print(to_json(result), flush=True)

    def without_reduction(self, network: nn.Module) -> AbstractContextManager[None]:
        """Return a context in which DDP does not reduce gradients, for all but the last accumulation step."""
        if isinstance(network, DistributedDataParallel):
            manager: AbstractContextManager[None] = network.no_sync()
            return manager
        return nullcontext()

    def check_agreement(self, name: str, value: str) -> None:
        """Raise an error that names the first rank whose value differs from rank 0's, if there is one."""
        values = self.gather_objects(value)
        for rank, other in enumerate(values):
            if other != values[0]:
                raise UserError(f"rank {rank}: {name} differs from rank 0's; start every rank with the same one")

    def first_fault(self, fault: str | None) -> str | None:
        """Return the first fault of any rank, with its rank, or None. All ranks get the same result."""
        for rank, other in enumerate(self.gather_objects(fault)):
            if other is not None:
                return other if self.world_size == 1 else f"rank {rank}: {other}"
        return None

    def distribute(self, model: nn.Module, example: Tensor, reduce_in_bf16: bool = False) -> nn.Module:
        """Wrap a model in DDP, which averages gradients over the ranks; with one rank, return the model itself.

        A model that was compiled in place is compiled at its first call inside DDP, split at DDP's buckets, so that
        gradients are communicated while others are computed.

        Args:
            example: An input for the model; it leaves the model unchanged.
            reduce_in_bf16: Reduce gradients in bfloat16: half the bytes, and 8 bits of precision.
        """
        if self.world_size == 1:
            return model
        devices = [self.device.index] if self.device.type == "cuda" else None
        distributed = DistributedDataParallel(model, devices, gradient_as_bucket_view=True)
        # Buffers are broadcast before evaluation and saving (`share_buffers`), not at every step. This is not a
        # constructor argument because torch 2.14 renames it, and earlier versions do not know the new name.
        distributed.broadcast_buffers = False
        if reduce_in_bf16:
            distributed.register_comm_hook(None, bf16_compress_hook)
        _arrange_buckets(distributed, example)
        return distributed


@contextmanager
def start(
    timeout: timedelta = timedelta(minutes=30),
    pause_watchdog: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> Iterator[Runtime]:
    """Join torchrun's process group (or run as the only process), and leave it at the end.

    Args:
        timeout: Time limit for joining and for each collective operation.
        pause_watchdog: See `Runtime`.
    """
    world_size, rank = launcher_variable("WORLD_SIZE", 1), launcher_variable("RANK", 0)
    if not 0 <= rank < world_size:
        raise UserError(
            f"RANK={rank}, WORLD_SIZE={world_size}: ranks count from 0 to WORLD_SIZE - 1; {LAUNCHER_ADVICE}"
        )
    local_rank, local_world_size = launcher_variable("LOCAL_RANK", 0), launcher_variable("LOCAL_WORLD_SIZE", 1)
    gpus = torch.cuda.device_count()
    if gpus and local_rank >= gpus:
        raise UserError(f"rank {rank}: {local_world_size} processes on {socket.gethostname()}, which has {gpus} GPUs; "
                        f"start torchrun with --nproc_per_node={gpus}")  # fmt: skip
    device = torch.device("cuda", local_rank) if gpus else torch.device("cpu")
    if gpus:
        torch.cuda.set_device(device)
    else:
        keep_freed_memory()
    control: Any = None
    if world_size > 1:
        _join(device, timeout, single_node=world_size == local_world_size)
        control = dist.new_group(backend="gloo", timeout=timeout)
    node = launcher_variable("GROUP_RANK", rank // local_world_size)
    yield Runtime(
        rank, world_size, local_rank, local_world_size, device, control, node=node, pause_watchdog=pause_watchdog
    )
    if world_size > 1:  # not after an error, when the group may wait for a lost rank
        dist.destroy_process_group()


def _arrange_buckets(distributed: DistributedDataParallel, example: Tensor) -> None:
    """Make DDP arrange its buckets now. It does so once, after the first backward pass, in the gradients' order.

    Otherwise the first step after a resume would sum gradients in another order than an uninterrupted run.
    """
    modes = [(module, module.training) for module in distributed.modules()]
    distributed.eval()  # uses no random numbers and does not update running statistics
    with torch.compiler.set_stance("force_eager"):
        for _ in range(2):  # DDP arranges its buckets at the start of the second pass
            distributed(example).sum().backward()
    distributed.zero_grad(set_to_none=True)
    for module, training in modes:
        module.training = training


def _join(device: torch.device, timeout: timedelta, single_node: bool) -> None:
    try:
        store, rank, world_size = next(dist.rendezvous("env://", timeout=timeout))  # type: ignore[attr-defined]
    except ValueError as error:  # rank 0's address is missing or invalid
        raise UserError(
            f"WORLD_SIZE={launcher_variable('WORLD_SIZE', 1)}: {one_line(error)}; {LAUNCHER_ADVICE}"
        ) from error
    if single_node:
        # All restarts by torchrun share one store, so restarted ranks would find the addresses of dead ranks without a
        # prefix. Not with several nodes, where each torchrun counts its own restarts.
        store = dist.PrefixStore(f"start-{launcher_variable('TORCHELASTIC_RESTART_COUNT', 0)}", store)  # type: ignore[attr-defined]
    on_gpu = device.type == "cuda"
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if on_gpu else "gloo",
        store=store,
        rank=rank,
        world_size=world_size,
        timeout=timeout,
        device_id=device if on_gpu else None,  # NCCL connects now, so its errors appear here and not in a step
    )

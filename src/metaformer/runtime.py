"""The process group: this rank, its device, and how the ranks exchange values, agree, or fail together."""

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

from metaformer.errors import UserError
from metaformer.files import to_json
from metaformer.program import START_RANKS, keep_freed_memory, launcher_variable

T = TypeVar("T")


class Process(NamedTuple):
    """Where a rank runs."""

    node: int
    host: str  # for people: two nodes may have one name
    pid: int


class Vote:
    """A sum over the ranks that is under way while the ranks do something else."""

    def __init__(self, value: Tensor, work: Any) -> None:
        self._value, self._work = value, work

    def result(self) -> int:
        """Wait for it."""
        self._work.wait()
        return int(self._value)


@dataclass(frozen=True)
class Runtime:
    """This process among the others.

    Attributes:
        rank, world_size: over all nodes.
        local_rank, local_world_size: on this node.
        device: where this rank computes.
        control: a group on CPUs, beside the gradients' exchange; None with one rank.
        bound_cpus: CPUs that this rank has for itself, near its GPU; empty where it shares with the other local ranks.
        node: this node's number among the launcher's.
        patience: entered by all ranks while one of them does what the others wait for, as long as it takes.
    """

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    device: torch.device
    control: dist.ProcessGroup | None = None
    bound_cpus: tuple[int, ...] = ()
    node: int = 0
    patience: Callable[[], AbstractContextManager[None]] = nullcontext

    @property
    def is_main(self) -> bool:
        """Whether this rank writes files and talks to the user."""
        return self.rank == 0

    def cpus_per_rank(self) -> int:
        """CPU cores that this rank may count as its own, at least 1."""
        return len(self.bound_cpus) or max(1, len(os.sched_getaffinity(0)) // self.local_world_size)

    def peak_memory_gib(self) -> float:
        """Most GPU memory that this rank has held; 0 on a CPU."""
        return torch.cuda.max_memory_allocated(self.device) / 2**30 if self.device.type == "cuda" else 0.0

    def sum(self, values: Tensor) -> Tensor:
        """The sum of a tensor over all ranks; every rank gets it."""
        if self.world_size > 1:
            values = values.clone()
            dist.all_reduce(values)
        return values

    def start_vote(self, value: bool) -> Vote:
        """Begin to count the ranks for which `value` is true; every rank must begin in the same order. No GPU waits."""
        own = torch.tensor(int(value))
        return Vote(own, dist.all_reduce(own, group=self.control, async_op=True))

    def gather(self, values: Tensor) -> list[Tensor]:
        """Every rank's tensor, on the CPU; all have the same shape."""
        values = values.cpu()
        if self.world_size == 1:
            return [values]
        everyone = [torch.empty_like(values) for _ in range(self.world_size)]
        dist.all_gather(everyone, values, group=self.control)
        return everyone

    def gather_objects(self, value: T) -> list[T]:
        """Every rank's value, in their order; every rank gets them."""
        if self.world_size == 1:
            return [value]
        everyone: list[T] = [value] * self.world_size
        dist.all_gather_object(everyone, value)
        return everyone

    def processes(self) -> list[Process]:
        """Where each rank runs."""
        return self.gather_objects(Process(self.node, socket.gethostname(), os.getpid()))

    def share_buffers(self, model: nn.Module) -> None:
        """Give every rank rank 0's buffers (BatchNorm's running statistics): those that a checkpoint holds."""
        if self.world_size > 1:
            for buffer in model.buffers():
                dist.broadcast(buffer, src=0)

    def from_main(self, make: Callable[[], T]) -> T:
        """Run `make` on rank 0 alone and give its result to every rank; a UserError there is every rank's."""
        with self.patience():
            return self._from_main(make)

    def _from_main(self, make: Callable[[], T]) -> T:
        if self.world_size == 1:
            return make()
        outcome: list[T | UserError | None] = [None]
        if self.is_main:
            try:
                outcome[0] = make()
            except UserError as error:
                outcome[0] = error
        dist.broadcast_object_list(outcome, src=0)
        result = outcome[0]
        if isinstance(result, UserError):
            raise result
        return result  # type: ignore[return-value]

    def main_only(self, make: Callable[[], T], otherwise: T) -> T:
        """Run `make` on rank 0, which keeps its result to itself; the other ranks wait for it and get `otherwise`."""
        result = otherwise

        def make_and_keep() -> None:
            nonlocal result
            result = make()

        self.from_main(make_and_keep)
        return result

    def main_first(self, make: Callable[[], T]) -> T:
        """Run `make` on rank 0, then on the others, which find what it left on disk."""
        result = self.main_only(make, otherwise=None)
        if result is not None:
            return result
        with self.patience():
            return make()

    def print_result(self, result: dict[str, Any]) -> None:
        """Print one JSON object as a line on stdout, once; figures that are not finite are null."""
        if self.is_main:
            print(to_json(result), flush=True)

    def without_reduction(self, network: nn.Module) -> AbstractContextManager[None]:
        """While gradients only accumulate, ranks need not exchange them."""
        if isinstance(network, DistributedDataParallel):
            manager: AbstractContextManager[None] = network.no_sync()
            return manager
        return nullcontext()

    def check_agreement(self, what: str, value: str) -> None:
        """Refuse to go on unless every rank has the same value.

        Raises:
            UserError: names the first rank that differs from rank 0.
        """
        values = self.gather_objects(value)
        for rank, other in enumerate(values):
            if other != values[0]:
                raise UserError(f"rank {rank}: {what} differs from rank 0's; start every rank with the same one")

    def first_fault(self, fault: str | None) -> str | None:
        """The first fault that any rank reports, with the rank; None if none does. Every rank gets the same answer."""
        for rank, other in enumerate(self.gather_objects(fault)):
            if other is not None:
                return other if self.world_size == 1 else f"rank {rank}: {other}"
        return None

    def distribute(self, model: nn.Module, example: Tensor, reduce_in_bf16: bool = False) -> nn.Module:
        """The model whose gradients are averaged over the ranks; with one rank, the model itself.

        A model that was compiled in place is compiled at its first call inside DDP, in parts that end at DDP's buckets:
        gradients are sent while others are computed.

        Args:
            example: an input of the model; the model is as before after it.
            reduce_in_bf16: send and add up the gradients in bfloat16: half the bytes, and 8 bits of precision.
        """
        if self.world_size == 1:
            return model
        devices = [self.device.index] if self.device.type == "cuda" else None
        distributed = DistributedDataParallel(model, devices, gradient_as_bucket_view=True)
        # Buffers are shared when they are read, before evaluation and saving: not at every step. Not as an argument,
        # which torch 2.14 renames and before does not know by the new name.
        distributed.broadcast_buffers = False
        if reduce_in_bf16:
            distributed.register_comm_hook(None, bf16_compress_hook)
        _settle_buckets(distributed, example)
        return distributed


@contextmanager
def start(
    timeout: timedelta = timedelta(minutes=30),
    patience: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> Iterator[Runtime]:
    """Join the processes that torchrun started (or be the only one), and leave them at the end.

    Args:
        patience: see `Runtime`.

    Raises:
        UserError: more ranks on this node than GPUs, or the launcher's variables are not what torchrun sets.
    """
    world_size, rank = launcher_variable("WORLD_SIZE", 1), launcher_variable("RANK", 0)
    if not 0 <= rank < world_size:
        raise UserError(f"RANK={rank}, WORLD_SIZE={world_size}: ranks count from 0 to WORLD_SIZE - 1; {START_RANKS}")
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
    yield Runtime(rank, world_size, local_rank, local_world_size, device, control, node=node, patience=patience)
    if world_size > 1:  # not after an error: a group that lost a rank may wait for it
        dist.destroy_process_group()


def _settle_buckets(distributed: DistributedDataParallel, example: Tensor) -> None:
    """Let DDP arrange its buckets now: it does so after its first backward pass, by the order of the gradients.

    Else a resumed run's first step would add up the ranks' gradients in another order than the run that never stopped.
    """
    modes = [(module, module.training) for module in distributed.modules()]
    distributed.eval()  # draws nothing, and leaves running statistics alone
    with torch.compiler.set_stance("force_eager"):
        for _ in range(2):  # arranged at the beginning of the second
            distributed(example).sum().backward()
    distributed.zero_grad(set_to_none=True)
    for module, training in modes:
        module.training = training


def _join(device: torch.device, timeout: timedelta, single_node: bool) -> None:
    try:
        store, rank, world_size = next(dist.rendezvous("env://", timeout=timeout))  # type: ignore[attr-defined]
    except ValueError as error:  # rank 0's address is missing, or is none
        raise UserError(
            f"WORLD_SIZE={launcher_variable('WORLD_SIZE', 1)}: {' '.join(str(error).split())}; {START_RANKS}"
        ) from error
    if single_node:
        # What torchrun starts again would find the addresses of its dead predecessors: all starts share one store. Not
        # over several nodes: there each torchrun counts its own restarts.
        store = dist.PrefixStore(f"start-{launcher_variable('TORCHELASTIC_RESTART_COUNT', 0)}", store)  # type: ignore[attr-defined]
    on_gpu = device.type == "cuda"
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if on_gpu else "gloo",
        store=store,
        rank=rank,
        world_size=world_size,
        timeout=timeout,
        device_id=device if on_gpu else None,  # NCCL connects now: what is wrong with it shows here, not in a step
    )

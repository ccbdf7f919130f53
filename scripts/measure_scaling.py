"""One number of ranks for benchmark_scaling.py: seconds of a step by each way of exchanging gradients, as JSON.

The network trains on one random batch that each rank keeps, in fp32: no loading, no augmentation. The median of the
rounds over all ways counts; in a round, each way takes its steps after one that does not count.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.nn.parallel import DistributedDataParallel

from metaformer import runtime
from metaformer.models import create_model
from metaformer.program import run_program
from metaformer.runtime import Runtime

Wrap = Callable[[nn.Module], nn.Module]
ALONE, ALL_REDUCE = "no exchange", "all-reduce alone"


def strategies(ranks: Runtime) -> dict[str, Wrap]:
    """How the gradients are exchanged."""
    if ranks.world_size == 1:
        return {ALONE: lambda model: model}

    def bf16(model: nn.Module) -> nn.Module:
        network = DistributedDataParallel(model, gradient_as_bucket_view=True)
        network.register_comm_hook(None, bf16_compress_hook)
        return network

    return {
        ALONE: lambda model: model,
        "as train.py": lambda model: ranks.distribute(model, torch.zeros(2, 3, 64, 64, device=ranks.device)),
        "torch's defaults": DistributedDataParallel,
        "5 MiB buckets": lambda model: DistributedDataParallel(model, bucket_cap_mb=5, gradient_as_bucket_view=True),
        "100 MiB buckets": lambda model: DistributedDataParallel(
            model, bucket_cap_mb=100, gradient_as_bucket_view=True
        ),
        "static graph": lambda model: DistributedDataParallel(model, static_graph=True, gradient_as_bucket_view=True),
        "bf16 gradients": bf16,
    }


def main() -> None:
    """Measure, and print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    for name in ("image-size", "batch", "steps", "rounds"):
        parser.add_argument(f"--{name}", type=int, required=True)
    arguments = parser.parse_args()
    with runtime.start() as ranks:
        seconds: dict[str, list[float]] = {name: [] for name in (*strategies(ranks), ALL_REDUCE)}
        for _ in range(arguments.rounds):
            for name, wrap in strategies(ranks).items():
                torch.manual_seed(0)
                model = create_model(arguments.model, 1000).to(ranks.device)
                network = wrap(model)
                seconds[name].append(_step_seconds(network, ranks, arguments))
            seconds[ALL_REDUCE].append(_exchange_seconds(model, ranks, arguments.steps))
        parameters = sum(p.numel() for p in model.parameters())
        medians = {name: statistics.median(values) for name, values in seconds.items()}
        ranks.print_result({"ranks": ranks.world_size, "parameters": parameters, "seconds": medians})


def _step_seconds(network: nn.Module, ranks: Runtime, arguments: argparse.Namespace) -> float:
    """Mean over the steps."""
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-6, fused=True)
    images = torch.randn(arguments.batch, 3, arguments.image_size, arguments.image_size, device=ranks.device)
    labels = torch.randint(1000, (arguments.batch,), device=ranks.device)
    start = _now(ranks)
    for step in range(arguments.steps + 1):
        if step == 1:
            start = _now(ranks)
        loss = nn.functional.cross_entropy(network(images), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return (_now(ranks) - start) / int(arguments.steps)


def _exchange_seconds(model: nn.Module, ranks: Runtime, repeats: int) -> float:
    """Of a sum over the ranks of as many values as there are gradients."""
    values = torch.zeros(sum(p.numel() for p in model.parameters()), device=ranks.device)
    ranks.sum(values)
    start = _now(ranks)
    for _ in range(repeats):
        ranks.sum(values)
    return (_now(ranks) - start) / repeats


def _now(ranks: Runtime) -> float:
    """When all ranks have come here, and their devices have done all they were told to."""
    ranks.sum(torch.zeros(1, device=ranks.device)).item()
    return time.perf_counter()


if __name__ == "__main__":
    run_program(main)

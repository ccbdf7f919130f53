"""Measure one number of ranks for scaling.py: the seconds of a step with each way of exchanging gradients.

In every round, each strategy takes an uncounted step and then the counted ones. Prints the medians over the rounds as
a JSON object.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.nn.parallel import DistributedDataParallel

from benchmarks.learner import CLASSES, make_learner, random_batches
from metaformer import runtime
from metaformer.models import create_model
from metaformer.program import run_program
from metaformer.runtime import Runtime
from metaformer.training.step import train_step

Wrap = Callable[[nn.Module], nn.Module]
NO_EXCHANGE, ALL_REDUCE = "no exchange", "all-reduce alone"


def strategies(ranks: Runtime) -> dict[str, Wrap]:
    """Return the ways of exchanging gradients, by name."""
    if ranks.world_size == 1:
        return {NO_EXCHANGE: lambda model: model}

    def bf16(model: nn.Module) -> nn.Module:
        network = DistributedDataParallel(model, gradient_as_bucket_view=True)
        network.register_comm_hook(None, bf16_compress_hook)
        return network

    return {
        NO_EXCHANGE: lambda model: model,
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
                model = create_model(arguments.model, CLASSES).to(ranks.device)
                seconds[name].append(_step_seconds(model, wrap(model), ranks, arguments))
            seconds[ALL_REDUCE].append(_exchange_seconds(model, ranks, arguments.steps))
        parameters = sum(p.numel() for p in model.parameters())
        medians = {name: statistics.median(values) for name, values in seconds.items()}
        ranks.print_result({"ranks": ranks.world_size, "parameters": parameters, "seconds": medians})


def _step_seconds(model: nn.Module, network: nn.Module, ranks: Runtime, arguments: argparse.Namespace) -> float:
    """Return the mean over the steps."""
    learner = make_learner(model, ranks, network=network)
    batches = random_batches(arguments.batch, arguments.image_size, ranks.device)
    train_step(learner, batches)
    start = _now(ranks)
    for _ in range(arguments.steps):
        train_step(learner, batches)
    return (_now(ranks) - start) / int(arguments.steps)


def _exchange_seconds(model: nn.Module, ranks: Runtime, repeats: int) -> float:
    """Return the time of a sum over the ranks of as many values as there are gradients."""
    values = torch.zeros(sum(p.numel() for p in model.parameters()), device=ranks.device)
    ranks.sum(values)
    start = _now(ranks)
    for _ in range(repeats):
        ranks.sum(values)
    return (_now(ranks) - start) / repeats


def _now(ranks: Runtime) -> float:
    """Wait until all ranks have arrived here and their devices have finished, and return the time."""
    ranks.sum(torch.zeros(1, device=ranks.device)).item()
    return time.perf_counter()


if __name__ == "__main__":
    run_program(main)

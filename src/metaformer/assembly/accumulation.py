"""Resolves accumulation_steps=auto to the smallest number of accumulation steps that fits in memory."""

from collections.abc import Callable
from dataclasses import replace

import torch

from metaformer.assembly.parts import example_images
from metaformer.assembly.preparation import Preparation, prepare_training
from metaformer.config import TrainConfig
from metaformer.errors import UserError
from metaformer.interfaces import Batch
from metaformer.runtime import Runtime
from metaformer.tracking.run_folder import parse_config
from metaformer.training.config import AUTO
from metaformer.training.memory import fits

# Returns whether training with a number of accumulation steps fits in this rank's memory.
Fits = Callable[[Preparation, int], bool]


def step_fits(prepared: Preparation, accumulation_steps: int) -> bool:
    """Take an optimizer step, which changes the state, and return whether it fits in this rank's memory."""
    config, runtime = prepared.config, prepared.runtime
    learner = prepared.learner(prepared.state.model)  # without DDP, each rank works independently
    learner.accumulation_steps = min(accumulation_steps, 2)  # further batches need no more memory
    learner.train_mode()
    images = example_images(config, prepared.images, runtime)
    classes = prepared.splits.num_classes
    targets = torch.full((len(images), classes), 1 / classes, device=runtime.device)
    return fits(learner, Batch(images, targets), config.global_batch_size // runtime.world_size // accumulation_steps)


def prepare(config: TrainConfig, runtime: Runtime, tries: Fits | None = None) -> Preparation:
    """Prepare a training, with accumulation_steps=auto resolved. A resumed run keeps its number.

    Args:
        tries: Tries a number of steps. None tries `step_fits` on GPUs, and nothing on a CPU.
    """
    if config.accumulation_steps != AUTO:
        return prepare_training(config, runtime)
    recorded = runtime.from_main(lambda: _accumulation_of_run(config))
    if recorded is not None:
        number, reason = recorded, "as the run began"
    else:
        tries = step_fits if tries is None and runtime.device.type == "cuda" else tries
        number = _smallest(config, runtime, tries)
        reason = "the smallest; nothing is tried on a CPU" if tries is None else "the smallest that fits in memory"
    prepared = prepare_training(replace(config, accumulation_steps=number), runtime)
    return replace(prepared, choices=[f"accumulation {number}, {reason} (auto)"])


def _smallest(config: TrainConfig, runtime: Runtime, tries: Fits | None) -> int:
    choices = config.accumulations(runtime.world_size) or [1]  # with 1, `check_batches` explains the error
    if tries is None:
        return choices[0]
    prepared = prepare_training(replace(config, accumulation_steps=choices[0]), runtime)
    for number in choices:
        if all(runtime.gather_objects(tries(prepared, number))):
            return number
    raise UserError(
        f"accumulation_steps=auto: not even {choices[-1]} steps fit in memory; use a smaller image_size or network"
    )


def _accumulation_of_run(config: TrainConfig) -> int | None:
    """Return the number in the run folder's configuration if there are checkpoints to resume from."""
    run_dir = config.resolved_run_dir
    file = run_dir / "config.yaml"
    if config.resume == "never" or not (run_dir / "checkpoints").is_dir() or not file.is_file():
        return None
    try:
        number = parse_config(file.read_bytes()).get("accumulation_steps")
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: cannot be read ({error}); give accumulation_steps=N") from error
    return number if isinstance(number, int) else None

"""What validate.py runs."""

import math
import sys
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from metaformer.assembly.parts import (
    LocatedWeights,
    evaluation_feed,
    locate_weights,
    make_model,
    open_index,
    prepare_workers,
)
from metaformer.assembly.preprocessing import adopt, adopt_parts, differences, find_run, resolve
from metaformer.config import ValidateConfig, fingerprint
from metaformer.data.feed import Feed
from metaformer.data.index.config import Labels
from metaformer.data.index.image_index import ImageIndex, check_same_classes
from metaformer.data.index.labels import class_counts, incompleteness, subset_mask
from metaformer.errors import Diverged, UserError, warn
from metaformer.evaluation.accuracy import evaluate
from metaformer.evaluation.results import append_result, check_results
from metaformer.evaluation.scoring import Scoring
from metaformer.models import load_weights
from metaformer.numa import keep_near_gpu
from metaformer.runtime import Runtime
from metaformer.training.checkpoint import EMA_FILE, MODEL_FILE
from metaformer.training.precision import Precision


@contextmanager
def validation(config: ValidateConfig, runtime: Runtime) -> Iterator[Callable[[], dict[str, Any]]]:
    """A function that evaluates, prints the result as validate.py's last line, then writes the results file.

    Raises:
        UserError: something that the user gave cannot work, the results file included: nothing is evaluated then.
        Diverged: the network's outputs are not numbers. The result is printed all the same, with null for what could
            not be measured, and has no row in the results file.
    """
    checkpoint = config.checkpoint
    assert checkpoint is not None
    trained = runtime.from_main(partial(find_run, checkpoint))
    notes = [] if trained is None else list(differences(config, trained))
    config, images = resolve(config if trained is None else adopt(config, trained), checkpoint, evaluation=True)
    runtime.check_agreement("the configuration", fingerprint(config))
    results = None if config.results_csv is None else Path(config.results_csv)
    if results is not None:
        runtime.main_only(partial(check_results, results), None)
    runtime = keep_near_gpu(runtime) if config.loader.numa_affinity else runtime
    prepare_workers(config, runtime)
    precision = Precision(config.precision, runtime.device)
    weights = runtime.from_main(partial(locate_weights, "checkpoint", checkpoint, config.use_ema))
    config = runtime.from_main(partial(adopt_parts, config, weights.path))
    index = _evaluation_index(config, runtime)
    classes = config.num_classes or len(index.classes)
    model, fused = make_model(config, images, classes, runtime, precision.dtype)
    load_weights(model, weights.path, weights.use_ema)
    notes += [f"images       {images}", f"weights      {weights.name}{_average_beside(weights)}"]
    runtime.main_only(lambda: print(*notes, sep="\n", file=sys.stderr, flush=True), None)
    scoring = _scoring(config, index, runtime.device)

    def run(feed: Feed) -> dict[str, Any]:
        """Evaluate, print, append to the results file if there is one, and return what is printed."""
        accuracy = evaluate(model, feed, precision, runtime, scoring)
        scored = {**accuracy.as_dict(), **class_counts(index, config.data)}
        if config.data.quarantine is not None:
            scored["quarantined"] = index.quarantined
        settings = {name.removeprefix("model."): value for name, value in images.settings.items()}
        names = {"model": config.model.name, "data": config.data.name}
        result = {**names, **scored, **settings, "checkpoint": weights.name, "fused": fused}
        if not math.isfinite(accuracy.loss):
            runtime.print_result(result | {"top1": None, "top5": None, "loss": None})
            raise Diverged(
                f"checkpoint={weights.name}: the loss is {accuracy.loss}: {_why_not_finite(model, precision)}"
            )
        runtime.print_result(result)  # first: a disk that refuses the file takes no result away
        if results is not None:
            row: dict[str, str | int | float] = {
                "model": config.model.name,
                "img_size": images.image_size,
                "top1": accuracy.top1,
                "top5": accuracy.top5,
                "param_count": sum(p.numel() for p in model.parameters()),
                "crop_pct": images.crop_pct,
                "interpolation": images.interpolation.value,
                "mean": " ".join(map(str, images.mean)),
                "std": " ".join(map(str, images.std)),
                "images": accuracy.images,
                "data": config.data.name,
                "checkpoint": weights.name,
            }
            runtime.main_only(partial(append_result, results, row), None)
        return result

    with closing(evaluation_feed(config, images, runtime, index)) as feed:
        yield partial(run, feed)


def _why_not_finite(model: nn.Module, precision: Precision) -> str:
    """Why a network's outputs are not finite, and what to do."""
    for name, tensor in model.state_dict().items():
        if not tensor.isfinite().all():
            return f"{name} holds numbers that are not finite; give weights from before training diverged"
    mend = "give other weights" if precision.dtype is None else "use precision=fp32"
    return f"the weights are finite, but what the network computes overflows; {mend}"


def _average_beside(weights: LocatedWeights) -> str:
    """Say that a checkpoint has averaged weights too, where these were not asked for."""
    beside = weights.path.name == MODEL_FILE and (weights.path.parent / EMA_FILE).is_file()
    return f"; the averaged weights are in {EMA_FILE}: use_ema=true" if beside else ""


def _evaluation_index(config: ValidateConfig, runtime: Runtime) -> ImageIndex:
    """The images to evaluate on; the training split need not be there."""
    index = open_index(config, runtime, config.data.val_split)
    if config.num_classes is not None and config.num_classes != len(index.classes):
        _check_num_classes(config.num_classes, config, runtime, index)
    if config.data.quarantine is not None:
        left_out = f"data.quarantine={config.data.quarantine}: {index.quarantined:,} images left out"
        runtime.main_only(lambda: print(left_out, file=sys.stderr, flush=True), None)
    runtime.main_only(
        lambda: print("".join(f"data         {note}\n" for note in index.notes), end="", file=sys.stderr), None
    )
    warning = incompleteness(index, config.data)
    if warning is not None:
        runtime.main_only(lambda: warn(warning), None)
    return index


def _check_num_classes(num_classes: int, config: ValidateConfig, runtime: Runtime, index: ImageIndex) -> None:
    """Labels by folder fit a network of more classes only if the training split, where it is, has the same folders."""
    data = config.data
    by_folder = data.labels is Labels.folders and data.train_split is not None
    if by_folder and (Path(data.root) / str(data.train_split)).is_dir() and num_classes > len(index.classes):
        check_same_classes(open_index(config, runtime, str(data.train_split)), index)
        return
    what = f"{len(index.classes)} class folders" if by_folder else "labels of ImageNet-1K's 1000 classes"
    mend = ", or, where some of ImageNet's folders are missing, give data.labels=wnids" if by_folder else ""
    raise UserError(f"num_classes={num_classes}: {index.folder} has {what}; leave it null{mend}")


def _scoring(config: ValidateConfig, index: ImageIndex, device: torch.device) -> Scoring:
    subset = config.data.class_subset
    return Scoring(
        class_mask=None if subset is None else torch.from_numpy(subset_mask(subset)).to(device),
        label_sets=None if index.label_sets is None else torch.from_numpy(index.label_sets).to(device),
    )

"""Builds and runs an evaluation from its configuration."""

import itertools
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from metaformer.assembly.adoption import adopt_weights
from metaformer.assembly.parts import (
    LocatedWeights,
    check_data_folder,
    evaluation_feed,
    make_model,
    open_index,
    prepare_workers,
)
from metaformer.assembly.preprocessing import resolve_config
from metaformer.config import ValidateConfig, fingerprint
from metaformer.data.feed import Feed
from metaformer.data.index.config import Labels, MatchClasses
from metaformer.data.index.image_index import ImageIndex, check_same_classes
from metaformer.data.index.labels import class_counts, data_set_name, incompleteness, match_by_name, subset_mask
from metaformer.errors import Diverged, UserError, warn
from metaformer.evaluation.accuracy import Accuracy, evaluate, ignore
from metaformer.evaluation.class_counts import ClassCounts, ClassTotals
from metaformer.evaluation.class_files import write_per_class
from metaformer.evaluation.results import append_result, check_results
from metaformer.evaluation.scoring import Scoring
from metaformer.files import check_output
from metaformer.goodput import VALIDATING
from metaformer.models import load_weights
from metaformer.models.config import Preprocessing
from metaformer.models.record import Record
from metaformer.numa import keep_near_gpu
from metaformer.runtime import Runtime
from metaformer.tracking.progress_bar import ProgressBar, terminal_console
from metaformer.training.checkpoint import EMA_FILE, MODEL_FILE
from metaformer.training.precision import Precision


@contextmanager
def build_validation(config: ValidateConfig, runtime: Runtime) -> Iterator[Callable[[], dict[str, Any]]]:
    """Yield a function that evaluates, prints the result as validate.py's last line, and writes the requested files.

    All inputs and output files are checked before the evaluation.
    """
    checkpoint = config.checkpoint
    assert checkpoint is not None
    if config.results_csv is not None:
        runtime.main_only(partial(check_results, Path(config.results_csv)), None)
    if config.per_class_csv is not None:
        option = f"per_class_csv={config.per_class_csv}"
        runtime.main_only(partial(check_output, option, Path(config.per_class_csv)), None)
    check_data_folder(config, runtime, config.data.val_split)
    config, notes, weights, record = adopt_weights(config, "checkpoint", checkpoint, config.use_ema, runtime)
    config, images = resolve_config(config, checkpoint, evaluation=True)
    runtime.check_agreement("the configuration", fingerprint(config))
    runtime = keep_near_gpu(runtime) if config.loader.numa_affinity else runtime
    prepare_workers(config, runtime)
    precision = Precision(config.precision, runtime.device)
    index = _evaluation_index(config, runtime, record)
    by_name = record is not None and record.classes == index.classes
    outputs = config.num_classes or (record.num_classes if record and by_name else None) or len(index.classes)
    model, fused = make_model(config, images, outputs, runtime, precision.dtype)
    load_weights(model, weights.path, weights.use_ema)
    _note(runtime, *notes, *images.lines, *weights_lines(weights))
    with closing(evaluation_feed(config, images, runtime, index)) as feed:
        yield Evaluation(
            config=config, images=images, runtime=runtime, precision=precision, index=index, outputs=outputs,
            model=model, fused=fused, weights=weights.name, feed=feed,
        ).run  # fmt: skip


@dataclass(kw_only=True)
class Evaluation:
    """A network and the images to evaluate it on.

    Attributes:
        outputs: Number of the network's outputs.
        fused: The status text of the fused operators.
        weights: Name of the weights in results.
        feed: This rank's batches.
    """

    config: ValidateConfig
    images: Preprocessing
    runtime: Runtime
    precision: Precision
    index: ImageIndex
    outputs: int
    model: nn.Module
    fused: str
    weights: str
    feed: Feed

    def run(self) -> dict[str, Any]:
        """Evaluate, print the result, write the requested files, and return the result.

        Raises:
            Diverged: The loss is not finite. The result is still printed, with null for top1, top5 and loss, but no
                file is written.
        """
        config, runtime = self.config, self.runtime
        by_class = ClassCounts(self.outputs, runtime.device)
        observe = by_class.add if config.per_class_csv is not None else ignore
        scoring = _scoring(config, self.index, runtime.device)
        with _progress(self.feed, runtime) as report:
            accuracy = evaluate(self.model, self.feed, self.precision, runtime, scoring, report, observe)
        result = self._result(accuracy)
        if not math.isfinite(accuracy.loss):
            runtime.print_result(result | {"top1": None, "top5": None, "loss": None})
            reason = why_not_finite(self.model, self.precision)
            raise Diverged(f"checkpoint={self.weights}: the loss is {accuracy.loss}: {reason}")
        runtime.print_result(result)  # before the files, so that a full disk does not lose the result
        if config.results_csv is not None:
            row = _describe_images(self.images)
            row |= {name: result[name] for name in ("model", "data", "top1", "top5", "images", "checkpoint")}
            row |= {"param_count": sum(parameter.numel() for parameter in self.model.parameters())}
            runtime.main_only(partial(append_result, Path(config.results_csv), row), None)
        if config.per_class_csv is not None:
            file, totals = Path(config.per_class_csv), by_class.total(runtime)
            runtime.main_only(partial(_write_per_class, file, self.index.classes, totals), None)
        return result

    def _result(self, accuracy: Accuracy) -> dict[str, Any]:
        """Return the figures of an evaluation, with what was evaluated and how."""
        data = self.config.data
        names = {"model": self.config.model.name, "data": data_set_name(self.index, data)}
        quarantined = {} if data.quarantine is None else {"quarantined": self.index.quarantined}
        settings = {name.removeprefix("model."): value for name, value in self.images.settings.items()}
        figures = accuracy.as_dict() | class_counts(self.index, data) | quarantined
        return names | figures | settings | {"checkpoint": self.weights, "fused": self.fused}


def _describe_images(images: Preprocessing) -> dict[str, Any]:
    """Return the preprocessing as cells of a results file."""
    return {
        "img_size": images.image_size,
        "crop_pct": images.crop_pct,
        "interpolation": images.interpolation.value,
        "mean": " ".join(map(str, images.mean)),
        "std": " ".join(map(str, images.std)),
    }


@contextmanager
def _progress(feed: Feed, runtime: Runtime) -> Iterator[Callable[[], bool]]:
    """Yield a function to call before each batch; it updates a bar on rank 0's stderr, if that is a terminal."""
    bar, batches = ProgressBar(terminal_console(stderr=True)), itertools.count()

    def report() -> bool:
        if runtime.is_main:
            done = next(batches)
            bar.show(VALIDATING, done, feed.rounds_per_epoch, f"{done}/{feed.rounds_per_epoch}")
        return False

    try:
        yield report
    finally:
        bar.close()


def _write_per_class(file: Path, classes: tuple[str, ...], totals: ClassTotals) -> None:
    try:
        write_per_class(file, classes, totals)
    except OSError as error:
        raise UserError(f"per_class_csv={file}: cannot be written ({error.strerror or error})") from error


def why_not_finite(model: nn.Module, precision: Precision) -> str:
    """Explain why a network's outputs are not finite, and how to fix it."""
    for name, tensor in model.state_dict().items():
        if not tensor.isfinite().all():
            return f"{name} has values that are not finite; use weights from before training diverged"
    fix = "use other weights" if precision.dtype is None else "use precision=fp32"
    return f"the weights are finite, but the computation overflows; {fix}"


def weights_lines(weights: LocatedWeights) -> Iterator[str]:
    """Yield the name of the weights, and a hint if their checkpoint also has averaged ones."""
    yield f"weights      {weights.name}"
    if weights.path.name == MODEL_FILE and (weights.path.parent / EMA_FILE).is_file():
        yield f"weights      use_ema=true takes the averaged ones in {EMA_FILE}"


def _note(runtime: Runtime, *lines: str) -> None:
    """Print lines on rank 0's stderr, because stdout has only the result."""
    text = "".join(f"{line}\n" for line in lines)
    runtime.main_only(lambda: print(text, end="", file=sys.stderr, flush=True), None)


def _evaluation_index(config: ValidateConfig, runtime: Runtime, record: Record | None) -> ImageIndex:
    """Open the images to evaluate on, with the labels of the weights. The training split may be missing."""
    index = open_index(config, runtime, config.data.val_split)
    if record is not None and record.classes is not None and config.match_classes is MatchClasses.name:
        folders = len(index.classes)
        index = match_by_name(index, record.classes, str(config.checkpoint))
        if folders != len(index.classes):
            _note(runtime, f"classes      {folders} of the {len(index.classes)} that the weights know have images")
    elif config.num_classes is not None and config.num_classes != len(index.classes):
        _check_num_classes(config.num_classes, config, runtime, index)
    if config.data.quarantine is not None:
        _note(runtime, f"data.quarantine={config.data.quarantine}: {index.quarantined:,} images excluded")
    _note(runtime, *(f"data         {note}" for note in index.notes))
    warning = incompleteness(index, config.data)
    if warning is not None:
        runtime.main_only(lambda: warn(warning), None)
    return index


def _check_num_classes(num_classes: int, config: ValidateConfig, runtime: Runtime, index: ImageIndex) -> None:
    """Raise an error unless the labels are right for a network with `num_classes` classes.

    With more classes than folders, they are right only if the training split exists and has the same class folders.
    """
    data = config.data
    by_folder = data.labels is Labels.folders and data.train_split is not None
    if by_folder and (Path(data.root) / str(data.train_split)).is_dir() and num_classes > len(index.classes):
        check_same_classes(open_index(config, runtime, str(data.train_split)), index)
        return
    found = f"{len(index.classes)} class folders" if by_folder else "labels of ImageNet-1K's 1000 classes"
    fix = ", or give data.labels=wnids if some of ImageNet's folders are missing" if by_folder else ""
    raise UserError(f"num_classes={num_classes}: {index.folder} has {found}; leave it null{fix}")


def _scoring(config: ValidateConfig, index: ImageIndex, device: torch.device) -> Scoring:
    subset = config.data.class_subset
    return Scoring(
        class_mask=None if subset is None else torch.from_numpy(subset_mask(subset)).to(device),
        label_sets=None if index.label_sets is None else torch.from_numpy(index.label_sets).to(device),
    )

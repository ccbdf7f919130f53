"""Suggests what to write instead of an option that does not exist, such as one of another framework."""

import dataclasses
import difflib
from collections.abc import Iterator
from typing import Any

from metaformer.config import TrainConfig

# Options of timm, torchvision, Ultralytics and Lightning, with the fields or groups that have the same meaning. Those
# that the program has are suggested. A field of a group, such as weight_decay, is found by its name without an entry.
FIELDS = {
    **dict.fromkeys(("learning_rate", "lr0"), ("optimizer.lr",)),
    **dict.fromkeys(("batch_size", "batch", "bs", "b"), ("global_batch_size", "eval_batch_size")),
    **dict.fromkeys(("validation_batch_size", "val_batch_size"), ("eval_batch_size",)),
    **dict.fromkeys(("max_epochs", "num_epochs"), ("epochs",)),
    **dict.fromkeys(("wd", "l2"), ("optimizer.weight_decay",)),
    **dict.fromkeys(("opt", "optim"), ("optimizer",)),
    **dict.fromkeys(("sched", "scheduler", "lr_scheduler", "cos_lr"), ("schedule",)),
    **dict.fromkeys(("data_dir", "data_path", "dataset", "dataset_path", "root", "path"), ("data.root",)),
    **dict.fromkeys(("arch", "architecture", "backbone", "net", "network"), ("model",)),
    **dict.fromkeys(("imgsz", "img_size", "img", "input_size", "resolution", "train_crop_size"), ("image_size",)),
    **dict.fromkeys(("nc", "classes"), ("num_classes",)),
    **dict.fromkeys(("num_workers", "j"), ("workers",)),
    **dict.fromkeys(("output", "output_dir", "save_dir", "log_dir", "experiment_name"), ("run_dir",)),
    **dict.fromkeys(("initial_checkpoint", "weights", "init"), ("init_weights", "checkpoint")),
    **dict.fromkeys(("ckpt", "ckpt_path"), ("resume", "init_weights", "checkpoint")),
    **dict.fromkeys(("grad_accum_steps", "accumulate_grad_batches"), ("accumulation_steps",)),
    **dict.fromkeys(("clip_grad", "gradient_clip_val"), ("clip_grad_norm",)),
    **dict.fromkeys(("log_interval", "log_every_n_steps", "print_freq"), ("log_every_steps",)),
    **dict.fromkeys(("smoothing", "label_smooth"), ("augmentation.label_smoothing",)),
    **dict.fromkeys(("reprob", "random_erase", "erasing"), ("augmentation.erase_probability",)),
    **dict.fromkeys(("aa", "auto_augment", "randaug"), ("augmentation", "augmentation.randaugment.magnitude")),
    **dict.fromkeys(("drop_path", "drop_path_prob"), ("model.drop_path_rate",)),
    **dict.fromkeys(("warmup", "lr_warmup_epochs"), ("schedule.warmup_epochs",)),
    **dict.fromkeys(("model_ema", "model_ema_decay", "ema_decay"), ("ema", "ema.decay")),
    "mixup": ("augmentation.mixup_alpha",),
    "cutmix": ("augmentation.cutmix_alpha",),
    "hflip": ("augmentation.flip_probability",),
    "log_wandb": ("tracking",),
    "model_name": ("model",),
    "torchcompile": ("compile",),
}
ADVICE = {
    "pretrained": "give init_weights=NAME to train.py or checkpoint=NAME to validate.py, as in official:poolformer_s12 "
    "or hf:timm/resnet50.a1_in1k",
    **dict.fromkeys(
        ("device", "accelerator", "cpu", "no_cuda"),
        "each rank uses its GPU, or the CPU where there is none; CUDA_VISIBLE_DEVICES selects or hides GPUs",
    ),
    **dict.fromkeys(
        ("gpus", "gpu", "ngpus", "num_gpus", "devices", "nproc_per_node", "world_size"),
        "start a process for each GPU: torchrun --nproc_per_node=N train.py ...",
    ),
    **dict.fromkeys(
        ("amp", "fp16", "half", "bf16", "mixed_precision", "use_amp"),
        "use precision=bf16, precision=fp16 or precision=fp32",
    ),
    **dict.fromkeys(("evaluate", "eval", "test_only", "val"), "evaluate with validate.py checkpoint=..."),
    "experiment": "use experiment=NAME, one of the recipes that --help lists",
    **dict.fromkeys(("distributed", "dist_url", "sync_bn", "strategy"), "torchrun sets up the ranks; leave it out"),
}
_MOST_LISTED = 12  # number of suggested fields; a longer list would hide the one that was meant


def advice(name: str, config_type: type) -> str:
    """Return what to write instead of `name`, such as "use optimizer.lr=...".

    Args:
        name: The option, with the names of the fields around it, as in "optimizer.rate".
        config_type: The dataclass of the program's configuration.
    """
    fields = list(field_names(config_type))
    parent, _, leaf = name.rpartition(".")
    if leaf in ADVICE:
        return ADVICE[leaf]
    if name in fields:  # written as a flag
        return f"use {'data.root' if name == 'data' else name}=..."
    meant = [field for field in FIELDS.get(leaf, ()) if field in fields] or _with_leaves(fields, [leaf])
    if 0 < len(meant) <= 2:
        return f"use {' or '.join(f'{field}=...' for field in meant)}"
    beside = [field for field in fields if field.rpartition(".")[0] == parent]
    near = (
        meant
        or _with_leaves(beside, _near_leaves(leaf, beside, cutoff=0.6))
        or _with_leaves(fields, _near_leaves(leaf, fields, cutoff=0.7))
    )
    if near:
        return f"did you mean {', '.join(near[:3])}?"
    if parent and 0 < len(beside) <= _MOST_LISTED:
        return f"its fields are {', '.join(beside)}"
    if config_type is not TrainConfig and _with_leaves(list(field_names(TrainConfig)), [leaf]):
        return "only train.py has it"
    return "--help lists all fields"


def _leaf(field: str) -> str:
    return field.rpartition(".")[2]


def _with_leaves(fields: list[str], leaves: list[str]) -> list[str]:
    return [field for leaf in leaves for field in fields if _leaf(field) == leaf]


def _near_leaves(leaf: str, fields: list[str], cutoff: float) -> list[str]:
    return difflib.get_close_matches(leaf, sorted({_leaf(field) for field in fields}), n=3, cutoff=cutoff)


def field_names(config_type: type, parent: str = "") -> Iterator[str]:
    """Yield the full names of all fields; a group comes before its own fields."""
    for field in dataclasses.fields(config_type):
        kind: Any = field.type
        if not field.metadata.get("omegaconf_ignore"):
            yield parent + field.name
            if dataclasses.is_dataclass(kind):
                yield from field_names(kind, f"{parent}{field.name}.")  # type: ignore[arg-type]

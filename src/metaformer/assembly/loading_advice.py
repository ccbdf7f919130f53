"""Suggests options that make loading faster, for each stage that training may wait for."""

from metaformer.assembly.parts import loader_name, worker_count
from metaformer.config import TrainConfig
from metaformer.data.index.image_index import ImageIndex
from metaformer.data.load.config import LoaderName
from metaformer.runtime import Runtime


def loading_advice(config: TrainConfig, runtime: Runtime, images: ImageIndex) -> dict[str, str]:
    """Return suggestions for the current settings by stage, for the fields of `interfaces.Waiting`."""
    stages = {"read": _read, "decode": _decode, "augment": _augment, "copy": _copy}
    return {stage: ", or ".join(options(config, runtime, images)) for stage, options in stages.items()}


def _read(config: TrainConfig, runtime: Runtime, images: ImageIndex) -> list[str]:
    options = ["copy the data to a faster disk"]
    if images.shards is None:
        options.insert(0, "pack the images (prepare_data.py folder --format shards)")
    elif images.shards.pixels is not None:
        options.insert(0, "use shards of JPEGs, which are several times smaller (--format shards)")
    if loader_name(config, runtime) is not LoaderName.dali:
        options.insert(0, f"raise workers (now {worker_count(config, runtime)}; readers that wait need no CPU core)")
    return options


def _decode(config: TrainConfig, runtime: Runtime, images: ImageIndex) -> list[str]:
    options = _use_all_cores(config, runtime) + _use_fastest_loader(config, runtime, "decodes")
    if images.shards is None or images.shards.pixels is None:
        options.append("decode the images once (prepare_data.py folder --format pixels)")
    return options or ["use more CPU cores per rank"]


def _augment(config: TrainConfig, runtime: Runtime, images: ImageIndex) -> list[str]:
    options = _use_all_cores(config, runtime) + _use_fastest_loader(config, runtime, "augments")
    if config.augmentation.randaugment.num_ops:
        options.append("use augmentation=light, which is another recipe")
    return options or ["use more CPU cores per rank"]


def _copy(config: TrainConfig, runtime: Runtime, images: ImageIndex) -> list[str]:
    options = [f"raise loader.prefetch_batches (now {config.loader.prefetch_batches})"]
    workers, cores = worker_count(config, runtime), runtime.cpus_per_rank()
    if workers > cores:
        options.insert(0, f"lower workers (now {workers}) to the {cores} CPU cores")
    if runtime.device.type == "cuda" and loader_name(config, runtime) is not LoaderName.dali:
        options.append("use loader=dali, which makes batches on the GPU")
    return options


def _use_all_cores(config: TrainConfig, runtime: Runtime) -> list[str]:
    workers, cores = worker_count(config, runtime), runtime.cpus_per_rank()
    return [f"raise workers (now {workers}, {cores} CPU cores)"] if workers < cores else []


def _use_fastest_loader(config: TrainConfig, runtime: Runtime, does: str) -> list[str]:
    loader, on_gpu = loader_name(config, runtime), runtime.device.type == "cuda"
    if on_gpu:
        return [] if loader is LoaderName.dali else [f"use loader=dali, which {does} on the GPU"]
    return [] if loader is LoaderName.torch else ["use loader=torch"]

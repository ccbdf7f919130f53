"""Writes a folder for the Hugging Face hub in timm's format: config.json, model.safetensors and README.md."""

import shutil
from pathlib import Path
from typing import Any

import httpx2
import timm
import torch
from huggingface_hub import HfApi, hf_hub_url
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from torch import Tensor, nn

from metaformer.errors import UserError, printable
from metaformer.files import fsync, temporary_beside, to_json
from metaformer.models.config import Library
from metaformer.models.export.exportable import TOLERANCE, Exportable, check, compare
from metaformer.models.export.model_card import Facts, TimmNetwork, make_card
from metaformer.models.variants import find_timm_cfg
from metaformer.models.weights import save_weights

WEIGHTS_FILE = "model.safetensors"


def write_hub_folder(network: Exportable, facts: Facts, folder: Path, title: str) -> TimmNetwork | None:
    """Write the folder, and load it with timm if timm has the network.

    Nothing is written if timm cannot load the folder or computes other features.

    Args:
        folder: must not exist.
        title: the model's name on the hub.

    Returns:
        Timm's network, or None if timm has no such network.
    """
    temporary = temporary_beside(folder)
    try:
        temporary.mkdir()
        save_weights(network.model, temporary / WEIGHTS_FILE, network.record)
        (temporary / "config.json").write_text(to_json(timm_config(network), indent=2) + "\n")
        in_timm = _load_with_timm(network, temporary)
        (temporary / "README.md").write_text(make_card(network, facts, in_timm, title))
        for file in temporary.iterdir():
            fsync(file)
        temporary.rename(folder)
        fsync(folder.parent)
    except OSError as error:
        raise UserError(f"--out={folder}: cannot be written ({error.strerror or error})") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return in_timm


def timm_config(network: Exportable) -> dict[str, Any]:
    """Return the content of config.json: timm's description of the network, preprocessing and class names."""
    record, images = network.record, network.record.images
    assert images is not None
    side = images.image_size
    name = timm_name(network)
    config: dict[str, Any] = {"architecture": name or record.name, "num_classes": record.num_classes}
    if record.classes is not None:
        config["label_names"] = list(record.classes)
    settings = {
        "num_classes": record.num_classes,
        "input_size": [3, side, side],
        "interpolation": images.interpolation.value,
        "crop_pct": images.crop_pct,
        "crop_mode": "center",
        "mean": list(images.mean),
        "std": list(images.std),
    }
    if name is None:
        return config | {"library": record.library.value, "pretrained_cfg": settings}
    known = find_timm_cfg(name)
    settings |= {"fixed_input_size": known.fixed_input_size, "first_conv": known.first_conv}
    return config | {
        "num_features": network.model.num_features,
        "pretrained_cfg": settings | {"classifier": known.classifier},
    }


def timm_name(network: Exportable) -> str | None:
    """Return the name of timm's network with the same keys, without a tag; None if there is none."""
    name, library = network.record.name.split(".")[0], network.record.library
    return name if library is not Library.target and timm.is_model(name) else None


def check_repository(repository: str) -> None:
    """Raise an error unless this is a valid name of a user's repository on the hub."""
    try:
        hf_hub_url(repository, WEIGHTS_FILE)
        if "/" not in repository:
            raise HFValidationError("without a user or organisation")
    except HFValidationError as error:
        raise UserError(
            f"--push={repository}: not a repository ({printable(str(error), 200)}); give USER/NAME"
        ) from error


def push(folder: Path, repository: str) -> str:
    """Upload a folder to the hub, creating a private repository if there is none, and return its address."""
    api = HfApi()
    try:
        address = api.create_repo(repository, private=True, exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=folder, commit_message="Upload weights by metaformer export")
    except (HfHubHTTPError, httpx2.HTTPError, OSError, ValueError) as error:  # the last line is the hub's answer
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise UserError(
            f"--push={repository}: failed ({printable(reason, 300)}); {folder} is complete: log in (hf auth login) "
            f"and run hf upload {repository} {folder}"
        ) from error
    return str(address)


def _load_with_timm(network: Exportable, folder: Path) -> TimmNetwork | None:
    """Load the folder as users of timm do, and compare the outputs."""
    name = timm_name(network)
    if name is None:
        return None
    try:
        loaded: nn.Module = timm.create_model(f"local-dir:{folder.absolute()}", pretrained=True)
    except (RuntimeError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"model={name}: timm cannot load the weights ({printable(str(error), 300)})") from error
    loaded.eval()

    @torch.inference_mode()
    def run(images: Tensor) -> Tensor:
        logits: Tensor = loaded(images)
        return logits

    if network.record.library is Library.timm:
        return TimmNetwork(name, check(network, run, "timm"))
    models: tuple[Any, ...] = (network.model, loaded)
    with torch.inference_mode():
        own, other = (model.forward_features(network.images) for model in models)
    if not (own - other).abs().max() <= TOLERANCE * own.abs().max():
        raise UserError(f"model={name}: timm's network computes other features; nothing is written")
    return TimmNetwork(name, compare(network, run))

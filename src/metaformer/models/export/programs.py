"""Exports a network to ONNX or to a program of torch.export, and compares the written file with the network."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from metaformer.errors import UserError, printable
from metaformer.files import to_json, write_atomically, write_text_atomically
from metaformer.models.export.exportable import INPUT, OUTPUT, Agreement, Exportable, check
from metaformer.models.record import ENTRY

MAX_ONNX_BYTES = 2**31  # limit of protobuf


def export_onnx(network: Exportable, file: Path) -> Agreement:
    """Write an ONNX file and a description next to it, unless ONNX Runtime computes other logits.

    The batch size is variable; the image size is fixed. The file's metadata also has the description, as `network`.
    """
    try:
        import onnx
        import onnxruntime
        import onnxscript  # noqa: F401  # torch needs it
    except ImportError as error:
        raise UserError(
            f"onnx: the package {error.name} is not installed; run `uv pip install onnx onnxscript onnxruntime`"
        ) from error
    size = sum(tensor.numel() * tensor.element_size() for tensor in network.model.state_dict().values())
    if size >= MAX_ONNX_BYTES:
        raise UserError(f"onnx: the weights have {size:,} bytes, and an ONNX file fewer than {MAX_ONNX_BYTES:,}; "
                        "export torch instead")  # fmt: skip
    options: dict[str, Any] = {"input_names": [INPUT], "output_names": [OUTPUT], "dynamo": True, "verbose": False}
    program = _export(network, partial(torch.onnx.export, dynamic_shapes=({0: "batch"},), **options))
    program.model.metadata_props[ENTRY] = to_json(network.describe())

    def write(temporary: Path) -> Agreement:
        program.save(temporary, external_data=False)
        onnx.checker.check_model(temporary)
        session = onnxruntime.InferenceSession(temporary, providers=["CPUExecutionProvider"])

        def run(images: Tensor) -> Tensor:
            return torch.from_numpy(session.run([OUTPUT], {INPUT: images.numpy()})[0])

        return check(network, run, "ONNX Runtime")

    return _write(network, file, write)


def export_program(network: Exportable, file: Path) -> Agreement:
    """Write a torch.export program and a description next to it, unless the program computes other logits.

    The batch size is variable; the image size is fixed. The program also contains the description, as `network`.
    """
    batch = torch.export.Dim.DYNAMIC
    program = _export(network, partial(torch.export.export, dynamic_shapes=({0: batch},)))

    def write(temporary: Path) -> Agreement:
        with temporary.open("wb") as out:
            torch.export.save(program, out, extra_files={ENTRY: to_json(network.describe())})
        with temporary.open("rb") as content:
            loaded = torch.export.load(content).module()
        return check(network, torch.no_grad()(loaded), "the exported program")

    return _write(network, file, write)


def description_file(file: Path) -> Path:
    """Return the path of the description of an exported file."""
    return file.with_suffix(".json")


def _export(network: Exportable, export: Callable[..., Any]) -> Any:
    """Export the network with the first two images as example input."""
    try:
        with torch.no_grad():
            return export(network.model, (network.images[:2],))
    except Exception as error:  # torch raises many kinds of errors for unsupported networks
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise UserError(f"model={network.record.name}: torch cannot export it ({printable(reason, 300)})") from error


def _write(network: Exportable, file: Path, write: Callable[[Path], Agreement]) -> Agreement:
    """Write the description with the result of the comparison, then the exported file."""
    found: list[Agreement] = []

    def write_both(temporary: Path) -> None:
        agreement = write(temporary)
        found.append(agreement)
        checked = agreement._asdict() | {"torch": torch.__version__}
        text = to_json(network.describe() | {"checked": checked}, indent=2)
        write_text_atomically(description_file(file), text + "\n")

    try:
        write_atomically(file, write_both)
    except OSError as error:
        raise UserError(f"--out={file}: cannot be written ({error.strerror or error})") from error
    return found[0]

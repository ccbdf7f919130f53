"""Randomly damaged and forged weight files, each of which gives a one-line error or loads."""

import io
import json
import zipfile
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save
from torch import nn

from metaformer.errors import UserError
from metaformer.models import load_weights

STATE = {"weight": torch.ones(2, 2), "bias": torch.zeros(2)}
CONTENTS = {"model": STATE, "args": Namespace(lr=np.float64(1), out=Path("/x")), "model_ema": {"n_averaged": 3}}
BYTES = st.one_of(st.binary(max_size=4), st.sampled_from([b"\xff" * 8, b"\0" * 8, b"\n", b"R", b"b", b"\x81", b"."]))


def torch_file(zipped: bool) -> bytes:
    buffer = io.BytesIO()
    torch.save(CONTENTS, buffer, _use_new_zipfile_serialization=zipped)
    return buffer.getvalue()


FILES = {
    "safetensors": save(STATE, {"model": "linear"}),
    "torch": torch_file(zipped=True),
    "torch before 1.6": torch_file(zipped=False),
}


def check(path: Path, content: bytes) -> None:
    """Assert that loading works, or raises a one-line UserError and leaves the model unchanged."""
    path.write_bytes(content)
    model = nn.Linear(2, 2)
    before = model.weight.clone()
    try:
        load_weights(model, path)
    except UserError as error:
        text = str(error)
        assert text.startswith(f"{path}: ")
        assert text.isprintable()
        assert len(text) < 1000
        assert torch.equal(model.weight, before)


fuzzed = settings(
    max_examples=100,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@pytest.mark.parametrize("layout", FILES)
@fuzzed
@given(changes=st.lists(st.tuples(st.floats(0, 1), st.integers(0, 12), BYTES), min_size=1, max_size=3))
def test_changed_bytes(tmp_path: Path, layout: str, changes: list[tuple[float, int, bytes]]) -> None:
    """Bytes are replaced, removed and inserted anywhere in a file of each format."""
    content = FILES[layout]
    for place, removed, added in changes:
        start = int(place * len(content))
        content = content[:start] + added + content[start + removed :]
    check(tmp_path / "w", content)


@fuzzed
@given(changes=st.lists(st.tuples(st.floats(0, 1), st.integers(0, 12), BYTES), min_size=1, max_size=3))
def test_changed_pickle_in_a_valid_archive(tmp_path: Path, changes: list[tuple[float, int, bytes]]) -> None:
    """Only the pickle is changed, in an archive with correct checksums and sizes."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(FILES["torch"])) as archive, zipfile.ZipFile(buffer, "w") as changed:
        for name in archive.namelist():
            content = archive.read(name)
            for place, removed, added in changes if name.endswith("data.pkl") else []:
                start = int(place * len(content))
                content = content[:start] + added + content[start + removed :]
            changed.writestr(name, content)
    check(tmp_path / "w", buffer.getvalue())


@fuzzed
@given(header=st.recursive(
    st.one_of(st.none(), st.integers(-(2**70), 2**70), st.floats(), st.text(max_size=9),
              st.sampled_from(["F32", "F4", "C64", "BOOL", "dtype", "__metadata__"])),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
        st.sampled_from(["dtype", "shape", "data_offsets", "weight", "bias", "__metadata__"]) | st.text(max_size=5),
        inner, max_size=4),
    max_leaves=12,
))  # fmt: skip
def test_any_header(tmp_path: Path, header: object) -> None:
    """A safetensors file may have any JSON as its header."""
    text = json.dumps({"weight": header}).encode()
    check(tmp_path / "w", len(text).to_bytes(8, "little") + text + bytes(24))

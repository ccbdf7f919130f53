"""Tests that stored configurations contain no secrets, and of values that are rejected."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from metaformer.composing import compose, freeze
from metaformer.config import TrainConfig, fingerprint, redacted
from metaformer.errors import UserError

SECRET = "canary-7f3a"
Compose = Callable[..., TrainConfig]


@pytest.fixture
def composed(monkeypatch: pytest.MonkeyPatch) -> Compose:
    """A function that composes train.py's configuration from overrides, with a secret in the environment."""
    monkeypatch.setenv("CANARY", SECRET)

    def run(*overrides: str) -> TrainConfig:
        monkeypatch.setattr(sys, "argv", ["train.py", *overrides])
        return compose("train", TrainConfig)

    return run


@pytest.mark.parametrize(
    ("override", "kept"),
    [
        ("tracking.entity='${oc.env:CANARY}'", "entity: ${oc.env:CANARY}"),
        ("tracking.entity='a-${oc.env:CANARY}-b'", "entity: a-${oc.env:CANARY}-b"),
        ("tracking.entity='${oc.decode:${oc.env:CANARY}}'", "entity: ${oc.decode:${oc.env:CANARY}}"),
        ("tracking.tags=[plain,'${oc.env:CANARY}']", "  - plain\n  - ${oc.env:CANARY}\n"),
        ("run_dir='${oc.env:CANARY}/run'", "run_dir: ${oc.env:CANARY}/run"),
    ],
)
def test_a_value_from_the_environment(composed: Compose, override: str, kept: str) -> None:
    """The run uses the value; the stored configuration keeps the interpolation, in a field, part of one, or a list."""
    config = composed(override)
    assert SECRET in str(config)
    text = OmegaConf.to_yaml(redacted(config))
    assert SECRET not in text
    assert kept in text


def test_a_value_from_another_field(composed: Compose) -> None:
    """A field that interpolates a field that interpolates the variable is stored as written too."""
    config = composed("tracking.entity='${oc.env:CANARY}'", "tracking.name='of-${tracking.entity}'")
    assert config.tracking.name == f"of-{SECRET}"
    text = OmegaConf.to_yaml(redacted(config))
    assert SECRET not in text
    assert "name: of-${tracking.entity}" in text


def test_data_root_is_resolved(composed: Compose, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """data.root, which conf/ reads from the environment, is stored as the actual folder."""
    monkeypatch.setenv("IMAGENET_DIR", str(tmp_path))
    config = composed()
    assert OmegaConf.to_container(redacted(config))["data"]["root"] == str(tmp_path)  # type: ignore[index,call-overload]


def test_all_other_values_are_stored(composed: Compose) -> None:
    """Without variables, the whole configuration is stored, enums by name, without `from_environment`."""
    config = composed("epochs=7", "tracking.tags=[a,b]")
    kept = OmegaConf.to_container(redacted(config))
    whole = OmegaConf.to_container(OmegaConf.structured(config), enum_to_str=True)
    assert kept == whole
    assert isinstance(kept, dict)
    assert (kept["epochs"], kept["tracking"]["tags"]) == (7, ["a", "b"])
    assert "from_environment" not in kept


def test_ranks_compare_the_values(composed: Compose, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks with different values of a variable have different fingerprints, but equal stored configurations."""
    one = composed("tracking.entity='${oc.env:CANARY}'")
    monkeypatch.setenv("CANARY", "other")
    other = composed("tracking.entity='${oc.env:CANARY}'")
    assert redacted(one) == redacted(other)
    assert fingerprint(one) != fingerprint(other)


@pytest.mark.parametrize("literal", ["${x}", "a\\${x}b", "\\\\${oc.env:HOME}", "${", "a\\b"])
def test_a_literal_interpolation(
    composed: Compose, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, literal: str
) -> None:
    """A literal `${`, escaped on the command line or from a variable, survives storing and freezing."""
    monkeypatch.setenv("IMAGENET_DIR", f"/{literal}")
    escaped = literal if "${" not in literal else literal.replace("\\", "\\\\").replace("${", "\\${")
    config = composed("model.crop_pct=0.9", f"run_dir='{tmp_path}/{escaped}'")
    assert config.resolved_run_dir == tmp_path / literal
    config.tracking.name = literal  # as set by code
    assert OmegaConf.create(OmegaConf.to_yaml(redacted(config))).run_dir == f"{tmp_path}/{literal}"

    (tmp_path / "frozen.yaml").write_text(freeze(config))
    frozen = composed(f"--config-dir={tmp_path}", "--config-name=frozen")
    assert frozen.data.root == config.data.root == f"/{literal}"
    assert frozen.tracking.name == literal
    assert frozen.run_dir == config.run_dir
    assert fingerprint(frozen) == fingerprint(config)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        (f"seed={10**30}", f"seed={10**30}: too large; must be less than 2^63"),
        (f"workers={2**63}", f"workers={2**63}: too large; must be less than 2^63"),
        ("run_dir='a\nb'", r"run_dir: contains the control character '\n'; remove it"),
        ("run_dir='a\0b'", r"run_dir: contains the control character '\x00'; remove it"),
        ("data.root='a\0b'", r"data.root: contains the control character '\x00'; remove it"),
        ("tracking.tags=[a,'\x1b[2J']", r"tracking.tags.1: contains the control character '\x1b'; remove it"),
    ],
)
def test_unusable_values(composed: Compose, override: str, expected: str) -> None:
    """Numbers beyond 64 bits and control characters are rejected with the field's name."""
    with pytest.raises(UserError) as caught:
        composed(override)
    assert str(caught.value) == expected

"""What is kept of a configuration holds no secret."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from metaformer.config import TrainConfig, compose, fingerprint, recorded

SECRET = "canary-7f3a"
Compose = Callable[..., TrainConfig]


@pytest.fixture
def composed(monkeypatch: pytest.MonkeyPatch) -> Compose:
    """What train.py composes of overrides, with a secret in the environment."""
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
    """The run has the value; what is kept has what was given, in a field, in a part of it and in a list."""
    config = composed(override)
    assert SECRET in str(config)
    text = OmegaConf.to_yaml(recorded(config))
    assert SECRET not in text
    assert kept in text


def test_a_value_by_way_of_another_field(composed: Compose) -> None:
    """A field that interpolates a field that interpolates the variable is kept as given, too."""
    config = composed("tracking.entity='${oc.env:CANARY}'", "tracking.name='of-${tracking.entity}'")
    assert config.tracking.name == f"of-{SECRET}"
    text = OmegaConf.to_yaml(recorded(config))
    assert SECRET not in text
    assert "name: of-${tracking.entity}" in text


def test_the_place_of_the_data_is_resolved(composed: Compose, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """data.root, which conf/ reads from the environment, is kept as the folder that was read."""
    monkeypatch.setenv("IMAGENET_DIR", str(tmp_path))
    config = composed()
    assert OmegaConf.to_container(recorded(config))["data"]["root"] == str(tmp_path)  # type: ignore[index,call-overload]


def test_all_else_is_kept_as_it_is(composed: Compose) -> None:
    """Without variables, it is the whole configuration, values and enums by name, and says nothing of how it came."""
    config = composed("epochs=7", "tracking.tags=[a,b]")
    kept = OmegaConf.to_container(recorded(config))
    whole = OmegaConf.to_container(OmegaConf.structured(config), enum_to_str=True)
    assert kept == whole
    assert isinstance(kept, dict)
    assert (kept["epochs"], kept["tracking"]["tags"]) == (7, ["a", "b"])
    assert "from_environment" not in kept


def test_ranks_compare_the_values(composed: Compose, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two ranks with another value in the variable have another fingerprint, though what is kept reads the same."""
    one = composed("tracking.entity='${oc.env:CANARY}'")
    monkeypatch.setenv("CANARY", "other")
    other = composed("tracking.entity='${oc.env:CANARY}'")
    assert recorded(one) == recorded(other)
    assert fingerprint(one) != fingerprint(other)

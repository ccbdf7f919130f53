"""Tests of the help text of train.py and validate.py."""

import dataclasses
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import pytest

from metaformer.config import TrainConfig, ValidateConfig
from metaformer.option_help import describe_options, describe_options_in_markdown, field_comments


def uncommented(config_type: Any, parent: str = "") -> Iterator[str]:
    """Yield the fields without a comment."""
    comments = field_comments(config_type)
    for field in dataclasses.fields(config_type):
        if dataclasses.is_dataclass(field.type):
            yield from uncommented(field.type, f"{parent}{field.name}.")
        elif not field.metadata.get("omegaconf_ignore") and not comments[field.name]:
            yield parent + field.name


@pytest.mark.parametrize("config_type", [TrainConfig, ValidateConfig])
def test_every_field_is_explained(config_type: type) -> None:
    """Each field of both programs has a comment, which --help shows."""
    assert list(uncommented(config_type)) == []


@dataclasses.dataclass
class Example:
    """A configuration with each kind of comment."""

    beside: int = 1  # images of a step; None: all
    # Two lines above
    # the field.
    above: list[str] = dataclasses.field(default_factory=list)
    bare: bool = True
    free: dict[str, Any] = dataclasses.field(default_factory=dict)  # further values


def test_an_entry() -> None:
    """A field is shown with its default as typed, its kind, and its comment if it has one."""
    text = describe_options("train.py", Example, {"beside": 1, "above": ["a"], "bare": True, "free": {"b": 2}}, {})
    lines = [line.strip() for line in text.splitlines()]
    entries = dict(pairwise(lines))
    assert entries["beside=1"] == "integer; images of a step; null: all"
    assert entries["above=[a]"] == "list; Two lines above the field."
    assert entries["bare=true"] == "true or false"
    assert entries["free={b:2}"] == "any fields; further values"
    assert list(uncommented(Example)) == ["bare"]


@dataclasses.dataclass
class Nested:
    """A configuration with a group."""

    seed: int = 0  # a|b <c>
    group: Example = dataclasses.field(default_factory=Example)


def test_a_page() -> None:
    """The page has a section for each group with its choices, and a row for each field, with its text escaped."""
    values = {"seed": 0, "group": {"beside": 1, "above": [], "bare": False, "free": {}}}
    lines = describe_options_in_markdown("train.py", Nested, values, {"group": ["one", "two"]}).splitlines()
    assert [line for line in lines if line.startswith("#")] == ["## train.py", "### train.py: group"]
    assert "`group=` `one`, `two`" in lines
    assert r"| `seed` | `0` | integer; a\|b &lt;c> |" in lines
    assert "| `group.bare` | `false` | true or false |" in lines

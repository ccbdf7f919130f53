"""Help text of train.py and validate.py: each field with its default and meaning, from comments in the dataclasses."""

import ast
import dataclasses
import inspect
import re
import shutil
import textwrap
import types
from collections.abc import Iterable, Iterator, Mapping
from enum import Enum
from typing import Any, get_args, get_origin


def describe_options(
    program: str, config_type: type, defaults: Mapping[str, Any], groups: Mapping[str, list[str]]
) -> str:
    """Return the help text of a program.

    Args:
        program: Its name on the command line.
        config_type: The dataclass of its configuration.
        defaults: The composed values, nested.
        groups: The choices of each group.
    """
    width = min(120, shutil.get_terminal_size().columns)
    fields = list(_describe_fields(config_type, defaults))
    lines = [
        f"usage: {program} [NAME=VALUE ...]",
        "",
        "Groups: GROUP=CHOICE sets several fields at once.",
        *(line for name, choices in groups.items() for line in _wrap(f"{name}=", ", ".join(choices), width)),
        "",
        "Fields, with their defaults: null stands for none; quote a list for the shell, as in 'tracking.tags=[a,b]'.",
        *(line for setting, meaning in fields for line in _wrap(setting, meaning, width)),
        "",
        "--cfg job prints the composed configuration; --hydra-help lists Hydra's own flags, --version the version.",
    ]
    return "\n".join(lines)


def describe_options_in_markdown(
    program: str, config_type: type, defaults: Mapping[str, Any], groups: Mapping[str, list[str]]
) -> str:
    """Return the text of `describe_options` as a section of Markdown, with a table for each group of fields."""
    sections: dict[str, list[str]] = {}
    for setting, meaning in _describe_fields(config_type, defaults):
        name, _, default = setting.partition("=")
        row = " | ".join(
            (f"`{name}`", f"`{default}`" if default else "", meaning.replace("|", "\\|").replace("<", "&lt;"))
        )
        sections.setdefault(name.rpartition(".")[0], []).append(f"| {row} |")
    lines = [f"## {program}", ""]
    for parent, rows in sections.items():
        choices = (
            [f"`{parent}=` {', '.join(f'`{choice}`' for choice in groups[parent])}", ""] if parent in groups else []
        )
        title = [f"### {program}: {parent}", ""] if parent else []
        lines += [*title, *choices, "| field | default | |", "|---|---|---|", *rows, ""]
    return "\n".join(lines)


def _wrap(head: str, text: str, width: int) -> Iterator[str]:
    """Yield the lines of an entry: its name, and its description on indented lines below."""
    yield f"  {head}"
    yield from textwrap.wrap(text, width, initial_indent=" " * 6, subsequent_indent=" " * 6)


def _describe_fields(config_type: type, defaults: Mapping[str, Any], parent: str = "") -> Iterator[tuple[str, str]]:
    """Yield NAME=DEFAULT and the meaning of each field; fields of groups come last."""
    comments = field_comments(config_type)
    fields = [field for field in dataclasses.fields(config_type) if not field.metadata.get("omegaconf_ignore")]
    nested = [field for field in fields if dataclasses.is_dataclass(field.type)]
    for field in (field for field in fields if field not in nested):
        meaning = (_describe_type(field.type), comments.get(field.name, ""))
        yield f"{parent}{field.name}={_as_typed(defaults[field.name])}", "; ".join(filter(None, meaning))
    for field in nested:
        assert isinstance(field.type, type)
        yield from _describe_fields(field.type, defaults[field.name], f"{parent}{field.name}.")


def field_comments(owner_type: type) -> dict[str, str]:
    """Return the comments next to or above the fields of a dataclass and its bases, or the members of an enum.

    None, True and False are replaced by YAML's null, true and false.
    """
    found: dict[str, str] = {}
    for owner in reversed([base for base in owner_type.__mro__ if base not in (object, Enum)]):
        lines = textwrap.dedent(inspect.getsource(owner)).splitlines()
        (definition,) = ast.parse("\n".join(lines)).body
        assert isinstance(definition, ast.ClassDef)
        for node in definition.body:
            target = node.targets[0] if isinstance(node, ast.Assign) else getattr(node, "target", None)
            if isinstance(target, ast.Name):
                found[target.id] = _in_yaml(_comment(lines, node.lineno - 1, node.end_lineno or node.lineno))
    return found


def _comment(lines: list[str], first: int, end: int) -> str:
    """Return the comment after the code that ends in line `end`, or else the comment lines above line `first`."""
    _, mark, beside = lines[end - 1].partition("  # ")
    if mark:
        return beside
    above = list(_take_comments(reversed(lines[:first])))
    return " ".join(reversed(above))


def _take_comments(lines: Iterable[str]) -> Iterator[str]:
    for line in lines:
        if not line.strip().startswith("# "):
            return
        yield line.strip().removeprefix("# ")


def _in_yaml(comment: str) -> str:
    words = {"None": "null", "True": "true", "False": "false"}
    return re.sub(r"\b(None|True|False)\b", lambda match: words[match[1]], comment)


def _describe_type(kind: Any) -> str:
    """Return the accepted values of a field: the choices of an enum, or the type of value."""
    if isinstance(kind, types.UnionType):
        texts = [_describe_type(part) for part in get_args(kind) if part is not type(None)]
        return " or ".join([*texts, "null"])
    if isinstance(kind, type) and issubclass(kind, Enum):
        comments = field_comments(kind)
        return ", ".join(
            f"{choice.value} ({note})" if (note := comments[choice.name]) else choice.value for choice in kind
        )
    names = {int: "integer", float: "number", bool: "true or false", str: "text"}
    return names.get(kind, "any fields" if get_origin(kind) is dict else "list")


def _as_typed(value: Any) -> str:
    """Return a value as it is written on the command line."""
    if isinstance(value, list | tuple):
        return f"[{','.join(map(_as_typed, value))}]"
    if isinstance(value, Enum):
        return str(value.name)
    if isinstance(value, dict):
        return "{" + ",".join(f"{name}:{_as_typed(item)}" for name, item in value.items()) + "}"
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    return str(value)

"""Checks the commands of the documentation without running them: programs, options, fields, choices and rows exist."""

import argparse
import ast
import importlib
import re
import shlex
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple, NoReturn

import pytest

from metaformer.composing import compose_training, compose_validation
from metaformer.config import TrainConfig, ValidateConfig
from metaformer.option_names import field_names
from metaformer.reporting.paper import find_rows
from scripts.submit import expand_sweep
from tests.conftest import REPOSITORY

# tests/test_extending.py runs the commands of docs/extending.md, which need the page's files.
PATTERNS = ("*.md", "docs/**/*.md", "Dockerfile", "conf/**/*.yaml", "slurm/*.sbatch", "scripts/*.py",
            "benchmarks/**/*.py", "src/metaformer/commands/*.py")  # fmt: skip
FILES = sorted({file for pattern in PATTERNS for file in REPOSITORY.glob(pattern) if file.name != "extending.md"})
PROGRAM = re.compile(
    r"\b(?:python|torchrun|sbatch)\b.*?\s"
    r"(?:(?:scripts/|slurm/)?(?P<file>\w+\.(?:py|sbatch))|-m (?P<module>benchmarks[.\w]*|metaformer [a-z]+))"
    r"(?P<rest>\s.*|)$"
    r"|^(?P<command>metaformer [a-z]+)(?P<rest2>\s.*|)$"
)
PAGES = [file for file in FILES if file.suffix == ".md" and file.name != "CHANGELOG.md"]
MODULES = {
    "prepare_data": "metaformer.commands.prepare",
    "benchmarks.gpu": "benchmarks.gpu.__main__",
    **{name: f"metaformer.commands.{name}" for name in ("doctor", "export", "predict", "prepare", "report")},
}


class Command(NamedTuple):
    """A command: the file that documents it, the program's name and its arguments."""

    file: str
    program: str
    arguments: tuple[str, ...]


class Parsed(BaseException):
    """Raised instead of running a program whose arguments have been parsed."""


def code_of(file: Path) -> Iterator[str]:
    """Yield the lines of code blocks, of a docstring or of comments, and the code within sentences."""
    text = file.read_text()
    if file.suffix == ".py":
        text = ast.get_docstring(ast.parse(text)) or ""
    elif file.suffix != ".md":
        text = "\n".join(line.lstrip("# ") for line in text.splitlines() if line.startswith("#"))
    text = re.sub(r"\\\n\s*", " ", text)
    fences = re.compile(r"^```\w*\n(.*?)^```$", re.MULTILINE | re.DOTALL)
    yield from (" ".join(span.split()) for span in re.findall(r"`([^`]+)`", fences.sub("", text)))
    yield from ("\n".join(fences.findall(text)) if file.suffix == ".md" else re.sub(r"`[^`]+`", "", text)).splitlines()


def is_placeholder(before: str, word: str) -> bool:
    """Return whether a word stands for something that its parser would refuse it for."""
    if word == "...":
        return before == "--" or not before.startswith("--")
    return re.match(r"(model|experiment)=(\.|[A-Z]|mine$)", word) is not None


def find_commands(file: Path) -> Iterator[Command]:
    """Yield the commands of this project's programs, without placeholders and without what follows a pipe."""
    for line in code_of(file):
        found = PROGRAM.search(line)
        if found is None:
            continue
        program = (found["file"] or found["module"] or found["command"]).removeprefix("metaformer ")
        rest = re.sub(r"\[(--[^]]*)\]", r"\1", found["rest"] or found["rest2"] or "")  # [--option]: may be left out
        words = shlex.split(re.split(r"\s[|>]\s", rest)[0], comments=True)
        words = [word.partition("|")[0] for before, word in pairwise(["", *words]) if not is_placeholder(before, word)]
        if program == "reproduce_table.sbatch":
            words.insert(0, "--run")
        if set(words) - {"--", "--help"}:
            yield Command(file.name, re.sub(r"\.(py|sbatch)$", "", program), tuple(words))


COMMANDS = sorted({command for file in FILES for command in find_commands(file)})


def test_commands_are_found() -> None:
    """The search finds commands in every kind of file, within sentences, in tables and over several lines."""
    assert len(COMMANDS) > 100
    assert {
        Command("README.md", "verify_resume", ("--", "data.root=...")),
        Command("README.md", "train", ("model=poolformer_s12", "data.root=...")),
        Command("README.md", "doctor", ("--data", "/path/to/imagenet")),
        Command("demo.yaml", "train", ("experiment=demo",)),
        Command("loader.py", "benchmarks.loader", ("/path/to/imagenet/val",)),
        Command("performance.md", "benchmarks.gpu", ("--measured", "train.json")),
    } <= set(COMMANDS)


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: f"{command.file} {command.program}")
def test_a_documented_command(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    """The program's parser accepts the arguments, and the overrides among them compose."""
    _, program, arguments = command
    overrides = [argument for argument in arguments if re.match(r"[\w.]+=", argument)]
    if program == "train":
        compose_training(overrides)
    elif program == "validate":
        compose_validation(overrides)
    else:
        parse(program, arguments, monkeypatch)
    if program in ("predict", "export") or "--released" in arguments:
        compose_validation([*overrides, "checkpoint=FILE"])
    elif program == "submit":
        expand_sweep(overrides)
    elif program in ("reproduce_table", "verify_resume"):
        compose_training(overrides)
    if program == "reproduce_table":
        find_rows([argument for argument in arguments if "/" in argument and "=" not in argument])


def test_documented_fields() -> None:
    """Every override within a sentence, such as `ema=enabled`, names a field or a group."""
    known = {*field_names(TrainConfig), *field_names(ValidateConfig), "experiment"}
    examples = {"a.b", "group", "decode", "gradient_as_bucket_view", "model.options.NAME"}
    override = re.compile(r"([a-z_]+(?:\.\w+)*)=\S*")
    lines = [line.split() for file in PAGES for line in code_of(file)]
    named = {word.partition("=")[0] for line in lines if all(map(override.fullmatch, line)) for word in line}
    assert len(named) > 60
    assert named - known - examples == set()


def parse(program: str, arguments: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """Run a program until it has parsed its arguments."""
    module = importlib.import_module(MODULES.get(program, program if "." in program else f"scripts.{program}"))
    if not hasattr(module, "argparse"):
        assert not arguments, f"{program} takes no arguments"
        return

    def stop(original: object) -> object:
        def parse_args(parser: argparse.ArgumentParser, words: list[str] | None = None) -> NoReturn:
            original(parser, words)  # type: ignore[operator]
            raise Parsed

        return parse_args

    for name in ("parse_args", "parse_intermixed_args"):
        monkeypatch.setattr(argparse.ArgumentParser, name, stop(getattr(argparse.ArgumentParser, name)))
    monkeypatch.setattr(sys, "argv", [program, *arguments])
    with pytest.raises(Parsed):
        module.main()

"""Rejects values that no run can use, and explains the errors of Hydra and OmegaConf in one line."""

import argparse
import dataclasses
import difflib
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra._internal.utils import get_args_parser
from hydra.core.config_store import ConfigStore
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, MissingMandatoryValue, OmegaConfBaseException

from metaformer.errors import UserError, one_line, unknown_name
from metaformer.option_names import advice

FREE_FORM = (r"model\.options", r"tracking\.options")  # dictionaries of the user's own
_CONTROL_CHARACTER = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")


def check_no_added_fields(config: Any, values: Any) -> None:
    """Raise an error for a field that no dataclass has, such as `_target_`, which Hydra's `+a.b=c` can add."""

    def check(part: Any, values: Any, parent: str) -> None:
        names = [field.name for field in dataclasses.fields(part)]
        for name, value in values.items():
            if name not in names:
                raise UserError(f"{parent}{name}: no such field; {advice(f'{parent}{name}', type(config))}")
            if dataclasses.is_dataclass(getattr(part, name)):
                check(getattr(part, name), value, f"{parent}{name}.")

    check(config, values, "")


def check_values(value: Any, name: str = "") -> None:
    """Raise an error for control characters and for integers of more than 64 bits, which paths and torch reject."""
    if dataclasses.is_dataclass(value):
        value = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if isinstance(value, dict | list):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            check_values(item, f"{name}.{key}" if name else str(key))
    elif isinstance(value, str) and (found := _CONTROL_CHARACTER.search(value)):
        raise UserError(f"{name}: contains the control character {found[0]!r}; remove it")
    elif isinstance(value, int) and not -(2**63) <= value < 2**63:
        raise UserError(f"{name}={value}: too large; must be less than 2^63")


def prepare_arguments(arguments: Sequence[str]) -> list[str]:
    """Return the arguments in the form that Hydra expects: flags first, and the fields of FREE_FORM as additions."""
    arguments = sorted(arguments, key=lambda argument: "=" in argument and not argument.startswith("-"))
    return [f"++{argument}" if re.match(rf"({'|'.join(FREE_FORM)})[.=]", argument) else argument
            for argument in arguments]  # fmt: skip


def check_arguments(arguments: Sequence[str], conf: Path, config_type: type) -> argparse.Namespace:
    """Parse the arguments as Hydra does.

    Reject those for which Hydra would print a usage text or a traceback, or start several trainings (`-m`).

    Args:
        conf: The folder with the groups.
        config_type: The dataclass of the program's configuration.
    """
    parser = get_args_parser()
    parser.allow_abbrev = False
    given, unknown = parser.parse_known_args(arguments)
    if given.multirun:
        raise UserError(
            "-m: a program trains one configuration; python scripts/submit.py runs each combination of values, as in "
            "optimizer.lr=1e-3,2e-3, on SLURM or with --local here"
        )
    flags = [argument for argument in unknown if argument.startswith("-")]
    if flags:
        name = flags[0].lstrip("-").partition("=")[0].replace("-", "_")
        raise UserError(f"{flags[0]}: options are written NAME=VALUE; {advice(name, config_type)}")
    for argument in given.overrides:
        group, _, name = argument.partition("=")
        if not group:
            raise UserError(f"{argument}: options are written NAME=VALUE; give the name too")
        if argument == f"{group}=":  # an empty path would be the current folder
            raise UserError(f"{argument}: has no value; give one, or leave the option out")
        group, at, _ = group.partition("@")
        if at:
            raise UserError(
                f"{argument}: a group has one place only; write {group.lstrip('+~') or 'model'}={name or 'NAME'}"
            )
        if re.fullmatch(r"null|true|false|[+-]?[\d.]+", name, re.IGNORECASE) and (conf / group).is_dir():
            raise unknown_name(group, name, group_choices(group, conf))
    return given


def explain(error: HydraException | OmegaConfBaseException, conf: Path, config_type: type) -> str:
    """Return a one-line message for an error of composing from the folder `conf`."""
    if isinstance(error, OmegaConfBaseException):
        return _explain_omegaconf_error(error, config_type)
    if isinstance(error.__cause__, OmegaConfBaseException):  # more specific
        return _explain_omegaconf_error(error.__cause__, config_type)
    if isinstance(error, MissingConfigException) and error.missing_cfg_file and error.options:
        return _explain_choice(error.missing_cfg_file, error.options, conf)
    if isinstance(error, OverrideParseException):
        return _explain_override(error.override)
    several = re.match("Ambiguous value for argument '(.+)'", str(error))
    if several is not None:
        return (
            f"{several[1]}: several values; write a list as NAME=[A,B]; "
            "python scripts/submit.py trains with each value, on SLURM or with --local here"
        )
    return one_line(error)


def _explain_choice(missing: str, options: Sequence[str], conf: Path) -> str:
    """Return a message for a group's choice that does not exist."""
    group, name = missing.split("/", 1)
    if group == "data" and ("/" in name or Path(name).is_dir()):
        return f"data={name}: data= selects a kind of data set; use data.root={name}"
    if not (conf / group).is_dir():  # one of Hydra's own groups
        group, name = os.path.split(missing)
        return str(unknown_name(group, name, options))
    choices = group_choices(group, conf)
    if group == "model":
        near = difflib.get_close_matches(name, choices, n=3)
        meant = f"did you mean {', '.join(near)}? A" if near else "--help lists the networks of the papers; a"
        return f"model={name}: unknown; {meant} network of timm is model=timm model.name={name}"
    return str(unknown_name(group, name, choices))


def _explain_override(override: str) -> str:
    """Return a message for an argument that is not NAME=VALUE."""
    if "=" in override:
        return f"{override}: cannot be parsed; quote a value with special characters, as in 'a=\"b c\"'"
    use = f"data.root={override}" if "/" in override else "model=poolformer_s12"
    return f"{override}: options are written NAME=VALUE, as in {use}"


def group_choices(group: str, conf: Path) -> list[str]:
    """Return a group's choices in conf/ and in the config store, including those of its subgroups."""
    files = [str(file.relative_to(conf / group)) for file in (conf / group).rglob("*.yaml")]
    stored: Any = ConfigStore.instance().repo
    for part in group.split("/"):
        stored = stored.get(part, {})
    nested = [
        f"{entry}/{name}" for entry in stored if "." not in entry for name in group_choices(f"{group}/{entry}", conf)
    ]
    return [*(name.removesuffix(".yaml") for name in [*files, *stored] if name.endswith(".yaml")), *nested]


def _explain_omegaconf_error(error: OmegaConfBaseException, config_type: type) -> str:
    key = error.full_key or str(error.key)
    if isinstance(error, ConfigKeyError | ConfigAttributeError) and dataclasses.is_dataclass(error.object_type):
        return f"{key}: no such field; {advice(key, config_type)}"
    if isinstance(error, MissingMandatoryValue):
        return f"{key}: missing; give {key}=..."
    number = re.match(r"Value '(.*)' of type '\w+' could not be converted to (Integer|Float)", str(error))
    if number is not None:
        return f"{key}={number[1]}: must be {'an integer' if number[2] == 'Integer' else 'a number'}"
    return f"{key}: {str(error).splitlines()[0]}"

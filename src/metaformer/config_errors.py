"""Reject values that no run can use, and explain the errors of Hydra and OmegaConf in one line."""

import dataclasses
import difflib
import os
import re
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, MissingMandatoryValue, OmegaConfBaseException

from metaformer.errors import UserError, one_line, unknown_name

_CONTROL_CHARACTER = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")


def check_no_added_fields(config: Any, values: Any, parent: str = "") -> None:
    """Raise `UserError` for a field that no dataclass has, such as `_target_`, which Hydra's `+a.b=c` can add."""
    names = [field.name for field in dataclasses.fields(config)]
    for name, value in values.items():
        if name not in names:
            raise UserError(f"{parent}{name}: no such field; the fields are {', '.join(names)}")
        if dataclasses.is_dataclass(getattr(config, name)):
            check_no_added_fields(getattr(config, name), value, f"{parent}{name}.")


def check_values(value: Any, name: str = "") -> None:
    """Raise `UserError` for control characters and for integers of more than 64 bits, which paths and torch reject."""
    if dataclasses.is_dataclass(value):
        value = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if isinstance(value, dict | list):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            check_values(item, f"{name}.{key}" if name else str(key))
    elif isinstance(value, str) and (found := _CONTROL_CHARACTER.search(value)):
        raise UserError(f"{name}: contains the control character {found[0]!r}; remove it")
    elif isinstance(value, int) and not -(2**63) <= value < 2**63:
        raise UserError(f"{name}={value}: too large; must be less than 2^63")


def explain(error: HydraException | OmegaConfBaseException, conf: Path) -> str:
    """Return a one-line message for an error of composing from the folder `conf`."""
    if isinstance(error, HydraException):
        return _explain_hydra_error(error, conf)
    return _explain_omegaconf_error(error)


def _explain_hydra_error(error: HydraException, conf: Path) -> str:
    """Return a one-line message for a Hydra error, taken from its more specific OmegaConf cause if it has one."""
    if isinstance(error.__cause__, OmegaConfBaseException):
        return _explain_omegaconf_error(error.__cause__)
    if isinstance(error, MissingConfigException) and error.missing_cfg_file and error.options:
        group, name = error.missing_cfg_file.split("/", 1)
        if not (conf / group).is_dir():  # one of Hydra's own groups
            group, name = os.path.split(error.missing_cfg_file)
            return str(unknown_name(group, name, error.options))
        return str(unknown_name(group, name, _choices(group, conf)))
    if isinstance(error, OverrideParseException):
        return f"{error.override}: cannot be parsed; quote a value with special characters, as in 'a=\"b c\"'"
    return one_line(error)


def _choices(group: str, conf: Path) -> list[str]:
    """Return a group's choices in conf/ and in the config store, including those of its subgroups."""
    files = [str(file.relative_to(conf / group)) for file in (conf / group).rglob("*.yaml")]
    stored: Any = ConfigStore.instance().repo
    for part in group.split("/"):
        stored = stored.get(part, {})
    nested = [f"{entry}/{name}" for entry in stored if "." not in entry for name in _choices(f"{group}/{entry}", conf)]
    return [*(name.removesuffix(".yaml") for name in [*files, *stored] if name.endswith(".yaml")), *nested]


def _explain_omegaconf_error(error: OmegaConfBaseException) -> str:
    key = error.full_key or str(error.key)
    if isinstance(error, ConfigKeyError | ConfigAttributeError) and dataclasses.is_dataclass(error.object_type):
        names = [field.name for field in dataclasses.fields(error.object_type)]
        parent = key.removesuffix(str(error.key))
        near = difflib.get_close_matches(str(error.key), names, n=3) or names
        return f"{key}: no such field; did you mean {', '.join(parent + name for name in near)}?"
    if isinstance(error, MissingMandatoryValue):
        return f"{key}: missing; give {key}=..."
    return f"{key}: {str(error).splitlines()[0]}"

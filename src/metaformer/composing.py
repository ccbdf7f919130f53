"""Composes configurations with Hydra, from conf/ and the command line."""

import os
import re
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import hydra
from hydra.conf import HydraConf
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from metaformer import __version__
from metaformer.config import CommonConfig, TrainConfig, ValidateConfig, redacted
from metaformer.config_errors import (
    check_arguments,
    check_no_added_fields,
    check_values,
    explain,
    group_choices,
    prepare_arguments,
)
from metaformer.errors import UserError, one_line
from metaformer.models import list_models
from metaformer.models.config import AUTO
from metaformer.option_help import describe_options
from metaformer.reporting.recipes import recipes
from metaformer.targets import make_importable

_INSTALLED_CONF = Path(__file__).parent / "conf"  # a wheel has a copy; see setup.py
CONF_FOLDER = _INSTALLED_CONF if _INSTALLED_CONF.is_dir() else Path(__file__).parents[2] / "conf"

C = TypeVar("C", bound=CommonConfig)


def compose(name: str, config_type: type[C]) -> C:
    """Return the validated configuration from conf/NAME.yaml and the command line.

    Hydra's own flags, such as `--help` and `--cfg job`, print and exit.
    """
    _store_schemas()
    composed: list[tuple[DictConfig, HydraConf]] = []

    # The program itself runs outside hydra.main, which would catch its errors and report them differently.
    @hydra.main(version_base="1.3", config_path=str(CONF_FOLDER), config_name=name)
    def capture(config: DictConfig) -> None:
        composed.append((config, HydraConfig.get()))

    if "--version" in sys.argv[1:]:  # Hydra's parser would print its own version
        print(f"metaformer {__version__}")
        raise SystemExit(0)
    sys.argv[1:] = prepare_arguments(sys.argv[1:])
    given = check_arguments(sys.argv[1:], CONF_FOLDER, config_type)
    if given.help:
        print(option_text(name, config_type, given.overrides))
        raise SystemExit(0)
    with _explained(config_type):
        os.environ["HYDRA_FULL_ERROR"] = "1"  # makes Hydra raise errors instead of printing them
        _run_hydra(capture)
        if not composed:
            raise SystemExit(0)
        ((values, hydra_config),) = composed
        config = _to_dataclasses(values)
    if isinstance(config, TrainConfig) and config.run_dir is None:
        config.run_dir = default_run_dir(
            _run_label(config), hydra_config.runtime.choices.get("experiment") or "default"
        )
    assert isinstance(config, config_type)
    if config.own_code:
        make_importable([Path.cwd(), *([given.config_dir] if given.config_dir else [])])
    return config


def compose_recipe(experiment: str) -> TrainConfig:
    """Return the configuration of train.py with `experiment=` as the only override."""
    return compose_training([f"experiment={experiment}"])


def compose_training(overrides: Sequence[str]) -> TrainConfig:
    """Return the configuration of train.py with these overrides on its command line."""
    _store_schemas()
    overrides = prepare_arguments(overrides)
    check_arguments(overrides, CONF_FOLDER, TrainConfig)
    with _explained(TrainConfig):
        with hydra.initialize_config_dir(str(CONF_FOLDER.absolute()), version_base="1.3"):
            values = hydra.compose("train", list(overrides), return_hydra_config=True)
        experiment = values.hydra.runtime.choices.get("experiment") or "default"
        with open_dict(values):
            del values["hydra"]
        config = _to_dataclasses(values)
    assert isinstance(config, TrainConfig)
    config.run_dir = config.run_dir or default_run_dir(_run_label(config), experiment)
    return config


def compose_validation(overrides: Sequence[str]) -> ValidateConfig:
    """Return the configuration of validate.py with these overrides on its command line."""
    _store_schemas()
    overrides = prepare_arguments(overrides)
    check_arguments(overrides, CONF_FOLDER, ValidateConfig)
    with _explained(ValidateConfig), hydra.initialize_config_dir(str(CONF_FOLDER.absolute()), version_base="1.3"):
        config = _to_dataclasses(hydra.compose("validate", list(overrides)))
    assert isinstance(config, ValidateConfig)
    if config.own_code:
        make_importable([Path.cwd()])
    return config


def option_text(
    name: str,
    config_type: type[CommonConfig],
    overrides: Sequence[str] = (),
    describe: Callable[..., str] = describe_options,
) -> str:
    """Return the help of a program, with the values that these overrides give as defaults.

    Args:
        describe: a function of `option_help` that makes the text.
    """
    _store_schemas()
    with _explained(config_type), hydra.initialize_config_dir(str(CONF_FOLDER.absolute()), version_base="1.3"):
        values = hydra.compose(name, list(overrides))
    config: Any = OmegaConf.to_container(values, resolve=False)
    own = {*config, "experiment"} if config_type is TrainConfig else {*config}
    names = sorted(folder.name for folder in CONF_FOLDER.iterdir() if folder.is_dir() and folder.name in own)
    groups = {group: sorted(group_choices(group, CONF_FOLDER)) for group in names}
    program = Path(sys.argv[0]).name if describe is describe_options else f"{name}.py"
    return describe(program, config_type, config, groups)


def freeze(config: TrainConfig) -> str:
    """Return YAML from which `train.py --config-dir --config-name` composes this configuration without conf/."""
    root = OmegaConf.load(CONF_FOLDER / "train.yaml")
    assert isinstance(root, DictConfig)
    no_logging = [{f"override hydra/{logging}": "none"} for logging in ("job_logging", "hydra_logging")]
    root.defaults = ["train_schema", "_self_", *no_logging]
    return "# Composed by scripts/submit.py\n" + OmegaConf.to_yaml(OmegaConf.merge(root, redacted(config)))


def _run_hydra(capture: Callable[[], None]) -> None:
    """Run Hydra, and explain the ValueError that it raises for some wrong arguments."""
    try:
        capture()
    except ValueError as error:
        raise UserError(f"{shlex.join(sys.argv[1:])}: {one_line(error)}; see --help") from error


@contextmanager
def _explained(config_type: type) -> Iterator[None]:
    """Raise the errors of Hydra and OmegaConf as a `UserError` of one line."""
    try:
        yield
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(explain(error, CONF_FOLDER, config_type)) from error


def _to_dataclasses(values: DictConfig) -> Any:
    """Convert composed values to the validated dataclasses."""
    config: Any = OmegaConf.to_object(values)
    check_values(config)
    check_no_added_fields(config, OmegaConf.to_container(values, resolve=False))
    config.from_environment = dict(_interpolated_fields(values))
    return config


def _store_schemas() -> None:
    store: Any = ConfigStore.instance()
    # Hydra copies the store for each group that --help lists, which took two seconds; it copies what it loads anyway.
    store.__deepcopy__ = lambda memo: store
    store.store("train_schema", TrainConfig)
    store.store("validate_schema", ValidateConfig)
    # Choices that only repeat a table are registered from it instead of having a file in conf/.
    for name in list_models():
        store.store(name, {"name": name}, group="model")
    for recipe in recipes():
        store.store(recipe.name, recipe.values, group=recipe.group, package="_global_")


def default_run_dir(model: str, experiment: str, runs: Path = Path("runs")) -> str:
    """Return the run folder of an experiment: RUNS/MODEL-EXPERIMENT, without repeating the model's name.

    For experiment=paper/poolformer_s12 this is runs/poolformer_s12-paper. If a folder with the whole name exists, as in
    version 0.1, it is used, so that its run resumes.
    """
    whole = runs / f"{model}-{experiment.replace('/', '-')}"
    group, _, name = experiment.rpartition("/")
    repeated = f"_{model}".endswith(f"_{name}")
    own = "" if repeated else re.sub(f"^{re.escape(model)}_", "", name)
    short = runs / "-".join(part for part in (model, group.replace("/", "-"), own) if part)
    return str(whole if whole.is_dir() or (repeated and not group) else short)


def _run_label(config: TrainConfig) -> str:
    """Return the network's name, or the name of the run, file or released network that determines it."""
    if config.model.name != AUTO or config.init_weights is None:
        return config.model.name
    parts = config.init_weights.rstrip("/").split("/")
    label = parts[max(0, parts.index("checkpoints") - 1)] if "checkpoints" in parts else parts[-1]
    return re.sub(r"\.(safetensors|pth|pt|bin|tar|ckpt)(\..*)?$", "", label.rpartition(":")[2])


def _interpolated_fields(values: DictConfig) -> Iterator[tuple[str, str]]:
    """Yield the key and raw text of each field that interpolates a variable or another field.

    List items count as fields. `data.root` is left out, because the path of a data set is not a secret.
    """
    pending: list[tuple[str, Any]] = [("", OmegaConf.to_container(values, resolve=False))]
    while pending:
        key, value = pending.pop()
        if isinstance(value, dict | list):
            items = value.items() if isinstance(value, dict) else enumerate(value)
            pending.extend((f"{key}.{name}" if key else str(name), item) for name, item in items)
        elif isinstance(value, str) and "${" in value and key != "data.root":
            yield key, value

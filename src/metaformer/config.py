"""Typed configuration of train.py and validate.py, composed by Hydra from conf/ and the command line."""

import dataclasses
import difflib
import hashlib
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any, TypeVar

import hydra
from hydra.conf import HydraConf
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, MissingMandatoryValue, OmegaConfBaseException

from metaformer.data.index.config import DataConfig
from metaformer.data.load.config import LoaderConfig
from metaformer.data.plan.augmentation import AugmentationConfig
from metaformer.errors import UserError, check_at_least, one_line, unknown_name
from metaformer.models import list_models
from metaformer.models.config import InitHead, ModelConfig
from metaformer.reporting.recipes import recipes
from metaformer.tracking.config import TrackingConfig
from metaformer.training.config import EmaConfig, LoopConfig, OptimizerConfig, PrecisionConfig

_CONTROL_CHARACTER = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")
CONF_FOLDER = Path(__file__).parents[2] / "conf"


@dataclass
class CommonConfig:
    """Configuration that train.py and validate.py share."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    loader: LoaderConfig = field(default_factory=LoaderConfig)
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    image_size: int | None = None  # pixels per side; None: the network's default
    num_classes: int | None = None  # None: the number of classes in the data set
    seed: int = 0
    workers: int | None = None  # loader processes or threads per rank; None: the rank's share of the CPU cores
    eval_batch_size: int = 128  # images per rank
    channels_last: bool = True
    compile: bool = False
    # Interpolated fields and their raw text: files of a run store ${oc.env:NAME}, never a value that may be secret.
    from_environment: dict[str, str] = field(default_factory=dict, metadata={"omegaconf_ignore": True})

    def __post_init__(self) -> None:
        check_at_least(1, self, "image_size", "num_classes", "eval_batch_size")
        check_at_least(0, self, "workers", "seed")
        if self.image_size is not None and self.image_size < 32:
            raise UserError(f"image_size={self.image_size}: the networks reduce an image 32-fold; use 32 or more")


@dataclass
class TrainConfig(LoopConfig, CommonConfig):
    """Configuration of train.py. The defaults are the paper's recipe."""

    augmentation: AugmentationConfig = field(default_factory=AugmentationConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    ema: EmaConfig = field(default_factory=EmaConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    run_dir: str | None = None  # None: runs/MODEL-EXPERIMENT
    allow_unused_classes: bool = False  # allow num_classes to exceed the data set's classes
    fill_last_batch: bool = False  # pad the last batch with the epoch's first images; False: drop an incomplete batch
    init_weights: str | None = None  # weights file to start from
    init_head: InitHead = InitHead.same  # how the classifier of these weights is used
    resume: str = "auto"  # auto: continue the run in run_dir; never: require an empty run_dir; or a checkpoint

    def __post_init__(self) -> None:
        CommonConfig.__post_init__(self)
        LoopConfig.__post_init__(self)
        self.data.check_can_train()
        if self.init_head is not InitHead.same and self.init_weights is None:
            raise UserError(f"init_head={self.init_head.value}: nothing to convert; give init_weights too")

    @property
    def learning_rate(self) -> float:
        """Return the peak learning rate."""
        return self.optimizer.learning_rate(self.global_batch_size)

    def check_batches(self, world_size: int) -> None:
        """Raise `UserError` unless the global batch divides evenly among ranks and suits mixup and cutmix."""
        parts = world_size * self.accumulation_steps
        size, remainder = divmod(self.global_batch_size, parts)
        if remainder or not size:
            raise UserError(
                f"global_batch_size={self.global_batch_size}: not divisible by {world_size} ranks x "
                f"accumulation_steps={self.accumulation_steps}; use a multiple of {parts}"
            )
        group = self.augmentation.mix_group_size
        if self.augmentation.mixes and size % (group or 2):
            raise UserError(
                f"global_batch_size={self.global_batch_size}: gives each rank batches of {size}, but mixup and cutmix "
                f"need {f'a multiple of augmentation.mix_group_size={group}' if group else 'an even size'}; "
                f"use a multiple of {parts * (group or 2)}, or augmentation=light"
            )

    @property
    def resolved_run_dir(self) -> Path:
        """Return the run folder, which `compose` has set."""
        assert self.run_dir is not None
        return Path(self.run_dir)


@dataclass
class ValidateConfig(CommonConfig):
    """Configuration of validate.py."""

    checkpoint: str | None = None  # weights file, checkpoint folder or run folder
    use_ema: bool = False
    results_csv: str | None = None  # append the result to this file

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.checkpoint is None:
            raise UserError("checkpoint: missing; give checkpoint=FILE, a checkpoint folder or a run folder")


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

    try:
        os.environ["HYDRA_FULL_ERROR"] = "1"  # makes Hydra raise errors instead of printing them
        capture()
        if not composed:
            raise SystemExit(0)
        if len(composed) > 1:
            raise UserError("-m: multi-run is not supported; start one job for each configuration")
        ((values, hydra_config),) = composed
        config = _to_dataclasses(values)
    except HydraException as error:
        raise UserError(_explain_hydra_error(error)) from error
    except OmegaConfBaseException as error:
        raise UserError(_explain_omegaconf_error(error)) from error
    if isinstance(config, TrainConfig) and config.run_dir is None:
        config.run_dir = _default_run_dir(config, hydra_config.runtime.choices.get("experiment") or "default")
    assert isinstance(config, config_type)
    return config


def compose_recipe(experiment: str) -> TrainConfig:
    """Return the configuration of train.py with `experiment=` as the only override."""
    return compose_training([f"experiment={experiment}"])


def compose_training(overrides: Sequence[str]) -> TrainConfig:
    """Return the configuration of train.py with these overrides on its command line."""
    _store_schemas()
    try:
        with hydra.initialize_config_dir(str(CONF_FOLDER.absolute()), version_base="1.3"):
            values = hydra.compose("train", list(overrides), return_hydra_config=True)
        experiment = values.hydra.runtime.choices.get("experiment") or "default"
        with open_dict(values):
            del values["hydra"]
        config = _to_dataclasses(values)
    except HydraException as error:
        raise UserError(_explain_hydra_error(error)) from error
    except OmegaConfBaseException as error:
        raise UserError(_explain_omegaconf_error(error)) from error
    assert isinstance(config, TrainConfig)
    config.run_dir = config.run_dir or _default_run_dir(config, experiment)
    return config


def freeze(config: TrainConfig) -> str:
    """Return YAML from which `train.py --config-dir --config-name` composes this configuration without conf/."""
    root = OmegaConf.load(CONF_FOLDER / "train.yaml")
    assert isinstance(root, DictConfig)
    no_logging = [{f"override hydra/{logging}": "none"} for logging in ("job_logging", "hydra_logging")]
    root.defaults = ["train_schema", "_self_", *no_logging]
    return "# Composed by scripts/submit.py\n" + OmegaConf.to_yaml(OmegaConf.merge(root, redacted(config)))


def _to_dataclasses(values: DictConfig) -> Any:
    """Convert composed values to the validated dataclasses."""
    config: Any = OmegaConf.to_object(values)
    _check_values(config)
    _check_no_added_fields(config, OmegaConf.to_container(values, resolve=False))
    config.from_environment = dict(_interpolated_fields(values))
    return config


def _check_no_added_fields(config: Any, values: Any, parent: str = "") -> None:
    """Raise `UserError` for a field that no dataclass has, such as `_target_`, which Hydra's `+a.b=c` can add."""
    names = [field.name for field in dataclasses.fields(config)]
    for name, value in values.items():
        if name not in names:
            raise UserError(f"{parent}{name}: no such field; the fields are {', '.join(names)}")
        if dataclasses.is_dataclass(getattr(config, name)):
            _check_no_added_fields(getattr(config, name), value, f"{parent}{name}.")


def _check_values(value: Any, name: str = "") -> None:
    """Raise `UserError` for control characters and for integers of more than 64 bits, which paths and torch reject."""
    if dataclasses.is_dataclass(value):
        value = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if isinstance(value, dict | list):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            _check_values(item, f"{name}.{key}" if name else str(key))
    elif isinstance(value, str) and (found := _CONTROL_CHARACTER.search(value)):
        raise UserError(f"{name}: contains the control character {found[0]!r}; remove it")
    elif isinstance(value, int) and not -(2**63) <= value < 2**63:
        raise UserError(f"{name}={value}: too large; must be less than 2^63")


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


def _default_run_dir(config: TrainConfig, experiment: str) -> str:
    return f"runs/{config.model.name}-{experiment.replace('/', '-')}"


def _explain_hydra_error(error: HydraException) -> str:
    """Return a one-line message for a Hydra error, taken from its more specific OmegaConf cause if it has one."""
    if isinstance(error.__cause__, OmegaConfBaseException):
        return _explain_omegaconf_error(error.__cause__)
    if isinstance(error, MissingConfigException) and error.missing_cfg_file and error.options:
        group, name = error.missing_cfg_file.split("/", 1)
        if not (CONF_FOLDER / group).is_dir():  # one of Hydra's own groups
            group, name = os.path.split(error.missing_cfg_file)
            return str(unknown_name(group, name, error.options))
        return str(unknown_name(group, name, _choices(group)))
    if isinstance(error, OverrideParseException):
        return f"{error.override}: cannot be parsed; quote a value with special characters, as in 'a=\"b c\"'"
    return one_line(error)


def _choices(group: str) -> list[str]:
    """Return a group's choices in conf/ and in the config store, including those of its subgroups."""
    files = [str(file.relative_to(CONF_FOLDER / group)) for file in (CONF_FOLDER / group).rglob("*.yaml")]
    stored: Any = ConfigStore.instance().repo
    for part in group.split("/"):
        stored = stored.get(part, {})
    nested = [f"{entry}/{name}" for entry in stored if "." not in entry for name in _choices(f"{group}/{entry}")]
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


def redacted(config: CommonConfig) -> DictConfig:
    """Return the configuration with interpolations such as `${oc.env:NAME}` unresolved, safe to write to files."""
    values = OmegaConf.create(_to_containers(config))
    assert isinstance(values, DictConfig)
    for key, raw in config.from_environment.items():
        OmegaConf.update(values, key, raw)
    return values


def fingerprint(config: CommonConfig) -> str:
    """Return a hash of the configuration, including values from the environment."""
    return hashlib.sha256(OmegaConf.to_yaml(OmegaConf.create(_to_containers(config))).encode()).hexdigest()


def _to_containers(value: Any) -> Any:
    """Convert a configuration to nested dicts and lists for OmegaConf, with `${` escaped in all text."""
    if dataclasses.is_dataclass(value):
        names = (field.name for field in dataclasses.fields(value) if not field.metadata.get("omegaconf_ignore"))
        return {name: _to_containers(getattr(value, name)) for name in names}
    if isinstance(value, list | tuple):
        return [_to_containers(item) for item in value]
    if isinstance(value, dict):
        return {name: _to_containers(item) for name, item in value.items()}
    if isinstance(value, str):
        return re.sub(r"(\\*)\$\{", r"\1\1\\${", value)
    return value.name if isinstance(value, Enum) else value


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

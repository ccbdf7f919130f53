"""The configuration of both programs, typed: YAML in conf/ holds values, the types are here and with their owners."""

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
from metaformer.training.config import LoopConfig
from metaformer.training.ema import EmaConfig
from metaformer.training.optimizer import OptimizerConfig
from metaformer.training.precision import PrecisionConfig

_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")
CONF_FOLDER = Path(__file__).parents[2] / "conf"


@dataclass
class CommonConfig:
    """What both programs need: a network, a data set, and how to read it."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    loader: LoaderConfig = field(default_factory=LoaderConfig)
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    image_size: int | None = None  # pixels, each side; None: the network's own
    num_classes: int | None = None  # None: counted in the data
    seed: int = 0
    workers: int | None = None  # processes or threads of a loader, per rank; None: this rank's share of the CPU cores
    eval_batch_size: int = 128  # images of a rank
    channels_last: bool = True
    compile: bool = False
    # Fields whose values came out of the environment, as they were given: what is kept of a run must hold no secret.
    from_environment: dict[str, str] = field(default_factory=dict, metadata={"omegaconf_ignore": True})

    def __post_init__(self) -> None:
        check_at_least(1, self, "image_size", "num_classes", "eval_batch_size")
        check_at_least(0, self, "workers", "seed")
        if self.image_size is not None and self.image_size < 32:
            raise UserError(f"image_size={self.image_size}: the networks reduce an image 32-fold; use 32 or more")


@dataclass
class TrainConfig(LoopConfig, CommonConfig):
    """Configuration of train.py; the defaults are the paper's recipe."""

    augmentation: AugmentationConfig = field(default_factory=AugmentationConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    ema: EmaConfig = field(default_factory=EmaConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    run_dir: str | None = None  # None: runs/MODEL-EXPERIMENT
    allow_unused_classes: bool = False  # num_classes may be more than the data set has
    fill_last_batch: bool = False  # of an epoch, with images that it began with; else an incomplete batch is left out
    init_weights: str | None = None  # weights file to start from
    init_head: InitHead = InitHead.same  # how its classifier becomes the network's
    resume: str = "auto"  # auto: go on where the run folder stands; never: only in an empty folder; or a checkpoint

    def __post_init__(self) -> None:
        CommonConfig.__post_init__(self)
        LoopConfig.__post_init__(self)
        self.data.check_can_train()
        if self.init_head is not InitHead.same and self.init_weights is None:
            raise UserError(f"init_head={self.init_head.value}: nothing to convert; give init_weights too")

    @property
    def learning_rate(self) -> float:
        """The peak learning rate."""
        return self.optimizer.learning_rate(self.global_batch_size)

    def check_batches(self, world_size: int) -> None:
        """The batch must divide among the ranks, and mix in pairs.

        Raises:
            UserError: it does not.
        """
        parts = world_size * self.accumulation_steps
        size, left = divmod(self.global_batch_size, parts)
        if left or not size:
            raise UserError(
                f"global_batch_size={self.global_batch_size}: does not divide by {world_size} ranks x "
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
        """The run folder; `compose` has filled it in."""
        assert self.run_dir is not None
        return Path(self.run_dir)


@dataclass
class ValidateConfig(CommonConfig):
    """Configuration of validate.py."""

    checkpoint: str | None = None  # weights file, checkpoint folder or run folder
    use_ema: bool = False
    results_csv: str | None = None  # gets a row with the result

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.checkpoint is None:
            raise UserError("checkpoint: missing; give checkpoint=FILE, a checkpoint folder or a run folder")


C = TypeVar("C", bound=CommonConfig)


def compose(name: str, kind: type[C]) -> C:
    """The typed, checked configuration that the command line asks for, from conf/NAME.yaml; `kind` is its type.

    Hydra's own flags work too (`--help`, `--cfg job`); those print and exit.

    Raises:
        UserError: an override names an unknown field, group or value, or fields contradict each other.
    """
    _store_schemas()
    composed: list[tuple[DictConfig, HydraConf]] = []

    # The program runs outside hydra.main, which would report its errors in a manner of its own.
    @hydra.main(version_base="1.3", config_path=str(CONF_FOLDER), config_name=name)
    def capture(config: DictConfig) -> None:
        composed.append((config, HydraConfig.get()))

    try:
        os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra then raises what is wrong instead of printing a page about it
        capture()
        if not composed:
            raise SystemExit(0)
        if len(composed) > 1:
            raise UserError("-m: one process trains one configuration; start a job for each")
        ((values, hydra_config),) = composed
        config = _typed(values)
    except HydraException as error:
        raise UserError(_explain(error)) from error
    except OmegaConfBaseException as error:
        raise UserError(_explain_value(error)) from error
    if isinstance(config, TrainConfig) and config.run_dir is None:
        config.run_dir = _default_run_dir(config, hydra_config.runtime.choices.get("experiment") or "default")
    assert isinstance(config, kind)
    return config


def compose_recipe(experiment: str) -> TrainConfig:
    """The configuration of train.py with `experiment=` and nothing else.

    Raises:
        UserError: there is no such experiment, or it cannot work.
    """
    return compose_training([f"experiment={experiment}"])


def compose_training(overrides: Sequence[str]) -> TrainConfig:
    """The configuration that train.py has with these overrides on its command line.

    Raises:
        UserError: as `compose`.
    """
    _store_schemas()
    try:
        with hydra.initialize_config_dir(str(CONF_FOLDER.absolute()), version_base="1.3"):
            values = hydra.compose("train", list(overrides), return_hydra_config=True)
        experiment = values.hydra.runtime.choices.get("experiment") or "default"
        with open_dict(values):
            del values["hydra"]
        config = _typed(values)
    except HydraException as error:
        raise UserError(_explain(error)) from error
    except OmegaConfBaseException as error:
        raise UserError(_explain_value(error)) from error
    assert isinstance(config, TrainConfig)
    config.run_dir = config.run_dir or _default_run_dir(config, experiment)
    return config


def freeze(config: TrainConfig) -> str:
    """What train.py --config-dir=... --config-name=... composes to this configuration, whatever becomes of conf/."""
    frozen = OmegaConf.load(CONF_FOLDER / "train.yaml")
    assert isinstance(frozen, DictConfig)
    quiet = [{f"override hydra/{logging}": "none"} for logging in ("job_logging", "hydra_logging")]
    frozen.defaults = ["train_schema", "_self_", *quiet]
    return "# Composed by scripts/submit.py\n" + OmegaConf.to_yaml(OmegaConf.merge(frozen, redacted(config)))


def _typed(values: DictConfig) -> Any:
    """The dataclasses that composed values mean, checked."""
    config: Any = OmegaConf.to_object(values)
    _refuse_values_of_no_use(config)
    _refuse_added_fields(config, OmegaConf.to_container(values, resolve=False))
    config.from_environment = dict(_from_environment(values))
    return config


def _refuse_added_fields(config: Any, values: Any, parent: str = "") -> None:
    """Hydra's `+a.b=c` adds what no dataclass has, such as `_target_`: nothing would ever read it."""
    known = [each.name for each in dataclasses.fields(config)]
    for name, value in values.items():
        if name not in known:
            raise UserError(f"{parent}{name}: no such field; known: {', '.join(known)}")
        if dataclasses.is_dataclass(getattr(config, name)):
            _refuse_added_fields(getattr(config, name), value, f"{parent}{name}.")


def _refuse_values_of_no_use(value: Any, name: str = "") -> None:
    """No number needs more than 64 bits, and no text a control character: neither torch nor a path takes them."""
    if dataclasses.is_dataclass(value):
        value = {each.name: getattr(value, each.name) for each in dataclasses.fields(value)}
    if isinstance(value, dict | list):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            _refuse_values_of_no_use(item, f"{name}.{key}" if name else str(key))
    elif isinstance(value, str) and (found := _CONTROL.search(value)):
        raise UserError(f"{name}: has the control character {found[0]!r}; leave it out")
    elif isinstance(value, int) and not -(2**63) <= value < 2**63:
        raise UserError(f"{name}={value}: too large; must be less than 2^63")


def _store_schemas() -> None:
    store = ConfigStore.instance()
    store.store("train_schema", TrainConfig)
    store.store("validate_schema", ValidateConfig)
    # Names that only repeat a table need no files: conf/ holds the choices that say more.
    for name in list_models():
        store.store(name, {"name": name}, group="model")
    for recipe in recipes():
        store.store(recipe.name, recipe.values, group=recipe.group, package="_global_")


def _default_run_dir(config: TrainConfig, experiment: str) -> str:
    return f"runs/{config.model.name}-{experiment.replace('/', '-')}"


def _explain(error: HydraException) -> str:
    """Hydra's message in one line; where a value or a key is wrong, its cause's, which says more."""
    if isinstance(error.__cause__, OmegaConfBaseException):
        return _explain_value(error.__cause__)
    if isinstance(error, MissingConfigException) and error.missing_cfg_file and error.options:
        group, name = error.missing_cfg_file.split("/", 1)
        if not (CONF_FOLDER / group).is_dir():  # a group of Hydra's own
            group, name = os.path.split(error.missing_cfg_file)
            return str(unknown_name(group, name, error.options))
        return str(unknown_name(group, name, _choices(group)))
    if isinstance(error, OverrideParseException):
        return f"{error.override}: cannot be parsed; quote a value with special characters, as in 'a=\"b c\"'"
    return one_line(error)


def _choices(group: str) -> list[str]:
    """Return the names that a group has, in files and in the store, also in folders of the group."""
    files = [str(file.relative_to(CONF_FOLDER / group)) for file in (CONF_FOLDER / group).rglob("*.yaml")]
    stored = ConfigStore.instance().list(group)
    below = [f"{entry}/{name}" for entry in stored if "." not in entry for name in _choices(f"{group}/{entry}")]
    return [*(name.removesuffix(".yaml") for name in [*files, *stored] if name.endswith(".yaml")), *below]


def _explain_value(error: OmegaConfBaseException) -> str:
    key = error.full_key or str(error.key)
    if isinstance(error, ConfigKeyError | ConfigAttributeError) and dataclasses.is_dataclass(error.object_type):
        known = [field.name for field in dataclasses.fields(error.object_type)]
        parent = key.removesuffix(str(error.key))
        near = difflib.get_close_matches(str(error.key), known, n=3) or known
        return f"{key}: no such field; did you mean {', '.join(parent + name for name in near)}?"
    if isinstance(error, MissingMandatoryValue):
        return f"{key}: missing; give {key}=..."
    return f"{key}: {str(error).splitlines()[0]}"


def redacted(config: CommonConfig) -> DictConfig:
    """The whole configuration as it may be kept: what came out of the environment stands there as `${oc.env:NAME}`."""
    values = OmegaConf.create(_plain(config))
    assert isinstance(values, DictConfig)
    for key, given in config.from_environment.items():
        OmegaConf.update(values, key, given)
    return values


def fingerprint(config: CommonConfig) -> str:
    """Equal for equal configurations, values from the environment included."""
    return hashlib.sha256(OmegaConf.to_yaml(OmegaConf.create(_plain(config))).encode()).hexdigest()


def _plain(value: Any) -> Any:
    """A configuration as nested dicts and lists that OmegaConf reads as these very values: no text interpolates."""
    if dataclasses.is_dataclass(value):
        kept = (field.name for field in dataclasses.fields(value) if not field.metadata.get("omegaconf_ignore"))
        return {name: _plain(getattr(value, name)) for name in kept}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, str):
        return re.sub(r"(\\*)\$\{", r"\1\1\\${", value)
    return value.name if isinstance(value, Enum) else value


def _from_environment(values: DictConfig) -> Iterator[tuple[str, str]]:
    """The fields that interpolate a variable, or another field, which may; each with what was given.

    Items of lists are fields of their own. The places of data sets are no secrets.
    """
    pending: list[tuple[str, Any]] = [("", OmegaConf.to_container(values, resolve=False))]
    while pending:
        key, value = pending.pop()
        if isinstance(value, dict | list):
            items = value.items() if isinstance(value, dict) else enumerate(value)
            pending.extend((f"{key}.{name}" if key else str(name), item) for name, item in items)
        elif isinstance(value, str) and "${" in value and key != "data.root":
            yield key, value

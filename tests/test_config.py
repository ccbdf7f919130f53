"""Tests that stored configurations contain no secrets, and of options and values that are rejected."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from metaformer.composing import compose, default_run_dir, freeze
from metaformer.config import TrainConfig, ValidateConfig, fingerprint, redacted
from metaformer.errors import UserError
from metaformer.option_names import ADVICE, FIELDS, field_names
from metaformer.reporting.paper import ROWS

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


def test_flags_between_overrides(composed: Compose, tmp_path: Path) -> None:
    """Hydra's flags may stand before, between and after overrides, whose order is kept."""
    (tmp_path / "optimizer").mkdir()
    (tmp_path / "optimizer" / "mine.yaml").write_text("name: lamb\nbase_lr: 2e-3\n")
    config = composed("seed=1", "--config-dir", str(tmp_path), "optimizer=mine", "seed=2")
    assert (config.optimizer.name, config.optimizer.base_lr, config.seed) == ("lamb", 2e-3, 2)


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


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("lr=0.1", "lr: no such field; use optimizer.lr=..."),
        ("--lr 0.1", "--lr: options are written NAME=VALUE; use optimizer.lr=..."),
        ("--lr=0.1", "--lr=0.1: options are written NAME=VALUE; use optimizer.lr=..."),
        ("batch_size=64", "batch_size: no such field; use global_batch_size=... or eval_batch_size=..."),
        ("-b 64", "-b: options are written NAME=VALUE; use global_batch_size=... or eval_batch_size=..."),
        ("--epochs 3", "--epochs: options are written NAME=VALUE; use epochs=..."),
        ("--experiment demo", "--experiment: options are written NAME=VALUE; use experiment=NAME, one of"),
        ("--data-path /d", "--data-path: options are written NAME=VALUE; use data.root=..."),
        ("--data /d", "--data: options are written NAME=VALUE; use data.root=..."),
        ("--model resnet50", "--model: options are written NAME=VALUE; use model=..."),
        ("data=photos", "data=photos: data= selects a kind of data set; use data.root=photos"),
        ("--nproc_per_node=2", "--nproc_per_node=2: options are written NAME=VALUE; start a process for each GPU: "),
        ("data=/d/images", "data=/d/images: data= selects a kind of data set; use data.root=/d/images"),
        ("/d/images", "/d/images: options are written NAME=VALUE, as in data.root=/d/images"),
        ("resnet50", "resnet50: options are written NAME=VALUE, as in model=poolformer_s12"),
        ("model=resnet50", "model=resnet50: unknown; --help lists the networks of the papers; "
                           "a network of timm is model=timm model.name=resnet50"),
        ("model=poolformer_s21", "model=poolformer_s21: unknown; did you mean poolformer_s24, poolformer_s12"),
        ("pretrained=true", "pretrained: no such field; give init_weights=NAME to train.py or checkpoint=NAME to"),
        ("device=cuda", "device: no such field; each rank uses its GPU, or the CPU where there is none"),
        ("amp=true", "amp: no such field; use precision=bf16, precision=fp16 or precision=fp32"),
        ("ema=true", "ema=true: unknown; known: disabled, enabled"),
        ("ema=null", "ema=null: unknown; known: disabled, enabled"),
        ("model@x=1", "model@x=1: a group has one place only; write model=1"),
        ("+ema@x=enabled", "+ema@x=enabled: a group has one place only; write ema=enabled"),
        ("--shell-completion", "--shell-completion: Expecting one subcommand from ['install', 'uninstall', 'query']"),
        ("loader=8", "loader=8: unknown; known: auto, dali, pil, torch"),
        ("warmup_epochs=1", "warmup_epochs: no such field; use schedule.warmup_epochs=..."),
        ("optimizer.warmup_epochs=1", "optimizer.warmup_epochs: no such field; use schedule.warmup_epochs=..."),
        ("optimiser=adamw", "optimiser: no such field; did you mean optimizer?"),
        ("data.rot=/d", "data.rot: no such field; did you mean data.root?"),
        ("ema.dcy=1", "ema.dcy: no such field; did you mean ema.decay?"),
        ("ema.zzz=1", "ema.zzz: no such field; its fields are ema.enabled, ema.decay, ema.warmup"),
        ("+optimizer.zzz.lr=1", "optimizer.zzz: no such field; its fields are optimizer.name, "),
        ("zzz=1", "zzz: no such field; --help lists all fields"),
        ("=3", "=3: options are written NAME=VALUE; give the name too"),
        ("seed=0,1", "seed=0,1: several values; write a list as NAME=[A,B]; python scripts/submit.py trains with each"),
        ("-m seed=0,1", "-m: a program trains one configuration; python scripts/submit.py runs each combination of "),
    ],
)  # fmt: skip
def test_options_of_other_programs(
    composed: Compose, arguments: str, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Options that newcomers type end in one short line with the form to use here."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    with pytest.raises(UserError) as caught:
        composed(*arguments.split())
    assert str(caught.value).startswith(expected)
    assert len(str(caught.value)) < 250


@pytest.mark.parametrize(
    ("argument", "expected"),
    [
        ("batch_size=64", "batch_size: no such field; use eval_batch_size=..."),
        ("lr=0.1", "lr: no such field; only train.py has it"),
        ("weights=FILE", "weights: no such field; use checkpoint=..."),
    ],
)
def test_validation_offers_its_own_fields(monkeypatch: pytest.MonkeyPatch, argument: str, expected: str) -> None:
    """validate.py does not advise fields that only train.py has."""
    monkeypatch.setattr(sys, "argv", ["validate.py", "checkpoint=FILE", argument])
    with pytest.raises(UserError) as caught:
        compose("validate", ValidateConfig)
    assert str(caught.value) == expected


def test_advised_fields_exist() -> None:
    """Every field that replaces an option of another framework is a field here, and no field is such an option."""
    fields = {*field_names(TrainConfig), *field_names(ValidateConfig)}
    assert {field for meant in FIELDS.values() for field in meant} <= fields
    assert not fields & {*FIELDS, *ADVICE}


def test_run_folders_do_not_repeat_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each recipe has a run folder of its own, without the model's name twice; an existing folder is still used."""
    monkeypatch.chdir(tmp_path)
    folders = [default_run_dir(row.model or "", row.name) for row in ROWS if row.has_recipe]
    assert len(set(folders)) == len(folders)
    assert default_run_dir("poolformer_s12", "default") == "runs/poolformer_s12-default"
    assert default_run_dir("poolformer_s12", "demo") == "runs/poolformer_s12-demo"
    assert default_run_dir("poolformer_s12", "paper/poolformer_s12") == "runs/poolformer_s12-paper"
    assert default_run_dir("caformer_s18", "baselines/caformer_s18_384") == "runs/caformer_s18-baselines-384"
    old = tmp_path / "runs" / "poolformer_s12-paper-poolformer_s12"
    old.mkdir(parents=True)
    assert default_run_dir("poolformer_s12", "paper/poolformer_s12") == str(old.relative_to(tmp_path))

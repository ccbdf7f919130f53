"""The paper's rows and their recipes."""

import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch

from metaformer.assembly import resolve_config
from metaformer.composing import CONF_FOLDER, compose, compose_recipe
from metaformer.config import ValidateConfig
from metaformer.errors import UserError
from metaformer.models import create_timm_model, list_models
from metaformer.models.config import Preprocessing, ResizeFilter
from metaformer.reporting.commands import validate_command
from metaformer.reporting.paper import ROWS, Row, Table, find_rows
from metaformer.reporting.recipes import recipe_file
from metaformer.training.schedule import Schedule

TRAINED = [row for row in ROWS if row.has_recipe]
FIRST_PAPER = [row for row in TRAINED if not row.name.startswith("baselines/")]
FINETUNED = [row for row in TRAINED if row.table is Table.baselines_384]
# Second paper, appendix: drop path and head dropout of fine-tuning at 384 px.
RATES_384 = {
    "convformer": {"s18": (0.3, 0.4), "s36": (0.5, 0.4), "m36": (0.8, 0.5), "b36": (0.8, 0.5)},
    "caformer": {"s18": (0.3, 0.4), "s36": (0.5, 0.4), "m36": (0.7, 0.4), "b36": (0.8, 0.5)},
}
LONGER = {400: 77.5, 500: 77.9, 1000: 78.4, 1500: 78.6, 2000: 78.8, 2500: 78.8, 3000: 78.8}


def test_every_row_of_the_tables_is_there() -> None:
    """Every table has all its rows, each once; every network has a row."""
    counts = {table: sum(row.table is table for row in ROWS) for table in Table}
    assert counts == {
        Table.paper: 5, Table.longer: 7, Table.ablation: 17, Table.comparison: 22,
        Table.baselines: 23, Table.baselines_384: 8, Table.baselines_21k: 8, Table.baselines_21k_384: 8,
    }  # fmt: skip
    assert len({row.name for row in ROWS}) == len(ROWS)
    assert {row.model for row in TRAINED} == set(list_models())


@pytest.mark.parametrize("row", [row for row in ROWS if row.table is Table.baselines], ids=lambda row: row.name)
def test_baselines_recipe(row: Row) -> None:
    """PoolFormer's recipe; ConvFormer and CAFormer warm up for 20 epochs, and CAFormer uses LAMB at lr 8e-3."""
    recipe, images = resolve_config(compose_recipe(row.name), None)
    caformer = row.name.startswith("baselines/caformer")
    trained = caformer or row.name.startswith("baselines/convformer")
    assert (recipe.model.name, row.released_weights) == (row.model, f"official:{row.model}")
    assert (recipe.epochs, recipe.global_batch_size, recipe.schedule.cooldown_epochs) == (300, 4096, 10)
    assert (recipe.schedule.warmup_epochs, recipe.schedule.min_lr) == (20 if trained else 5, 1e-5)
    assert (recipe.optimizer.name, recipe.learning_rate) == (("lamb", 8e-3) if caformer else ("adamw", 4e-3))
    assert (recipe.optimizer.weight_decay, recipe.ema.enabled, recipe.augmentation.name) == (0.05, False, "paper")
    assert (recipe.model.drop_path_rate, recipe.model.head_dropout) == (None, None), "the network's own"
    assert (images.image_size, images.crop_pct) == (224, 1.0)
    assert "300 epochs and 10 of cool-down" in recipe_file(row)


@pytest.mark.parametrize("row", FINETUNED, ids=lambda row: row.name)
def test_finetuning_recipe(row: Row) -> None:
    """30 epochs at a constant lr, 384 px, EMA, no mixing, from the released weights of 224 px."""
    recipe, images = resolve_config(compose_recipe(row.name), None)
    assert row.model is not None
    family, size = row.model.split("_")
    assert recipe.model.name == row.model
    assert recipe.init_weights == f"official:{row.model}"
    assert row.released_weights == f"official:{row.model}_384"
    assert (images.image_size, images.crop_pct, row.image_size) == (384, 1.0, 384)
    assert (recipe.total_epochs, recipe.global_batch_size) == (30, 1024)
    lr = 1e-4 if family == "caformer" else 5e-5
    weights = torch.nn.Linear(1, 1)
    schedule = Schedule(recipe.schedule, torch.optim.SGD(weights.parameters(), recipe.learning_rate), 30, 10)
    assert [schedule.set(step) for step in range(300)] == pytest.approx([lr] * 300)
    assert recipe.optimizer.name == ("lamb" if family == "caformer" else "adamw")
    assert (recipe.ema.enabled, recipe.ema.decay, recipe.augmentation.mixes) == (True, 0.9999, False)
    assert (recipe.model.drop_path_rate, recipe.model.head_dropout) == RATES_384[family][size]
    assert "30 epochs and 0 of cool-down read 38 million images" in recipe_file(row)


@pytest.mark.parametrize("row", FIRST_PAPER, ids=lambda row: row.name)
def test_recipe_is_the_papers(row: Row) -> None:
    """Each recipe composes to its network under the paper's training; its file states the row in its first lines."""
    recipe = compose_recipe(row.name)
    text = recipe_file(row)
    assert recipe.model.name == row.model
    epochs = next((number for number in LONGER if f"_{number}_" in row.name), 300)
    batch = 1024 if row.name in ("ablation/pppa", "ablation/ppaa") else 4096
    assert (recipe.epochs, recipe.schedule.cooldown_epochs, recipe.global_batch_size) == (epochs, 10, batch)
    assert recipe.optimizer.learning_rate(batch) == pytest.approx(batch / 1024 * 1e-3)
    assert row.top1 == LONGER.get(epochs, row.top1)
    assert (recipe.augmentation.name, recipe.optimizer.name, recipe.data.name) == ("paper", "adamw", "imagenet")
    head = text.splitlines()[1:5]
    assert f"top-1 {row.top1} in the paper" in head[0]
    assert f"train.py experiment={row.name} data.root=" in head[1]
    assert head[2].startswith("# Hardware: ")
    images = (epochs + 10) * 1_281_167
    days = max(1, round(epochs / 300))
    assert f"{images / 1e6:,.0f} million images: {images / days / 86400:,.0f} images/s" in head[3]


def test_a_copied_recipe_is_the_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A recipe's file, saved in a conf/ folder under another name, composes to the same configuration."""
    conf = tmp_path / "conf"
    shutil.copytree(CONF_FOLDER, conf)
    (row,) = find_rows(["paper/poolformer_s12_400_epochs"])
    (conf / "experiment" / "mine.yaml").write_text(recipe_file(row))
    monkeypatch.setattr("metaformer.composing.CONF_FOLDER", conf)
    expected = compose_recipe(row.name)
    assert replace(compose_recipe("mine"), run_dir=expected.run_dir) == expected


def test_compared_networks_are_timms() -> None:
    """timm creates the network of each comparison with released weights, with the paper's number of parameters."""
    for row in ROWS:
        if row.is_comparison and row.model is not None and row.parameters < 70:
            parameters = sum(p.numel() for p in create_timm_model(row.model, 1000).parameters())
            assert parameters / 1e6 == pytest.approx(row.parameters, abs=0.6), row.name


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_released_weights_get_their_preprocessing(row: Row, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command of each row evaluates at 224 px with timm's or the paper's crop, filter, mean and std."""
    if row.released_weights is None:
        return
    command = validate_command(row, Path("results.csv"), 1)
    monkeypatch.setattr(sys, "argv", command[1:])
    config = compose("validate", ValidateConfig)
    _, found = resolve_config(config, config.checkpoint, evaluation=True)
    if row.name.startswith("baselines/"):
        size = 384 if "_384" in row.name else 224
        assert (found.image_size, found.crop_pct, row.image_size) == (size, 1.0, size)
        assert found.interpolation is ResizeFilter.bicubic
        return
    if row.has_recipe:
        wide = ("poolformer_m36", "poolformer_m48", "metaformer_s12_pppa", "metaformer_s12_ppaa", "metaformer_s12_ppff")
        mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
        assert found == Preprocessing(224, 0.95 if row.model in wide else 0.9, ResizeFilter.bicubic, mean, std)
        return
    cfg = timm.get_pretrained_cfg(row.released_weights.removeprefix("hf:timm/"), allow_unregistered=False)
    assert cfg is not None
    assert (cfg.input_size, cfg.crop_mode) == ((3, 224, 224), "center")
    assert found == Preprocessing(224, cfg.crop_pct, ResizeFilter(cfg.interpolation), cfg.mean, cfg.std)


def test_rows_are_found_by_name_and_pattern() -> None:
    """Names keep the given order and patterns the tables' order, without duplicates; unmatched names are refused."""
    assert [row.name for row in find_rows(["ablation/relu", "ablation/[rs]*lu"])] == ["ablation/relu", "ablation/silu"]
    assert len(find_rows(["*"])) == len(ROWS)
    with pytest.raises(UserError, match=r"^row=paper/poolformer_s13: unknown; .*paper/poolformer_s12"):
        find_rows(["paper/poolformer_s13"])

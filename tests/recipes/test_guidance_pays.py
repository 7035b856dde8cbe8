"""The experiment of docs/results/guidance-pays.md: what is on record is not run again, effects, Holm's adjustment."""

import argparse
import importlib.util
import math
import shlex
import sys
from pathlib import Path
from types import ModuleType

import pytest

from npo_cli.config.loading import load_recipe
from npo_cli.experiments.bench_plan import SETTING

RECIPE = Path(__file__).parents[2] / "recipes" / "guidance_pays.py"


@pytest.fixture(scope="module")
def recipe() -> ModuleType:
    """The script as a module."""
    spec = importlib.util.spec_from_file_location("guidance_pays", RECIPE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def make_row(recipe: ModuleType, arm: str, seed: int, tokens: float | None, **changed: object) -> object:
    """One seed of addh2's confirmation."""
    place = {"part": "confirm", "cell": "addh2", "arm": f"matched-{arm}", "seed": seed, "target": 0.9}
    measured = {"total_tokens": 1000.0, "seconds": 1.0, "final_accuracy": 0.9, "gain_at_equal_tokens": 0.0}
    return recipe.SeedRow(**(place | {"tokens": tokens} | measured | changed))


def test_holm_multiplies_the_smallest_p_value_by_the_number_of_cells(recipe: ModuleType) -> None:
    assert recipe.adjust_holm([0.01, 0.04, 0.03], family=3) == pytest.approx([0.03, 0.06, 0.06])
    assert recipe.adjust_holm([0.04, 0.01], family=3) == pytest.approx([0.08, 0.03])
    assert recipe.adjust_holm([0.5, 0.9, 0.8], family=3) == [1.0, 1.0, 1.0]


def test_an_effect_is_censored_at_the_smallest_total(recipe: ModuleType) -> None:
    baseline = [make_row(recipe, "grpo", seed, tokens) for seed, tokens in ((500, 400.0), (501, 500.0))]
    arm = [
        make_row(recipe, "distill-scout", 500, 200.0, gain_at_equal_tokens=0.02),
        make_row(recipe, "distill-scout", 501, None, total_tokens=800.0, gain_at_equal_tokens=-0.04),
        make_row(recipe, "distill-scout", 502, 100.0),
    ]
    found = recipe.estimate_effect(arm, baseline)
    assert (found.num_seeds, found.num_reached, found.num_reached_baseline) == (2, 1, 2)
    assert found.ratio == pytest.approx(math.sqrt(400 / 200 * 500 / 800))
    assert found.low < found.ratio < found.high
    assert found.gain == pytest.approx(-0.01)


def test_finished_seeds_are_read_from_the_record(recipe: ModuleType, tmp_path: Path) -> None:
    rows = [make_row(recipe, arm, seed, 300.0 + seed) for arm in ("grpo", "distill-scout") for seed in (500, 501)]
    recipe.write_rows(tmp_path / "seeds.csv", [*rows, make_row(recipe, "grpo", 502, None)])
    assert recipe.find_finished_seeds(tmp_path, "confirm", "addh2", ("grpo", "distill-scout")) == {500, 501}
    assert recipe.find_finished_seeds(tmp_path, "confirm", "addh2", ("grpo", "rejoin")) == set()

    newer = make_row(recipe, "grpo", 500, 900.0)
    recipe.add_rows(tmp_path / "seeds.csv", recipe.SeedRow, [newer], key=lambda row: (row.arm, row.seed))
    found = recipe.read_rows(tmp_path / "seeds.csv", recipe.SeedRow)
    assert newer in found and len(found) == 5

    recipe.write_effects(tmp_path)
    (effect,) = recipe.read_rows(tmp_path / "effects.csv", recipe.EffectRow)
    assert effect.p_holm == pytest.approx(min(1.0, 3 * effect.p_value))


def test_confirmation_runs_the_missing_seeds_with_the_tuned_setting(
    recipe: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = argparse.Namespace(
        part="confirm",
        out=tmp_path,
        cells=["addh2"],
        arms=["distill-scout"],
        seeds=3,
        jobs=1,
        overrides=[],
        dry_run=True,
    )
    with pytest.raises(SystemExit, match="addh2 is not tuned"):
        recipe.run_part(given)
    chosen = recipe.TuningRow(cell="addh2", setting="train.lr=6e-4 train.num_updates=2", area=0.7, is_chosen=1)
    recipe.write_rows(tmp_path / "tuning.csv", [chosen])
    recipe.write_rows(tmp_path / "seeds.csv", [make_row(recipe, arm, 500, 300.0) for arm in ("grpo", "distill-scout")])
    recipe.run_part(given)
    command = capsys.readouterr().out
    assert "--seeds 501,502" in command
    assert "train.lr=6e-4 train.num_updates=2" in command


def test_a_pretrained_cell_has_its_own_recipe_and_scout(
    recipe: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cell = "smollm2-learns"
    given = {"out": tmp_path, "cells": [cell], "arms": None, "seeds": 2, "jobs": 1, "overrides": [], "dry_run": True}
    recipe.run_part(argparse.Namespace(part="tune", **given))
    assert "--grid train.lr=1e-5,2e-5 --grid train.num_updates=1,2" in capsys.readouterr().out
    chosen = recipe.TuningRow(cell=cell, setting="train.lr=2e-5", area=0.7, is_chosen=1)
    recipe.write_rows(tmp_path / "tuning.csv", [chosen])
    recipe.run_part(argparse.Namespace(part="confirm", **given))
    words = shlex.split(capsys.readouterr().out.splitlines()[-1].removeprefix("$ npo "))
    file = tmp_path / "confirm" / cell / "matched-distill-scout.yaml"
    assert words[words.index("--methods") + 1] == f"grpo,{file},mistakes-first"
    settings = [word for word in words[2:] if SETTING.match(word)]
    loaded = load_recipe("smollm2-arithmetic", settings, method=str(file))
    assert (loaded.scout.num_steps, loaded.train.lr, loaded.train.num_steps) == (10, 2e-5, 28)
    assert "target.num_steps=6" in loaded.method.commands[-1]


def test_the_seeds_that_suggested_mistakes_first_do_not_confirm_it(recipe: ModuleType, tmp_path: Path) -> None:
    rows = [
        make_row(recipe, arm, seed, tokens, target=0.8)
        for seed, ours in ((505, 100.0), (506, 380.0), (507, 400.0), (517, 420.0), (518, 100.0))
        for arm, tokens in (("grpo", 400.0), ("mistakes-first", ours))
    ]
    recipe.write_rows(tmp_path / "seeds.csv", rows)
    recipe.write_effects(tmp_path)
    every, fresh = recipe.read_rows(tmp_path / "effects.csv", recipe.EffectRow)
    assert (every.part, every.num_seeds, every.p_holm) == ("confirm", 5, None)
    assert (fresh.part, fresh.num_seeds) == ("mistakes", 3)
    assert fresh.ratio == pytest.approx((400 / 380 * 400 / 420) ** (1 / 3))
    assert fresh.p_holm == pytest.approx(min(1.0, 3 * fresh.p_value))

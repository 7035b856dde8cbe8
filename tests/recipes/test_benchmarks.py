"""`recipes/bench_trl.py`: that it runs, and its arithmetic."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest

from npo_cli.config.loading import load_recipe
from recipes import bench_trl
from recipes.bench_trl import Measurement, summarize

RECIPES = Path(__file__).parents[2] / "recipes"


def measured(pair: int, side: str, seconds: float, peak_mb: float) -> Measurement:
    return Measurement(
        work="micro", pair=pair, side=side, seconds_per_step=seconds, tokens_per_step=100.0, peak_mb=peak_mb
    )


def test_speed_and_memory_are_medians_of_paired_ratios():
    pairs = [(0.1, 0.3, 400, 800), (0.2, 0.5, 500, 800), (0.4, 0.4, 600, 800)]
    found = [
        each
        for pair, (npo, trl, npo_mb, trl_mb) in enumerate(pairs)
        for each in (measured(pair, "npo", npo, npo_mb), measured(pair, "trl", trl, trl_mb))
    ]
    row = summarize(found)
    assert (row["npo_seconds_per_step"], row["trl_seconds_per_step"]) == (0.2, 0.4)
    # 3, 2.5 and 1: the median of the ratios, not the ratio of the medians
    assert [row[name] for name in ("speed", "speed_low", "speed_high")] == pytest.approx([2.5, 1.0, 3.0])
    assert [row[name] for name in ("memory", "memory_low", "memory_high")] == pytest.approx([0.625, 0.5, 0.75])


def test_given_lengths_are_log_normal_the_same_for_both_sides_and_others_in_each_step():
    work = bench_trl.WORKS["long"]
    recipe = load_recipe("micro", ["sampling.max_new_tokens=512", "train.prompts_per_step=500"])
    first, again, second = (bench_trl.draw_lengths(work, recipe, step) for step in (0, 0, 1))
    assert first == again != second
    assert len(first) == 500 * 8
    assert (min(first) >= 1, max(first)) == (True, 512)
    assert sum(first) / len(first) == pytest.approx(124, rel=0.1)  # exp(4.35 + 1/2) = 128 without the limit


@pytest.mark.slow
def test_quick_comparison_with_trl_trains_as_much_on_both_sides(tmp_path):
    pytest.importorskip("trl")
    command = [sys.executable, str(RECIPES / "bench_trl.py"), "--quick", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("| work |")
    with (tmp_path / "pairs.csv").open() as file:
        sides = {row["side"]: row for row in csv.DictReader(file)}
    tokens = [float(sides[side]["tokens_per_step"]) for side in ("npo", "trl")]
    # 16 x 8 responses of 13 to 18 tokens
    assert all(16 * 8 * 13 <= each <= 16 * 8 * 18 for each in tokens)
    (row,) = json.loads((tmp_path / "summary.json").read_text())
    assert row["speed"] == pytest.approx(
        float(sides["trl"]["seconds_per_step"]) / float(sides["npo"]["seconds_per_step"])
    )

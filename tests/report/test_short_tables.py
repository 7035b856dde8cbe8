"""The tables without `--full`: every line has at most 80 characters, whatever the names."""

from dataclasses import replace
from pathlib import Path

import pytest

from npo_cli.cli.output import format_table
from npo_cli.report.short_tables import MAX_ROWS, SHORT_TABLES, fit, short_index_tables, short_scores_tables
from npo_cli.report.tables import TABLES
from npo_cli.types.comparison import Estimate, MethodSummary, SpeedUp
from npo_cli.types.rollouts import CheckpointEntry
from npo_cli.types.views import RunListing
from tests.helpers.cli_errors import npo
from tests.report.samples import FAR_SCORE, SCORE

WIDTH = 80
LONG = "a-very-long-name-of-a-branch-or-guide-or-method-with-64-characters"


def lines_of(tables) -> list[str]:
    return [line for table in tables for line in format_table(table).splitlines()]


def test_every_kind_of_record_has_short_tables():
    assert set(SHORT_TABLES) == set(TABLES)


def test_short_names_keep_their_ends():
    assert fit("short", 10) == "short"
    assert (fit("checkpoint:1000@main", 12), len(fit(LONG))) == ("check..@main", 18)


def test_short_score_table_has_the_choice_and_fits():
    widest = {"quality_net": -0.25, "quality_net_low": -0.35, "quality_net_high": -0.15}
    scores = [replace(SCORE, candidate=f"model:/{LONG}", **widest), FAR_SCORE]
    lines = lines_of(short_scores_tables(scores))
    assert max(map(len, lines)) <= WIDTH
    assert lines[1].split() == ["candidate", "ahead", "Q_net", "V", "S", "value"]
    (selected,) = [line for line in lines if line.startswith("* ") and "model:/" in line]
    assert "  -0.25 [-0.35, -0.15]  " in selected


def test_short_index_shows_the_last_checkpoints_and_says_so():
    entry = CheckpointEntry(
        branch=LONG, step=0, parent=None, tier="full", size_bytes=3_400_000_000, complete=True, digest="0" * 64,
        path="", reward=0.123, entropy=0.1, accuracy=0.5, quality=0.1, variance=1.1, signal=0.1, learner_step=40,
    )  # fmt: skip
    lines = lines_of(short_index_tables([replace(entry, step=step) for step in range(100)]))
    assert max(map(len, lines)) <= WIDTH
    assert len(lines) == 2 + MAX_ROWS + 1
    assert lines[-1] == f"The last {MAX_ROWS} of 100 checkpoints; --full shows all."


def test_short_tables_of_methods_and_runs_fit():
    estimate = Estimate(value=0.912, low=0.812, high=0.951, num_used=3, num_total=5)
    summary = MethodSummary(
        method=LONG, seeds=(0, 1, 2), runs=("r:main",), num_prompts=256, resampling_unit="seeds", horizon=12_000,
        final_accuracy=estimate, areas={}, entropies=(None,) * 4, injections_per_step=0.0, guide_gradient_share=None,
        mean_costs={"tokens": 123_456_789.0, "seconds": 12_345.6}, run_tokens=1.0, changed_settings=(),
        mismatched_settings=(),
    )  # fmt: skip
    faster = SpeedUp(
        method=LONG, baseline="grpo", threshold=0.9, ratio_if_reached=dict.fromkeys(("step", "tokens"), estimate),
        restricted_mean_ratio={},
    )  # fmt: skip
    listing = RunListing(
        run=f"runs/{LONG}", recipe=LONG, branches=("main", LONG), step=12_000, num_steps=12_000, best_accuracy=0.5,
        best_branch=LONG, best_step=1, size_bytes=12_345_678_901, state="finished",
    )  # fmt: skip
    for record in (summary, faster, listing):
        assert max(map(len, lines_of(SHORT_TABLES[type(record)]([record])))) <= WIDTH


@pytest.mark.parametrize(
    "args",
    [
        ["index"],
        *(["show", what] for what in ("metrics", "rollouts", "groups", "guides", "lineage", "costs")),
        ["eval", "--step", "4"],
    ],
)
def test_reading_commands_fit_80_columns_between_the_sentence_and_the_next_command(circle: Path, args):
    command, *rest = args
    result = npo(command, circle, *rest)
    assert result.code == 0
    sentence, *tables, last = result.out.split("\n\n")
    assert max(map(len, result.out.splitlines()[:-1])) <= WIDTH
    assert sentence and tables
    assert last.startswith("next: npo ") and last.count("\n") == 1
    full = npo(command, circle, *rest, "--full")
    assert (full.code, full.out.split("\n\n")[0], full.out.split("\n\n")[-1]) == (0, sentence, last)

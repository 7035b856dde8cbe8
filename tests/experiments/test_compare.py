"""Methods read from real tiny runs: two seeds, each trained plainly to step 4 and replayed from step 2 with a guide."""

import re
import statistics
from pathlib import Path

import numpy as np
import pytest

from npo_cli.errors import NpoError
from npo_cli.experiments.compare import compare_runs
from npo_cli.experiments.load_methods import parse_method_argument
from npo_cli.storage.bench_dir import BENCH_INDEX_FILE, save_bench_index
from npo_cli.storage.cost_sums import cost_at
from npo_cli.storage.evals import read_evals
from npo_cli.storage.layout import open_run
from npo_cli.storage.metrics import read_metrics
from npo_cli.types.comparison import AXES, MethodDifference, MethodSummary, MethodTimeToThreshold, SeedPoint, SpeedUp
from npo_cli.types.rollouts import Notice
from tests.helpers.runs import copy_run, file_digests, resume, sample, train

SETTINGS = ("eval.every=1", "task.heldout_size=8")


@pytest.fixture(scope="module")
def seeds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("seeds")
    for seed in (0, 1):
        train(home / f"s{seed}", *SETTINGS, f"train.seed={seed}")
        sample(home / f"s{seed}")
        resume(home / f"s{seed}", at=2, guide="near")
    return home


def compared(*methods: str, **options) -> dict[type, list]:
    arguments = {"thresholds": (), "baseline": None, "figure": None} | options
    found: dict[type, list] = {}
    for record in compare_runs(methods, **arguments):
        found.setdefault(type(record), []).append(record)
    return found


def both(seeds: Path) -> list[str]:
    return [
        f"{name}={seeds}/s{seed}:{branch}" for name, branch in (("grpo", "main"), ("npo", "near")) for seed in (0, 1)
    ]


def notices(found: dict[type, list]) -> list[str]:
    return [notice.message for notice in found.get(Notice, [])]


def accuracies(root: Path, branch: str) -> dict[int, float]:
    """Of the branch itself at its own steps, of main before."""
    reports = {(one.branch, one.step): one.accuracy for one in read_evals(open_run(root))}
    return {step: reports.get((branch, step), reports["main", step]) for step in range(5)}


def test_compare_reads_each_seed_along_its_ancestry_with_costs(seeds):
    found = compared(*both(seeds))
    points = [one for one in found[SeedPoint] if (one.method, one.seed, one.curve) == ("npo", 1, "own")]
    # the fork stands twice: as it was, and with the scout's two steps and the guide's answers paid
    assert [(one.step, one.updates) for one in points] == [(0, 0), (1, 1), (2, 2), (2, 4), (3, 5), (4, 6)]
    end = cost_at(open_run(seeds / "s1"), "near", 4)
    assert (points[-1].tokens, points[-1].seconds) == (end.tokens, end.seconds)
    assert {one.step: one.accuracy for one in points} == accuracies(seeds / "s1", "near")
    assert notices(found) == []


def test_compare_final_accuracy_and_areas_equal_the_evaluations(seeds):
    npo = compared(*both(seeds))[MethodSummary][1]
    curves = [accuracies(seeds / name, "near") for name in ("s0", "s1")]
    assert npo.final_accuracy.value == pytest.approx(
        statistics.fmean(curve[step] for curve in curves for step in (2, 3, 4))
    )
    # evenly spaced steps 0 to 4: the ends count half
    areas = [(curve[0] / 2 + curve[1] + curve[2] + curve[3] + curve[4] / 2) / 4 for curve in curves]
    assert npo.areas["step"].value == pytest.approx(statistics.fmean(areas))
    # no older copy was asked, so forward passes are tokens
    assert set(npo.areas) == set(AXES) - {"forwards"}
    assert (npo.seeds, npo.num_prompts, npo.resampling_unit, npo.horizon) == ((0, 1), 8, "seeds and prompts", 4)


def test_compare_areas_by_tokens_end_at_the_shortest_method(seeds):
    found = compared(*both(seeds))
    ends = [max(one.tokens for one in found[SeedPoint] if (one.method, one.seed) == ("grpo", seed)) for seed in (0, 1)]
    areas = []
    for seed in (0, 1):
        points = [one for one in found[SeedPoint] if (one.method, one.seed, one.curve) == ("npo", seed, "own")]
        grid = np.linspace(0, min(ends), 20001)
        areas.append(np.interp(grid, [one.tokens for one in points], [one.accuracy for one in points]).mean())
    assert found[MethodSummary][1].areas["tokens"].value == pytest.approx(statistics.fmean(areas), abs=1e-4)


def test_compare_injected_slots_and_entropy_follow_the_ancestry(seeds):
    grpo, npo = compared(*both(seeds))[MethodSummary]
    runs = [open_run(seeds / name) for name in ("s0", "s1")]
    # steps 1 and 2 had no guide
    slots = [row["inject/slots"] for run in runs for row in read_metrics(run, "near")]
    assert npo.injections_per_step == pytest.approx(sum(slots) / 8)
    assert (grpo.injections_per_step, grpo.guide_gradient_share) == (0.0, None)
    own = [row["entropy"] for run in runs for row in read_metrics(run, "near") if row["step"] == 3]
    assert npo.entropies[2] == pytest.approx(statistics.fmean(own))
    assert npo.entropies[:2] == grpo.entropies[:2]


def test_compare_names_the_guide_as_the_only_changed_setting(seeds):
    grpo, npo = compared(*both(seeds))[MethodSummary]
    assert (grpo.changed_settings, grpo.mismatched_settings) == ((), ())
    assert (npo.changed_settings, npo.mismatched_settings) == (("guides none -> step 4 at 2",), ())


def test_settings_without_effect_are_no_difference(seeds, tmp_path):
    root = tmp_path / "tuned"
    train(root, *SETTINGS, "autonpo.trigger.patience=9", "guide.inject.max_accuracy=0.25", "train.save_every=1")
    found = compared(f"a={seeds}/s0:main", f"b={root}", f"c={seeds}/s0:near")
    assert [one.changed_settings for one in found[MethodSummary]] == [(), (), ("guides none -> step 4 at 2",)]
    assert notices(found) == []


def test_differences_are_paired_by_seed_and_prompt(seeds):
    (found,) = compared(*both(seeds))[MethodDifference]
    finals = [
        [statistics.fmean(accuracies(seeds / name, branch)[step] for step in (2, 3, 4)) for name in ("s0", "s1")]
        for branch in ("near", "main")
    ]
    assert (found.method, found.baseline, found.num_pairs, found.num_prompts) == ("npo", "grpo", 2, 8)
    assert found.final_accuracy.value == pytest.approx(statistics.fmean(finals[0]) - statistics.fmean(finals[1]))
    assert found.num_not_lower == sum(mine >= theirs for mine, theirs in zip(*finals, strict=True))


def test_compare_of_a_method_with_itself_has_no_difference(seeds):
    found = compared(f"a={seeds}/s0:main", f"b={seeds}/s0:main", thresholds=(0.01,))
    (apart,) = found[MethodDifference]
    assert (apart.final_accuracy.value, {one.value for one in apart.areas.values()}) == (0.0, {0.0})
    assert apart.resampling_unit == "prompts"


def test_compare_of_different_seeds_is_not_paired(seeds):
    (apart,) = compared(f"a={seeds}/s0:main", f"b={seeds}/s1:main")[MethodDifference]
    assert (apart.num_pairs, apart.num_prompts, apart.resampling_unit, apart.num_not_lower) == (0, None, "prompts", 0)
    finals = [statistics.fmean(accuracies(seeds / name, "main")[step] for step in (2, 3, 4)) for name in ("s1", "s0")]
    assert apart.final_accuracy.value == pytest.approx(finals[0] - finals[1])


def test_compare_threshold_never_reached_has_lower_bounds_and_no_speedup(seeds):
    found = compared(*both(seeds), thresholds=(1.0,))
    grpo, npo, held = found[MethodTimeToThreshold]
    assert (grpo.num_reached, grpo.num_runs, grpo.is_censored) == (0, 2, True)
    # everything spent by the end: 4 updates, and 4 + 2 with the scout's two steps twice
    assert (grpo.costs["updates"], npo.costs["updates"], held.costs["updates"]) == (4, 6, 6)
    assert (npo.horizons["updates"], npo.restricted_means["updates"]) == (4, 4)
    assert [(one.ratio_if_reached, one.restricted_mean_ratio) for one in found[SpeedUp]] == [({}, {})] * 2


def test_best_held_policy_is_at_least_as_early_as_the_methods_own(seeds):
    found = compared(*both(seeds), thresholds=(0.01, 0.02))
    reached = {(one.method, one.curve, one.threshold): one for one in found[MethodTimeToThreshold]}
    # Only the replay pays for a scout; a step of the scout is no position of the replay.
    assert {key[:2] for key in reached} == {("grpo", "own"), ("npo", "own"), ("npo", "best held")}
    assert "step" not in reached["npo", "best held", 0.01].costs
    for threshold in (0.01, 0.02):
        own, held = (reached["npo", curve, threshold] for curve in ("own", "best held"))
        assert held.num_reached >= own.num_reached
        assert all(held.costs[axis] <= own.costs[axis] for axis in held.costs)
    points = [point for point in found[SeedPoint] if point.curve == "best held"]
    assert {(point.method, point.seed) for point in points} == {("npo", 0), ("npo", 1)}
    assert {one.curve for one in found[SpeedUp]} <= {"own", "best held"}


def test_compare_run_without_name_means_its_branches(seeds):
    found = compared(str(seeds / "s0"), str(seeds / "s1"))
    assert [(one.method, one.seeds) for one in found[MethodSummary]] == [("micro:main", (0, 1)), ("micro:near", (0, 1))]
    named = compared(f"x={seeds}/s0:near", f"x={seeds}/s1:near", f"y={seeds}/s0:main", baseline="y")
    assert [(one.method, one.runs) for one in named[MethodSummary]] == [
        ("y", (f"{seeds}/s0:main",)),
        ("x", (f"{seeds}/s0:near", f"{seeds}/s1:near")),
    ]
    assert notices(named) == ["x has seeds 0, 1, y has 0: only common seeds are paired"]


def test_compare_refuses_a_named_method_of_several_branches(seeds):
    with pytest.raises(NpoError, match="has several branches, so x is not one method: main, near"):
        compared(f"x={seeds}/s0", f"y={seeds}/s1:near")


def test_compare_bench_folder_means_all_its_runs_after_a_move_too(seeds, tmp_path):
    home = copy_run(seeds, tmp_path / "a")
    save_bench_index(home, [(method, home / run) for method, run in (("npo", "s0"), ("npo", "s1"), ("again", "s1"))])
    moved = home.rename(tmp_path / "b")
    found, plain = compared(str(moved), *both(seeds)[:2], baseline="grpo"), compared(*both(seeds))
    assert [(one.method, one.seeds) for one in found[MethodSummary]] == [
        ("grpo", (0, 1)),
        ("npo", (0, 1)),
        ("again", (1,)),
    ]
    read, meant = ([one for one in some[SeedPoint] if one.method == "npo"] for some in (found, plain))
    assert [(one.seed, one.branch, one.step, one.tokens, one.accuracy) for one in read] == [
        (one.seed, one.branch, one.step, one.tokens, one.accuracy) for one in meant
    ]
    with pytest.raises(NpoError, match="holds the runs of a bench, which have names"):
        compared(f"x={moved}", *both(seeds)[:2])
    (moved / BENCH_INDEX_FILE).write_text("{}")
    with pytest.raises(NpoError, match=r"methods\.json is not what npo bench writes"):
        compared(str(moved))


def test_compare_method_argument_is_name_run_and_branch(tmp_path, monkeypatch):
    assert parse_method_argument("npo=runs/a:late") == ("npo", Path("runs/a"), "late")
    assert parse_method_argument("runs/a") == (None, Path("runs/a"), None)
    monkeypatch.chdir(tmp_path)
    for odd in ("lr=3:x", "b:c"):
        (tmp_path / odd).mkdir()
        assert parse_method_argument(odd) == (None, Path(odd), None)
    assert parse_method_argument("n=b:c") == ("n", Path("b:c"), None)
    assert parse_method_argument("n=b:c:late") == ("n", Path("b:c"), "late")


@pytest.mark.parametrize(
    ("methods", "message"),
    [
        (["a=S/s0:main", "a=S/s0:near"], "method 'a' has seed 0 twice"),
        (["S/s0:main"], "there is only one run to compare"),
        (["S/s0:late", "S/s1"], "has no branch 'late': main, near"),
        (["=S/s0", "S/s1"], "'' cannot name a method"),
        (["a=S/s0:", "S/s1"], r"a method is \[NAME=\]RUN\[:BRANCH\], got"),
        (["S/nothing", "S/s1"], "there is no run directory"),
    ],
)
def test_compare_refuses_invalid_method_arguments(seeds, methods, message):
    with pytest.raises(NpoError, match=message):
        compared(*(method.replace("S/", f"{seeds}/") for method in methods))


def test_compare_refuses_unknown_baseline_and_run_without_evaluations(seeds, tmp_path):
    with pytest.raises(NpoError, match="there is no method 'c'"):
        compared(*both(seeds), baseline="c")
    dark = copy_run(seeds / "s0", tmp_path / "dark")
    for path in dark.glob("evals.jsonl*"):
        path.unlink()
    with pytest.raises(NpoError, match="has no held-out evaluation") as refused:
        compared(f"a={dark}:main", f"b={seeds}/s1:near")
    assert refused.value.hint == f"npo eval {dark} --all --branch main"


def test_compare_without_results_per_prompt_resamples_seeds_with_a_notice(seeds, tmp_path):
    old = [copy_run(seeds / f"s{seed}", tmp_path / f"old{seed}") for seed in (0, 1)]
    for path in old[0].glob("prompt_results.jsonl*"):
        path.unlink()
    found = compared(*(f"a={root}:main" for root in old), *(f"b={root}:near" for root in old))
    assert {one.resampling_unit for one in found[MethodSummary]} == {"seeds"}
    assert found[MethodDifference][0].num_prompts is None
    assert notices(found)[0].startswith("a: 1 of 2 seeds have no evaluation results per prompt; npo eval")


def test_compare_of_other_prompts_is_not_paired_and_names_mismatched_settings(seeds, tmp_path):
    root = tmp_path / "other"
    train(root, *SETTINGS, "train.lr=0.5", "train.group_size=2", "task.seed=9", "train.num_steps=3")
    found = compared(f"a={seeds}/s0:main", f"b={root}")
    other = found[MethodSummary][1]
    assert other.changed_settings == ("train.lr 0.0003 -> 0.5",)
    assert other.mismatched_settings == ("train.group_size 4 -> 2",)
    assert (found[MethodDifference][0].num_pairs, found[MethodDifference][0].num_prompts) == (1, None)
    assert notices(found) == [
        "not alike: train.group_size 4 -> 2 (b)",
        f"{root}:main was last evaluated at step 3: final accuracies of all methods are taken there",
    ]
    assert other.horizon == 3
    one_method = compared(f"a={seeds}/s1:main", f"a={root}")
    assert "train.lr 0.5 -> 0.0003 between seeds" in one_method[MethodSummary][0].mismatched_settings


def test_compare_writes_into_no_run(seeds, tmp_path):
    before = file_digests(seeds)
    found = compared(*both(seeds), figure=tmp_path / "c.svg")
    assert file_digests(seeds) == before
    assert found[SeedPoint]
    assert {"generated tokens, all costs", "2 seeds a method; band: 95 % over seeds and prompts"} <= set(
        re.findall(r"<!-- (.*) -->", (tmp_path / "c.svg").read_text())
    )


def test_compare_has_a_forwards_axis_with_extrapolation(tmp_path):
    for name, more in (
        ("plain", ()),
        ("pushed", ("guide.source=extrapolated", "extrapolation.k=2", "guide.inject.max_accuracy=1")),
    ):
        train(tmp_path / name, "train.num_steps=4", "eval.every=2", *more)
    plain, extrapolated = compared(f"plain={tmp_path / 'plain'}", f"pushed={tmp_path / 'pushed'}")[MethodSummary]
    assert plain.mean_costs["forwards"] == plain.mean_costs["tokens"]
    assert extrapolated.mean_costs["forwards"] > extrapolated.mean_costs["tokens"]
    assert "forwards" in plain.areas

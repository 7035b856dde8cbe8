"""The "add a ..." pages, tested by doing what they say with the code that they show."""

import json
import re
import tomllib
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from npo_cli.cli.main import main
from npo_cli.config.loading import load_recipe
from npo_cli.guides.source import ReplayTarget
from npo_cli.losses.importance_ratio import PolicyLogps
from npo_cli.registry import ENGINES, GUIDE_SOURCES, IMPORTANCE_RATIOS, MIX_STRATEGIES, Registry
from npo_cli.session.learner import find_learner
from npo_cli.storage.guide_cache import load_guide
from npo_cli.storage.layout import open_run
from npo_cli.storage.rollout_log import RolloutLog
from npo_cli.storage.sample_store import find_latest_scores
from npo_cli.types.guides import SourceSpec
from tests.helpers.runs import WHOLE_REPLAY, open_session_at
from tests.helpers.teachers import correct_response

PAGES = Path(__file__).parents[2] / "docs/how-to"
TINY = (
    "train.num_steps=2",
    "train.save_every=1",
    "train.prompts_per_step=2",
    "train.group_size=2",
    "task.pool_size=8",
    "eval.every=0",
)


def code_of(page: str, language: str, *, number: int = 0) -> str:
    """A code block of that language, the first by default."""
    return re.findall(rf"```{language}\n(.*?)```", (PAGES / page).read_text(encoding="utf-8"), re.DOTALL)[number]


def plug_in_of(page: str, name: str, *, number: int = 0) -> Any:
    """What a Python block of the page defines under that name; the first block by default."""
    scope: dict[str, object] = {"__name__": page}
    exec(compile(code_of(page, "python", number=number), page, "exec"), scope)
    return scope[name]


@pytest.mark.parametrize(
    ("page", "number", "plugins", "added"),
    [
        ("add-a-guide-source.md", 0, GUIDE_SOURCES, "SolutionsSource"),
        ("add-an-engine.md", 0, ENGINES, "PlainEngine"),
        ("add-a-method.md", 0, MIX_STRATEGIES, "HardestGroups"),
        ("add-a-method.md", 1, IMPORTANCE_RATIOS, "geometric_ratio"),
    ],
)
def test_entry_points_of_the_pages_name_their_plug_ins(page: str, number: int, plugins: Registry, added: str) -> None:
    """The right group, the plug-in's own name, and the file that the code block names."""
    points = tomllib.loads(code_of(page, "toml", number=number))["project"]["entry-points"]
    found = plug_in_of(page, added, number=number)
    module = code_of(page, "python", number=number).splitlines()[0].removeprefix("# ").removesuffix(".py")
    assert points == {plugins.group: {found.name: f"my_package.{module}:{added}"}}


def run(*args: str) -> None:
    """A command that must succeed."""
    with pytest.raises(SystemExit) as ended:
        main(args)
    assert ended.value.code == 0, args


def test_add_a_guide_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its solutions of prompts that the run visits become a guide cache, without log-probabilities."""
    from npo_cli.session.session import open_task

    monkeypatch.chdir(tmp_path)
    run("train", "micro", "r", *TINY)
    recipe = load_recipe("micro", TINY)
    task = open_task(recipe)
    Path("solutions.json").write_text(json.dumps({each.prompt_id: correct_response(each) for each in task.train}))
    with GUIDE_SOURCES.registered(plug_in_of("add-a-guide-source.md", "SolutionsSource")):
        run("sample-guide", "r", "--at", "0", "--source", "solutions:solutions.json", "--steps", "2", "--name", "s")
    info = json.loads(Path("r/guides/s/guide.json").read_text())
    assert (info["complete"], info["num_prompts_with_rollouts"], info["has_logps"]) == (
        True,
        info["num_prompts"],
        False,
    )


def test_add_a_guide_source_of_recorded_responses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The page's `open` finds every correct response of the run, and no other."""
    monkeypatch.chdir(tmp_path)
    run("train", "micro", "r", *TINY)
    scope: dict[str, object] = {"replace": replace}
    body = "\n".join(f"    {line}" for line in code_of("add-a-guide-source.md", "python", number=1).splitlines())
    head = "from npo_cli.guides.source import GuideSource\n\n\nclass Recorded(GuideSource):\n    sample = None\n"
    exec(head + body, scope)
    recorded = scope["Recorded"]
    assert isinstance(recorded, type)
    run_dir = open_run(Path("r"))
    learner = find_learner(run_dir, at=2, branch=None, overrides=())
    source = recorded(SourceSpec(name="past", options={}, text="past"), ReplayTarget(run=run_dir, learner=learner))
    with closing(open_session_at(Path("r"), 2)) as session:
        source.open(session)
    groups = [group for _, group in RolloutLog(run_dir.rollouts_path("main")).iter_groups()]
    correct = sum(rollout.is_correct for group in groups for rollout in group.rollouts)
    assert sum(map(len, source.found.values())) == correct
    assert all(each.source == "past" and each.is_correct for found in source.found.values() for each in found)


def test_add_a_guide_source_that_samples_a_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a limit it is the checkpoint itself; with one of a token its responses are all wrong, in Q too."""
    monkeypatch.chdir(tmp_path)
    run("train", "micro", "r", *TINY, *WHOLE_REPLAY, "train.prompts_per_step=4", "guide.inject.max_accuracy=1")
    with GUIDE_SOURCES.registered(plug_in_of("add-a-guide-source.md", "BranchSource", number=2)):
        for name, spec in (("same", "2"), ("all", "branch:main,2,99"), ("short", "branch:main,2,1")):
            run("sample-guide", "r", "--at", "0", "--source", spec, "--name", name)
        run("score-checkpoints", "r", "--at", "0", "--source", "branch:main,2,99", "--source", "branch:main,2,1")
    (_, same), (_, unlimited), (info, short) = (
        load_guide(open_run(Path("r")), name) for name in ("same", "all", "short")
    )
    assert unlimited == same and same
    assert not short
    # none of a prompt's 8 samples is accepted, so all are drawn
    assert info.num_samples == 8 * info.num_prompts > 0
    found = find_latest_scores(open_run(Path("r")), branch="main", learner_step=0)
    assert found is not None
    quality = {score.candidate: score.quality for score in found.scores}
    assert quality["branch:main,2,99"] > quality["branch:main,2,1"] == 0


def test_add_an_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two steps with the page's engine: its weights are synced and checked, its log-probabilities are the trainer's."""
    monkeypatch.chdir(tmp_path)
    with ENGINES.registered(plug_in_of("add-an-engine.md", "PlainEngine")):
        run("train", "micro", "r", *TINY, "engine.kind=plain")
    rows = [json.loads(line) for line in Path("r/branches/main/metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2]
    assert all(row.get("mismatch/abs_log_w_p99", 0.0) < 1e-3 for row in rows)


def test_add_a_method(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The page's file changes the recipe, and its commands are commands of npo with their options."""
    from npo_cli.experiments.bench_plan import BenchRun, build_commands
    from tests.docs.test_docs import check_command

    monkeypatch.chdir(tmp_path)
    Path("my-npo.yaml").write_text(code_of("add-a-method.md", "yaml"))
    run("train", "micro", "r", "--method", "./my-npo.yaml", *TINY)
    recipe = load_recipe("micro-bench", method="./my-npo.yaml")
    assert (recipe.guide.inject.max_accuracy, recipe.guide.inject.ratio) == (0.3, "proximal")
    planned = BenchRun(
        recipe="micro-bench", method="./my-npo.yaml", settings=(), seed=0, folder=tmp_path / "b", teacher=""
    )
    commands = build_commands(planned)
    assert [command[0] for command in commands] == ["train", "sample-guide", "resume"]
    for command in commands:
        check_command(" ".join(("npo", *command)))


def test_add_a_mix_strategy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A replay with the page's strategy: of the three groups of a step, the two hardest receive the guide's rollout."""
    monkeypatch.chdir(tmp_path)
    small = (*TINY, "train.prompts_per_step=3", "guide.cache.keep=all", *WHOLE_REPLAY)
    mixing = ("guide.inject.mode=hardest", "guide.inject.max_accuracy=1")
    run("train", "micro", "r", *small)
    run("sample-guide", "r", "--at", "0", "--source", "2", "--name", "g")
    with MIX_STRATEGIES.registered(plug_in_of("add-a-method.md", "HardestGroups")):
        run("resume", "r", "--at", "0", "--guide", "g", "--new-branch", "npo", *mixing)
    log = RolloutLog(open_run(Path("r")).rollouts_path("npo"))
    for step in (1, 2):
        groups = log.read_step(step) or ()
        injected = [group for group in groups if group.injection_status == "injected"]
        left_out = [group for group in groups if group.injection_status == "gate_closed"]
        assert (len(injected), len(left_out)) == (2, 1)
        assert max(each.on_policy.accuracy for each in injected) <= left_out[0].on_policy.accuracy


def test_add_an_importance_ratio(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The denominator is the geometric mean, and a replay uses it on the slots of the guide."""
    from torch import tensor

    monkeypatch.chdir(tmp_path)
    ratio = plug_in_of("add-a-method.md", "geometric_ratio", number=1)
    old, guide = tensor([[-1.0, -2.0]]), tensor([[-3.0, -2.5]])
    logps = PolicyLogps(current_NT=old, old_NT=old, behavior_NT=guide)
    assert ratio.compute_anchor(logps, load_recipe("micro").guide.inject).logps_NT.tolist() == [[-2.0, -2.25]]
    run("train", "micro", "r", *TINY, "guide.cache.keep=all", *WHOLE_REPLAY)
    run("sample-guide", "r", "--at", "0", "--source", "2", "--name", "g")
    with IMPORTANCE_RATIOS.registered(ratio):
        run("resume", "r", "--at", "0", "--guide", "g", "--new-branch", "npo", "guide.inject.ratio=geometric")
    rows = [json.loads(line) for line in Path("r/branches/npo/metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2]
    assert sum(row["inject/slots"] for row in rows) > 0

from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from npo_cli.storage.checkpoints import Checkpoint, list_checkpoints
from npo_cli.storage.guide_cache import finish_guide_cache, open_guide_cache
from npo_cli.storage.layout import RunDir
from npo_cli.storage.retention import apply_retention, find_protected_checkpoints, plan_retention
from npo_cli.storage.sample_store import open_sample_store, save_scores
from tests.storage.builders import RECIPE, fork, guide_info, new_run, score, write_checkpoint

TIERS = st.dictionaries(st.integers(0, 30), st.sampled_from(["full", "weights"]), max_size=12)
QUOTA = st.one_of(st.none(), st.integers(1, 5))


def checkpoints(tiers: dict[int, str]) -> list[Checkpoint]:
    return [Checkpoint(branch="main", step=step, path=Path(), tier=tier) for step, tier in tiers.items()]  # type: ignore[arg-type]


@given(TIERS, st.sets(st.integers(0, 30)), QUOTA, QUOTA)
def test_no_plan_ever_touches_what_is_protected_or_newest(tiers, protected, keep_anchors, keep_guides):
    plan = plan_retention(
        checkpoints(tiers), protected=protected, keep_full_checkpoints=keep_anchors, keep_weights_only=keep_guides
    )
    touched = set(plan.demote) | set(plan.delete)
    anchors = [step for step, tier in tiers.items() if tier == "full"]
    assert not touched & (protected | {0})
    assert not anchors or max(anchors) not in touched
    assert touched <= set(tiers)
    assert not set(plan.demote) & set(plan.delete)
    assert all(tiers[step] == "full" for step in plan.demote)


@given(TIERS, st.sets(st.integers(0, 30)), QUOTA, QUOTA)
def test_the_quotas_are_kept_and_never_undercut(tiers, protected, keep_anchors, keep_guides):
    plan = plan_retention(
        checkpoints(tiers), protected=protected, keep_full_checkpoints=keep_anchors, keep_weights_only=keep_guides
    )
    anchors = {step for step, tier in tiers.items() if tier == "full"}
    left_anchors = anchors - set(plan.demote) - set(plan.delete)
    left_guides = set(tiers) - left_anchors - set(plan.delete)
    if keep_anchors is None:
        assert left_anchors == anchors
    else:
        assert set(sorted(anchors)[-keep_anchors:]) <= left_anchors
        assert len(left_anchors - protected - {0}) <= keep_anchors
    if keep_guides is None:
        assert not plan.delete
    else:
        assert len(left_guides) >= min(keep_guides, len(left_guides | set(plan.delete)))
        assert len(left_guides - protected - {0}) <= keep_guides


@given(TIERS, QUOTA, QUOTA)
def test_a_plan_carried_out_leaves_nothing_to_plan(tiers, keep_anchors, keep_guides):
    plan = plan_retention(
        checkpoints(tiers), protected=(), keep_full_checkpoints=keep_anchors, keep_weights_only=keep_guides
    )
    after = {step: "guide" if step in plan.demote else tier for step, tier in tiers.items() if step not in plan.delete}
    again = plan_retention(
        checkpoints(after), protected=(), keep_full_checkpoints=keep_anchors, keep_weights_only=keep_guides
    )
    assert (again.demote, again.delete) == ((), ())


def test_older_anchors_become_guides_and_older_guides_go():
    tiers = dict.fromkeys((0, 20, 40, 60, 80, 100), "full")
    plan = plan_retention(checkpoints(tiers), protected={40}, keep_full_checkpoints=2, keep_weights_only=1)
    # 80 and 100 are the newest two; 0 and 40 are safe; 20 and 60 shrink, and of these only 60 fits the quota
    assert (plan.demote, plan.delete) == ((60,), (20,))


def left(run: RunDir) -> dict[int, str]:
    return {found.step: found.tier for found in list_checkpoints(run, "main")}


def test_a_plan_carried_out_on_disk(tmp_path):
    run = new_run(tmp_path)
    for step in (0, 20, 40, 60, 80):
        write_checkpoint(run, step)
    dead = run.checkpoint_folder("main", 80) / ".training_state.dead"
    dead.mkdir()
    apply_retention(run, "main", keep_full_checkpoints=1, keep_weights_only=2)
    assert left(run) == {0: "full", 40: "weights", 60: "weights", 80: "full"}
    home = run.checkpoints_folder("main")
    assert sorted(path.name for path in home.iterdir()) == ["step_000000", "step_000040", "step_000060", "step_000080"]
    assert not dead.exists()


def test_without_quotas_nothing_changes(tmp_path):
    run = new_run(tmp_path)
    for step in (0, 20, 40):
        write_checkpoint(run, step)
    apply_retention(run, "main", keep_full_checkpoints=None, keep_weights_only=None)
    assert left(run) == dict.fromkeys((0, 20, 40), "full")


def test_everything_an_intervention_may_need_is_protected(tmp_path):
    run = new_run(tmp_path)
    fork(run, "late", parent="main", at=10)
    open_guide_cache(run, guide_info(run, name="open", branch="late", learner_step=5, guide_step=40))  # 5 is main's
    open_guide_cache(run, guide_info(run, name="done", learner_step=20, guide_step=30))
    finish_guide_cache(run, guide_info(run, name="done", learner_step=20, guide_step=30))
    open_guide_cache(run, guide_info(run, name="foreign", run_id="f" * 32, branch="elsewhere", learner_step=7))
    open_sample_store(run.scores_folder, "main", 50, checkpoints=[60, 70], settings={})
    finished = open_sample_store(run.scores_folder, "main", 80, checkpoints=[85, 90], settings={})
    save_scores(finished, [score(85), score(90, is_selected=True)])
    run.save_recipe("main", RECIPE | {"guide": {"replay": {"at_step": 100, "guide_step": 120, "num_steps": None}}})
    of_main = {step for branch, step in find_protected_checkpoints(run) if branch == "main"}
    assert of_main == {10, 5, 20, 30, 50, 60, 70, 80, 90, 100, 120}
    assert {step for branch, step in find_protected_checkpoints(run) if branch == "late"} == {40}


def test_a_guide_cache_keeps_its_learner_an_anchor_whatever_the_quota(tmp_path):
    run = new_run(tmp_path)
    for step in (0, 20, 40, 60, 80):
        write_checkpoint(run, step)
    open_guide_cache(run, guide_info(run))  # guide 40 for learner 20
    apply_retention(run, "main", keep_full_checkpoints=1, keep_weights_only=1)
    # of the guides (60 alone) the newest one is kept
    assert left(run) == {0: "full", 20: "full", 40: "full", 60: "weights", 80: "full"}

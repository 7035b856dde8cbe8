"""Settings under which AutoNPO could never intervene are refused by their key, before anything is written."""

import pytest

from npo_cli.autonpo.preflight import max_failed_prompts, usable_distances, validate_autonpo_settings
from npo_cli.errors import NpoError
from tests.helpers.autonpo_runs import EAGER, eager_recipe, start_autonpo_resume
from tests.helpers.runs import copy_run, file_digests

NUM_PROMPTS = 16
"""task.pool_size of the eager recipe: 4 a step, a checkpoint every 2 steps, distances 2 and 4, 12 steps."""

REFUSED = {
    "no distance ends at a checkpoint": (
        ("autonpo.rollback.distances=[1,3]",),
        "none of autonpo.rollback.distances (1, 3)",
        "autonpo.rollback.distances=[2,4]",
    ),
    # 4 steps back in steps of 2: the guide's own state, the one between, the one to go back to
    "too few full states": (
        ("train.keep_full_checkpoints=2",),
        "train.keep_full_checkpoints is 2",
        "train.keep_full_checkpoints=3",
    ),
    # 5 is no multiple of 2, and 6 needs 6/2 + 1
    "too few full states for a longer one": (
        ("train.keep_full_checkpoints=3", "autonpo.rollback.distances=[2,5,6]"),
        "train.keep_full_checkpoints is 3: a rollback by 6 steps",
        "train.keep_full_checkpoints=4",
    ),
    "a warm-up as long as the run": (
        ("autonpo.trigger.warmup_steps=12",),
        "autonpo.trigger.warmup_steps is 12",
        "autonpo.trigger.warmup_steps=11",
    ),
    "a window longer than the run": (
        ("autonpo.trigger.window=1000",),
        "autonpo.trigger.window is 1000",
        "autonpo.trigger.window=11",
    ),
    # max(4, 2) + 9 = 13 steps of 12
    "patience that outlasts the run": (
        ("autonpo.trigger.patience=9",),
        "earliest warning is at step 13",
        "autonpo.trigger.patience=8",
    ),
    "a probe that cannot be accepted": (
        ("autonpo.probe.min_quality=1",),
        "autonpo.probe.min_quality is 1",
        "autonpo.probe.min_quality=0.1",
    ),
    "a replay that never visits its guides' prompts": (
        ("autonpo.rollback.data=onward",),
        "autonpo.rollback.data is onward",
        "data=same",
    ),
    "a V that recorded samples cannot estimate": (
        ("autonpo.probe.variance_samples=learner", "scoring.variance=seq2"),
        "scoring.variance=seq2 can only be estimated",
        "scoring.variance=group2",
    ),
    "a scout longer than the run": (
        ("autonpo.early.enabled=true", "autonpo.early.scout_steps=400", "autonpo.early.replay_steps=4"),
        "autonpo.early.scout_steps is 400",
        "autonpo.early.scout_steps=10",
    ),
    "a scout whose checkpoint may be deleted": (
        (
            "autonpo.early.enabled=true",
            "autonpo.early.scout_steps=8",
            "autonpo.early.replay_steps=2",
            "autonpo.replay.acceptance_test=true",
            "train.keep_weights_only=1",
        ),
        "autonpo.early.replay_steps is 2 and autonpo.early.scout_steps 8",
        "autonpo.early.replay_steps=8",
    ),
    # no distance is longer than the run: min(16 prompts, 12 * 4)
    "a probe of more prompts than the run visits": (
        ("autonpo.rollback.distances=[2,400]", "autonpo.probe.num_prompts=17"),
        "autonpo.probe.num_prompts is 17, but at most 16",
        "autonpo.probe.num_prompts=16",
    ),
    "every distance longer than the run": (
        ("autonpo.rollback.distances=[12]",),
        "autonpo.rollback.distances begin at 12",
        "train.num_steps",
    ),
    "guides that would never be injected": (
        ("guide.inject.max_accuracy=0.2",),
        "autonpo.pool.max_accuracy is 0.25, above guide.inject.max_accuracy 0.2",
        "autonpo.pool.max_accuracy=0.2",
    ),
    "the same steps for ever": (
        ("autonpo.max_interventions=-1", "autonpo.trigger.cooldown_steps=3"),
        "autonpo.trigger.cooldown_steps is 3, shorter than the longest replay (4",
        "autonpo.trigger.cooldown_steps=4",
    ),
    "an early replay longer than its scout": (
        ("autonpo.early.enabled=true", "autonpo.early.scout_steps=4", "autonpo.early.replay_steps=5"),
        "autonpo.early.replay_steps is 5",
        "autonpo.early.replay_steps=4",
    ),
    "a scout that ends without a checkpoint": (
        ("autonpo.early.enabled=true", "autonpo.early.scout_steps=5", "autonpo.early.replay_steps=2"),
        "autonpo.early.scout_steps is 5",
        "autonpo.early.scout_steps=2",
    ),
    "an early replay whose end cannot be compared": (
        (
            "autonpo.early.enabled=true",
            "autonpo.early.scout_steps=4",
            "autonpo.early.replay_steps=3",
            "autonpo.replay.acceptance_test=true",
        ),
        "autonpo.early.replay_steps is 3",
        "autonpo.early.replay_steps=4",
    ),
    # min(autonpo.pool.max_size, 16 prompts, 4 steps * 4 prompts) = 16
    "a probe of more prompts than there are": (
        ("autonpo.probe.num_prompts=17",),
        "autonpo.probe.num_prompts is 17, but at most 16",
        "autonpo.probe.num_prompts=16",
    ),
    "a probe of more prompts than the pool holds": (
        ("autonpo.pool.max_size=7",),
        "autonpo.probe.num_prompts is 8, but at most 7",
        "autonpo.probe.num_prompts=7",
    ),
    "more failed prompts required than a segment has": (
        ("autonpo.rollback.distances=[2]", "autonpo.rollback.min_failed_prompts=9"),
        "autonpo.rollback.min_failed_prompts is 9, but at most 8",
        "autonpo.rollback.min_failed_prompts=8",
    ),
}

LEGAL = {
    "as it is": (),
    "one distance of two ends at a checkpoint": ("autonpo.rollback.distances=[3,4]",),
    "just enough full states": ("train.keep_full_checkpoints=3",),
    "patience that just fits": ("autonpo.trigger.patience=8",),
    "a long warm-up without interventions": ("autonpo.max_interventions=0", "autonpo.trigger.warmup_steps=40"),
    "a distance one step short of the run": ("autonpo.rollback.distances=[2,10]",),
    "max_accuracy of injection and pool equal": ("guide.inject.max_accuracy=0.25",),
    "no limit and a cooldown as long as a replay": ("autonpo.max_interventions=-1", "autonpo.trigger.cooldown_steps=4"),
    "no intervention at all": ("autonpo.max_interventions=0",),
    "a replay as long as its scout": (
        "autonpo.early.enabled=true",
        "autonpo.early.scout_steps=4",
        "autonpo.early.replay_steps=4",
    ),
    "an odd replay without an acceptance test": (
        "autonpo.early.enabled=true",
        "autonpo.early.scout_steps=4",
        "autonpo.early.replay_steps=3",
    ),
    "early settings that are not used": ("autonpo.early.scout_steps=5", "autonpo.early.replay_steps=9"),
    "a probe of as many prompts as there are": (
        "autonpo.probe.num_prompts=16",
        "autonpo.rollback.min_failed_prompts=16",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_preflight_refuses_settings_that_cannot_work(case):
    overrides, message, hint = REFUSED[case]
    with pytest.raises(NpoError) as caught:
        validate_autonpo_settings(eager_recipe(*overrides), NUM_PROMPTS)
    assert message in caught.value.message
    assert hint in caught.value.hint


@pytest.mark.parametrize("case", REFUSED)
def test_preflight_accepts_the_suggested_fix(case):
    """The first words of the hint, typed as they are, where they are one setting."""
    overrides, _, _ = REFUSED[case]
    with pytest.raises(NpoError) as caught:
        validate_autonpo_settings(eager_recipe(*overrides), NUM_PROMPTS)
    fixed = caught.value.hint.split(", or ")[0].removesuffix(" or less")
    if "=" in fixed and " " not in fixed:
        validate_autonpo_settings(eager_recipe(*overrides, fixed), NUM_PROMPTS)
    else:
        assert case == "every distance longer than the run"


@pytest.mark.parametrize("case", LEGAL)
def test_preflight_accepts_settings_that_just_work(case):
    validate_autonpo_settings(eager_recipe(*LEGAL[case]), NUM_PROMPTS)


def test_preflight_counts_distances_that_end_at_a_checkpoint():
    recipe = eager_recipe("autonpo.rollback.distances=[1,2,3,4,6,7]")
    assert usable_distances(recipe) == (2, 4, 6)
    # 6 steps of 4 prompts are 24; there are 16, or 10, or room for 5
    assert max_failed_prompts(recipe, num_prompts=16) == 16
    assert max_failed_prompts(recipe, num_prompts=10) == 10
    assert max_failed_prompts(recipe, num_prompts=100) == 24
    assert (
        max_failed_prompts(eager_recipe("autonpo.rollback.distances=[4]", "autonpo.pool.max_size=5"), num_prompts=16)
        == 5
    )


def test_preflight_error_in_the_cli_is_two_lines_and_writes_nothing(warm, tmp_path):
    root = tmp_path / "run"
    args = ("train", "micro", *EAGER, "autonpo.rollback.distances=[1,3]", "--run", str(root), "--autonpo")
    child = warm.npo(*args, err=tmp_path / "err")
    assert child.wait() == 2
    error, hint = child.read_stderr().splitlines()
    assert error.startswith("error: none of autonpo.rollback.distances (1, 3) is a multiple of train.save_every (2)")
    assert hint.startswith("  try: autonpo.rollback.distances=[2,4]")
    assert not root.exists()


def test_preflight_error_leaves_an_existing_run_unchanged(plain, tmp_path):
    root = copy_run(plain, tmp_path / "run")
    with pytest.raises(NpoError, match=r"autonpo\.rollback\.min_failed_prompts is 17"):
        list(start_autonpo_resume(root, "autonpo.rollback.min_failed_prompts=17"))
    with pytest.raises(NpoError, match=r"autonpo\.rollback\.min_failed_prompts is 17"):
        list(start_autonpo_resume(root, "autonpo.rollback.min_failed_prompts=17", at=4))
    assert file_digests(root) == file_digests(plain)


def test_rollback_distances_must_be_ascending(plain):
    with pytest.raises(NpoError, match=r"autonpo\.rollback\.distances must be ascending"):
        eager_recipe("autonpo.rollback.distances=[4,2]")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--guide", "near", "--steps", "2"], "not available with --autonpo"),
        (["--new-branch", "new"], "--new-branch needs --at STEP"),
    ],
)
def test_autonpo_refuses_options_of_a_manual_replay(warm, plain, tmp_path, given, message):
    child = warm.npo("resume", str(plain), "--autonpo", *given, err=tmp_path / "err")
    assert child.wait() == 2
    assert message in child.read_stderr()
    assert len(child.read_stderr().splitlines()) == 2


def test_autonpo_continues_another_branch_only_as_a_fork(watched):
    with pytest.raises(NpoError, match=r"active on branch auto-2 of .*, not on main") as caught:
        next(start_autonpo_resume(watched, source_branch="main"))
    assert "--branch main --at STEP" in caught.value.hint

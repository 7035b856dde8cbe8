"""Settings under which AutoNPO could never step in are refused by the key, before anything is written."""

import pytest

from npo_cli.errors import NpoError
from npo_cli.stages.auto_checks import longest_slice, refuse_impossible, usable_deltas
from tests.stages.auto_runs import EAGER, auto_resuming, eager
from tests.stages.running import copied, files_of

NUM_PROMPTS = 16
"""task.pool_size of the eager recipe: 4 a step, a checkpoint every 2 steps, deltas 2 and 4, 12 steps."""

REFUSED = {
    "no distance ends at a checkpoint": (("auto.deltas=[1,3]",), "none of auto.deltas (1, 3)", "auto.deltas=[2,4]"),
    # 4 steps back in steps of 2: the guide's own state, the one between, the one to go back to
    "too few full states": (("train.keep_anchors=2",), "train.keep_anchors is 2", "train.keep_anchors=3"),
    # 5 is no multiple of 2, and 6 needs 6/2 + 1
    "too few full states for a longer one": (
        ("train.keep_anchors=3", "auto.deltas=[2,5,6]"),
        "train.keep_anchors is 3: a rollback by 6 steps",
        "train.keep_anchors=4",
    ),
    "a warm-up as long as the run": (("auto.warmup=12",), "auto.warmup is 12", "auto.warmup=11"),
    "a window longer than the run": (("auto.window=1000",), "auto.window is 1000", "auto.window=11"),
    # max(4, 2) + 9 = 13 steps of 12
    "patience that outlasts the run": (("auto.patience=9",), "could come at step 13", "auto.patience=8"),
    "a probe that nothing passes": (("auto.q_min=1",), "auto.q_min is 1", "auto.q_min=0.1"),
    "a replay that never meets its guides": (("rollback.data=onward",), "rollback.data is onward", "data=same"),
    "a V that the old samples cannot tell": (
        ("probe.direction=learner", "score.variance=seq2"),
        "score.variance=seq2 can only be told",
        "score.variance=group2",
    ),
    "a scout longer than the run": (
        ("auto.early=true", "early.scout=400", "early.window=4"),
        "early.scout is 400",
        "early.scout=10",
    ),
    "a scout of which nothing may be left": (
        ("auto.early=true", "early.scout=8", "early.window=2", "replay.accept_test=true", "train.keep_guides=1"),
        "early.window is 2 and early.scout 8",
        "early.window=8",
    ),
    # no distance is longer than the run: min(16 prompts, 12 * 4)
    "more asked than a run has steps for": (
        ("auto.deltas=[2,400]", "probe.prompts=17"),
        "probe.prompts is 17, but at most 16",
        "probe.prompts=16",
    ),
    "every distance longer than the run": (("auto.deltas=[12]",), "auto.deltas begin at 12", "train.num_steps"),
    "guides that would never be let in": (
        ("inject.gate=0.2",),
        "pool.tau is 0.25, above inject.gate 0.2",
        "pool.tau=0.2",
    ),
    "the same steps for ever": (
        ("auto.max=-1", "auto.cooldown=3"),
        "auto.cooldown is 3, shorter than the longest replay (4",
        "auto.cooldown=4",
    ),
    "an early replay longer than its scout": (
        ("auto.early=true", "early.scout=4", "early.window=5"),
        "early.window is 5",
        "early.window=4",
    ),
    "a scout that ends without a checkpoint": (
        ("auto.early=true", "early.scout=5", "early.window=2"),
        "early.scout is 5",
        "early.scout=2",
    ),
    "an early replay whose end cannot be compared": (
        ("auto.early=true", "early.scout=4", "early.window=3", "replay.accept_test=true"),
        "early.window is 3",
        "early.window=4",
    ),
    # min(pool.size, 16 prompts, 4 steps * 4 prompts) = 16
    "more asked than there are": (("probe.prompts=17",), "probe.prompts is 17, but at most 16", "probe.prompts=16"),
    "more asked than are remembered": (("pool.size=7",), "probe.prompts is 8, but at most 7", "probe.prompts=7"),
    "more wanted than a segment has": (
        ("auto.deltas=[2]", "auto.pool_min=9"),
        "auto.pool_min is 9, but at most 8",
        "auto.pool_min=8",
    ),
}

LEGAL = {
    "as it is": (),
    "one distance of two ends at a checkpoint": ("auto.deltas=[3,4]",),
    "just enough full states": ("train.keep_anchors=3",),
    "patience that just fits": ("auto.patience=8",),
    "a long warm-up where nobody steps in": ("auto.max=0", "auto.warmup=40"),
    "a distance one step short of the run": ("auto.deltas=[2,10]",),
    "a gate as wide as a mistake": ("inject.gate=0.25",),
    "no cap and a rest as long as a replay": ("auto.max=-1", "auto.cooldown=4"),
    "no intervention at all": ("auto.max=0",),
    "a window as long as its scout": ("auto.early=true", "early.scout=4", "early.window=4"),
    "an odd window that nobody compares": ("auto.early=true", "early.scout=4", "early.window=3"),
    "early settings that are not used": ("early.scout=5", "early.window=9"),
    "as many asked as there are": ("probe.prompts=16", "auto.pool_min=16"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_could_never_work_is_refused_by_its_key(case):
    overrides, message, hint = REFUSED[case]
    with pytest.raises(NpoError) as caught:
        refuse_impossible(eager(*overrides), NUM_PROMPTS)
    assert message in caught.value.message
    assert hint in caught.value.hint


@pytest.mark.parametrize("case", REFUSED)
def test_the_mended_recipe_is_let_through(case):
    """The first words of the hint, typed as they are, where they are one setting."""
    overrides, _, _ = REFUSED[case]
    with pytest.raises(NpoError) as caught:
        refuse_impossible(eager(*overrides), NUM_PROMPTS)
    mended = caught.value.hint.split(", or ")[0].removesuffix(" or less")
    if "=" in mended and " " not in mended:
        refuse_impossible(eager(*overrides, mended), NUM_PROMPTS)
    else:
        assert case == "every distance longer than the run"


@pytest.mark.parametrize("case", LEGAL)
def test_what_just_works_is_let_through(case):
    refuse_impossible(eager(*LEGAL[case]), NUM_PROMPTS)


def test_distances_count_where_they_end_at_a_checkpoint():
    recipe = eager("auto.deltas=[1,2,3,4,6,7]")
    assert usable_deltas(recipe) == (2, 4, 6)
    # 6 steps of 4 prompts are 24; there are 16, or 10, or room for 5
    assert longest_slice(recipe, num_prompts=16) == 16
    assert longest_slice(recipe, num_prompts=10) == 10
    assert longest_slice(recipe, num_prompts=100) == 24
    assert longest_slice(eager("auto.deltas=[4]", "pool.size=5"), num_prompts=16) == 5


def test_at_the_door_it_is_two_lines_and_no_directory(warm, tmp_path):
    root = tmp_path / "run"
    args = ("train", "micro", *EAGER, "auto.deltas=[1,3]", "--run", str(root), "--autonpo")
    child = warm.npo(*args, err=tmp_path / "err")
    assert child.ended() == 2
    error, hint = child.said().splitlines()
    assert error.startswith("error: none of auto.deltas (1, 3) is a multiple of train.save_every (2)")
    assert hint.startswith("  try: auto.deltas=[2,4]")
    assert not root.exists()


def test_a_run_that_is_there_is_not_touched(plain, tmp_path):
    root = copied(plain, tmp_path / "run")
    with pytest.raises(NpoError, match=r"auto\.pool_min is 17"):
        list(auto_resuming(root, "auto.pool_min=17"))
    with pytest.raises(NpoError, match=r"auto\.pool_min is 17"):
        list(auto_resuming(root, "auto.pool_min=17", at=4))
    assert files_of(root) == files_of(plain)


def test_descending_distances_are_no_recipe(plain):
    with pytest.raises(NpoError, match=r"auto\.deltas must be ascending"):
        eager("auto.deltas=[4,2]")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--guide", "near"], "--autonpo makes its own guides"),
        (["--steps", "2"], "--autonpo makes its own guides"),
        (["--branch", "new"], "--branch names a new branch, which needs --at STEP"),
    ],
)
def test_options_of_a_replay_by_hand_do_not_go_with_it(warm, plain, tmp_path, given, message):
    child = warm.npo("resume", str(plain), "--autonpo", *given, err=tmp_path / "err")
    assert child.ended() == 2
    assert message in child.said()
    assert len(child.said().splitlines()) == 2


def test_another_branch_is_watched_only_as_a_fork(watched):
    with pytest.raises(NpoError, match="at work on branch auto-2, not on main") as caught:
        next(auto_resuming(watched, source_branch="main"))
    assert "--from main --at STEP" in caught.value.hint

"""The choice of k and a while a run trains: made on time, charged, kept in the state, the same after a kill."""

from pathlib import Path

import pytest

from npo_cli.extrapolation.in_loop import Extrapolator
from npo_cli.extrapolation.retune import newest_mistakes, pushes_in_reach
from npo_cli.policy.optimizer import read_trainer_state
from npo_cli.session.session import sample_groups
from npo_cli.storage.checkpoints import find_checkpoint
from npo_cli.storage.jsonl import JsonlLog
from npo_cli.storage.layout import open_run
from npo_cli.training.train import train_run
from npo_cli.types.rollouts import Group
from tests.extrapolation.test_training import AHEAD, metrics_of
from tests.helpers.runs import open_session_at, reproducible_digests, resume, stop_after, tiny_recipe, train

CHOOSING = (
    *(*AHEAD, "train.num_steps=8", "extrapolation.refresh=3", "extrapolation.k_grid=[2,4]", "extrapolation.a_grid=[1]"),
    *("extrapolation.prompts=8", "extrapolation.confidence=0.5", "scoring.bootstrap_resamples=50"),
)


@pytest.fixture(scope="module")
def choosing(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("choosing") / "run"
    train(root, *CHOOSING)
    return root


def decisions(root: Path) -> list[dict]:
    return [row for row in JsonlLog(open_run(root).events_path).iter_rows() if row["kind"] == "extrapolated"]


def test_it_is_made_every_so_many_steps_over_the_pushes_there_was_time_for(choosing):
    made = decisions(choosing)
    assert [row["step"] for row in made] == [3, 6]
    tried = [[trial["push"] for trial in row["trials"]] for row in made]
    assert tried == [["logits:2:1"], ["logits:2:1", "logits:4:1"]]


def test_what_was_chosen_is_in_force_until_the_next_choice(choosing):
    made = {row["step"]: row for row in decisions(choosing)}
    rows = {row["step"]: row for row in metrics_of(choosing)}
    for step in (3, 6):
        last = max(at for at in range(step + 1, 9) if at <= step + 3)
        for at in range(step + 1, last + 1):
            assert ("extrapolate/groups" in rows[at]) == made[step]["asking"]
            if made[step]["asking"]:
                assert f"logits:{rows[at]['extrapolate/k']:g}:{rows[at]['extrapolate/a']:g}" == made[step]["push"]


def test_its_tokens_are_charged_to_the_step_that_follows(choosing):
    rows = {row["step"]: row for row in metrics_of(choosing)}
    for made in decisions(choosing):
        row = rows[made["step"] + 1]
        assert row["extrapolate/choice_tokens"] == made["tokens"] > 0
        assert row["forwards"] > row["tokens"] > made["tokens"]
    # tokens so far are the sum over steps, choices included
    assert rows[8]["tokens_total"] == sum(row["tokens"] for row in rows.values())


@pytest.mark.parametrize(("space", "passes"), [("logits", 2), ("weights", 1)])
def test_the_older_copy_is_charged_for_what_it_read_while_it_was_sampled(tmp_path, space, passes):
    """Asked again at step 4 with the same seeds: the learner's tokens are read once, a push's by as many as it has."""
    root = tmp_path / "run"
    train(root, *CHOOSING, "extrapolation.refresh=4", "train.num_steps=5", f"extrapolation.space={space}")
    session = open_session_at(root, 4)
    prompts = newest_mistakes(session, read_trainer_state(find_checkpoint(session.run, "main", 4).training_state_path))
    label, slots = ("refresh", "main", 4), range(session.recipe.extrapolation.samples_per_group)
    own = tokens_in(sample_groups(session, prompts, seed_label=label, slots=slots, sampler_step=4))
    theirs = 0
    for push in pushes_in_reach(session.recipe.extrapolation, step=4):
        ahead = Extrapolator(session=session, branch="main").open_sampler(push, step=4)
        theirs += tokens_in(ahead.sample_groups(prompts, label=(*label, push.name), slots=slots))
    row = metrics_of(root)[4]
    assert row["extrapolate/choice_tokens"] == own + theirs
    # and what step 5 asked for itself
    asked = row.get("extrapolate/tokens", 0)
    assert row["forwards"] - row["tokens"] == (passes - 1) * (theirs + asked)


def tokens_in(groups: list[Group]) -> int:
    return sum(len(one.response_ids) for group in groups for one in group.rollouts)


def test_the_choice_is_in_the_training_state(choosing):
    state = read_trainer_state(find_checkpoint(open_run(choosing), "main", 8).training_state_path)
    last = decisions(choosing)[-1]
    assert (state.extrapolation_choice.spec.name, state.extrapolation_choice.is_active) == (
        last["push"],
        last["asking"],
    )


@pytest.mark.parametrize("step", [4, 5])
def test_a_run_killed_around_a_choice_decides_the_same(choosing, tmp_path, step):
    root = tmp_path / "run"
    stop_after(train_run(root, tiny_recipe(*CHOOSING)), step)
    resume(root)
    assert reproducible_digests(root) == reproducible_digests(choosing)


def test_a_push_above_the_limit_is_never_asked(tmp_path):
    root = tmp_path / "run"
    train(root, *CHOOSING, "extrapolation.max_kl=1e-9", "train.num_steps=5")
    (made,) = decisions(root)
    assert made["asking"] is False
    assert [row["step"] for row in metrics_of(root) if "extrapolate/groups" in row] == [3]
    assert made["trials"][0]["kl_per_sequence"] > 1e-9

"""One prompt through real training: a pool of 4 prompts, so that every step visits every prompt."""

from pathlib import Path

import pytest

from npo_cli.errors import NpoError
from npo_cli.report.prompt_history import build_prompt_history, iter_visits
from npo_cli.report.show import show_run
from npo_cli.storage.layout import open_run
from npo_cli.storage.rollout_log import RolloutLog
from npo_cli.types.views import PromptHistory, PromptVisit
from tests.helpers.runs import resume, sample, train

EVERY_PROMPT = ("task.pool_size=4",)


@pytest.fixture(scope="module")
def replayed(tmp_path_factory) -> Path:
    """4 steps on main; then steps 3 and 4 again as `near`, every group given to a guide that knows the answer."""
    root = tmp_path_factory.mktemp("replayed") / "run"
    train(root, *EVERY_PROMPT)
    sample(root, "guide.cache.samples_per_prompt=16")
    resume(root, "guide.inject.max_accuracy=1.0", at=2, guide="near")
    return root


def shown(root: Path, prompt_id: str, **options: object) -> list:
    arguments = {"branch": "near", "step": None, "limit": None} | options
    return show_run(root, "rollouts", prompt_id=prompt_id, **arguments)


def prompts_of(root: Path) -> list[str]:
    groups = RolloutLog(open_run(root).rollouts_path("main")).read_step(1)
    return [group.prompt.prompt_id for group in groups]


def test_prompt_history_follows_a_prompt_across_the_rollback(replayed):
    for prompt_id in prompts_of(replayed):
        head, *seen = shown(replayed, prompt_id)
        assert isinstance(head, PromptHistory)
        assert [(one.branch, one.step) for one in seen] == [("main", 1), ("main", 2), ("near", 3), ("near", 4)]
        assert {one.group.prompt.prompt_id for one in seen} == {prompt_id}
        assert (head.num_visits, head.branch) == (4, "near")


def test_another_branch_has_a_story_of_its_own(replayed):
    head, *seen = shown(replayed, prompts_of(replayed)[0], branch="main")
    assert [(one.branch, one.step) for one in seen] == [("main", step) for step in (1, 2, 3, 4)]
    assert head.injection_steps == ()


def test_prompt_history_counts_verdicts(replayed):
    run = open_run(replayed)
    for visit in iter_visits(run, "near"):
        own = [one for one in visit.group.rollouts if one.source == "own"]
        assert (visit.num_on_policy, visit.num_correct) == (len(own), sum(one.reward for one in own))
        if visit.branch == "near":
            # what the mix counted before a guide took a slot
            assert visit.num_correct == pytest.approx(len(own) * visit.group.on_policy_accuracy)
    injected = {
        prompt_id: [visit.step for visit in iter_visits(run, "near", prompt_id=prompt_id) if visit.off_policy_rollouts]
        for prompt_id in prompts_of(replayed)
    }
    assert {prompt_id: list(shown(replayed, prompt_id)[0].injection_steps) for prompt_id in injected} == injected
    assert any(injected.values()), "no guide rollout was injected: the test shows nothing"


def test_prompt_history_first_solved_is_the_first_own_correct_response(replayed):
    run = open_run(replayed)
    num_solved = 0
    for prompt_id in prompts_of(replayed):
        seen = list(iter_visits(run, "near", prompt_id=prompt_id))
        own = [[one for one in visit.group.rollouts if one.source == "own"] for visit in seen]
        right = [sum(one.verdict == "correct" for one in some) for some in own]
        history = build_prompt_history("near", seen)
        assert history.first_solved_step == next((seen[place].step for place, n in enumerate(right) if n > 0), None)
        # 3 of 4 and 2 of 3 are more than half, 2 of 4 are not
        half = [len(some) / 2 for some in own]
        mostly = (visit.step for visit, n, least in zip(seen, right, half, strict=True) if n > least)
        assert history.first_mostly_solved_step == next(mostly, None)
        num_solved += history.first_solved_step is not None
    assert num_solved, "no prompt was ever solved: the test shows nothing"


def test_prompt_history_limit_keeps_the_last_visits_and_the_summary(replayed):
    head, *seen = shown(replayed, prompts_of(replayed)[0], limit=1)
    assert isinstance(head, PromptHistory)
    assert [(type(one), one.step) for one in seen] == [(PromptVisit, 4)]


def test_prompt_history_of_one_step_is_a_table_of_rollouts(replayed):
    lines = shown(replayed, prompts_of(replayed)[0], step=3)
    assert {(line.branch, line.step, line.rollout.source) for line in lines} >= {("near", 3, "own")}


def test_prompt_history_of_an_unvisited_prompt_is_refused(replayed):
    with pytest.raises(NpoError, match="has no rollouts of prompt 'nobody'"):
        shown(replayed, "nobody")

"""A run with real-valued rewards: advantages from the reward, everything else from what is correct."""

import json
import shutil
from contextlib import closing
from pathlib import Path

import pytest

from npo_cli.errors import NpoError
from npo_cli.rollout.batch import add_advantages, restore_prompt
from npo_cli.storage.layout import open_run
from npo_cli.storage.log_head import rewrite_head
from npo_cli.storage.rollout_log import RolloutLog
from npo_cli.tasks.custom_verifier import code_permitted
from tests.helpers.runs import copy_run, file_digests, open_session_at, resume, sample, train

GRADE = """
def grade(response, answer, level):
    is_correct = response.endswith("7")
    return {"reward": -level * len(response), "correct": is_correct, "parts": {"length": len(response)}}

def starts(completions, note, **kwargs):
    return [float(one.startswith(str(i))) if text == "even" else None for one, text, i in zip(completions, note, "1")]
"""


@pytest.fixture(autouse=True)
def with_code():
    with code_permitted():
        yield


@pytest.fixture(scope="module")
def settings(tmp_path_factory) -> tuple[str, ...]:
    folder = tmp_path_factory.mktemp("data")
    rows = [
        {"prompt": f"{n}+1=", "answer": str(n + 1), "level": 1 + n % 2, "note": ["even", "odd"][n % 2]}
        for n in range(30)
    ]
    (folder / "d.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "v.py").write_text(GRADE)
    return (
        *("task.source=file", f"task.path={folder}/d.jsonl"),
        *(f"task.verifier=[{folder}/v.py:grade, {folder}/v.py:starts]", "task.reward_weights=[0.5, 2]"),
        *("guide.inject.max_accuracy=0.5", "guide.cache.lazy=false"),
    )


@pytest.fixture(scope="module")
def graded(settings, tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("rewards") / "run"
    with code_permitted():
        train(root, *settings)
    return root


def groups_of(root: Path, branch: str = "main") -> list:
    log = RolloutLog(open_run(root).rollouts_path(branch))
    return [group for step in log.steps() for group in log.read_step(step)]


def expected_reward(prompt_id: str, text: str) -> float:
    number = int(prompt_id.removeprefix("rows/"))
    return 0.5 * -(1 + number % 2) * len(text) + (2.0 * text.startswith("1") if number % 2 == 0 else 0.0)


def test_reward_of_a_run_is_the_weighted_sum_of_both_functions(graded):
    rollouts = [rollout for group in groups_of(graded) for rollout in group.rollouts]
    assert len(rollouts) == 4 * 4 * 4
    for rollout in rollouts:
        assert rollout.reward == expected_reward(rollout.prompt_id, rollout.text)
        assert rollout.is_correct == (rollout.text.endswith("7") and rollout.finished)
        assert rollout.reward_parts["grade/length"] == len(rollout.text)
        assert ("starts" in rollout.reward_parts) == (int(rollout.prompt_id[5:]) % 2 == 0)


def test_metrics_have_reward_accuracy_and_parts(graded):
    first = json.loads(open_run(graded).metrics_path("main").read_text().splitlines()[0])
    rollouts = [rollout for group in groups_of(graded)[:4] for rollout in group.rollouts]
    assert first["reward"] == pytest.approx(sum(one.reward for one in rollouts) / 16)
    assert first["accuracy"] == sum(one.is_correct for one in rollouts) / 16
    assert first["reward/grade/length"] == pytest.approx(sum(len(one.text) for one in rollouts) / 16)
    some = [one.reward_parts["starts"] for one in rollouts if "starts" in one.reward_parts]
    assert first["reward/starts"] == pytest.approx(sum(some) / len(some))


def test_advantages_are_computed_from_the_reward(graded):
    with closing(open_session_at(graded, 4)) as session:
        groups = groups_of(graded)[:4]
        for entry in add_advantages(session, groups):
            rewards = [rollout.reward for rollout in entry.group.rollouts]
            mean = sum(rewards) / 4
            std = (sum((one - mean) ** 2 for one in rewards) / 3) ** 0.5
            expected = [(one - mean) / (std + 1e-6) if std else 0.0 for one in rewards]
            assert entry.advantages == pytest.approx(expected, abs=1e-5)
            assert entry.has_signal == (len(set(rewards)) > 1)  # what dynamic sampling keeps


def test_guides_are_correct_responses_with_their_own_reward(graded, tmp_path):
    root = copy_run(graded, tmp_path / "run")
    sample(root)
    reports = resume(root, at=2, guide="near")
    injected = [one for group in groups_of(root, "near") for one in group.rollouts if one.is_off_policy]
    assert len(injected) == sum(report.metrics["inject/slots"] for report in reports) > 0
    for rollout in injected:
        assert rollout.text.endswith("7")
        assert rollout.reward == expected_reward(rollout.prompt_id, rollout.text) != 1.0


def test_killed_run_with_rewards_resumes_to_the_same_bytes(graded, settings, tmp_path):
    root = tmp_path / "run"
    train(root, *settings, until=2)
    resume(root)
    names = ("rollouts.jsonl", "metrics.jsonl")
    ours, theirs = ({k: v for k, v in file_digests(run).items() if k.endswith(names)} for run in (root, graded))
    assert ours == theirs


def test_recorded_step_is_graded_with_the_columns_of_the_data(graded):
    with closing(open_session_at(graded, 4)) as session:
        group = restore_prompt(session, groups_of(graded)[0])
        (result, *_) = session.task.grade([group.prompt], ["x7"])
        assert result.reward == expected_reward(group.prompt.prompt_id, "x7")


@pytest.mark.parametrize(
    ("value", "words"), [("true", "reward is True"), ('"1"', "reward is '1'"), ("1e999", "reward is inf")]
)
def test_recorded_reward_that_is_no_finite_number_is_damage(graded, tmp_path, value, words):
    shutil.copytree(graded, tmp_path / "run")
    path = open_run(tmp_path / "run").rollouts_path("main")
    head, _, tail = path.read_text().partition('"reward":')
    path.write_text(f'{head}"reward":{value},{tail.partition(",")[2]}')
    rewrite_head(path)
    with pytest.raises(NpoError, match=words):
        groups_of(tmp_path / "run")

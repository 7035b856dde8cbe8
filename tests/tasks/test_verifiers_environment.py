"""`task.source=verifiers`: one-turn environments of the package `verifiers`, on environments made for this test."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from npo_cli.config.recipe import TaskSettings
from npo_cli.errors import NpoError, RunFailed
from npo_cli.tasks.task import Task, load_task
from npo_cli.types.rollouts import Message
from tests.helpers.runs import resume, train

ENVIRONMENTS = Path(__file__).parents[1] / "data" / "environments"
pytestmark = pytest.mark.skipif(find_spec("verifiers") is None, reason="verifiers is not installed")


@pytest.fixture(autouse=True)
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ENVIRONMENTS)


def load(environment: str = "sums-env", **settings: Any) -> Task:
    sizes = {"pool_size": 6, "heldout_size": 4, "verify_workers": 1, "verify_timeout": 60.0} | settings
    return load_task(TaskSettings(source="verifiers", environment=environment, **sizes), seed=0)


def refusal(environment: str, **arguments: Any) -> str:
    with pytest.raises(NpoError) as caught:
        load(environment, environment_args=arguments).close()
    assert caught.value.hint
    return caught.value.message


@pytest.mark.slow  # each process imports verifiers
def test_environment_gives_prompts_and_rewards():
    task = load(environment_args={"first": 100})
    try:
        assert [prompt.text for prompt in task.train] == [f"{n}+1=" for n in range(100, 106)]
        assert [prompt.answer for prompt in task.heldout] == ["107", "108", "109", "110"]
        results = task.grade([task.train[0]] * 3, ["101", "one hundred", " 102"])
        assert [result.reward for result in results] == [1.0, 0.5, 0.0]
        assert [result.verdict for result in results] == ["correct", "wrong", "wrong"]
        assert results[1].parts == {"is_right": 0.0, "is_long": 1.0, "num_characters": 11.0}
        with pytest.raises(RunFailed, match="cannot count"):
            task.grade(task.train[:1], ["raise"])
    finally:
        task.close()


@pytest.mark.slow
def test_environment_with_a_system_prompt_gives_chats():
    task = load(environment_args={"system": "Add."}, suffix="Digits only.")
    task.close()
    assert task.train[0].messages == (
        Message(role="system", content="Add."),
        Message(role="user", content="0+1=\nDigits only."),
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("environment", "arguments", "words"),
    [
        ("dialog_env", {}, "task 0 of dialog_env has a stop condition, so it takes several turns"),
        ("dialog_env", {"kind": "InRuntime"}, "scores in a runtime (runs)"),
        ("dialog_env", {"kind": "Prepared"}, "has setup in a runtime"),
        ("dialog_env", {"kind": "Unrewarded"}, "has no rewards"),
        ("dialog_env", {"kind": "DialogTask", "prompt": None}, "lets the user open the conversation"),
        ("dialog_env", {"kind": "DialogTask", "image": "python"}, "needs a container"),
        ("dialog_env", {"kind": "Other"}, "dialog_env does not take task.environment_args={'kind': 'Other'}"),
        ("old-env", {}, "old-env is an environment of verifiers before 0.4"),
        ("no-such-env", {}, "task.environment=no-such-env is not installed"),
        ("json", {}, "json is no environment"),
    ],
    ids=str,
)
def test_environment_of_several_turns_is_refused(environment: str, arguments: dict[str, Any], words: str):
    assert words in refusal(environment, **arguments)


@pytest.mark.slow
def test_run_on_an_environment_continues(tmp_path: Path):
    settings = ["task.source=verifiers", "task.environment=sums-env", "task.pool_size=8", "task.heldout_size=4"]
    settings += ["train.prompts_per_step=4", "task.verify_timeout=60"]
    (report,) = train(tmp_path / "run", *settings, until=1)
    assert {"reward/is_right", "reward/is_long", "reward/num_characters"} <= set(report.metrics)
    assert [each.step for each in resume(tmp_path / "run", until=2)] == [2]

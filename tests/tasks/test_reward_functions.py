"""Reward functions in the signatures of npo, TRL and verl: what they are given, and what their results mean."""

import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy
import pytest

from npo_cli.errors import NpoError
from npo_cli.tasks.reward_functions import InvalidReward, make_reward_call, wrap_function
from npo_cli.types.rollouts import Message, Prompt, VerifierResult

ROW = {"prompt": "2+2=", "answer": "4", "solution": "it is 4", "level": 0.5}
TEXT = Prompt(prompt_id="p0", text="2+2=", answer="4", columns=ROW)
CHAT = Prompt(prompt_id="p1", messages=(Message(role="user", content="2+2="),), answer="4", columns=ROW)


def graded(
    function: Callable, response: str = "4", *, prompt: Prompt = TEXT, threshold: float = 1.0
) -> VerifierResult | None:
    columns = tuple(prompt.columns)
    reward = wrap_function(function, "v.py: f", correct_threshold=threshold, column_names=columns)
    return reward(make_reward_call(prompt, response, data_source="file", column_names=columns))


def arguments_of(make: Callable[[dict], Callable], **options: Any) -> Mapping[str, Any]:
    """What a function that records its arguments is given."""
    found: dict[str, Any] = {}
    graded(make(found), **options)
    return found


# What they are given


def test_reward_function_of_npo_gets_columns_by_name():
    def make(found):
        return lambda response, level, extra=3: found.update(response=response, level=level, extra=extra) or 1

    assert arguments_of(make) == {"response": "4", "level": 0.5, "extra": 3}


def test_reward_function_with_kwargs_gets_everything():
    found = arguments_of(lambda found: lambda **everything: found.update(everything) or 1)
    assert found == {**ROW, "prompt_id": "p0", "prompt": "2+2=", "response": "4", "answer": "4"}


def test_reward_function_gets_none_for_a_column_its_row_lacks():
    found: dict[str, Any] = {}
    reward = wrap_function(
        lambda response, level: found.update(level=level) or 1, "f", correct_threshold=1, column_names=("level",)
    )
    bare = Prompt(prompt_id="p", text="?", answer="4")
    reward(make_reward_call(bare, "4", data_source="file", column_names=("level",)))
    assert found == {"level": None}


def test_trl_reward_function_gets_lists_of_texts():
    found = arguments_of(
        lambda found: lambda completions, prompts, **columns: found.update(columns, c=completions, p=prompts) or [1]
    )
    # TRL passes no column `prompt`
    assert found == {
        **{"c": ["4"], "p": ["2+2="], "prompt_id": ["p0"]},
        **{"answer": ["4"], "solution": ["it is 4"], "level": [0.5]},
    }


def test_trl_reward_function_gets_messages_for_a_chat():
    found = arguments_of(
        lambda found: lambda completions, prompts: found.update(c=completions, p=prompts) or [1], prompt=CHAT
    )
    assert found["c"] == [[{"role": "assistant", "content": "4"}]]
    assert found["p"] == [[{"role": "user", "content": "2+2="}]]


def test_trl_own_reward_functions_work_as_they_are():
    rewards = pytest.importorskip("trl.rewards")
    assert graded(rewards.think_format_reward, "<think>\n2+2\n</think>\n4", prompt=CHAT).reward == 1.0
    assert graded(rewards.think_format_reward, "4", prompt=CHAT).reward == 0.0


def test_asynchronous_reward_function_is_waited_for():
    async def reward(completions, **columns):
        return [0.5]

    assert graded(reward).reward == 0.5


def test_verl_reward_function_gets_the_answer_and_all_columns():
    def make(found):
        def compute_score(data_source, solution_str, ground_truth, extra_info=None):
            found.update(source=data_source, said=solution_str, truth=ground_truth, extra=extra_info)
            return 1.0

        return compute_score

    found = arguments_of(make)
    assert (found["source"], found["said"], found["truth"]) == ("file", "4", "4")
    assert found["extra"] == {**ROW, "prompt_id": "p0"}


def test_verl_reward_function_gets_the_columns_of_verl():
    row = {"data_source": "gsm8k", "reward_model": {"ground_truth": "four"}, "extra_info": {"index": 7}}

    def make(found):
        def compute_score(data_source, solution_str, ground_truth, extra_info):
            found.update(source=data_source, truth=ground_truth, extra=extra_info)
            return 1.0

        return compute_score

    found = arguments_of(make, prompt=Prompt(prompt_id="p", text="?", answer="4", columns=row))
    assert found == {"source": "gsm8k", "truth": "four", "extra": {"index": 7}}


# What their results mean


@pytest.mark.parametrize(
    ("value", "reward", "is_correct"),
    [
        *((True, 1, True), (False, 0, False), (2, 2, True), (0.99, 0.99, False), (-3.5, -3.5, False)),
        *((numpy.float32(1.5), 1.5, True), (numpy.True_, 1, True)),
    ],
)
def test_reward_is_the_number(value: Any, reward: float, is_correct: bool):
    result = graded(lambda response: value)
    assert (result.reward, result.is_correct) == (reward, is_correct)


def test_correct_threshold_decides_about_numbers_not_about_bools():
    assert graded(lambda response: 0.5, threshold=0.5).is_correct
    assert not graded(lambda response: -1, threshold=-0.5).is_correct
    assert not graded(lambda response: False, threshold=-0.5).is_correct


def test_dict_has_reward_verdict_and_parts():
    result = graded(lambda response: {"reward": 0.3, "correct": True, "parts": {"format": 0.1, "short": True}})
    assert (result.reward, result.is_correct, result.parts) == (0.3, True, {"format": 0.1, "short": 1.0})
    assert graded(lambda response: {"reward": 2}) == VerifierResult(verdict="correct", score=2.0)
    assert not graded(lambda response: {"reward": 2, "correct": False}).is_correct


def test_dict_of_verl_has_score_acc_and_other_numbers():
    def compute_score(data_source, solution_str, ground_truth):
        return {"score": -1.0, "acc": True, "pred": "4", "length": 1}

    result = graded(compute_score)
    assert (result.reward, result.is_correct, result.parts) == (-1.0, True, {"length": 1.0})


def test_none_of_trl_is_not_applicable():
    assert graded(lambda completions: [None]) is None


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (None, "it returned None (None is not a number)"),
        (float("nan"), "it returned nan (nan is not finite)"),
        (float("-inf"), "it returned -inf (-inf is not finite)"),
        (1e300, "it returned 1e+300 (more than 1e+15)"),
        ("1", "it returned '1' ('1' is not a number)"),
        (1j, "it returned 1j (1j is not a number)"),
        ([1], "it returned [1] ([1] is not a number)"),
        ({}, "it returned {} (None is not a number)"),
        ({"reward": 1, "score": 1}, "('score' is no key of it)"),
        ({"reward": 1, "correct": "yes"}, "('yes' is neither true nor false)"),
        ({"reward": 1, "parts": [1]}, "(parts are not numbers by name)"),
        ({"reward": 1, "parts": {"a": float("inf")}}, "(inf is not finite)"),
    ],
)
def test_result_that_is_no_reward_is_an_error_with_the_value(value: Any, words: str):
    with pytest.raises(InvalidReward, match=f"^v.py: f must return .*{re.escape(words)}$"):
        graded(lambda response: value)


@pytest.mark.parametrize("value", [1.0, [], [1.0, 2.0], "1", ["1"], {"reward": 1}, [float("nan")]])
def test_trl_result_is_a_list_of_one_number(value: Any):
    with pytest.raises(InvalidReward, match=r"v\.py: f must return a list with one finite number, or None"):
        graded(lambda completions: value)


# What is refused before the run


@pytest.mark.parametrize(
    ("function", "message", "hint"),
    [
        (3, "v.py: f is not a function", "write def function"),
        (lambda question: 1, "v.py: f(question) takes no response", "write def function"),
        (lambda response, hardness: 1, "requires the parameter 'hardness'", "columns of the data: prompt, answer, sol"),
        (lambda completions, solutoin: 1, "requires the parameter 'solutoin'", "use one of: answer, completions, lev"),
        (
            lambda solution_str, language: 1,
            "requires the parameter 'language'",
            "data_source, extra_info",
        ),
        (lambda completions, completion_ids: 1, "requires the parameter 'completion_ids'", "columns of the data"),
        (lambda response, /: 1, "requires the parameter 'response'", "columns of the data"),
    ],
)
def test_function_that_cannot_be_called_is_refused(function: Any, message: str, hint: str):
    with pytest.raises(NpoError) as caught:
        graded(function)
    assert message in caught.value.message
    assert hint in caught.value.hint

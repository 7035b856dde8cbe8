"""The reward as the weighted sum of several verifiers."""

import math

import pytest

from npo_cli.config.recipe import TaskSettings
from npo_cli.errors import NpoError, RunFailed
from npo_cli.tasks.base import Verifier
from npo_cli.tasks.rewards import WeightedVerifier, grade_weighted, name_terms
from npo_cli.tasks.task import load_task
from npo_cli.tasks.verifiers import ExactVerifier
from npo_cli.types.rollouts import Prompt, VerifierResult

PROMPTS = [Prompt(prompt_id=f"p{place}", text="2+2=", answer="4") for place in range(3)]


class Given(Verifier):
    """Gives these results."""

    def __init__(self, *results: VerifierResult | None) -> None:
        self.results = results

    def grade(self, prompts, responses):
        return self.results


def number(score: float, verdict: str = "wrong", **parts: float) -> VerifierResult:
    return VerifierResult(verdict=verdict, score=score, parts=parts)


def term(name: str, *results: VerifierResult | None, weight: float = 1.0) -> WeightedVerifier:
    return WeightedVerifier(name=name, verifier=Given(*results), weight=weight)


def test_reward_is_the_weighted_sum_and_the_first_verifier_says_what_is_correct():
    exact = WeightedVerifier(name="exact", verifier=ExactVerifier())
    style = term("style", number(0.5, short=1), number(-2.0, "correct"), number(0.25), weight=2.0)
    right, wrong, silent = grade_weighted([exact, style], PROMPTS, ["4", "5", ""], [True] * 3)
    assert (right.verdict, right.reward) == ("correct", 1 + 2 * 0.5)
    assert right.parts == {"exact": 1.0, "style": 0.5, "style/short": 1}
    assert (wrong.verdict, wrong.reward) == ("wrong", 0 + 2 * -2.0)
    assert (silent.verdict, silent.reward) == ("unparseable", 0 + 2 * 0.25)


def test_verifier_that_does_not_apply_is_left_out():
    maths = term("maths", number(1.0, "correct"), None, None)
    code = term("code", None, number(3.0, "correct"), number(0.5))
    results = grade_weighted([maths, code], PROMPTS, ["a", "b", "c"], [True] * 3)
    assert [(one.verdict, one.reward) for one in results] == [("correct", 1.0), ("correct", 3.0), ("wrong", 0.5)]
    assert [dict(one.parts) for one in results] == [{"maths": 1.0}, {"code": 3.0}, {"code": 0.5}]


def test_response_without_any_reward_is_an_error():
    with pytest.raises(RunFailed, match=r"a response to prompt p0 has no reward.*maths, code returned None"):
        grade_weighted([term("maths", None), term("code", None)], PROMPTS[:1], ["a"], [True])


@pytest.mark.parametrize("score", [math.nan, math.inf, 1e16])
def test_reward_of_a_plug_in_is_finite_too(score: float):
    with pytest.raises(RunFailed, match=r"the reward of a response to prompt p0 is .*\(mine .*\)"):
        grade_weighted([term("mine", number(score))], PROMPTS[:1], ["a"], [True])


def test_truncated_response_is_wrong_and_keeps_a_number_as_its_reward():
    exact = WeightedVerifier(name="exact", verifier=ExactVerifier())
    (verdict,) = grade_weighted([exact], PROMPTS[:1], ["4"], [False])
    assert (verdict.verdict, verdict.reward) == ("wrong", 0.0)
    (result,) = grade_weighted([exact, term("length", number(0.3))], PROMPTS[:1], ["4"], [False])
    assert (result.verdict, result.reward, result.parts["exact"]) == ("wrong", 0.3, 0.0)
    (alone,) = grade_weighted([term("mine", number(1.0, "correct"))], PROMPTS[:1], ["4"], [False])
    assert (alone.verdict, alone.reward) == ("wrong", 1.0)


def test_names_of_rewards_are_unique():
    assert name_terms(["math_verify", "a/grade.py:score"]) == ["math_verify", "score"]
    assert name_terms(["a/one.py:score", "a/two.py:score"]) == ["one.score", "two.score"]
    with pytest.raises(NpoError, match=r"names two verifiers 'one\.score'"):
        name_terms(["a/one.py:score", "b/one.py:score"])


def test_threshold_is_refused_where_every_verifier_gives_verdicts():
    settings = TaskSettings(pool_size=2, heldout_size=2, verifier=("number", "exact"), correct_threshold=0.5)
    with pytest.raises(NpoError, match="no effect: number, exact gives verdicts"):
        load_task(settings, seed=0)

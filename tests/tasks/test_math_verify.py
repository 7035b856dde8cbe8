import threading
from collections.abc import Iterator

import pytest

from npo_cli.errors import NpoError
from npo_cli.tasks.math_verify import MathVerifier, make_math_verifier
from npo_cli.types.rollouts import Prompt, VerifierResult

pytest.importorskip("math_verify")


@pytest.fixture(scope="module")
def grader() -> Iterator[MathVerifier]:
    grader = make_math_verifier(num_workers=1, timeout=5.0)
    yield grader
    grader.close()


def graded(grader: MathVerifier, pairs: list[tuple[str, str]]) -> list[VerifierResult]:
    prompts = [Prompt(prompt_id=str(place), text="?", answer=answer) for place, (answer, _) in enumerate(pairs)]
    return grader.grade(prompts, [response for _, response in pairs])


def test_equal_mathematics_is_correct_however_it_is_written(grader: MathVerifier):
    pairs = [
        ("0.5", "It is \\boxed{\\frac{1}{2}}."),
        ("\\frac{1}{2}", "so the answer is $0.5$"),
        ("2\\sqrt{3}", "\\boxed{\\sqrt{12}}"),
        ("1000", "That makes 1,000."),
        ("$x+1$", "\\boxed{1+x}"),
    ]
    assert [one.verdict for one in graded(grader, pairs)] == ["correct"] * 5


def test_wrong_and_unparseable_are_told_apart(grader: MathVerifier):
    wrong, silent, words = graded(grader, [("4", "\\boxed{5}"), ("4", ""), ("4", "I cannot say")])
    assert wrong == VerifierResult(verdict="wrong", extracted="5")
    assert silent == words == VerifierResult(verdict="unparseable")


def test_the_reference_goes_first(grader: MathVerifier):
    # an interval answers for the inequality it solves; an inequality does not answer for the interval asked for
    found = graded(grader, [("$1<x<2$", "$(1,2)$"), ("$(1,2)$", "$1<x<2$")])
    assert [one.verdict for one in found] == ["correct", "wrong"]


def test_a_thread_gets_the_same_verdicts(grader: MathVerifier):
    found: list[VerifierResult] = []
    thread = threading.Thread(target=lambda: found.extend(graded(grader, [("4", "$4$"), ("4", "$5$")])))
    thread.start()
    thread.join()
    assert [one.verdict for one in found] == ["correct", "wrong"]


def test_a_comparison_that_takes_for_ever_is_a_timeout_and_the_next_is_not():
    grader = make_math_verifier(num_workers=1, timeout=0.5)
    tower = "$9^{9^{9^{9}}}$"  # a number that does not fit into this universe
    late, right = graded(grader, [("4", tower), ("4", "$4$")])
    grader.close()
    assert late == VerifierResult(verdict="timeout")
    assert right.verdict == "correct"


def test_a_reference_that_is_not_mathematics_is_refused_by_name(grader: MathVerifier):
    prompts = [Prompt(prompt_id="good", text="?", answer="4"), Prompt(prompt_id="bad", text="?", answer="$$")]
    with pytest.raises(NpoError, match="prompt bad is not mathematics"):
        grader.check_answers(prompts)

import threading
from collections.abc import Iterator

import pytest

from npo_cli.config.recipe import TaskSettings
from npo_cli.errors import NpoError
from npo_cli.tasks.math_verify import MathVerifier
from npo_cli.types.rollouts import Prompt, VerifierResult

pytest.importorskip("math_verify")


@pytest.fixture(scope="module")
def verifier() -> Iterator[MathVerifier]:
    verifier = MathVerifier.open(TaskSettings(verify_workers=1))
    yield verifier
    verifier.close()


def grade(verifier: MathVerifier, pairs: list[tuple[str, str]]) -> list[VerifierResult]:
    prompts = [Prompt(prompt_id=str(place), text="?", answer=answer) for place, (answer, _) in enumerate(pairs)]
    return verifier.grade(prompts, [response for _, response in pairs])


def test_math_verifier_accepts_equal_mathematics_in_any_notation(verifier: MathVerifier):
    pairs = [
        ("0.5", "It is \\boxed{\\frac{1}{2}}."),
        ("\\frac{1}{2}", "so the answer is $0.5$"),
        ("2\\sqrt{3}", "\\boxed{\\sqrt{12}}"),
        ("1000", "That makes 1,000."),
        ("$x+1$", "\\boxed{1+x}"),
    ]
    assert [one.verdict for one in grade(verifier, pairs)] == ["correct"] * 5


def test_math_verifier_distinguishes_wrong_from_unparseable(verifier: MathVerifier):
    wrong, silent, words = grade(verifier, [("4", "\\boxed{5}"), ("4", ""), ("4", "I cannot say")])
    assert wrong == VerifierResult(verdict="wrong", extracted="5")
    assert silent == words == VerifierResult(verdict="unparseable")


def test_math_verifier_compares_the_reference_with_the_response(verifier: MathVerifier):
    # an interval answers for the inequality it solves; an inequality does not answer for the interval asked for
    found = grade(verifier, [("$1<x<2$", "$(1,2)$"), ("$(1,2)$", "$1<x<2$")])
    assert [one.verdict for one in found] == ["correct", "wrong"]


def test_math_verifier_works_in_a_thread(verifier: MathVerifier):
    found: list[VerifierResult] = []
    thread = threading.Thread(target=lambda: found.extend(grade(verifier, [("4", "$4$"), ("4", "$5$")])))
    thread.start()
    thread.join()
    assert [one.verdict for one in found] == ["correct", "wrong"]


def test_math_verifier_times_out_one_comparison_only():
    verifier = MathVerifier.open(TaskSettings(verify_workers=1, verify_timeout=0.5))
    tower = "$9^{9^{9^{9}}}$"  # a number that does not fit into this universe
    late, right = grade(verifier, [("4", tower), ("4", "$4$")])
    verifier.close()
    assert late == VerifierResult(verdict="timeout")
    assert right.verdict == "correct"


def test_math_verifier_refuses_an_unreadable_reference_answer(verifier: MathVerifier):
    prompts = [Prompt(prompt_id="good", text="?", answer="4"), Prompt(prompt_id="bad", text="?", answer="$$")]
    with pytest.raises(NpoError, match="prompt bad is not mathematics"):
        verifier.check_answers(prompts)

import pytest

from npo_cli.errors import NpoError
from npo_cli.tasks.micro import grade_micro
from npo_cli.tasks.verifiers import (
    ExactVerifier,
    LastNumberVerifier,
    NumberVerifier,
    grade_exact,
    grade_last_number,
    grade_number,
)
from npo_cli.types.rollouts import Prompt, VerifierResult


def test_exact_verifier_ignores_surrounding_whitespace_only():
    assert grade_exact("Yes", " Yes\n") == VerifierResult(verdict="correct", extracted="Yes")
    assert grade_exact("Yes", "yes") == VerifierResult(verdict="wrong", extracted="yes")
    assert grade_exact("Yes", "  ") == VerifierResult(verdict="unparseable")


def test_number_verifier_compares_exact_values():
    assert grade_number("0.5", "1/2") == VerifierResult(verdict="correct", extracted="1/2")
    assert grade_number("1000", " 1,000 ").verdict == "correct"
    assert grade_number("0.3", "0.30000000000000004").verdict == "wrong"  # a float would call 0.1 + 0.2 equal
    assert grade_number("5", "The answer is 5").verdict == "unparseable"


def test_last_number_verifier_reads_the_last_number():
    assert grade_last_number("7", "3 + 4 = 7.") == VerifierResult(verdict="correct", extracted="7")
    assert grade_last_number("7", "7 or maybe 8") == VerifierResult(verdict="wrong", extracted="8")
    assert grade_last_number("7", "seven") == VerifierResult(verdict="unparseable")


def test_micro_verifier_reads_the_text_after_the_hash():
    assert grade_micro("579", "9_7_5_#579") == VerifierResult(verdict="correct", extracted="579")
    assert grade_micro("579", "9_7_5_#0579").verdict == "wrong"
    assert grade_micro("579", "9_7_5_#").verdict == "wrong"
    assert grade_micro("579", "9_7_5_").verdict == "unparseable"
    assert grade_micro("579", "#579#579").verdict == "unparseable"


def test_verifier_rewards_are_one_for_correct_and_else_zero():
    prompts = [Prompt(prompt_id=str(place), text="?", answer="4") for place in range(3)]
    graded = LastNumberVerifier().grade(prompts, ["4", "5", "four"])
    assert [one.reward for one in graded] == [1.0, 0.0, 0.0]
    assert [one.verdict for one in graded] == ["correct", "wrong", "unparseable"]


def test_verifier_needs_one_response_per_prompt():
    with pytest.raises(ValueError, match="zip"):
        ExactVerifier().grade([Prompt(prompt_id="a", text="?", answer="4")], [])


def test_number_verifier_refuses_an_unreadable_reference_answer():
    with pytest.raises(NpoError, match=r"prompt a is not a number .* 'four'"):
        NumberVerifier().check_answers([Prompt(prompt_id="a", text="?", answer="four")])

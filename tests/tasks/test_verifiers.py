import pytest

from npo_cli.errors import NpoError
from npo_cli.tasks.verifiers import BUILTIN_VERIFIERS, grade_exact, grade_last_number, grade_micro, grade_number
from npo_cli.types.rollouts import Prompt, VerifierResult


def test_exact_ignores_only_the_blanks_around():
    assert grade_exact("Yes", " Yes\n") == VerifierResult(verdict="correct", extracted="Yes")
    assert grade_exact("Yes", "yes") == VerifierResult(verdict="wrong", extracted="yes")
    assert grade_exact("Yes", "  ") == VerifierResult(verdict="unparseable")


def test_a_number_is_compared_by_value_not_by_spelling():
    assert grade_number("0.5", "1/2") == VerifierResult(verdict="correct", extracted="1/2")
    assert grade_number("1000", " 1,000 ").verdict == "correct"
    assert grade_number("0.3", "0.30000000000000004").verdict == "wrong"  # a float would call 0.1 + 0.2 equal
    assert grade_number("5", "The answer is 5").verdict == "unparseable"


def test_the_last_number_counts_and_no_number_is_unparseable():
    assert grade_last_number("7", "3 + 4 = 7.") == VerifierResult(verdict="correct", extracted="7")
    assert grade_last_number("7", "7 or maybe 8") == VerifierResult(verdict="wrong", extracted="8")
    assert grade_last_number("7", "seven") == VerifierResult(verdict="unparseable")


def test_micro_reads_what_follows_the_one_mark():
    assert grade_micro("579", "9_7_5_#579") == VerifierResult(verdict="correct", extracted="579")
    assert grade_micro("579", "9_7_5_#0579").verdict == "wrong"
    assert grade_micro("579", "9_7_5_#").verdict == "wrong"
    assert grade_micro("579", "9_7_5_").verdict == "unparseable"
    assert grade_micro("579", "#579#579").verdict == "unparseable"


def test_rewards_are_one_for_correct_and_zero_for_the_rest():
    prompts = [Prompt(prompt_id=str(place), text="?", answer="4") for place in range(3)]
    graded = BUILTIN_VERIFIERS["last_number"].grade(prompts, ["4", "5", "four"])
    assert [one.reward for one in graded] == [1.0, 0.0, 0.0]
    assert [one.verdict for one in graded] == ["correct", "wrong", "unparseable"]


def test_a_batch_of_the_wrong_length_is_our_bug():
    with pytest.raises(ValueError, match="zip"):
        BUILTIN_VERIFIERS["exact"].grade([Prompt(prompt_id="a", text="?", answer="4")], [])


def test_a_reference_that_no_response_can_match_is_refused_by_name():
    with pytest.raises(NpoError, match=r"prompt a is not a number .* 'four'"):
        BUILTIN_VERIFIERS["number"].check_answers([Prompt(prompt_id="a", text="?", answer="four")])

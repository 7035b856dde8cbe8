"""How often each held-out prompt was solved, kept and found again."""

from dataclasses import replace

import pytest

from npo_cli.errors import NpoError
from npo_cli.storage.evals import append_prompt_results, hash_prompt, match_prompt_results, read_prompt_results
from npo_cli.types.rollouts import ImageRef, Message, Prompt
from tests.storage.builders import evaluation, make_eval_results, new_run


def test_a_prompt_is_known_by_what_is_asked_and_expected_alone():
    plain = Prompt(prompt_id="a", text="3+4=", answer="7")
    # printf '{"text":"3+4=","messages":[],"images":[],"answer":"7"}' | sha256sum
    assert hash_prompt(plain) == "4372ba56bd4bc545"
    assert hash_prompt(replace(plain, prompt_id="b", row=5, dataset="d")) == hash_prompt(plain)
    picture = ImageRef(location="x.png", sha256="ab", width=4, height=3)
    moved = replace(plain, images=(replace(picture, location="y.png"),))
    assert hash_prompt(moved) == hash_prompt(replace(plain, images=(picture,)))
    others = [
        replace(plain, text="4+3="),
        replace(plain, answer="8"),
        replace(plain, images=(picture,)),
        replace(plain, text=None, messages=(Message(role="user", content="3+4="),)),
    ]
    assert len({hash_prompt(one) for one in (plain, *others)}) == 5


def test_outcomes_come_back_and_the_first_of_an_evaluation_stays(tmp_path):
    run = new_run(tmp_path)
    append_prompt_results(run, make_eval_results(20))
    append_prompt_results(run, make_eval_results(20, num_correct=(0, 0, 0, 0)))
    append_prompt_results(run, make_eval_results(40))
    assert read_prompt_results(run) == [make_eval_results(20), make_eval_results(40)]


def test_outcomes_belong_to_the_report_that_sums_them_up(tmp_path):
    run = new_run(tmp_path)
    # 2 + 1 + 0 + 1 of 4 prompts twice: 0.5
    append_prompt_results(run, make_eval_results(20))
    assert match_prompt_results({("main", 20): evaluation(20, accuracy=0.5)}, run) == {
        ("main", 20): make_eval_results(20)
    }
    for other in (
        evaluation(20, accuracy=0.375),
        evaluation(20, num_samples=4),
        replace(evaluation(20), num_prompts=2),
        evaluation(40),
    ):
        assert match_prompt_results({(other.branch, other.step): other}, run) == {}


@pytest.mark.parametrize(
    "harm",
    [
        {"num_correct": (3, 0, 0, 1)},
        {"num_correct": (1, 1)},
        {"prompt_keys": ("a", "a", "b", "c")},
        {"num_correct": "ab"},
    ],
    ids=["more than asked", "too few", "a prompt twice", "no list"],
)
def test_counts_that_cannot_be_are_damage_and_the_line_is_named(tmp_path, harm):
    run = new_run(tmp_path)
    append_prompt_results(run, make_eval_results(20))
    append_prompt_results(run, replace(make_eval_results(40), **harm))
    with pytest.raises(NpoError, match=r"prompt_results\.jsonl, line 2 is damaged"):
        read_prompt_results(run)

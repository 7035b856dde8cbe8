import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from npo_cli.tasks.micro import (
    ALPHABET,
    MAX_RESPONSE,
    PROMPT_CHARS,
    Noise,
    digits,
    final_answer,
    format_addition,
    grade_micro,
    micro_prompts,
    misconceptions,
    noisy_response,
    num_misconceived,
)

NO_NOISE = Noise(digit=0.0, carry=0.0, misconception=0.0)


@st.composite
def additions(draw: st.DrawFn) -> tuple[int, int, int]:
    length = draw(st.integers(3, 5))
    number = st.integers(10 ** (length - 1), 10**length - 1)
    return draw(number), draw(number), length


def test_micro_task_has_thirty_fixed_misconceptions():
    wrong = misconceptions()
    assert len(wrong) == 30  # 15 % of 10 * 10 * 2
    assert list(wrong.items())[:4] == [((9, 2, 1), 7), ((3, 3, 1), 2), ((9, 9, 1), 1), ((3, 5, 1), 7)]
    assert all(digit != (a + b + c) % 10 for (a, b, c), digit in wrong.items())


@given(additions())
def test_micro_prompt_has_a_fixed_length(addition: tuple[int, int, int]):
    a, b, length = addition
    text = format_addition(a, b, length)
    assert len(text) == PROMPT_CHARS
    left, right = text.strip(".=").split("+")
    assert (int(left[::-1]), int(right[::-1])) == (a, b)


@given(additions())
def test_micro_response_without_noise_is_correct(addition: tuple[int, int, int]):
    a, b, length = addition
    response = noisy_response(a, b, length, noise=NO_NOISE, wrong=misconceptions(), rng=random.Random(0))
    assert grade_micro(str(a + b), response).verdict == "correct"
    assert len(response) <= MAX_RESPONSE - 1  # one place is left for the end token
    assert set(response) <= set(ALPHABET)


@given(additions())
def test_micro_misconceptions_are_counted_exactly(addition: tuple[int, int, int]):
    a, b, length = addition
    sure = Noise(digit=0.0, carry=0.0, misconception=1.0)
    response = noisy_response(a, b, length, noise=sure, wrong=misconceptions(), rng=random.Random(0))
    written = response.partition("#")[0][::2]
    right = digits((a + b) % 10**length, length)
    num_wrong = sum(int(said) != digit for said, digit in zip(written, right, strict=True))
    assert num_wrong == num_misconceived(a, b, length, wrong=misconceptions())


@given(st.text(alphabet="0#", max_size=6))
def test_micro_final_answer_needs_exactly_one_hash(response: str):
    assert (final_answer(response) is None) == (response.count("#") != 1)


def test_micro_final_answer_follows_the_hash():
    assert final_answer("9_7_5_#579") == "579"
    assert final_answer("#") == ""


@pytest.mark.parametrize(("kind", "least"), [("addh1", 1), ("addh2", 2), ("addh4", 4)])
def test_micro_hard_additions_need_misconceptions(kind: str, least: int):
    for prompt in micro_prompts(kind, 40, seed=0):
        a, b = map(int, prompt.prompt_id.partition("/")[2].split("+"))
        assert num_misconceived(a, b, 5, wrong=misconceptions()) >= least
        assert prompt.answer == str(a + b)


def test_micro_mix3_alternates_easy_and_hard():
    met = []
    for prompt in micro_prompts("mix3", 20, seed=0):
        a, b = map(int, prompt.prompt_id.partition("/")[2].split("+"))
        met.append((len(str(a)), num_misconceived(a, b, len(str(a)), wrong=misconceptions())))
    assert all(one == (3, 0) for one in met[::2])
    assert all(length == 5 and count >= 3 for length, count in met[1::2])


@pytest.mark.parametrize(("share", "num_hard"), [(0.5, 10), (0.8, 16), (0.95, 19)])
def test_micro_mix3_has_a_share_of_hard_additions(share: float, num_hard: int):
    lengths = [len(prompt.answer or "") for prompt in micro_prompts("mix3", 20, seed=0, hard_share=share)]
    assert sum(length >= 5 for length in lengths) == num_hard


def test_micro_prompts_depend_on_kind_and_seed_only():
    short, long = micro_prompts("mix3", 10, seed=3), micro_prompts("mix3", 25, seed=3)
    assert long[:10] == short
    assert len({prompt.text for prompt in long}) == 25
    assert micro_prompts("mix3", 10, seed=4) != short
    assert [prompt.text for prompt in micro_prompts("mix3", 2, seed=0)] == ["....398+455=", "64599+01792="]

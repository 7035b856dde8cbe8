import pytest

from npo_cli.errors import NpoError
from npo_cli.scoring.halving import HalvingRound, halving_rounds, select_survivors
from tests.scoring.samples import make_candidate, rank


def test_halving_doubles_the_prompts_of_eight_candidates_each_round():
    # 3 rounds of 160 pairs: 160/8, 160/4, 160/2
    rounds = halving_rounds(8, 480)
    assert [r.num_candidates for r in rounds] == [8, 4, 2]
    assert [r.prompts_per_candidate for r in rounds] == [20, 40, 80]
    assert sum(r.num_candidates * r.prompts_per_candidate for r in rounds) == 480


def test_halving_of_an_odd_number_keeps_the_larger_half_within_budget():
    # ceil(log2 5) = 3 rounds: 5, 3, 2 candidates; floor(100/15), floor(100/9), floor(100/6)
    rounds = halving_rounds(5, 100)
    assert [(r.num_candidates, r.prompts_per_candidate) for r in rounds] == [(5, 6), (3, 11), (2, 16)]
    assert sum(r.num_candidates * r.prompts_per_candidate for r in rounds) <= 100


def test_halving_gives_a_single_candidate_the_whole_budget():
    assert halving_rounds(1, 50) == [HalvingRound(num_candidates=1, prompts_per_candidate=50)]


def test_halving_refuses_a_budget_below_one_prompt_each():
    with pytest.raises(NpoError) as caught:
        halving_rounds(8, 23)
    assert "scoring.budget is 23" in caught.value.message
    assert "24 or more" in caught.value.hint
    assert halving_rounds(8, 24)[0].prompts_per_candidate == 1


def test_halving_survivors_have_the_largest_signal_nearest_first():
    candidates = [
        make_candidate(20, [0, 1] * 10),
        make_candidate(40, [4] * 20),
        make_candidate(60, [2] * 20, log_w=-1.0),
        make_candidate(80, [4] * 20, log_w=-2.5),
    ]
    scores = rank(make_candidate(0, [0] * 20), candidates)
    # Q~/V: 20 -> .5, 40 -> .98, 60 -> .98/1.80, 80 -> .98/13.4
    assert select_survivors(scores, 2) == ["checkpoint:40", "checkpoint:60"]
    assert select_survivors(scores, 9) == [f"checkpoint:{step}" for step in (20, 40, 60, 80)]


def test_halving_survivor_of_equals_is_the_nearer():
    scores = rank(make_candidate(0, [0] * 8), [make_candidate(60, [2] * 8), make_candidate(20, [2] * 8)])
    assert select_survivors(scores, 1) == ["checkpoint:20"]

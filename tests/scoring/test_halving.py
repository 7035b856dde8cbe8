import pytest

from npo_cli.errors import NpoError
from npo_cli.scoring.halving import HalvingRound, halving_rounds, select_survivors, successive_rejects
from npo_cli.scoring.ranking import rank_candidates
from tests.scoring.samples import SIGNAL, make_candidate


def test_eight_arms_double_their_prompts_each_round():
    # 3 rounds of 160 pairs: 160/8, 160/4, 160/2
    rounds = halving_rounds(8, 480)
    assert [r.num_candidates for r in rounds] == [8, 4, 2]
    assert [r.prompts_per_candidate for r in rounds] == [20, 40, 80]
    assert sum(r.num_candidates * r.prompts_per_candidate for r in rounds) == 480


def test_an_odd_field_keeps_the_larger_half_and_never_overspends():
    # ceil(log2 5) = 3 rounds: 5, 3, 2 arms; floor(100/15), floor(100/9), floor(100/6)
    rounds = halving_rounds(5, 100)
    assert [(r.num_candidates, r.prompts_per_candidate) for r in rounds] == [(5, 6), (3, 11), (2, 16)]
    assert sum(r.num_candidates * r.prompts_per_candidate for r in rounds) <= 100


def test_a_lone_arm_gets_the_whole_budget():
    assert halving_rounds(1, 50) == [HalvingRound(num_candidates=1, prompts_per_candidate=50)]


def test_a_budget_too_small_for_one_prompt_each_is_refused():
    with pytest.raises(NpoError) as caught:
        halving_rounds(8, 23)
    assert "scoring.budget is 23" in caught.value.message
    assert "24 or more" in caught.value.hint
    assert halving_rounds(8, 24)[0].prompts_per_candidate == 1


def test_successive_rejects_with_four_arms():
    # logbar = 1/2 + 1/2 + 1/3 + 1/4 = 19/12; 96/(19/12 * 4, 3, 2) = 15.2, 20.2, 30.3
    assert successive_rejects(4, 100) == [16, 21, 31]


def test_successive_rejects_spends_at_most_its_budget():
    totals = successive_rejects(4, 100)
    # one arm leaves after 16, one after 21, two see 31
    assert totals[0] + totals[1] + 2 * totals[2] == 99


def test_successive_rejects_needs_more_prompts_than_arms():
    with pytest.raises(NpoError, match=r"scoring\.budget is 4"):
        successive_rejects(4, 4)
    assert successive_rejects(1, 10) == []


def test_the_survivors_are_those_of_largest_signal_nearest_first():
    arms = [
        make_candidate(20, [0, 1] * 10),
        make_candidate(40, [4] * 20),
        make_candidate(60, [2] * 20, log_w=-1.0),
        make_candidate(80, [4] * 20, log_w=-2.5),
    ]
    scores = rank_candidates(make_candidate(0, [0] * 20), arms, SIGNAL)
    # Q~/V: 20 -> .5, 40 -> .98, 60 -> .98/1.80, 80 -> .98/13.4
    assert select_survivors(scores, 2) == (40, 60)
    assert select_survivors(scores, 9) == (20, 40, 60, 80)


def test_of_equals_the_nearer_survives():
    scores = rank_candidates(
        make_candidate(0, [0] * 8), [make_candidate(60, [2] * 8), make_candidate(20, [2] * 8)], SIGNAL
    )
    assert select_survivors(scores, 1) == (20,)

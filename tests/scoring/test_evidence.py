from dataclasses import replace

import pytest

from npo_cli.errors import NpoError
from npo_cli.scoring.evidence import CandidateResults, gather_evidence, list_queried_prompts, mean_quality
from tests.scoring.samples import SIGNAL, make_candidate

SELF = make_candidate(0, [0] * 4)


def test_pass_at_one_ignores_k():
    assert replace(SIGNAL, quality="pass@1", k=8).quality_k == 1
    assert replace(SIGNAL, quality="pass@k", k=8).quality_k == 8


def test_quality_is_the_mean_over_prompts():
    # pass@2 of 0, 2 and 4 correct of 4: 0, 1 - C(2,2)/C(4,2) = 5/6, 1
    assert mean_quality(make_candidate(20, [0, 2, 4]).pass_counts, 2) == pytest.approx((0 + 5 / 6 + 1) / 3)


def test_all_prompts_put_to_anyone_are_gathered_in_order():
    assert list_queried_prompts(SELF, [make_candidate(40, [1]), make_candidate(20, [1, 0, 0])]) == ["p00", "p01", "p02"]


def test_no_candidate_is_a_users_error():
    with pytest.raises(NpoError, match="no candidate guide for the learner at step 0"):
        list_queried_prompts(SELF, [])


def test_a_learner_that_fails_nothing_needs_no_guide():
    nothing = CandidateResults(step=20, distance=20, pass_counts=(), ratios=())
    with pytest.raises(NpoError) as caught:
        list_queried_prompts(replace(SELF, pass_counts=()), [nothing])
    assert "fails none of the probed prompts" in caught.value.message
    assert "scoring.num_prompts" in caught.value.hint


def test_a_prompt_counted_twice_is_our_own_mistake():
    twice = make_candidate(20, [1])
    with pytest.raises(AssertionError):
        list_queried_prompts(SELF, [replace(twice, pass_counts=twice.pass_counts * 2)])


def test_correct_samples_stand_behind_variance_once_everyone_has_thirty_two():
    enough, few = make_candidate(20, [4] * 8), make_candidate(40, [4] * 7 + [3])  # 32 and 31 correct of 32
    ids = list_queried_prompts(SELF, [enough])
    wide = make_candidate(20, [4] * 8 + [0] * 8)  # 32 correct, 32 wrong
    (only,) = gather_evidence([wide], list_queried_prompts(SELF, [wide]), SIGNAL)
    assert only.diagnostics.num_samples == 32
    # one candidate short of 32 puts all of them on all samples
    pair = gather_evidence([enough, few], ids, SIGNAL)
    assert [each.diagnostics.num_samples for each in pair] == [32, 32]
    both = gather_evidence([wide, few], list_queried_prompts(SELF, [wide]), SIGNAL)
    assert [each.diagnostics.num_samples for each in both] == [64, 32]


def test_prompts_never_asked_are_marked_uncovered():
    ids = ["p00", "p01", "p02"]
    (one,) = gather_evidence([make_candidate(20, [4, 0])], ids, SIGNAL)
    assert one.candidate.covered_P.tolist() == [1.0, 1.0, 0.0]
    assert one.candidate.values_P.tolist() == [1.0, 0.0, 0.0]
    assert one.candidate.num_prompts == 2
    assert one.num_tokens == 8 * 10

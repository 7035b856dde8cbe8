"""AutoNPO's confirmation does not accept what was there before, and does accept what was learned."""

import pytest

from tests.autonpo.acceptance_simulation import DIFFICULTIES, share, simulate


@pytest.mark.slow
@pytest.mark.parametrize("name", DIFFICULTIES)
def test_probe_with_nothing_learned_is_accepted_in_at_most_a_twentieth(name):
    # 100 probes at each drift; a true rate of .05 exceeds .10 in 1 % of samples of 100
    null = {drift: simulate(name, gain=0.0, drift=drift, num=100) for drift in (0.5, 1.0, 2.0)}
    assert all(share(found, "is_accepted") <= 0.1 for found in null.values())
    assert sum(share(found, "is_accepted") for found in null.values()) / 3 <= 0.05
    # most end before half of the prompts were sampled, where the rule before took all of them and accepted
    assert share(null[0.5], "share_sampled") < 0.6


@pytest.mark.slow
def test_probe_with_a_fifth_learned_is_accepted():
    found = simulate("Beta(1,2)", gain=0.2, drift=1.0, num=40)
    assert share(found, "is_accepted") >= 0.95


def test_probe_of_an_unchanged_policy_is_never_accepted():
    """Without drift every weight is 1, and Q_self is Q: the rule before accepted it."""
    (found,) = simulate("Beta(1,2)", gain=0.0, drift=0.0, num=1)
    assert (found.is_accepted, found.stop, found.share_sampled) == (False, "futility", 0.25)
    assert found.is_accepted_as_published

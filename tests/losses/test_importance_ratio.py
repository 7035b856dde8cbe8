import math

import pytest
from torch import tensor

from npo_cli.losses.importance_ratio import log_ratio, make_ratio_anchor
from tests.losses.builders import make_rows

CURRENT = [[-1.0, -2.0], [-1.0, -2.0]]
OLD = tensor([[-1.5, -2.5], [-1.5, -2.5]])
BEHAVIOR = tensor([[-9.0, -9.0], [-3.0, -2.0]])
"""Row 0 is the learner's own, row 1 foreign."""


def charged(mode, *, old=OLD, behavior=BEHAVIOR, cap=2.0):
    rows = make_rows([1.0, 1.0], mask=[[1, 1], [1, 1]], behavior=behavior, old=old, is_off_policy=[0, 1])
    return make_ratio_anchor(mode, decoupled_cap=cap)(tensor(CURRENT), rows)


@pytest.mark.parametrize("mode", ["exact", "proximal", "decoupled", "none"])
def test_an_own_row_is_charged_to_the_old_policy_in_every_mode(mode):
    found = charged(mode)
    assert found.anchor_logps_NT[0].tolist() == [-1.5, -2.5]
    assert found.weight_NT[0].tolist() == [1.0, 1.0]
    assert found.unclipped_N1[0].tolist() == [False]


def test_exact_charges_a_foreign_row_to_the_policy_that_wrote_it():
    found = charged("exact")
    assert found.anchor_logps_NT[1].tolist() == [-3.0, -2.0]
    assert found.weight_NT[1].tolist() == [1.0, 1.0]
    assert found.unclipped_N1[1].tolist() == [False]


def test_proximal_charges_a_foreign_row_to_the_old_policy():
    found = charged("proximal")
    assert found.anchor_logps_NT[1].tolist() == [-1.5, -2.5]
    assert found.weight_NT[1].tolist() == [1.0, 1.0]


def test_decoupled_weighs_by_old_over_behavior_up_to_the_cap():
    found = charged("decoupled")
    assert found.anchor_logps_NT[1].tolist() == [-1.5, -2.5]
    # exp(-1.5 + 3) = 4.48, capped at 2; exp(-2.5 + 2) = 0.606531
    assert found.weight_NT[1].tolist() == pytest.approx([2.0, 0.606531], abs=1e-6)


def test_none_anchors_a_foreign_row_on_itself_and_frees_it_from_clips():
    found = charged("none")
    assert found.anchor_logps_NT[1].tolist() == [-1.0, -2.0]
    assert found.weight_NT[1].tolist() == [1.0, 1.0]
    assert found.unclipped_N1.tolist() == [[False], [True]]


def test_without_old_log_probs_the_current_ones_stand_in():
    assert charged("exact", old=None).anchor_logps_NT.tolist() == [[-1.0, -2.0], [-3.0, -2.0]]
    # exp(-1 + 3) = 7.39, capped at 5; exp(-2 + 2) = 1
    assert charged("decoupled", old=None, cap=5.0).weight_NT[1].tolist() == [5.0, 1.0]


def test_no_charge_carries_a_gradient():
    current = tensor(CURRENT, requires_grad=True)
    rows = make_rows([1.0, 1.0], mask=[[1, 1], [1, 1]], behavior=BEHAVIOR, is_off_policy=[0, 1])
    for mode in ("exact", "proximal", "decoupled", "none"):
        found = make_ratio_anchor(mode, decoupled_cap=2.0)(current, rows)
        assert not found.anchor_logps_NT.requires_grad
        assert not found.weight_NT.requires_grad


def test_padding_never_reaches_a_charge():
    behavior = tensor([[0.0, 0.0], [-3.0, math.nan]])
    rows = make_rows([1.0, 1.0], mask=[[1, 1], [1, 0]], behavior=behavior, is_off_policy=[0, 1])
    assert make_ratio_anchor("exact", decoupled_cap=2.0)(tensor(CURRENT), rows).anchor_logps_NT[1].tolist() == [
        -3.0,
        0.0,
    ]


def test_log_ratios_stop_at_twenty_nats():
    assert log_ratio(tensor([-1.0, -50.0, 0.0]), tensor([-1.5, -1.0, -50.0])).tolist() == [0.5, -20.0, 20.0]

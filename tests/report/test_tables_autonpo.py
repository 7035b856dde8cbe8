from dataclasses import replace

from npo_cli.report.tables import TABLES
from npo_cli.report.tables_autonpo import (
    account_tables,
    no_trigger_tables,
    probes_tables,
    transitions_tables,
)
from npo_cli.types.autonpo import NonTriggerSpan, ProbeResult
from npo_cli.types.costs import RunCosts
from tests.report.autonpo_samples import CONFIRMATION, SCORE, intervention_transitions, make_transition


def test_every_move_says_what_it_was_based_on():
    armed = [make_transition(41, "armed"), make_transition(161, "armed", before="COOLDOWN")]
    (table, *_) = transitions_tables([armed[0], *intervention_transitions(120, to=110), armed[1]])
    assert table.title == "What AutoNPO did"
    assert table.header == ("step", "event", "branch", "based on")
    signals = "reward gained +0.0040 (noise 0.0110), entropy fell 9.1%"
    assert [(row[0], row[1], row[3]) for row in table.rows] == [
        ("41", "armed", "the warm-up is over"),
        ("118", "warning", signals),
        ("120", "trigger", signals),
        ("120", "probe_accepted", "D* = 10: Q 0.250 [0.200, 0.300], V 2, best in 75%"),
        ("120", "guide_built", "20 of 30 mistakes answered, 5 by the probe"),
        ("120", "rolled_back", "back to step 110, replayed until 120"),
        ("120", "replay_done", "rest until 160"),
        ("161", "armed", "the rest is over"),
    ]
    assert table.notes == ()


def test_a_rehearsal_says_that_it_assumed_and_where_it_could_have_gone_back_to():
    moves = [
        make_transition(
            0,
            "started",
            rehearsed=True,
            settings={"autonpo": {"trigger": {"window": 20, "max_reward_gain_se": 1.0}, "max_interventions": -1}},
        ),
        make_transition(120, "probe_accepted", "GUIDE_GEN", before="PROBE", assumed=True, distance=80),
        make_transition(120, "guide_built", "ROLLBACK", before="GUIDE_GEN", assumed=True),
        make_transition(120, "rolled_back", "REPLAY", before="ROLLBACK", to=40, assumed=True, to_steps=[40, 60, 100]),
    ]
    (table,) = transitions_tables(moves)
    assert table.title == "What AutoNPO would have done"
    assert [row[-1] for row in table.rows] == [
        "W 20, c_r 1, max -1",
        "assumed: D = 80, the largest that leads to a checkpoint",
        "assumed",
        "assumed: to 40, 60 or 100",
    ]
    assert len(table.notes) == 1
    (nothing,) = transitions_tables(moves[:1])
    assert (nothing.title, nothing.notes) == ("What AutoNPO would have done", ())


def test_records_of_a_file_have_no_branch_to_show():
    found = make_transition(41, "armed")
    (table,) = transitions_tables([replace(found, state=replace(found.state, branch="-"))])
    assert table.header == ("step", "event", "based on")


def test_each_probe_shows_q_v_and_s_by_distance_the_nearest_first():
    _, scores, variances, strata = transitions_tables(intervention_transitions(120, to=110))
    assert scores.title == "Rollback distances, step 120 of main"
    bounded = ("0.250 [0.200, 0.300]", "2.000 [1.500, 2.500]", "0.125 [0.100, 0.150]")
    assert scores.rows == (("10", "90", *bounded, "0.75", "<- D*"), ("20", "170", *bounded, "0.25", ""))
    assert scores.notes == (
        "accepted.",
        "48 prompts, 192 samples, 3,225 tokens; intervals are 95 %.",
        "D by rule and profile: argmax 10, one_se 20, seq_kl 10.",
    )
    assert variances.header[:6] == ("D", "asked", "V forward", "V backward", "agree", "tail")
    assert [row[:6] for row in variances.rows] == [
        ("10", "19", "2.000", "1.900", "yes", ""),
        ("20", "19", "2.000", "1.900", "yes", "HEAVY"),
    ]
    # the stratum of D = 10 holds the ages 0 to 9
    assert strata.rows == (("0-9", "90", "10", "40", "10", "0.250 [0.100, 0.400]"),)


def test_a_rejected_probe_gives_its_whole_reason_below_its_table():
    reason = (
        "the policy solves 0 % [0 %, 27.8 %] of the mistakes in the last 10 steps; autonpo.probe.min_quality is 10 %"
    )
    rejected = CONFIRMATION | {"is_accepted": False, "reason": reason}
    table, scores, *_ = transitions_tables(
        [make_transition(40, "probe_rejected", "COOLDOWN", before="PROBE", **rejected)]
    )
    assert table.rows[0][-1] == "rest until 80; the policy solves 0 % [0 %, 27.8 %] of the ..."
    assert scores.notes[0] == f"rejected: {reason}."
    # Without scores there is no such table: the cell says it all.
    unasked = make_transition(40, "probe_rejected", "COOLDOWN", before="PROBE", reason=reason, scores=[])
    (alone,) = transitions_tables([unasked])
    assert alone.rows[0][-1] == f"rest until 80; {reason}"


def test_figures_that_were_no_numbers_when_written_are_dashes():
    torn = {name: value for name, value in SCORE.items() if name not in ("variance", "signal", "quality_low")}
    _, scores, *_ = transitions_tables(
        [make_transition(40, "probe_accepted", "GUIDE_GEN", **(CONFIRMATION | {"scores": [torn]}))]
    )
    assert scores.rows == (("20", "170", "0.250 [-, 0.300]", "-", "-", "0.25", ""),)


def test_a_confirmation_as_a_record_has_the_same_tables():
    empty = ProbeResult(is_accepted=False, reason="no checkpoint to go back to", distance=None, strata=(), scores=())
    scores, strata = probes_tables([empty])
    assert (scores.rows, strata.rows) == ((), ())
    assert scores.notes[0] == "rejected: no checkpoint to go back to."


def test_reasons_are_counted_exactly_and_their_ranges_run_on_over_flickers():
    stretches = [
        NonTriggerSpan(reason="rising", first_step=41, last_step=60, num_steps=20),
        NonTriggerSpan(reason="streak", first_step=61, last_step=63, num_steps=3),
        # 3 steps lie between: the range runs on
        NonTriggerSpan(reason="rising", first_step=64, last_step=92, num_steps=29),
        NonTriggerSpan(reason="streak", first_step=93, last_step=97, num_steps=5),
        # 5 steps lie between: it does not
        NonTriggerSpan(reason="rising", first_step=98, last_step=98, num_steps=1),
    ]
    (table,) = no_trigger_tables(stretches)
    assert table.rows == (
        ("rising", "50", "reward still rises", "41-92, 98"),
        ("streak", "8", "both hold, too briefly", "61-63, 93-97"),
    )


def test_of_many_ranges_the_longest_are_named():
    stretches = [
        NonTriggerSpan(reason="x", first_step=20 * n, last_step=20 * n + n, num_steps=n + 1) for n in range(1, 7)
    ]
    (table,) = no_trigger_tables(stretches)
    assert table.rows == (("x", "27", "", "60-63, 80-84, 100-105, 120-126 and 2 more"),)


def test_an_account_adds_up():
    found = RunCosts(
        branch="auto-2", step=120, updates=170, training_tokens=224_302, probe_tokens=9_889, guide_tokens=22_041,
        acceptance_test_tokens=400, abandoned_tokens=93_516, seconds=0.0, num_interventions=2, num_rejections=1,
    )  # fmt: skip
    (table,) = account_tables([found])
    # 224302 + 9889 + 22041 + 400 + 93516 = 350148; no clock was kept
    assert dict(table.rows) == {
        "logical step": "120",
        "optimiser updates": "170",
        "training tokens": "224,302",
        "probe tokens": "9,889",
        "guide tokens": "22,041",
        "judge tokens": "400",
        "abandoned tokens": "93,516",
        "all tokens": "350,148",
        "wall clock, s": "-",
        "interventions": "2",
        "rejections": "1",
    }


def test_the_console_knows_autonpos_records():
    assert {ProbeResult, NonTriggerSpan, RunCosts} < set(TABLES)

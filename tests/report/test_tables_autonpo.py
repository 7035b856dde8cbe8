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
from tests.report.autonpo_samples import (
    NEAR_SCORE,
    PROBE_RESULT,
    SCORE,
    STRATUM,
    intervention_transitions,
    make_transition,
)


def test_autonpo_table_has_the_evidence_of_every_transition():
    armed = [make_transition(41, "armed"), make_transition(161, "armed", before="COOLDOWN")]
    (table, *_) = transitions_tables([armed[0], *intervention_transitions(120, to=110), armed[1]])
    assert table.title == "What AutoNPO did"
    assert table.header == ("step", "event", "branch", "based on")
    signals = "reward gained +0.0040 (noise 0.0110), entropy fell 9.1%"
    assert [(row[0], row[1], row[3]) for row in table.rows] == [
        ("41", "armed", "end of the warm-up"),
        ("118", "warning", signals),
        ("120", "trigger", signals),
        ("120", "probe_accepted", "D* = 10: Q 0.250 [0.200, 0.300], V 2"),
        ("120", "guide_built", "20 of 30 failed prompts have a guide, 5 from the probe"),
        ("120", "rolled_back", "back to step 110, replay until 120"),
        ("120", "replay_done", "cooldown until 160"),
        ("161", "armed", "end of the cooldown"),
    ]
    assert table.notes == ()


def test_autonpo_table_of_a_dry_run_marks_assumptions():
    transitions = [
        make_transition(
            0,
            "started",
            simulated=True,
            settings={"autonpo": {"trigger": {"window": 20, "max_reward_gain_se": 1.0}, "max_interventions": -1}},
        ),
        make_transition(120, "probe_accepted", "GUIDE_GEN", before="PROBE", assumed=True, distance=80),
        make_transition(120, "guide_built", "ROLLBACK", before="GUIDE_GEN", assumed=True),
        make_transition(120, "rolled_back", "REPLAY", before="ROLLBACK", to=40, assumed=True, to_steps=[40, 60, 100]),
    ]
    (table,) = transitions_tables(transitions)
    assert table.title == "What AutoNPO would have done"
    assert [row[-1] for row in table.rows] == [
        "W 20, c_r 1, max -1",
        "assumed: D = 80, the largest that reaches a checkpoint",
        "assumed",
        "assumed: to 40, 60 or 100",
    ]
    assert len(table.notes) == 1
    (nothing,) = transitions_tables(transitions[:1])
    assert (nothing.title, nothing.notes) == ("What AutoNPO would have done", ())


def test_autonpo_table_of_a_file_has_no_branch_column():
    found = make_transition(41, "armed")
    (table,) = transitions_tables([replace(found, state=replace(found.state, branch="-"))])
    assert table.header == ("step", "event", "based on")


def test_probe_tables_have_q_v_and_s_by_distance():
    _, scores, variances, strata = transitions_tables(intervention_transitions(120, to=110))
    assert scores.title == "Rollback distances, step 120 of main"
    bounded = ("0.250 [0.200, 0.300]", "2.000 [1.500, 2.500]", "0.125 [0.100, 0.150]")
    assert scores.rows == (("10", "90", *bounded, "0.75", "<- D*"), ("20", "170", *bounded, "0.25", ""))
    assert scores.notes == (
        "accepted.",
        "48 prompts, 192 samples, 3,225 tokens; intervals are 95 %.",
        "D by rule and profile: argmax 10, one_se 20, seq_kl 10.",
    )
    assert variances.header[:6] == ("D", "probed", "V forward", "V backward", "agree", "tail")
    assert [row[:6] for row in variances.rows] == [
        ("10", "19", "2.000", "1.900", "yes", ""),
        ("20", "19", "2.000", "1.900", "yes", "HEAVY"),
    ]
    # the stratum of D = 10 holds the ages 0 to 9
    assert strata.rows == (("0-9", "90", "10", "40", "10", "0.250 [0.100, 0.400]"),)


def test_probe_table_has_the_whole_reason_of_a_rejection():
    solved = "the policy solves 0 % [0 %, 27.8 %] of the prompts failed in the last 10 steps"
    reason = f"{solved}; autonpo.probe.min_quality is 10 %"
    rejected = PROBE_RESULT | {"is_accepted": False, "reason": reason}
    table, scores, *_ = transitions_tables(
        [make_transition(40, "probe_rejected", "COOLDOWN", before="PROBE", **rejected)]
    )
    assert table.rows[0][-1] == "cooldown until 80; the policy solves 0 % [0 %, 27.8 %] of the prompts ..."
    assert scores.notes[0] == f"rejected: {reason}."
    # Without scores there is no such table, and the cell has the whole reason.
    unasked = make_transition(40, "probe_rejected", "COOLDOWN", before="PROBE", reason=reason, scores=[])
    (alone,) = transitions_tables([unasked])
    assert alone.rows[0][-1] == f"cooldown until 80; {reason}"


def test_probe_table_shows_absent_numbers_as_dashes():
    torn = {name: value for name, value in SCORE.items() if name not in ("variance", "signal", "quality_low")}
    _, scores, *_ = transitions_tables(
        [make_transition(40, "probe_accepted", "GUIDE_GEN", **(PROBE_RESULT | {"scores": [torn]}))]
    )
    assert scores.header == ("D", "failed", "Q", "p(best)")
    assert scores.rows == (("20", "170", "0.250 [-, 0.300]", "0.25"),)


def test_probe_tables_have_q_net_and_the_forecast():
    net = {"quality_net": 0.2, "quality_net_low": 0.15, "quality_net_high": 0.26}
    score = NEAR_SCORE | net | {"steps_saved": 4.2, "price": 12.5, "value": 0.336}
    split = {"quality_split": 0.19, "quality_split_low": 0.1, "quality_split_high": 0.25, "level": 0.0015625}
    strata = [STRATUM, STRATUM | {"min_age": 10, "max_age": 20, "quality": 0.05}]
    result = PROBE_RESULT | split | {"scores": [score], "strata": strata, "stop": "success"}
    table, scores, *_ = transitions_tables([make_transition(40, "probe_accepted", "GUIDE_GEN", **result)])
    cells = dict(zip(scores.header, scores.rows[0], strict=True))
    assert cells["Q net"] == "0.200 [0.150, 0.260]"
    assert (cells["steps saved"], cells["price"], cells["value"]) == ("4.2", "12.5", "0.34")
    assert any("ended for success" in note and "0.190 [0.100, 0.250]" in note for note in scores.notes)
    assert table.rows[0][-1] == (
        "D* = 10: Q net 0.200 [0.150, 0.260], V 2, 4.2 steps saved for 12.5, Q by age 0-9: 0.250 10-19: 0.050"
    )


def test_probe_result_as_a_record_has_the_same_tables():
    empty = ProbeResult(is_accepted=False, reason="no checkpoint to go back to", distance=None, strata=(), scores=())
    scores, strata = probes_tables([empty])
    assert (scores.rows, strata.rows) == ((), ())
    assert scores.notes[0] == "rejected: no checkpoint to go back to."


def test_no_trigger_table_counts_exactly_and_closes_short_gaps():
    spans = [
        NonTriggerSpan(reason="rising", first_step=41, last_step=60, num_steps=20),
        NonTriggerSpan(reason="short_streak", first_step=61, last_step=63, num_steps=3),
        # 3 steps lie between: the range runs on
        NonTriggerSpan(reason="rising", first_step=64, last_step=92, num_steps=29),
        NonTriggerSpan(reason="short_streak", first_step=93, last_step=97, num_steps=5),
        # 5 steps lie between: it does not
        NonTriggerSpan(reason="rising", first_step=98, last_step=98, num_steps=1),
    ]
    (table,) = no_trigger_tables(spans)
    assert table.rows == (
        ("rising", "50", "the reward still rises", "41-92, 98"),
        ("short_streak", "8", "fewer than autonpo.trigger.patience in a row", "61-63, 93-97"),
    )


def test_no_trigger_table_shows_the_longest_ranges():
    spans = [NonTriggerSpan(reason="x", first_step=20 * n, last_step=20 * n + n, num_steps=n + 1) for n in range(1, 7)]
    (table,) = no_trigger_tables(spans)
    assert table.rows == (("x", "27", "", "60-63, 80-84, 100-105, 120-126 and 2 more"),)


def test_costs_table_adds_up():
    found = RunCosts(
        branch="auto-2", step=120, updates=170, training_tokens=224_302, probe_tokens=9_889, guide_tokens=22_041,
        acceptance_test_tokens=400, scout_tokens=500, abandoned_tokens=93_016, seconds=0.0, num_interventions=2,
        num_rejections=1,
    )  # fmt: skip
    (table,) = account_tables([found])
    # 224302 + 9889 + 22041 + 400 + 500 + 93016 = 350148; no seconds were recorded
    assert dict(table.rows) == {
        "step": "120",
        "optimizer updates": "170",
        "training tokens": "224,302",
        "probe tokens": "9,889",
        "guide tokens": "22,041",
        "acceptance-test tokens": "400",
        "scout tokens": "500",
        "abandoned tokens": "93,016",
        "all tokens": "350,148",
        "wall clock, s": "-",
        "interventions": "2",
        "rejections": "1",
    }


def test_tables_are_registered_for_autonpo_records():
    assert {ProbeResult, NonTriggerSpan, RunCosts} < set(TABLES)

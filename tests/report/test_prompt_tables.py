import re
from dataclasses import replace

from npo_cli.report.prompt_tables import (
    dedupe_responses,
    describe_guide_distance,
    describe_history,
    describe_log_ratio,
    describe_visit,
    prompt_history_tables,
    visits_tables,
)
from tests.report.prompt_visits import GUIDED, SOLVED, STORY, VISITS

OWN = SOLVED.group.rollouts[0].source


def test_prompt_history_counts_visits_and_names_steps():
    other = replace(STORY, num_visits=1, first_solved_step=None, first_mostly_solved_step=None, injection_steps=())
    twice = replace(STORY, first_mostly_solved_step=30, injection_steps=(30, 50))
    numbers = [re.findall(r"\d+", describe_history(one)) for one in (STORY, other, twice)]
    # visits; first solved, mostly solved, injected
    assert numbers == [["3", "30", "50", "30"], ["1"], ["3", "30", "30", "50"]]
    assert "never solved" in describe_history(other)


def test_equal_responses_are_merged_guide_first_then_correct():
    merged = [(one.source_label, one.first.text, one.slots) for one in dedupe_responses(GUIDED)]
    assert merged == [("guide, step 40", "42", (2,)), (OWN, "42", (1,)), (OWN, "7", (0, 2))]


def test_visit_tables_have_one_row_per_distinct_response():
    (history,) = prompt_history_tables([STORY])
    assert history.rows == (("6*7=", "42"),)
    guided, solved = visits_tables(VISITS[1:])
    # log-prob: (-0.25 - 0.125) / 2 = -0.1875 for the guide, (-0.5 - 0.25) / 2 = -0.375 for the others
    assert guided.rows == (
        ("2", "guide, step 40", "correct", "yes", "2", "-0.188", "42"),
        ("1", OWN, "correct", "yes", "2", "-0.375", "42"),
        ("0 2", OWN, "wrong", "yes", "2", "-0.375", "7"),
    )
    assert solved.rows == (("0", OWN, "correct", "yes", "2", "-0.375", "42"),)
    assert (guided.notes, len(solved.notes)) == ((), 1)


def test_log_ratio_is_shown_where_the_policy_sampled_the_guides_response():
    # (-0.5 - 0.25) - (-0.25 - 0.125) = -0.375, over two tokens
    assert "-0.375 nats, -0.1875 per token" in describe_log_ratio(GUIDED)
    others = tuple(one for one in GUIDED.group.rollouts if one.is_off_policy or one.reward == 0)
    others = tuple(one if one.is_off_policy else replace(one, response_ids=(8, 9)) for one in others)
    assert "was not recorded" in describe_log_ratio(replace(GUIDED, group=replace(GUIDED.group, rollouts=others)))


def test_a_long_response_is_truncated_in_the_middle():
    long = replace(SOLVED.group.rollouts[0], text="y" * 5000 + "42")
    (table,) = visits_tables([replace(SOLVED, group=replace(SOLVED.group, rollouts=(long,)))])
    assert table.rows[0][-1].endswith("y42")
    # 5002 characters, 600 are shown
    assert "[... 4,402 characters left out ...]" in table.rows[0][-1]


def test_an_external_source_has_no_step_and_no_log_prob():
    teacher = replace(GUIDED.group.rollouts[-1], source="teacher", sampler_step=None, behavior_logps=None)
    with_teacher = replace(GUIDED, group=replace(GUIDED.group, rollouts=(*GUIDED.group.rollouts[:-1], teacher)))
    first = dedupe_responses(with_teacher)[0]
    assert (first.source_label, first.logp_per_token, describe_guide_distance(with_teacher)) == (
        "teacher",
        None,
        "teacher",
    )
    assert describe_visit(with_teacher) == "1 of 3 on-policy rollouts correct; injected: teacher"
    assert describe_log_ratio(with_teacher) == "The log-probabilities of its behavior policy are unavailable."


def test_a_past_rollout_is_behind_the_policy():
    past = replace(GUIDED.group.rollouts[-1], source="past", sampler_step=9)
    replayed = replace(GUIDED, group=replace(GUIDED.group, rollouts=(*GUIDED.group.rollouts[:-1], past)))
    # The rollouts of step 30 are sampled by the policy of step 29.
    assert describe_guide_distance(replayed) == "past, step 9: 20 steps behind the policy"


def test_a_visit_without_an_injection_says_why():
    closed = replace(SOLVED, group=replace(SOLVED.group, injection_status="gate_closed"))
    assert describe_visit(closed).endswith(
        "; no guide was injected, because this accuracy is above guide.inject.max_accuracy"
    )
    missing = replace(SOLVED, group=replace(SOLVED.group, injection_status="no_guide"))
    assert describe_visit(missing).endswith("; no guide was injected, because the guide has no response to this prompt")

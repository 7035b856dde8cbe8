from dataclasses import replace

from npo_cli.cli.output import format_table
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


def test_a_story_is_one_sentence():
    assert describe_history(STORY) == (
        "3 visits; first solved by itself at step 30, mostly at step 50; a guide was seated at step 30"
    )
    other = replace(STORY, num_visits=1, first_solved_step=None, first_mostly_solved_step=None, injection_steps=())
    assert describe_history(other) == "1 visit; never solved by itself; no guide was seated"
    twice = replace(STORY, first_mostly_solved_step=30, injection_steps=(30, 50))
    assert describe_history(twice) == "3 visits; first solved by itself at step 30; a guide was seated at steps 30, 50"


def test_equal_answers_are_told_once_the_guides_first_then_the_correct():
    told = [(one.source_label, one.first.text, one.slots) for one in dedupe_responses(GUIDED)]
    assert told == [("guide, step 40", "42", (2,)), ("own", "42", (1,)), ("own", "7", (0, 2))]


def test_a_story_on_the_terminal_is_read_from_top_to_bottom():
    tables = [*prompt_history_tables([STORY]), *visits_tables(VISITS[1:])]
    # log-prob: (-0.25 - 0.125) / 2 = -0.1875 for the guide, (-0.5 - 0.25) / 2 = -0.375 for the others
    assert "\n".join(map(format_table, tables)) == (
        "Prompt p1 on the line of late: 3 visits; first solved by itself at step 30, mostly at step 50; "
        "a guide was seated at step 30\n"
        "question  reference answer\n"
        "6*7=                    42\n"
        "\n"
        "Step 30, late: 1 of 3 own answers correct; in a slot: guide, step 40\n"
        "slots  source          verdict  ended  tokens  log-prob  response\n"
        "2      guide, step 40  correct  yes         2    -0.188        42\n"
        "1      own             correct  yes         2    -0.375        42\n"
        "0 2    own             wrong    yes         2    -0.375         7\n"
        "\n"
        "Step 50, late: 1 of 1 own answers correct; good enough without a guide\n"
        "slots  source  verdict  ended  tokens  log-prob  response\n"
        "    0  own     correct  yes         2    -0.375        42\n"
        "log-prob: mean a token, in nats, under the policy that wrote it; the guide's under the guide.\n"
    )


def test_the_log_ratio_is_on_record_where_the_policy_gave_the_guides_answer():
    # (-0.5 - 0.25) - (-0.25 - 0.125) = -0.375, over two tokens
    assert "policy / guide -0.375 nats, -0.1875 a token" in describe_log_ratio(GUIDED)
    others = tuple(one for one in GUIDED.group.rollouts if one.source == "guide" or one.reward == 0)
    others = tuple(replace(one, response_ids=(8, 9)) if one.source == "own" else one for one in others)
    assert "not on record" in describe_log_ratio(replace(GUIDED, group=replace(GUIDED.group, rollouts=others)))


def test_a_long_answer_is_cut_on_the_terminal():
    long = replace(SOLVED.group.rollouts[0], text="y" * 5000 + "42")
    (table,) = visits_tables([replace(SOLVED, group=replace(SOLVED.group, rollouts=(long,)))])
    assert table.rows[0][-1].endswith("y42")
    # 5002 letters, 600 are shown
    assert "[... 4,402 letters left out ...]" in table.rows[0][-1]


def test_a_teacher_has_no_step_and_no_log_probability():
    teacher = replace(GUIDED.group.rollouts[-1], source="teacher", sampler_step=None, behavior_logps=None)
    taught = replace(GUIDED, group=replace(GUIDED.group, rollouts=(*GUIDED.group.rollouts[:-1], teacher)))
    first = dedupe_responses(taught)[0]
    assert (first.source_label, first.logp_per_token, describe_guide_distance(taught)) == ("teacher", None, "teacher")
    assert describe_visit(taught) == "1 of 3 own answers correct; in a slot: teacher"
    assert describe_log_ratio(taught) == "Its log-probability under who wrote it is not known."


def test_the_past_is_behind():
    past = replace(GUIDED.group.rollouts[-1], source="past", sampler_step=9)
    replayed = replace(GUIDED, group=replace(GUIDED.group, rollouts=(*GUIDED.group.rollouts[:-1], past)))
    # The policy of step 30 had made 29 steps.
    assert describe_guide_distance(replayed) == "past, step 9: 20 steps behind the policy that answered"

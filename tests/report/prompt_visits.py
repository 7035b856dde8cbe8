"""A prompt's story by hand: nothing solved, then a guide, then solved."""

from dataclasses import replace

from npo_cli.types.views import PromptHistory, PromptVisit
from tests.report.samples import group, rollout

FAILED = PromptVisit(
    branch="main", step=8, num_on_policy=2, num_correct=0, group=group(*(rollout(s, reward=0) for s in (0, 1)))
)
GUIDED = PromptVisit(
    branch="late",
    step=30,
    num_on_policy=3,
    num_correct=1,
    group=group(
        rollout(0, reward=0, text="7"),
        rollout(1, reward=1),
        rollout(2, reward=0, text="7"),
        replace(rollout(2, reward=1, source="guide"), behavior_logps=(-0.25, -0.125)),
        mix="injected",
        own_accuracy=1 / 3,
    ),
)
SOLVED = PromptVisit(
    branch="late", step=50, num_on_policy=1, num_correct=1, group=group(rollout(0, reward=1), mix="gate_closed")
)
VISITS = (FAILED, GUIDED, SOLVED)
STORY = PromptHistory(
    prompt_id="p1",
    branch="late",
    prompt_text="6*7=",
    reference_answer="42",
    num_visits=3,
    first_solved_step=30,
    first_mostly_solved_step=50,
    injection_steps=(30,),
)

"""A prompt's story by hand: nothing solved, then a guide, then solved."""

from dataclasses import replace

from npo_cli.report.lines import PromptStory, Visit
from tests.report.samples import group, rollout

FAILED = Visit(branch="main", step=8, num_asked=2, num_correct=0, group=group(*(rollout(s, reward=0) for s in (0, 1))))
GUIDED = Visit(
    branch="late",
    step=30,
    num_asked=3,
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
SOLVED = Visit(branch="late", step=50, num_asked=1, num_correct=1, group=group(rollout(0, reward=1), mix="gate_closed"))
VISITS = (FAILED, GUIDED, SOLVED)
STORY = PromptStory(
    prompt_id="p1",
    branch="late",
    question="6*7=",
    answer="42",
    num_visits=3,
    solved_at=30,
    mostly_solved_at=50,
    seated_at=(30,),
)

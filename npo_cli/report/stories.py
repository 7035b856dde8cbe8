"""A prompt's story: in one sentence, as tables of text, and its answers with equal ones told once."""

from collections.abc import Sequence
from dataclasses import dataclass

from npo_cli.records import Rollout
from npo_cli.report.cells import Table, number
from npo_cli.report.inert import shortened
from npo_cli.report.lines import PromptStory, Visit

LONGEST = 600
"""Letters of an answer in a table."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """Rollouts of one visit that say the same, from the same source."""

    rollouts: tuple[Rollout, ...]

    @property
    def first(self) -> Rollout:
        """One of them, for everything that they share."""
        return self.rollouts[0]

    @property
    def who(self) -> str:
        """`own`, `guide, step 60`, or `teacher`."""
        return who_wrote(self.first)

    @property
    def slots(self) -> tuple[int, ...]:
        """Places in the group."""
        return tuple(rollout.slot for rollout in self.rollouts)

    @property
    def logp_per_token(self) -> float | None:
        """Mean log-probability of a token under who wrote it (nats), of equal answers the mean; None if not known."""
        logps = [logp for rollout in self.rollouts for logp in rollout.behavior_logps or ()]
        return sum(logps) / len(logps) if logps else None


def answers(visit: Visit) -> tuple[Answer, ...]:
    """Those of others first, then correct ones, then the rest by how often they were given."""
    alike: dict[tuple[object, ...], list[Rollout]] = {}
    for one in visit.group.rollouts:
        alike.setdefault((one.source, one.verdict, one.finished, one.text), []).append(one)
    ordered = sorted(
        alike.values(),
        key=lambda some: (not some[0].foreign, some[0].verdict != "correct", -len(some), some[0].slot),
    )
    return tuple(Answer(rollouts=tuple(some)) for some in ordered)


def in_a_sentence(story: PromptStory) -> str:
    """`5 visits; first solved by itself at step 40; a guide was seated at steps 12, 26`."""
    times = f"{story.num_visits} visit{'s' * (story.num_visits != 1)}"
    solved = (
        "never solved by itself" if story.solved_at is None else f"first solved by itself at step {story.solved_at}"
    )
    mostly = "" if story.mostly_solved_at in (None, story.solved_at) else f", mostly at step {story.mostly_solved_at}"
    steps = ", ".join(map(str, story.seated_at))
    seated = f"a guide was seated at step{'s' * (len(story.seated_at) > 1)} {steps}" if steps else "no guide was seated"
    return f"{times}; {solved}{mostly}; {seated}"


SEATS = {
    "gate_closed": "good enough without a guide",
    "no_guide": "the guide had no answer",
    "off": "",
    "injected": "",
}


def who_wrote(rollout: Rollout) -> str:
    """`own`, or the source with the step of its weights where these are of this run."""
    if not rollout.foreign or rollout.sampler_step is None:
        return rollout.source
    return f"{rollout.source}, step {rollout.sampler_step}"


def how_far(visit: Visit) -> str:
    """`guide, step 60: 40 steps ahead of the policy that answered`, of the first guest."""
    guest = visit.guests[0]
    if guest.sampler_step is None:
        return who_wrote(guest)
    if guest.source == "extrapolated":
        return f"{who_wrote(guest)}: the policy that answered, pushed along its own motion"
    # The policy of step t has made t - 1 steps.
    ahead = guest.sampler_step - (visit.step - 1)
    return f"{who_wrote(guest)}: {abs(ahead)} steps {'ahead of' if ahead >= 0 else 'behind'} the policy that answered"


def what_happened(visit: Visit) -> str:
    """`0 of 8 own answers correct; in a slot: guide, step 60`."""
    own = f"{visit.num_correct} of {visit.num_asked} own answers correct"
    seat = f"in a slot: {'; '.join(map(who_wrote, visit.guests))}" if visit.guests else SEATS[visit.group.mix]
    return f"{own}; {seat}" if seat else own


def log_ratio(visit: Visit) -> str:
    """How much likelier the guide found its answer than the policy did: on record where the policy gave it as well.

    log policy / guide, summed over the tokens: the exact ratio that the guide's slot is trained with, before its clip.
    """
    guide = visit.guests[0]
    if guide.behavior_logps is None:
        return "Its log-probability under who wrote it is not known."
    same = [one for one in visit.group.rollouts if not one.foreign and one.response_ids == guide.response_ids]
    if not same:
        return "The policy did not give this answer here, so its log-probability under the policy is not on record."
    ratio = sum(same[0].behavior_logps or ()) - sum(guide.behavior_logps)
    return (
        f"The policy gave this very answer too: log-ratio policy / guide {ratio:+.3f} nats, "
        f"{ratio / len(guide.response_ids):+.4f} a token."
    )


def stories_tables(stories: Sequence[PromptStory]) -> tuple[Table, ...]:
    """A sentence over question and reference answer."""
    return tuple(
        Table(
            title=f"Prompt {one.prompt_id} on the line of {one.branch}: {in_a_sentence(one)}",
            header=("question", "reference answer"),
            rows=((one.question, one.answer),),
        )
        for one in stories
    )


def visits_tables(visits: Sequence[Visit]) -> tuple[Table, ...]:
    """A table a visit, a line for each different answer."""
    header = ("slots", "source", "verdict", "ended", "tokens", "log-prob", "response")
    told = []
    for visit in visits:
        rows = tuple(
            (
                *(" ".join(map(str, one.slots)), one.who, one.first.verdict or "-"),
                *("yes" if one.first.finished else "cut off", str(len(one.first.response_ids))),
                *(number(one.logp_per_token), shortened(one.first.text, longest=LONGEST, tail=LONGEST // 2)),
            )
            for one in answers(visit)
        )
        told.append(Table(title=f"Step {visit.step}, {visit.branch}: {what_happened(visit)}", header=header, rows=rows))
    notes = ("log-prob: mean a token, in nats, under the policy that wrote it; the guide's under the guide.",)
    last = told.pop()
    return (*told, Table(title=last.title, header=last.header, rows=last.rows, notes=notes))

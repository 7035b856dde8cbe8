"""A prompt's story: in one sentence, as tables of text, and its answers with equal ones told once."""

from collections.abc import Sequence
from dataclasses import dataclass

from npo_cli.report.table import Table, format_number
from npo_cli.report.text_sanitizer import truncate_middle
from npo_cli.types.rollouts import Rollout
from npo_cli.types.views import PromptHistory, PromptVisit

MAX_RESPONSE_CHARS = 600
"""Letters of an answer in a table."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DistinctResponse:
    """Rollouts of one visit that say the same, from the same source."""

    rollouts: tuple[Rollout, ...]

    @property
    def first(self) -> Rollout:
        """One of them, for everything that they share."""
        return self.rollouts[0]

    @property
    def source_label(self) -> str:
        """`own`, `guide, step 60`, or `teacher`."""
        return describe_source(self.first)

    @property
    def slots(self) -> tuple[int, ...]:
        """Places in the group."""
        return tuple(rollout.slot for rollout in self.rollouts)

    @property
    def logp_per_token(self) -> float | None:
        """Mean log-probability of a token under who wrote it (nats), of equal answers the mean; None if not known."""
        logps = [logp for rollout in self.rollouts for logp in rollout.behavior_logps or ()]
        return sum(logps) / len(logps) if logps else None


def dedupe_responses(visit: PromptVisit) -> tuple[DistinctResponse, ...]:
    """Those of others first, then correct ones, then the rest by how often they were given."""
    alike: dict[tuple[object, ...], list[Rollout]] = {}
    for one in visit.group.rollouts:
        alike.setdefault((one.source, one.verdict, one.finished, one.text), []).append(one)
    ordered = sorted(
        alike.values(),
        key=lambda some: (not some[0].is_off_policy, some[0].verdict != "correct", -len(some), some[0].slot),
    )
    return tuple(DistinctResponse(rollouts=tuple(some)) for some in ordered)


def describe_history(story: PromptHistory) -> str:
    """`5 visits; first solved by itself at step 40; a guide was seated at steps 12, 26`."""
    times = f"{story.num_visits} visit{'s' * (story.num_visits != 1)}"
    solved = (
        "never solved by itself"
        if story.first_solved_step is None
        else f"first solved by itself at step {story.first_solved_step}"
    )
    mostly = (
        ""
        if story.first_mostly_solved_step in (None, story.first_solved_step)
        else f", mostly at step {story.first_mostly_solved_step}"
    )
    steps = ", ".join(map(str, story.injection_steps))
    seated = (
        f"a guide was seated at step{'s' * (len(story.injection_steps) > 1)} {steps}"
        if steps
        else "no guide was seated"
    )
    return f"{times}; {solved}{mostly}; {seated}"


MIX_LABELS = {
    "gate_closed": "good enough without a guide",
    "no_guide": "the guide had no answer",
    "off": "",
    "injected": "",
}


def describe_source(rollout: Rollout) -> str:
    """`own`, or the source with the step of its weights where these are of this run."""
    if not rollout.is_off_policy or rollout.sampler_step is None:
        return rollout.source
    return f"{rollout.source}, step {rollout.sampler_step}"


def describe_guide_distance(visit: PromptVisit) -> str:
    """`guide, step 60: 40 steps ahead of the policy that answered`, of the first guest."""
    guest = visit.off_policy_rollouts[0]
    if guest.sampler_step is None:
        return describe_source(guest)
    if guest.source == "extrapolated":
        return f"{describe_source(guest)}: the policy that answered, pushed along its own motion"
    # The policy of step t has made t - 1 steps.
    ahead = guest.sampler_step - (visit.step - 1)
    return f"{describe_source(guest)}: {abs(ahead)} steps {'ahead of' if ahead >= 0 else 'behind'} the policy that answered"  # noqa: E501


def describe_visit(visit: PromptVisit) -> str:
    """`0 of 8 own answers correct; in a slot: guide, step 60`."""
    own = f"{visit.num_correct} of {visit.num_on_policy} own answers correct"
    seat = (
        f"in a slot: {'; '.join(map(describe_source, visit.off_policy_rollouts))}"
        if visit.off_policy_rollouts
        else MIX_LABELS[visit.group.injection_status]
    )
    return f"{own}; {seat}" if seat else own


def describe_log_ratio(visit: PromptVisit) -> str:
    """How much likelier the guide found its answer than the policy did: on record where the policy gave it as well.

    log policy / guide, summed over the tokens: the exact ratio that the guide's slot is trained with, before its clip.
    """
    guide = visit.off_policy_rollouts[0]
    if guide.behavior_logps is None:
        return "Its log-probability under who wrote it is not known."
    same = [one for one in visit.group.rollouts if not one.is_off_policy and one.response_ids == guide.response_ids]
    if not same:
        return "The policy did not give this answer here, so its log-probability under the policy is not on record."
    ratio = sum(same[0].behavior_logps or ()) - sum(guide.behavior_logps)
    return (
        f"The policy gave this very answer too: log-ratio policy / guide {ratio:+.3f} nats, "
        f"{ratio / len(guide.response_ids):+.4f} a token."
    )


def prompt_history_tables(stories: Sequence[PromptHistory]) -> tuple[Table, ...]:
    """A sentence over question and reference answer."""
    return tuple(
        Table(
            title=f"Prompt {one.prompt_id} on the line of {one.branch}: {describe_history(one)}",
            header=("question", "reference answer"),
            rows=((one.prompt_text, one.reference_answer),),
        )
        for one in stories
    )


def visits_tables(visits: Sequence[PromptVisit]) -> tuple[Table, ...]:
    """A table a visit, a line for each different answer."""
    header = ("slots", "source", "verdict", "ended", "tokens", "log-prob", "response")
    told = []
    for visit in visits:
        rows = tuple(
            (
                *(" ".join(map(str, one.slots)), one.source_label, one.first.verdict or "-"),
                *("yes" if one.first.finished else "cut off", str(len(one.first.response_ids))),
                *(
                    format_number(one.logp_per_token),
                    truncate_middle(one.first.text, max_chars=MAX_RESPONSE_CHARS, tail_chars=MAX_RESPONSE_CHARS // 2),
                ),
            )
            for one in dedupe_responses(visit)
        )
        told.append(
            Table(title=f"Step {visit.step}, {visit.branch}: {describe_visit(visit)}", header=header, rows=rows)
        )
    notes = ("log-prob: mean a token, in nats, under the policy that wrote it; the guide's under the guide.",)
    last = told.pop()
    return (*told, Table(title=last.title, header=last.header, rows=last.rows, notes=notes))

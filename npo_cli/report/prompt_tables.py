"""The history of a prompt: as one sentence, as tables, and its responses with duplicates merged."""

from collections.abc import Sequence
from dataclasses import dataclass

from npo_cli.report.table import Table, format_number
from npo_cli.report.text_sanitizer import truncate_middle
from npo_cli.types.rollouts import Rollout
from npo_cli.types.views import PromptHistory, PromptVisit

MAX_RESPONSE_CHARS = 600
"""Characters of a response in a table."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DistinctResponse:
    """Rollouts of one visit with the same text, verdict and source."""

    rollouts: tuple[Rollout, ...]

    @property
    def first(self) -> Rollout:
        """One of them."""
        return self.rollouts[0]

    @property
    def source_label(self) -> str:
        """`own`, `guide, step 60`, or `teacher`."""
        return describe_source(self.first)

    @property
    def slots(self) -> tuple[int, ...]:
        """Slots in the group."""
        return tuple(rollout.slot for rollout in self.rollouts)

    @property
    def logp_per_token(self) -> float | None:
        """Mean log-probability per token (nats) under the behavior policy; None if unavailable."""
        logps = [logp for rollout in self.rollouts for logp in rollout.behavior_logps or ()]
        return sum(logps) / len(logps) if logps else None


def dedupe_responses(visit: PromptVisit) -> tuple[DistinctResponse, ...]:
    """Off-policy ones first, then correct ones, then the rest by frequency."""
    same: dict[tuple[object, ...], list[Rollout]] = {}
    for one in visit.group.rollouts:
        same.setdefault((one.source, one.verdict, one.finished, one.text), []).append(one)
    ordered = sorted(
        same.values(),
        key=lambda some: (not some[0].is_off_policy, some[0].verdict != "correct", -len(some), some[0].slot),
    )
    return tuple(DistinctResponse(rollouts=tuple(some)) for some in ordered)


def describe_history(history: PromptHistory) -> str:
    """`5 visits; first solved on-policy at step 40; a guide was injected at steps 12, 26`."""
    times = f"{history.num_visits} visit{'s' * (history.num_visits != 1)}"
    solved = (
        "never solved on-policy"
        if history.first_solved_step is None
        else f"first solved on-policy at step {history.first_solved_step}"
    )
    mostly = (
        ""
        if history.first_mostly_solved_step in (None, history.first_solved_step)
        else f", mostly at step {history.first_mostly_solved_step}"
    )
    steps = ", ".join(map(str, history.injection_steps))
    injected = (
        f"a guide was injected at step{'s' * (len(history.injection_steps) > 1)} {steps}"
        if steps
        else "no guide was injected"
    )
    return f"{times}; {solved}{mostly}; {injected}"


MIX_LABELS = {
    "gate_closed": "no guide was injected, because this accuracy is above guide.inject.max_accuracy",
    "no_guide": "no guide was injected, because the guide has no response to this prompt",
    "off": "",
    "injected": "",
}


def describe_source(rollout: Rollout) -> str:
    """The source, with the step of its weights where they belong to this run."""
    if not rollout.is_off_policy or rollout.sampler_step is None:
        return rollout.source
    return f"{rollout.source}, step {rollout.sampler_step}"


def describe_guide_distance(visit: PromptVisit) -> str:
    """`guide, step 60: 40 steps ahead of the policy`, of the first injected rollout."""
    guide = visit.off_policy_rollouts[0]
    if guide.sampler_step is None:
        return describe_source(guide)
    if guide.source == "extrapolated":
        return f"{describe_source(guide)}: extrapolated from the policy"
    # The rollouts of step t are sampled by the policy of step t - 1.
    ahead = guide.sampler_step - (visit.step - 1)
    return f"{describe_source(guide)}: {abs(ahead)} steps {'ahead of' if ahead >= 0 else 'behind'} the policy"


def describe_visit(visit: PromptVisit) -> str:
    """`0 of 8 on-policy rollouts correct; injected: guide, step 60`."""
    own = f"{visit.num_correct} of {visit.num_on_policy} on-policy rollouts correct"
    injected = (
        f"injected: {'; '.join(map(describe_source, visit.off_policy_rollouts))}"
        if visit.off_policy_rollouts
        else MIX_LABELS[visit.group.injection_status]
    )
    return f"{own}; {injected}" if injected else own


def describe_log_ratio(visit: PromptVisit) -> str:
    """The log-ratio policy / guide of the injected response, recorded where the policy sampled the same response.

    Summed over the tokens: the exact importance ratio of the injected rollout, before clipping.
    """
    guide = visit.off_policy_rollouts[0]
    if guide.behavior_logps is None:
        return "The log-probabilities of its behavior policy are unavailable."
    same = [one for one in visit.group.rollouts if not one.is_off_policy and one.response_ids == guide.response_ids]
    if not same:
        return "The policy did not sample this response here, so its log-probability under the policy was not recorded."
    ratio = sum(same[0].behavior_logps or ()) - sum(guide.behavior_logps)
    return (
        f"The policy sampled the same response: log-ratio policy / guide {ratio:+.3f} nats, "
        f"{ratio / len(guide.response_ids):+.4f} per token."
    )


def prompt_history_tables(histories: Sequence[PromptHistory]) -> tuple[Table, ...]:
    """The history as the title over question and reference answer."""
    return tuple(
        Table(
            title=f"Prompt {one.prompt_id} in the lineage of {one.branch}: {describe_history(one)}",
            header=("question", "reference answer"),
            rows=((one.prompt_text, one.reference_answer),),
        )
        for one in histories
    )


def visits_tables(visits: Sequence[PromptVisit]) -> tuple[Table, ...]:
    """One table per visit, one row per distinct response."""
    header = ("slots", "source", "verdict", "ended", "tokens", "log-prob", "response")
    tables = []
    for visit in visits:
        rows = tuple(
            (
                *(" ".join(map(str, one.slots)), one.source_label, one.first.verdict or "-"),
                *("yes" if one.first.finished else "truncated", str(len(one.first.response_ids))),
                *(
                    format_number(one.logp_per_token),
                    truncate_middle(one.first.text, max_chars=MAX_RESPONSE_CHARS, tail_chars=MAX_RESPONSE_CHARS // 2),
                ),
            )
            for one in dedupe_responses(visit)
        )
        tables.append(
            Table(title=f"Step {visit.step}, {visit.branch}: {describe_visit(visit)}", header=header, rows=rows)
        )
    notes = ("log-prob: mean per token (nats) under the behavior policy.",)
    last = tables.pop()
    return (*tables, Table(title=last.title, header=last.header, rows=last.rows, notes=notes))

"""Seat answers of an extrapolated policy while training: which groups are asked, who takes a slot, what is spare.

Nobody is asked for a group that the policy can do itself. *inject*: a few answers of each hard group, and those that
are verified-correct take its last slots. *sample*: the last slots are sampled from the extrapolated policy instead of
the learner, and keep what comes, right or wrong. The first way costs tokens, the second none.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

from npo_cli.guide.mix import InjectionPolicy, measure_on_policy_accuracy
from npo_cli.records import Group, Rollout

InjectionMode = Literal["inject", "sample"]


def select_failed_groups(groups: Sequence[Group], rule: InjectionPolicy) -> list[Group]:
    """Those whose own answers leave room for help, in order."""
    return [group for group in groups if measure_on_policy_accuracy(group) <= rule.gate]


def inject_responses(own: Group, answers: Sequence[Rollout], rule: InjectionPolicy, *, num_gate_rollouts: int, mode: InjectionMode) -> Group:
    """The group with the answers it was given in their slots; whether it was hard, its first `num_judged` rollouts say.

    Of verified-correct answers the first ones are seated, at most `rule.slots`.
    """
    accuracy = measure_on_policy_accuracy(replace(own, rollouts=own.rollouts[:num_gate_rollouts]))
    if accuracy > rule.gate:
        return replace(own, mix="gate_closed", own_accuracy=accuracy)
    if mode == "sample":
        return replace(own, rollouts=(*own.rollouts, *answers), mix="injected", own_accuracy=accuracy)
    right = [one for one in answers if one.verdict == "correct" and one.finished][: rule.slots]
    spare = tuple(one for one in answers if one not in right)
    if not right:
        return replace(own, mix="no_guide", own_accuracy=accuracy, spare=spare)
    first = rule.group_size - (len(right) if rule.compose == "replace" else 0)
    guests = tuple(replace(one, slot=first + place) for place, one in enumerate(right))
    return replace(own, rollouts=(*own.rollouts[:first], *guests), mix="injected", own_accuracy=accuracy, spare=spare)


def extrapolated_rollouts(group: Group) -> tuple[Rollout, ...]:
    """Every answer of the extrapolated policy, seated or spare."""
    return tuple(one for one in (*group.rollouts, *group.unused_guide_rollouts) if one.source == "extrapolated")


def extrapolation_metrics(groups: Sequence[Group]) -> dict[str, float]:
    """Of a batch: groups that it was asked for, its answers, how many were verified, and the tokens they took."""
    answers = [extrapolated_rollouts(group) for group in groups]
    every = [one for several in answers for one in several]
    return {
        "extrapolate/groups": float(sum(bool(several) for several in answers)),
        "extrapolate/answers": float(len(every)),
        "extrapolate/correct": float(sum(one.verdict == "correct" and one.finished for one in every)),
        "extrapolate/tokens": float(sum(len(one.response_ids) for one in every)),
    }

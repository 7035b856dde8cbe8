"""Extrapolated guides inside the loop: the policy pushed along its own motion answers for groups that are hard.

The older copy is a checkpoint of the run, read again after a kill. Before the run is k steps old nobody is asked, nor
while a guide cache is at work. The gate needs the policy's own answers, so these come first: with `sample` all but the
last slots, which are then sampled from one or the other.

Seat answers of an extrapolated policy while training: which groups are asked, who takes a slot, what is spare.

Nobody is asked for a group that the policy can do itself. *inject*: a few answers of each hard group, and those that
are verified-correct take its last slots. *sample*: the last slots are sampled from the extrapolated policy instead of
the learner, and keep what comes, right or wrong. The first way costs tokens, the second none.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from npo_cli.config.recipe import Recipe
from npo_cli.extrapolation.sampler import (
    ExtrapolatedSampler,
    ResolvedExtrapolation,
    find_extrapolation,
    load_older_policy,
    open_extrapolated_sampler,
)
from npo_cli.policy.model import Policy
from npo_cli.policy.optimizer import TrainerState
from npo_cli.rollout.batch import PromptBatch, StepBatch
from npo_cli.rollout.mixing import MixStrategy
from npo_cli.session.session import Session, count_generated_tokens, sample_groups
from npo_cli.storage.checkpoints import Checkpoint
from npo_cli.types.guides import ExtrapolationSpec, ExtrapolationState
from npo_cli.types.rollouts import Group, Prompt, Rollout

InjectionMode = Literal["inject", "sample"]


def select_failed_groups(groups: Sequence[Group], strategy: MixStrategy) -> list[Group]:
    """Those whose own answers leave room for help, in order."""
    return [group for group in groups if strategy.is_eligible(group.accuracy)]


def inject_responses(
    own: Group, answers: Sequence[Rollout], strategy: MixStrategy, *, num_gate_rollouts: int, mode: InjectionMode
) -> Group:
    """The group with the answers it was given in their slots; whether it was hard, its first `num_judged` rollouts say.

    Of verified-correct answers the first ones are seated, at most `guide.inject.slots`.
    """
    accuracy = replace(own, rollouts=own.rollouts[:num_gate_rollouts]).accuracy
    if not strategy.is_eligible(accuracy):
        return replace(own, injection_status="gate_closed", on_policy_accuracy=accuracy)
    if mode == "sample":
        return replace(
            own, rollouts=(*own.rollouts, *answers), injection_status="injected", on_policy_accuracy=accuracy
        )
    right = [one for one in answers if one.is_correct][: strategy.settings.slots]
    spare = tuple(one for one in answers if one not in right)
    if not right:
        return replace(own, injection_status="no_guide", on_policy_accuracy=accuracy, unused_guide_rollouts=spare)
    return replace(strategy.inject(own, right, accuracy), unused_guide_rollouts=spare)


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
        "extrapolate/correct": float(sum(one.is_correct for one in every)),
        "extrapolate/tokens": float(sum(one.num_tokens for one in every)),
    }


EXTRAPOLATED_SEED_LABEL = "ahead"
"""In the seeds of extrapolated answers, before everything that is in those of own ones."""


@dataclass(kw_only=True, slots=True)
class Extrapolator:
    """Finds the older copy of each step, and keeps it at hand for as long as it is the right one."""

    session: Session
    branch: str
    older_checkpoints: dict[tuple[int, int], Checkpoint] = field(default_factory=dict)
    """The newest one found, by k and by how many saves lie behind it."""
    loaded_checkpoint: Checkpoint | None = None
    """Found whole, and in `old` where there is one."""
    older_policy: Policy | None = None
    """A second model; only where logits are pushed."""

    def open_guide(self, state: TrainerState) -> "ExtrapolatedGuide | None":
        """Who helps at the step after `state`; None where there is no older copy, or the choice is to ask nobody."""
        if (
            self.session.recipe.extrapolation.refresh
            and state.extrapolation_choice
            and not state.extrapolation_choice.is_active
        ):
            return None
        ahead = self.open_sampler(
            select_extrapolation(self.session.recipe, state.extrapolation_choice), step=state.step
        )
        return None if ahead is None else ExtrapolatedGuide(session=self.session, sampler=ahead)

    def open_sampler(self, push: ExtrapolationSpec, *, step: int) -> ExtrapolatedSampler | None:
        """The policy of `step`, whose weights are at hand, pushed; None while there is no older copy."""
        motion = self._motion(push, step=step)
        if motion is None:
            return None
        if motion.older_checkpoint != self.loaded_checkpoint:
            self.older_policy = load_older_policy(self.session, motion, into=self.older_policy)
            self.loaded_checkpoint = motion.older_checkpoint
        return open_extrapolated_sampler(self.session, motion, older=self.older_policy)

    def _motion(self, push: ExtrapolationSpec, *, step: int) -> ResolvedExtrapolation | None:
        every = self.session.recipe.train.save_every
        key = (push.k, (step - push.k) // every)
        if key not in self.older_checkpoints:
            found = find_extrapolation(self.session.run, self.branch, push, step=step, every=every)
            if found is None:
                return None
            self.older_checkpoints = {
                kept: older for kept, older in self.older_checkpoints.items() if kept[0] != push.k
            }
            self.older_checkpoints[key] = found.older_checkpoint
        return ResolvedExtrapolation(spec=push, step=step, older_checkpoint=self.older_checkpoints[key])


def make_extrapolator(session: Session, branch: str) -> Extrapolator | None:
    """The online guide of this branch; None without `guide.source=extrapolated`."""
    if session.recipe.guide.source == "extrapolated":
        return Extrapolator(session=session, branch=branch)
    return None


def select_extrapolation(recipe: Recipe, choice: ExtrapolationState | None) -> ExtrapolationSpec:
    """The one chosen last, or the recipe's k and a."""
    settings = recipe.extrapolation
    if choice is not None and settings.refresh:
        # A replay may push something else than the run that chose.
        return replace(choice.spec, space=settings.space)
    return ExtrapolationSpec(space=settings.space, k=settings.k, a=settings.a)


@dataclass(frozen=True, kw_only=True, slots=True)
class ExtrapolatedGuide:
    """The pushed policy at one step of the loop, and how its answers are seated."""

    session: Session
    sampler: ExtrapolatedSampler

    def build_groups(
        self, part: PromptBatch, before: Sequence[Group], *, seed_name: str, step: int
    ) -> tuple[Sequence[Group], Sequence[Group]]:
        """Own answers, and the same groups with what the pushed policy said; read back where they are on record."""
        if before:
            own, answers = (
                [group.on_policy for group in before],
                [extrapolated_rollouts(group) for group in before],
            )
        else:
            own, answers = self._asked(part, label=(seed_name, step, *part.seed_label), step=step)
        settings = self.session.recipe.extrapolation
        num_judged = self._num_judged(part)
        return own, [
            inject_responses(group, said, part.strategy, num_gate_rollouts=num_judged, mode=settings.mode)
            for group, said in zip(own, answers, strict=True)
        ]

    def metrics(self, batch: StepBatch) -> dict[str, float]:
        """What it was asked for at this step, and every token and forward pass that sampling took."""
        asked, motion = extrapolation_metrics(batch.mixed), self.sampler.extrapolation
        own, theirs = count_generated_tokens(batch.on_policy), asked["extrapolate/tokens"]
        return asked | {
            "extrapolate/k": float(motion.spec.k),
            "extrapolate/a": motion.spec.a,
            "extrapolate/lag": float(motion.lag),
            "extrapolate/strength": motion.strength,
            "tokens": own + theirs,
            "forwards": own + self.sampler.forwards_per_token * theirs,
        }

    def _num_judged(self, part: PromptBatch) -> int:
        """Own answers before the gate is looked at."""
        settings = self.session.recipe.extrapolation
        return part.strategy.group_size - (settings.slots if settings.mode == "sample" else 0)

    def _asked(
        self, part: PromptBatch, *, label: tuple[str | int, ...], step: int
    ) -> tuple[list[Group], list[tuple[Rollout, ...]]]:
        """The policy first; then the pushed one for hard groups, and with `sample` the policy again for the others."""
        settings, strategy = self.session.recipe.extrapolation, part.strategy
        first = self._num_judged(part)
        own = self._own(part.prompts, label=label, slots=range(first), step=step)
        hard = [group.prompt for group in select_failed_groups(list(own.values()), strategy)]
        names = {prompt.prompt_id for prompt in hard}
        left = range(first, strategy.group_size)
        easy = [prompt for prompt in part.prompts if prompt.prompt_id not in names]
        if left and easy:
            more = self._own(easy, label=label, slots=left, step=step)
            own |= {name: _longer(own[name], group) for name, group in more.items()}
        slots = left or range(settings.samples_per_group)
        said = self.sampler.sample_groups(hard, label=(EXTRAPOLATED_SEED_LABEL, *label), slots=slots) if hard else []
        answers = {group.prompt.prompt_id: group.rollouts for group in said}
        return list(own.values()), [answers.get(name, ()) for name in own]

    def _own(
        self, prompts: Sequence[Prompt], *, label: tuple[str | int, ...], slots: range, step: int
    ) -> dict[str, Group]:
        groups = sample_groups(self.session, prompts, seed_label=label, slots=slots, sampler_step=step - 1)
        return {group.prompt.prompt_id: group for group in groups}


def _longer(group: Group, more: Group) -> Group:
    return replace(group, rollouts=group.rollouts + more.rollouts)

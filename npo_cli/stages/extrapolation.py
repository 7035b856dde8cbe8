"""Extrapolated guides inside the loop: the policy pushed along its own motion answers for groups that are hard.

The older copy is a checkpoint of the run, read again after a kill. Before the run is k steps old nobody is asked, nor
while a guide cache is at work. The gate needs the policy's own answers, so these come first: with `sample` all but the
last slots, which are then sampled from one or the other.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from npo_cli.config import Recipe
from npo_cli.guide.extrapolated import answers_in, asked_counts, hard_groups, seat_answers
from npo_cli.guide_records import Push, PushChoice
from npo_cli.policy.model import Policy
from npo_cli.policy.optimizer import TrainerState
from npo_cli.records import Group, Prompt, Rollout
from npo_cli.run_dir.checkpoints import Checkpoint
from npo_cli.run_dir.lineage import birth_segment
from npo_cli.stages.ahead import Ahead, Motion, motion_at, older_policy, open_ahead
from npo_cli.stages.batches import Part, StepBatch, own_part
from npo_cli.stages.world import World, answer, num_tokens

AHEAD = "ahead"
"""In the seeds of extrapolated answers, before everything that is in those of own ones."""


@dataclass(kw_only=True, slots=True)
class Extrapolator:
    """Finds the older copy of each step, and keeps it at hand for as long as it is the right one."""

    world: World
    branch: str
    older: dict[tuple[int, int], Checkpoint] = field(default_factory=dict)
    """The newest one found, by k and by how many saves lie behind it."""
    held: Checkpoint | None = None
    """Found whole, and in `old` where there is one."""
    old: Policy | None = None
    """A second model; only where logits are pushed."""
    until: int | None = None
    """Last step of an intervention of AutoNPO; None where it helps as long as the run lasts."""

    def rests(self, state: TrainerState) -> bool:
        """Whether its time is over at the step after `state`."""
        return self.until is not None and state.step >= self.until

    def helper(self, state: TrainerState) -> "Helper | None":
        """Who helps at the step after `state`; None where there is no older copy, or the choice is to ask nobody."""
        if self.world.recipe.extrapolation.refresh and state.choice and not state.choice.asking:
            return None
        ahead = self.ahead(push_in_force(self.world.recipe, state.choice), step=state.step)
        return None if ahead is None else Helper(world=self.world, ahead=ahead)

    def ahead(self, push: Push, *, step: int) -> Ahead | None:
        """The policy of `step`, whose weights are at hand, pushed; None while there is no older copy."""
        motion = self._motion(push, step=step)
        if motion is None:
            return None
        if motion.older != self.held:
            self.old = older_policy(self.world, motion, into=self.old)
            self.held = motion.older
        return open_ahead(self.world, motion, old=self.old)

    def _motion(self, push: Push, *, step: int) -> Motion | None:
        every = self.world.recipe.train.save_every
        key = (push.k, (step - push.k) // every)
        if key not in self.older:
            found = motion_at(self.world.run, self.branch, push, step=step, every=every)
            if found is None:
                return None
            self.older = {kept: older for kept, older in self.older.items() if kept[0] != push.k}
            self.older[key] = found.older
        return Motion(push=push, step=step, older=self.older[key])


def extrapolator_of(world: World, branch: str) -> Extrapolator | None:
    """Who pushes the policy on this branch: the recipe wants it, or AutoNPO tries it for some steps; else None."""
    if world.recipe.guide.source == "extrapolated":
        return Extrapolator(world=world, branch=branch)
    until = birth_segment(world.run, branch).ahead_until
    return None if until is None else Extrapolator(world=world, branch=branch, until=until)


def push_in_force(recipe: Recipe, choice: PushChoice | None) -> Push:
    """The one chosen last, or the recipe's k and a."""
    settings = recipe.extrapolation
    if choice is not None and settings.refresh:
        # A replay may push something else than the run that chose.
        return replace(choice.push, space=settings.space)
    return Push(space=settings.space, k=settings.k, a=settings.a)


@dataclass(frozen=True, kw_only=True, slots=True)
class Helper:
    """The pushed policy at one step of the loop, and how its answers are seated."""

    world: World
    ahead: Ahead

    def filled(
        self, part: Part, before: Sequence[Group], *, seed_name: str, step: int
    ) -> tuple[Sequence[Group], Sequence[Group]]:
        """Own answers, and the same groups with what the pushed policy said; read back where they are on record."""
        if before:
            own, answers = [own_part(group) for group in before], [answers_in(group) for group in before]
        else:
            own, answers = self._asked(part, label=(seed_name, step, *part.label), step=step)
        settings = self.world.recipe.extrapolation
        num_judged = self._num_judged(part)
        return own, [
            seat_answers(group, said, part.rule, num_judged=num_judged, seat=settings.mode)
            for group, said in zip(own, answers, strict=True)
        ]

    def metrics(self, batch: StepBatch) -> dict[str, float]:
        """What it was asked for at this step, and every token and forward pass that sampling took."""
        asked, motion = asked_counts(batch.mixed), self.ahead.motion
        own, theirs = num_tokens(batch.own), asked["extrapolate/tokens"]
        return asked | {
            "extrapolate/k": float(motion.push.k),
            "extrapolate/a": motion.push.a,
            "extrapolate/lag": float(motion.lag),
            "extrapolate/strength": motion.strength,
            "tokens": own + theirs,
            "forwards": own + self.ahead.forwards_per_token * theirs,
        }

    def _num_judged(self, part: Part) -> int:
        """Own answers before the gate is looked at."""
        settings = self.world.recipe.extrapolation
        return part.rule.group_size - (settings.slots if settings.mode == "sample" else 0)

    def _asked(
        self, part: Part, *, label: tuple[str | int, ...], step: int
    ) -> tuple[list[Group], list[tuple[Rollout, ...]]]:
        """The policy first; then the pushed one for hard groups, and with `sample` the policy again for the others."""
        settings, rule = self.world.recipe.extrapolation, part.rule
        first = self._num_judged(part)
        own = self._own(part.prompts, label=label, slots=range(first), step=step)
        hard = [group.prompt for group in hard_groups(list(own.values()), rule)]
        names = {prompt.prompt_id for prompt in hard}
        left = range(first, rule.group_size)
        easy = [prompt for prompt in part.prompts if prompt.prompt_id not in names]
        if left and easy:
            more = self._own(easy, label=label, slots=left, step=step)
            own |= {name: _longer(own[name], group) for name, group in more.items()}
        slots = left or range(settings.samples_per_group)
        said = self.ahead.answer(hard, label=(AHEAD, *label), slots=slots) if hard else []
        answers = {group.prompt.prompt_id: group.rollouts for group in said}
        return list(own.values()), [answers.get(name, ()) for name in own]

    def _own(
        self, prompts: Sequence[Prompt], *, label: tuple[str | int, ...], slots: range, step: int
    ) -> dict[str, Group]:
        groups = answer(self.world, prompts, label=label, slots=slots, sampler_step=step - 1)
        return {group.prompt.prompt_id: group for group in groups}


def _longer(group: Group, more: Group) -> Group:
    return replace(group, rollouts=group.rollouts + more.rollouts)

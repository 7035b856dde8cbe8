"""The learner pushed along its own motion as an author: no later checkpoint is needed, and nothing is rolled back."""

from collections.abc import Sequence
from dataclasses import dataclass

from npo_cli.policy.model import Policy
from npo_cli.records import Prompt
from npo_cli.stages.ahead import Ahead, Motion, older_policy, open_ahead
from npo_cli.stages.authors import Answers, Pairs, drawn_in_rounds, mean_logps
from npo_cli.stages.guide_plan import OpenSource, Plan, quiet_world
from npo_cli.stages.world import World, open_world
from npo_cli.tasks.prompts import Task


@dataclass(frozen=True, kw_only=True, slots=True)
class ExtrapolatedAuthor:
    """Answers of the pushed policy, in rounds; the learner's weights are at hand between them."""

    world: World
    ahead: Ahead
    label: tuple[str | int, ...]

    def ask(self, prompts: Sequence[Prompt]) -> list[Answers]:
        """Rounds of samples; a prompt that has a correct answer asks no more, unless all k are wanted."""
        settings = self.world.recipe.guide

        def draw(now: Sequence[Prompt], slots: range) -> list[Answers]:
            groups = self.ahead.answer(now, label=self.label, slots=slots, temperature=settings.cache.temperature)
            return [
                Answers(
                    prompt=group.prompt,
                    rollouts=group.rollouts,
                    num_tokens=sum(len(rollout.response_ids) for rollout in group.rollouts),
                )
                for group in groups
            ]

        return drawn_in_rounds(settings, prompts, draw)

    def logps(self, pairs: Pairs) -> list[tuple[float, ...] | None]:
        """From the trainer's pass under the pushed policy."""
        return [*self.ahead.logps(pairs, temperature=self.world.recipe.guide.cache.temperature)]

    def nearness(self, pairs: Pairs) -> list[float]:
        """Under the learner."""
        return mean_logps(self.world, pairs)

    def remarks(self) -> list[str]:
        """Nothing: its tokens are the learner's."""
        return []


def open_extrapolated(plan: Plan, task: Task, policy: Policy) -> OpenSource:
    """In logits beside no engine, in weights with the run's own."""
    motion = plan.motion
    assert motion is not None
    in_logits = motion.push.space == "logits"
    recipe = plan.learner.recipe
    world = (
        quiet_world(plan, task, policy)
        if in_logits
        else open_world(plan.run, recipe, task=task, policy=policy, pushes_weights=True)
    )
    return OpenSource(
        plan=plan,
        world=world,
        author=ExtrapolatedAuthor(
            world=world,
            ahead=open_ahead(world, motion, old=older_policy(world, motion)),
            label=(plan.purpose, "extrapolated", motion.push.name, motion.step),
        ),
        digest=motion.older.digest,
        tokenizer_digest=policy.tokenizer_digest,
        origin=origin_of(motion),
    )


def origin_of(motion: Motion) -> str:
    """`logits:20:2 of steps 80 and 60`; how it is asked for stands before the ` of `."""
    return f"{motion.push.name} of steps {motion.step} and {motion.older.step}"

"""An outside model answers, in its own tokens and by its own chat template: from a folder, the hub, or another run.

Two models are in memory, its own and the learner's. Where both have one vocabulary and one way to end, its token ids
are kept with its log-probabilities; else its text is told in the learner's tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from npo_cli.config import Recipe
from npo_cli.errors import NpoError
from npo_cli.policy.model import Policy, load_policy
from npo_cli.policy.reading import require_reader
from npo_cli.records import Prompt, Rollout
from npo_cli.run_dir.checkpoints import require_whole
from npo_cli.stages.authors import Answers, Pairs, drawn_in_rounds, forward_logps, mean_logps
from npo_cli.stages.guide_plan import OpenSource, Plan
from npo_cli.stages.ledger import cost_at
from npo_cli.stages.retelling import Retelling, Said
from npo_cli.stages.world import World, answer, num_tokens, open_world
from npo_cli.tasks.prompts import Task


@dataclass(frozen=True, kw_only=True, slots=True)
class OutsideAuthor:
    """Whose answers are kept, and for whom."""

    world: World
    """The outside model's: its policy, its engine."""
    learner: Policy
    retelling: Retelling
    label: tuple[str, ...]
    """In the sampling seeds."""

    @property
    def same_tokens(self) -> bool:
        """Whether its token ids mean the same to the learner."""
        return self.world.policy.tokenizer_digest == self.learner.tokenizer_digest

    def ask(self, prompts: Sequence[Prompt]) -> list[Answers]:
        """Rounds of samples."""
        return drawn_in_rounds(self.world.recipe.guide, prompts, self._drawn)

    def _drawn(self, prompts: Sequence[Prompt], slots: range) -> list[Answers]:
        heat = self.world.recipe.guide.cache.temperature
        groups = answer(self.world, prompts, label=self.label, slots=slots, sampler_step=0, temperature=heat)
        told = iter(self._told([(group.prompt, rollout) for group in groups for rollout in group.rollouts]))
        return [
            Answers(
                prompt=group.prompt,
                rollouts=tuple(next(told) for _ in group.rollouts),
                num_tokens=num_tokens([group]),
            )
            for group in groups
        ]

    def _told(self, pairs: Pairs) -> list[Rollout]:
        if self.same_tokens:
            return [replace(rollout, sampler_step=None, source="teacher") for _, rollout in pairs]
        return self.retelling.rollouts(
            [
                Said(prompt=prompt, slot=rollout.slot, text=rollout.text, finished=rollout.finished)
                for prompt, rollout in pairs
            ]
        )

    def logps(self, pairs: Pairs) -> list[tuple[float, ...] | None]:
        """From a forward pass of the outside model; None for what it said in other tokens."""
        if not self.same_tokens:
            return [None] * len(pairs)
        return [*forward_logps(self.world, pairs, temperature=self.world.recipe.guide.cache.temperature)]

    def nearness(self, pairs: Pairs) -> list[float]:
        """Under the learner, who is in memory too."""
        return mean_logps(self.world, pairs, policy=self.learner)

    def remarks(self) -> list[str]:
        """Answers that the learner has no room for."""
        return self.retelling.remarks()


def open_outside(plan: Plan, task: Task, policy: Policy) -> OpenSource:
    """The outside model behind the configured engine; `policy` is the learner's."""
    outside = load_outside(plan)
    recipe = fitted(plan, outside, task)
    world = open_world(plan.run, recipe, task=task, policy=outside)
    author = OutsideAuthor(
        world=world,
        learner=policy,
        retelling=Retelling(world=world, learner=policy),
        label=(plan.purpose, plan.ask.source),
    )
    other = plan.other
    return OpenSource(
        plan=plan,
        world=world,
        author=author,
        digest=other.checkpoint.digest if other else outside.digest,
        tokenizer_digest=policy.tokenizer_digest,
        origin=plan.origin,
        side_tokens=cost_at(other.run, other.branch, other.checkpoint.step).tokens if other else 0,
        remarks=() if author.same_tokens else (OTHER_TOKENS,),
    )


OTHER_TOKENS = (
    "it has another tokenizer than the learner: its text is told in the learner's tokens, without log-probabilities, "
    "so a replay needs guide.inject.ratio=unit, proximal or none"
)


def load_outside(plan: Plan) -> Policy:
    """Its weights, in the device and precision of the learner's recipe."""
    settings = plan.learner.recipe.model
    try:
        if plan.other is None:
            return load_policy(settings.model_copy(update={"path": plan.origin}))
        require_whole(plan.other.checkpoint)
        return load_policy(settings, plan.other.checkpoint.path)
    except NpoError as error:
        hint = "name another folder, hub id or run with --from"
        raise NpoError(f"--from {plan.ask.origin} cannot be asked: {error.message}", hint) from error


def fitted(plan: Plan, outside: Policy, task: Task) -> Recipe:
    """The learner's recipe with room for the prompts as the outside model reads them; one that has none is refused."""
    recipe = plan.learner.recipe
    require_reader(outside, task.train, plan.origin)
    lengths = {prompt.prompt_id: len(outside.encode(prompt)) for prompt in task.train}
    longest = max(lengths, key=lengths.__getitem__)
    wanted = lengths[longest] + recipe.sampling.max_new_tokens
    if min(lengths.values()) == 0:
        blank = min(lengths, key=lengths.__getitem__)
        raise NpoError(f"--from {plan.ask.origin} reads no token of prompt {blank}", "name another model with --from")
    if outside.max_tokens is not None and wanted > outside.max_tokens:
        raise NpoError(
            f"--from {plan.ask.origin}: prompt {longest} and its answer may have {wanted} of its tokens; "
            f"it was made for {outside.max_tokens}",
            "name another model with --from",
        )
    return recipe.model_copy(
        update={"task": recipe.task.model_copy(update={"max_prompt_tokens": max(lengths.values())})}
    )

"""A checkpoint of the run answers: its weights are swapped in, and prompts are asked in rounds."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from npo_cli.records import Prompt, Rollout
from npo_cli.run_dir.checkpoints import Checkpoint
from npo_cli.stages.authors import Answers, Pairs, forward_logps, mean_logps
from npo_cli.stages.world import World, answer

Known = Mapping[str, Sequence[Rollout]]
"""Answers that the guide gave before, by prompt id: they count as its first samples, and cost nothing again."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointAuthor:
    """Whose answers are kept, and for whom. The guide's weights are at hand whenever it is asked."""

    world: World
    learner: Checkpoint
    guide: Checkpoint
    known: Known = field(default_factory=dict)

    def ask(self, prompts: Sequence[Prompt]) -> list[Answers]:
        """Rounds of samples; a prompt that has a correct answer asks no more, unless all k are wanted."""
        return ask_in_rounds(self.world, prompts, step=self.guide.step, known=self.known)

    def logps(self, pairs: Pairs) -> list[tuple[float, ...] | None]:
        """From the trainer's pass under the guide's weights."""
        return [*forward_logps(self.world, pairs, temperature=self.world.recipe.guide.temperature)]

    def nearness(self, pairs: Pairs) -> list[float]:
        """Under the learner, whose weights are swapped in for a moment."""
        self.world.policy.load(self.learner.path)
        near = mean_logps(self.world, pairs)
        self.world.policy.load(self.guide.path)
        return near


def ask_in_rounds(world: World, prompts: Sequence[Prompt], *, step: int, known: Known | None = None) -> list[Answers]:
    """Up to guide.k samples a prompt of the weights at hand, `guide.round` at a time; `step` enters the seeds."""
    settings = world.recipe.guide
    asked = {prompt.prompt_id: _begun(prompt, (known or {}).get(prompt.prompt_id, ())) for prompt in prompts}
    while True:
        wanting = [
            entry
            for entry in asked.values()
            if len(entry.rollouts) < settings.k and (settings.draws_all or not entry.correct)
        ]
        if not wanting:
            return list(asked.values())
        # Those who have the fewest answers are asked together, so that a slot is never drawn twice.
        first = min(len(entry.rollouts) for entry in wanting)
        slots = range(first, min(first + (settings.k if settings.draws_all else settings.round), settings.k))
        now = [entry.prompt for entry in wanting if len(entry.rollouts) == first]
        for group in answer(
            world, now, label=("guide", step), slots=slots, sampler_step=step, temperature=settings.temperature
        ):
            before = asked[group.prompt.prompt_id]
            asked[group.prompt.prompt_id] = replace(before, rollouts=before.rollouts + group.rollouts)


def _begun(prompt: Prompt, rollouts: Sequence[Rollout]) -> Answers:
    return Answers(prompt=prompt, rollouts=tuple(rollouts), num_known=len(rollouts))

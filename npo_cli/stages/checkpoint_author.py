"""A checkpoint of the run answers: its weights are swapped in, and prompts are asked in rounds."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from npo_cli.records import Prompt
from npo_cli.run_dir.checkpoints import Checkpoint
from npo_cli.stages.authors import Answers, Known, Pairs, drawn_in_rounds, forward_logps, mean_logps
from npo_cli.stages.world import World, answer, num_tokens


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
        return [*forward_logps(self.world, pairs, temperature=self.world.recipe.guide.cache.temperature)]

    def nearness(self, pairs: Pairs) -> list[float]:
        """Under the learner, whose weights are swapped in for a moment."""
        self.world.policy.load(self.learner.path)
        near = mean_logps(self.world, pairs)
        self.world.policy.load(self.guide.path)
        return near

    def remarks(self) -> list[str]:
        """Nothing: its tokens are the learner's."""
        return []


def ask_in_rounds(world: World, prompts: Sequence[Prompt], *, step: int, known: Known | None = None) -> list[Answers]:
    """Rounds of samples of the weights at hand; `step` enters the seeds."""
    settings = world.recipe.guide

    def draw(now: Sequence[Prompt], slots: range) -> list[Answers]:
        groups = answer(
            world, now, label=("guide", step), slots=slots, sampler_step=step, temperature=settings.cache.temperature
        )
        return [
            Answers(prompt=group.prompt, rollouts=group.rollouts, num_tokens=num_tokens([group])) for group in groups
        ]

    return drawn_in_rounds(settings, prompts, draw, known=known)

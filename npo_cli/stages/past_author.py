"""The run's own past: what its line of descent got right in steps (0, at], as it was recorded. Nothing is asked."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from npo_cli.errors import NpoError, as_typed
from npo_cli.policy.model import Policy
from npo_cli.records import Prompt, Rollout
from npo_cli.run_dir.lineage import descent
from npo_cli.run_dir.paths import RunDir
from npo_cli.run_dir.rollouts import RolloutJournal
from npo_cli.stages.authors import Answers, Pairs, each_once, mean_logps, right_ones
from npo_cli.stages.guide_plan import OpenSource, Plan, quiet_world
from npo_cli.stages.segment import segment_prompts
from npo_cli.stages.world import World
from npo_cli.tasks.prompts import Task


@dataclass(frozen=True, kw_only=True, slots=True)
class PastAuthor:
    """The learner as it once was, many of it at a time."""

    world: World
    """With the learner's weights."""
    past: Mapping[str, Sequence[Rollout]]
    """By prompt id, the newest first."""

    def ask(self, prompts: Sequence[Prompt]) -> list[Answers]:
        """What is on record; of equal answers the newest, which is nearest to the learner."""
        return [each_once(prompt, self.past.get(prompt.prompt_id, ())) for prompt in prompts]

    def logps(self, pairs: Pairs) -> list[tuple[float, ...] | None]:
        """As they were recorded."""
        return [rollout.behavior_logps for _, rollout in pairs]

    def nearness(self, pairs: Pairs) -> list[float]:
        """Under the learner, whose weights are at hand."""
        return mean_logps(self.world, pairs)

    def remarks(self) -> list[str]:
        """Nothing."""
        return []


def open_past(plan: Plan, task: Task, policy: Policy) -> OpenSource:
    """The journals of the learner's line, read once."""
    world = quiet_world(plan, task, policy)
    learner = plan.learner
    asked = {prompt.prompt_id for prompt in segment_prompts(world, learner, plan.num_steps)}
    past = own_answers(plan.run, learner.branch, at=learner.step, prompt_ids=asked)
    if not any(right_ones(rollouts) for rollouts in past.values()):
        last = learner.step + plan.num_steps
        raise NpoError(
            f"none of the {len(asked)} prompts of steps {learner.step + 1}-{last} was solved in steps "
            f"1-{learner.step}: there is no past to replay",
            f"choose a later --at, or a longer --steps: npo index {as_typed(plan.run.root)} lists the steps",
        )
    return OpenSource(
        plan=plan,
        world=world,
        author=PastAuthor(world=world, past=past),
        digest="",
        tokenizer_digest=policy.tokenizer_digest,
    )


def own_answers(run: RunDir, branch: str, *, at: int, prompt_ids: set[str]) -> dict[str, list[Rollout]]:
    """The line's own rollouts in steps (0, at] by prompt id, newest first, told as past ones."""
    found: dict[str, list[Rollout]] = {}
    for stretch in reversed(descent(run, branch)):
        journal = RolloutJournal(run.rollouts_path(stretch.branch))
        steps = [step for step in journal.steps() if stretch.owns(step) and step <= at]
        for step in sorted(steps, reverse=True):
            for group in journal.read_step(step) or ():
                if group.prompt.prompt_id in prompt_ids:
                    own = [replace(rollout, source="past") for rollout in group.rollouts if not rollout.foreign]
                    found.setdefault(group.prompt.prompt_id, []).extend(own)
    return found

"""The run's own past: what its line of descent got right in steps (0, at], as it was recorded. Nothing is asked."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from npo_cli.errors import NpoError, quote_path
from npo_cli.guides.registry import ResolvedSource, SourceHandle, open_session_without_engine
from npo_cli.guides.source import Pairs, PromptResponses, compute_mean_logprobs, dedupe_rollouts, filter_correct
from npo_cli.policy.model import Policy
from npo_cli.session.learner import list_replay_prompts
from npo_cli.session.session import Session
from npo_cli.storage.layout import RunDir
from npo_cli.storage.lineage import ancestry
from npo_cli.storage.rollout_log import RolloutLog
from npo_cli.tasks.task import Task
from npo_cli.types.rollouts import Prompt, Rollout


@dataclass(frozen=True, kw_only=True, slots=True)
class OwnHistorySource:
    """The learner as it once was, many of it at a time."""

    forwards_per_token: ClassVar[int] = 1
    session: Session
    """With the learner's weights."""
    rollouts: Mapping[str, Sequence[Rollout]]
    """By prompt id, the newest first."""

    def sample(self, prompts: Sequence[Prompt]) -> list[PromptResponses]:
        """What is on record; of equal answers the newest, which is nearest to the learner."""
        return [dedupe_rollouts(prompt, self.rollouts.get(prompt.prompt_id, ())) for prompt in prompts]

    def logprobs(self, pairs: Pairs) -> list[tuple[float, ...] | None]:
        """As they were recorded."""
        return [rollout.behavior_logps for _, rollout in pairs]

    def learner_logprob(self, pairs: Pairs) -> list[float]:
        """Under the learner, whose weights are at hand."""
        return compute_mean_logprobs(self.session, pairs)

    def warnings(self) -> list[str]:
        """Nothing."""
        return []


def open_own_history(plan: ResolvedSource, task: Task, policy: Policy) -> SourceHandle:
    """The journals of the learner's line, read once."""
    session = open_session_without_engine(plan, task, policy)
    learner = plan.learner
    asked = {prompt.prompt_id for prompt in list_replay_prompts(session, learner, plan.num_steps)}
    past = read_own_rollouts(plan.run, learner.branch, at=learner.step, prompt_ids=asked)
    if not any(filter_correct(rollouts) for rollouts in past.values()):
        last = learner.step + plan.num_steps
        raise NpoError(
            f"none of the {len(asked)} prompts of steps {learner.step + 1}-{last} was solved in steps "
            f"1-{learner.step}: there is no past to replay",
            f"choose a later --at, or a longer --steps: npo index {quote_path(plan.run.root)} lists the steps",
        )
    return SourceHandle(
        resolved=plan,
        session=session,
        source=OwnHistorySource(session=session, rollouts=past),
        digest="",
        tokenizer_digest=policy.tokenizer_digest,
    )


def read_own_rollouts(run: RunDir, branch: str, *, at: int, prompt_ids: set[str]) -> dict[str, list[Rollout]]:
    """The line's own rollouts in steps (0, at] by prompt id, newest first, told as past ones."""
    found: dict[str, list[Rollout]] = {}
    for stretch in reversed(ancestry(run, branch)):
        journal = RolloutLog(run.rollouts_path(stretch.branch))
        steps = [step for step in journal.steps() if stretch.contains(step) and step <= at]
        for step in sorted(steps, reverse=True):
            for group in journal.read_step(step) or ():
                if group.prompt.prompt_id in prompt_ids:
                    own = [replace(rollout, source="past") for rollout in group.rollouts if not rollout.is_off_policy]
                    found.setdefault(group.prompt.prompt_id, []).extend(own)
    return found

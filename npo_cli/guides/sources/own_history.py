"""The run's own past: what its line got right in steps (0, at], as recorded while training. Generates nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Literal

from npo_cli.errors import NpoError, quote_path
from npo_cli.guides.source import GuideSource, PromptResponses, dedupe_rollouts, filter_correct
from npo_cli.types.rollouts import Prompt, Rollout

if TYPE_CHECKING:
    from npo_cli.session.session import Session
    from npo_cli.storage.layout import RunDir


class OwnHistorySource(GuideSource):
    """Earlier responses of the learner's line, with the log-probabilities recorded when they were sampled."""

    name = "past"
    usage = "past"
    example = "past"
    summary = "the run's own earlier successes, as recorded"
    is_fresh = False
    rollouts: Mapping[str, Sequence[Rollout]] = {}
    """By prompt id, newest first."""

    def validate(self) -> None:
        """The learner has a past."""
        if self.target.learner.step == 0:
            raise NpoError("the learner at step 0 has no earlier rollouts", "choose a later learner with --at")

    def open(self, session: Session) -> None:
        """Read the rollout logs of the learner's line."""
        from npo_cli.session.learner import list_replay_prompts

        super().open(session)
        run, learner, num_steps = self.target.run, self.target.learner, self.num_steps
        wanted = {prompt.prompt_id for prompt in list_replay_prompts(session, learner, num_steps)}
        self.rollouts = read_own_rollouts(run, learner.branch, at=learner.step, prompt_ids=wanted)
        if not any(filter_correct(rollouts) for rollouts in self.rollouts.values()):
            raise NpoError(
                f"none of the {len(wanted)} prompts of steps {learner.step + 1}-{learner.step + num_steps} was solved "
                f"in steps 1-{learner.step}: there is no past success to replay",
                f"choose a later --at, or a longer --steps: npo index {quote_path(run.root)} lists the steps",
            )

    def sample(self, prompts: Sequence[Prompt]) -> list[PromptResponses]:
        """The recorded responses; of equal ones the newest, whose policy is nearest to the learner."""
        return [dedupe_rollouts(prompt, self.rollouts.get(prompt.prompt_id, ())) for prompt in prompts]


def read_own_rollouts(
    run: RunDir,
    branch: str,
    *,
    after: int = 0,
    at: int,
    prompt_ids: set[str],
    source: Literal["past", "guide"] = "past",
) -> dict[str, list[Rollout]]:
    """On-policy rollouts of the line in steps (after, at] by prompt id, newest first, marked as of `source`."""
    from npo_cli.storage.lineage import ancestry
    from npo_cli.storage.rollout_log import RolloutLog

    found: dict[str, list[Rollout]] = {}
    for span in reversed(ancestry(run, branch)):
        log = RolloutLog(run.rollouts_path(span.branch))
        steps = [step for step in log.steps() if span.contains(step) and after < step <= at]
        for step in sorted(steps, reverse=True):
            for group in log.read_step(step) or ():
                if group.prompt.prompt_id in prompt_ids:
                    own = [replace(rollout, source=source) for rollout in group.rollouts if not rollout.is_off_policy]
                    found.setdefault(group.prompt.prompt_id, []).extend(own)
    return found

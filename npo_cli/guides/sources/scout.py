"""A disposable scout of the run as guide and teacher: a branch that `npo scout` trained for nothing else."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

from npo_cli.errors import NpoError, quote_path
from npo_cli.guides.source import GuideSource, OptionValue, Pairs, compute_mean_logprobs, make_spec
from npo_cli.guides.sources.checkpoint import SampledCheckpoint
from npo_cli.types.guides import SCOUT_SOURCE

if TYPE_CHECKING:
    from npo_cli.config.recipe import ModelSettings
    from npo_cli.session.session import Session


class ScoutSource(SampledCheckpoint):
    """A checkpoint of a scout that was forked from the learner's line.

    The weights of a scout take the learner's place in the session. One that trained adapters on a frozen step of a run
    without adapters is a model of its own, beside the learner.
    """

    name = SCOUT_SOURCE
    usage = "scout:BRANCH[@STEP]"
    example = "scout:scout-0"
    summary = "a disposable scout (default: its last step)"
    options: ClassVar[Mapping[str, str]] = {
        "branch": "branch of the scout",
        "step": "step of the checkpoint (default: the scout's last)",
    }
    optional = frozenset({"step"})

    @classmethod
    def parse(cls, argument: str) -> dict[str, OptionValue]:
        """`BRANCH` or `BRANCH@STEP`."""
        match = re.fullmatch(r"([^@]+)(?:@(\d+))?", argument)
        if match is None:
            return {}
        step = {} if match[2] is None else {"step": int(match[2])}
        return {"branch": match[1], **step}

    @classmethod
    def format(cls, options: Mapping[str, OptionValue]) -> str:
        """`BRANCH[@STEP]`."""
        return f"{options['branch']}@{options['step']}" if "step" in options else str(options["branch"])

    def validate(self) -> None:
        """The branch is a scout of the learner's line, has ended, and was not dropped."""
        from npo_cli.storage.checkpoints import find_checkpoint
        from npo_cli.storage.interrupted import find_last_saved_step
        from npo_cli.storage.lineage import check_branch, find_first_segment, find_owning_branch, is_scout
        from npo_cli.storage.scouts import check_not_dropped, has_ended

        run, learner, branch = self.target.run, self.target.learner, str(self.spec.options["branch"])
        check_branch(run, branch)
        root = quote_path(run.root)
        if not is_scout(run, branch):
            raise NpoError(f"branch {branch} is no scout", "a checkpoint of the learner's line is checkpoint:STEP")
        first = find_first_segment(run, branch)
        assert first.parent is not None, "a scout is forked"
        fork_step = first.fork_step
        if find_owning_branch(run, learner.branch, fork_step) != find_owning_branch(run, first.parent, fork_step):
            raise NpoError(
                f"scout {branch} was forked from step {fork_step} of {first.parent}, which is not a step of "
                f"{learner.branch}",
                f"npo scout {root} --branch {learner.branch} --at {learner.step} --name NEW",
            )
        check_not_dropped(run, branch)
        if not has_ended(run, branch):
            raise NpoError(f"scout {branch} has not ended", f"npo resume {root} --branch {branch}")
        newest = find_last_saved_step(run, branch)
        self.checkpoint = find_checkpoint(run, branch, int(self.spec.options.get("step", newest)))
        if self.checkpoint.branch != branch:
            raise NpoError(
                f"step {self.checkpoint.step} is a step of {first.parent}, before scout {branch}",
                f"scout:{branch}@{newest}",
            )
        self.fork_step = fork_step
        self.spec = make_spec(self.name, {"branch": branch, "step": self.checkpoint.step})
        self.uses_engine = not self.is_own_model

    @property
    def guide_step(self) -> None:
        """It is no step of the learner's line."""

    @property
    def place(self) -> tuple[str, int]:
        """The scout's branch and step."""
        return str(self.spec.options["branch"]), self.checkpoint.step

    @property
    def steps_ahead(self) -> int:
        """Steps that the scout trained."""
        return self.checkpoint.step - self.fork_step

    @property
    def default_label(self) -> str:
        """The branch."""
        return str(self.spec.options["branch"])

    @property
    def seed_label(self) -> tuple[str | int, ...]:
        """With the branch: two scouts of one length do not draw the same."""
        return self.target.purpose, *self.place

    @property
    def model_settings(self) -> ModelSettings:
        """The learner's, with the adapters that the scout trained and their base."""
        from npo_cli.storage.scouts import read_scout_recipe

        own = read_scout_recipe(self.target.run, self.place[0]).model
        return self.target.learner.recipe.model.model_copy(update={"path": own.path, "lora": own.lora})

    @property
    def is_own_model(self) -> bool:
        """Whether it has adapters that the learner has not."""
        return self.model_settings.lora.rank != self.target.learner.recipe.model.lora.rank

    def open(self, session: Session) -> None:
        """Load the scout's weights into the session's policy, or the scout beside it, sampled without a server."""
        if not self.is_own_model:
            super().open(session)
            return
        from npo_cli.session.distributed import shard_policy
        from npo_cli.session.session import build_session

        GuideSource.open(self, session)
        recipe = session.recipe.model_copy(update={"model": self.model_settings})
        policy = shard_policy(self.load_teacher(), recipe, folder=self.checkpoint.path)
        policy.model.requires_grad_(False)
        self.guide_session = build_session(self.target.run, recipe, task=session.task, policy=policy)

    def close(self) -> None:
        """End the engine of a scout beside the learner."""
        if hasattr(self, "guide_session") and self.guide_session is not self.session:
            self.guide_session.close()

    def learner_logprob(self, pairs: Pairs) -> list[float]:
        """Under the learner."""
        return compute_mean_logprobs(self.session, pairs) if self.is_own_model else super().learner_logprob(pairs)

"""An outside model answers, in its own tokens and by its own chat template: from a folder, the hub, or another run.

Two models are in memory, its own and the learner's. Where both have one vocabulary and one way to end, its token ids
are kept with its log-probabilities; else its text is told in the learner's tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from npo_cli.config.recipe import Recipe
from npo_cli.errors import NpoError
from npo_cli.guides.registry import ResolvedSource, SourceHandle
from npo_cli.guides.source import Pairs, PromptResponses, compute_logprobs, compute_mean_logprobs, sample_in_rounds
from npo_cli.guides.sources.retokenize import Retokenizer, TextResponse
from npo_cli.policy.model import Policy, check_prompt_support, load_policy
from npo_cli.session.session import Session, build_session, count_generated_tokens, sample_groups
from npo_cli.storage.checkpoints import verify_checkpoint
from npo_cli.storage.cost_sums import cost_at
from npo_cli.tasks.task import Task
from npo_cli.types.rollouts import Prompt, Rollout


@dataclass(frozen=True, kw_only=True, slots=True)
class ExternalModelSource:
    """Whose answers are kept, and for whom."""

    forwards_per_token: ClassVar[int] = 1
    session: Session
    """The outside model's: its policy, its engine."""
    learner: Policy
    retokenizer: Retokenizer
    label: tuple[str, ...]
    """In the sampling seeds."""

    @property
    def uses_learner_tokenizer(self) -> bool:
        """Whether its token ids mean the same to the learner."""
        return self.session.policy.tokenizer_digest == self.learner.tokenizer_digest

    def sample(self, prompts: Sequence[Prompt]) -> list[PromptResponses]:
        """Rounds of samples."""
        return sample_in_rounds(self.session.recipe.guide, prompts, self._drawn)

    def _drawn(self, prompts: Sequence[Prompt], slots: range) -> list[PromptResponses]:
        heat = self.session.recipe.guide.cache.temperature
        groups = sample_groups(
            self.session, prompts, seed_label=self.label, slots=slots, sampler_step=0, temperature=heat
        )
        told = iter(self._told([(group.prompt, rollout) for group in groups for rollout in group.rollouts]))
        return [
            PromptResponses(
                prompt=group.prompt,
                rollouts=tuple(next(told) for _ in group.rollouts),
                num_tokens=count_generated_tokens([group]),
            )
            for group in groups
        ]

    def _told(self, pairs: Pairs) -> list[Rollout]:
        if self.uses_learner_tokenizer:
            return [replace(rollout, sampler_step=None, source="teacher") for _, rollout in pairs]
        return self.retokenizer.retokenize(
            [
                TextResponse(prompt=prompt, slot=rollout.slot, text=rollout.text, finished=rollout.finished)
                for prompt, rollout in pairs
            ]
        )

    def logprobs(self, pairs: Pairs) -> list[tuple[float, ...] | None]:
        """From a forward pass of the outside model; None for what it said in other tokens."""
        if not self.uses_learner_tokenizer:
            return [None] * len(pairs)
        return [*compute_logprobs(self.session, pairs, temperature=self.session.recipe.guide.cache.temperature)]

    def learner_logprob(self, pairs: Pairs) -> list[float]:
        """Under the learner, who is in memory too."""
        return compute_mean_logprobs(self.session, pairs, policy=self.learner)

    def warnings(self) -> list[str]:
        """Answers that the learner has no room for."""
        return self.retokenizer.warnings()


def open_external_model(plan: ResolvedSource, task: Task, policy: Policy) -> SourceHandle:
    """The outside model behind the configured engine; `policy` is the learner's."""
    outside = load_external_model(plan)
    recipe = fit_recipe_to_model(plan, outside, task)
    session = build_session(plan.run, recipe, task=task, policy=outside)
    author = ExternalModelSource(
        session=session,
        learner=policy,
        retokenizer=Retokenizer(session=session, learner=policy),
        label=(plan.purpose, plan.spec.kind),
    )
    other = plan.other_run
    return SourceHandle(
        resolved=plan,
        session=session,
        source=author,
        digest=other.checkpoint.digest if other else outside.digest,
        tokenizer_digest=policy.tokenizer_digest,
        origin=plan.origin,
        guide_training_tokens=cost_at(other.run, other.branch, other.checkpoint.step).tokens if other else 0,
        warnings=() if author.uses_learner_tokenizer else (OTHER_TOKENIZER_WARNING,),
    )


OTHER_TOKENIZER_WARNING = (
    "it has another tokenizer than the learner: its text is told in the learner's tokens, without log-probabilities, "
    "so a replay needs guide.inject.ratio=unit, proximal or none"
)


def load_external_model(plan: ResolvedSource) -> Policy:
    """Its weights, in the device and precision of the learner's recipe."""
    settings = plan.learner.recipe.model
    try:
        if plan.other_run is None:
            return load_policy(settings.model_copy(update={"path": plan.origin}))
        verify_checkpoint(plan.other_run.checkpoint)
        return load_policy(settings, plan.other_run.checkpoint.path)
    except NpoError as error:
        hint = "name another folder, hub id or run with --from"
        raise NpoError(f"--from {plan.spec.origin} cannot be asked: {error.message}", hint) from error


def fit_recipe_to_model(plan: ResolvedSource, outside: Policy, task: Task) -> Recipe:
    """The learner's recipe with room for the prompts as the outside model reads them; one that has none is refused."""
    recipe = plan.learner.recipe
    check_prompt_support(outside, task.train, plan.origin)
    lengths = {prompt.prompt_id: len(outside.encode(prompt)) for prompt in task.train}
    longest = max(lengths, key=lengths.__getitem__)
    wanted = lengths[longest] + recipe.sampling.max_new_tokens
    if min(lengths.values()) == 0:
        blank = min(lengths, key=lengths.__getitem__)
        raise NpoError(f"--from {plan.spec.origin} reads no token of prompt {blank}", "name another model with --from")
    if outside.max_tokens is not None and wanted > outside.max_tokens:
        raise NpoError(
            f"--from {plan.spec.origin}: prompt {longest} and its answer may have {wanted} of its tokens; "
            f"it was made for {outside.max_tokens}",
            "name another model with --from",
        )
    return recipe.model_copy(
        update={"task": recipe.task.model_copy(update={"max_prompt_tokens": max(lengths.values())})}
    )

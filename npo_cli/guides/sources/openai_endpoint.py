"""A model at an address answers, in words: they are told in the learner's tokens, and verified here."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from npo_cli.errors import NpoError
from npo_cli.guides.registry import ResolvedSource, SourceHandle, open_session_without_engine
from npo_cli.guides.source import Pairs, PromptResponses, compute_mean_logprobs, sample_in_rounds
from npo_cli.guides.sources.retokenize import Retokenizer, TextResponse
from npo_cli.inference.openai_client import OpenAIClient, RequestLimits, TextRequest, validate_url
from npo_cli.policy.model import Policy
from npo_cli.seeds import derive_seed
from npo_cli.session.session import Session
from npo_cli.tasks.task import Task
from npo_cli.types.rollouts import Prompt


@dataclass(frozen=True, kw_only=True, slots=True)
class EndpointSource:
    """Whose answers are kept. How far they repeat themselves is the server's affair: it is given seeds."""

    forwards_per_token: ClassVar[int] = 1
    session: Session
    """With the learner's weights."""
    endpoint: OpenAIClient
    retokenizer: Retokenizer
    label: tuple[str, ...]
    """In the sampling seeds."""

    def sample(self, prompts: Sequence[Prompt]) -> list[PromptResponses]:
        """Rounds of samples."""
        return sample_in_rounds(self.session.recipe.guide, prompts, self._drawn)

    def _drawn(self, prompts: Sequence[Prompt], slots: range) -> list[PromptResponses]:
        asked = [(prompt, slot) for prompt in prompts for slot in slots]
        heard = self.endpoint.generate([self._request(prompt, slot) for prompt, slot in asked])
        rollouts = self.retokenizer.retokenize(
            [
                TextResponse(prompt=prompt, slot=slot, text=answer.text, finished=answer.finished)
                for (prompt, slot), answer in zip(asked, heard, strict=True)
            ]
        )
        tokens = [
            len(rollout.response_ids) if answer.num_tokens is None else answer.num_tokens
            for rollout, answer in zip(rollouts, heard, strict=True)
        ]
        width = len(slots)
        return [
            PromptResponses(
                prompt=prompt,
                rollouts=tuple(rollouts[place * width : (place + 1) * width]),
                num_tokens=sum(tokens[place * width : (place + 1) * width]),
            )
            for place, prompt in enumerate(prompts)
        ]

    def _request(self, prompt: Prompt, slot: int) -> TextRequest:
        if prompt.images:
            raise NpoError(
                f"prompt {prompt.prompt_id} has images, and no pictures are sent to an address",
                "ask a model's folder instead: --source model --from FOLDER_OR_HUB_ID",
            )
        recipe = self.session.recipe
        heat = recipe.guide.cache.temperature
        return TextRequest(
            prompt=prompt,
            seed=derive_seed(recipe.train.seed, *self.label, prompt.prompt_id, slot),
            temperature=recipe.sampling.temperature if heat is None else heat,
            max_new_tokens=recipe.sampling.max_new_tokens,
        )

    def logprobs(self, pairs: Pairs) -> list[tuple[float, ...] | None]:
        """Nobody knows them."""
        return [None] * len(pairs)

    def learner_logprob(self, pairs: Pairs) -> list[float]:
        """Under the learner, whose weights are at hand."""
        return compute_mean_logprobs(self.session, pairs)

    def warnings(self) -> list[str]:
        """Answers that the learner has no room for."""
        return self.retokenizer.warnings()


def open_endpoint(plan: ResolvedSource, task: Task, policy: Policy) -> SourceHandle:
    """The address, once it has shown that it has the model."""
    settings = plan.learner.recipe.guide
    patience = RequestLimits(
        concurrency=settings.endpoint.concurrency,
        timeout=settings.endpoint.timeout,
        retries=settings.endpoint.max_retries,
    )
    endpoint = OpenAIClient(url=validate_url(plan.origin), model=plan.spec.model or "", limits=patience)
    endpoint.check_model()
    session = open_session_without_engine(plan, task, policy)
    return SourceHandle(
        resolved=plan,
        session=session,
        source=EndpointSource(
            session=session,
            endpoint=endpoint,
            retokenizer=Retokenizer(session=session, learner=policy),
            label=(plan.purpose, plan.spec.kind),
        ),
        digest="",
        tokenizer_digest=policy.tokenizer_digest,
        origin=f"{endpoint.url} model {endpoint.model}",
    )

"""A model behind an OpenAI-compatible endpoint: it returns text, which is re-tokenized and verified here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar

from npo_cli.errors import NpoError
from npo_cli.guides.source import GuideSource, OptionValue, Pairs, PromptResponses, sample_in_rounds
from npo_cli.seeds import derive_seed
from npo_cli.types.rollouts import Prompt

if TYPE_CHECKING:
    from npo_cli.config.recipe import Recipe
    from npo_cli.guides.served_teacher import ServedTeacher
    from npo_cli.inference.openai_client import OpenAIClient, TextRequest
    from npo_cli.session.session import Session


class EndpointSource(GuideSource):
    """Responses of a served model. Each request has a seed; whether the server honours it is not known."""

    name = "endpoint"
    usage = "endpoint:URL#MODEL"
    example = "endpoint:http://127.0.0.1:8000/v1#NAME"
    summary = "an OpenAI-compatible endpoint; no log-probs"
    has_distribution = True
    options: ClassVar[Mapping[str, str]] = {
        "url": "base address of the API, such as http://127.0.0.1:8000/v1",
        "model": "name of the model on that server",
    }
    has_logprobs = False

    @classmethod
    def parse(cls, argument: str) -> dict[str, OptionValue]:
        """`URL#MODEL`."""
        url, _, model = argument.partition("#")
        return {name: value for name, value in (("url", url), ("model", model)) if value}

    @classmethod
    def format(cls, options: Mapping[str, OptionValue]) -> str:
        """`URL#MODEL`."""
        return f"{options['url']}#{options['model']}"

    def validate(self) -> None:
        """The address is one of HTTP."""
        from npo_cli.inference.openai_client import validate_url

        validate_url(str(self.spec.options["url"]))

    def connect(self, recipe: Recipe) -> OpenAIClient:
        """A client, after a check that the server has the model."""
        from npo_cli.inference.openai_client import OpenAIClient, RequestLimits, validate_url

        settings = recipe.guide.endpoint
        limits = RequestLimits(concurrency=settings.concurrency, timeout=settings.timeout, retries=settings.max_retries)
        url, model = str(self.spec.options["url"]), str(self.spec.options["model"])
        client = OpenAIClient(url=validate_url(url), model=model, limits=limits)
        client.check_model()
        return client

    def load_teacher(self) -> ServedTeacher:
        """The served model, of vLLM: other servers do not return log-probabilities of given tokens."""
        from npo_cli.guides.served_teacher import ServedTeacher

        recipe = self.target.learner.recipe
        return ServedTeacher(client=self.connect(recipe), top_k=recipe.target.top_k or 0)

    def open(self, session: Session) -> None:
        """Connect."""
        from npo_cli.guides.sources.retokenize import Retokenizer

        super().open(session)
        self.client = self.connect(session.recipe)
        self.retokenizer = Retokenizer(session=session, learner=session.policy)

    def sample(self, prompts: Sequence[Prompt]) -> list[PromptResponses]:
        """In rounds, until a prompt is solved or all samples are drawn."""
        return sample_in_rounds(self.session.recipe.guide, prompts, self._draw)

    def _draw(self, prompts: Sequence[Prompt], slots: range) -> list[PromptResponses]:
        from npo_cli.guides.sources.retokenize import TextResponse

        slots_of_prompts = [(prompt, slot) for prompt in prompts for slot in slots]
        texts = self.client.generate([self._request(prompt, slot) for prompt, slot in slots_of_prompts])
        rollouts = self.retokenizer.retokenize(
            [
                TextResponse(prompt=prompt, slot=slot, text=text.text, finished=text.finished)
                for (prompt, slot), text in zip(slots_of_prompts, texts, strict=True)
            ]
        )
        tokens = [
            len(rollout.response_ids) if text.num_tokens is None else text.num_tokens
            for rollout, text in zip(rollouts, texts, strict=True)
        ]
        width = len(slots)
        return [
            PromptResponses(
                prompt=prompt,
                rollouts=tuple(rollouts[row * width : (row + 1) * width]),
                num_tokens=sum(tokens[row * width : (row + 1) * width]),
            )
            for row, prompt in enumerate(prompts)
        ]

    def _request(self, prompt: Prompt, slot: int) -> TextRequest:
        from npo_cli.inference.openai_client import TextRequest

        if prompt.images:
            raise NpoError(
                f"prompt {prompt.prompt_id} has images, which are not sent to an endpoint",
                "use the model's weights instead: --source model:FOLDER_OR_ID",
            )
        recipe = self.session.recipe
        temperature = recipe.guide.cache.temperature
        return TextRequest(
            prompt=prompt,
            seed=derive_seed(recipe.train.seed, self.target.purpose, self.name, prompt.prompt_id, slot),
            temperature=recipe.sampling.temperature if temperature is None else temperature,
            max_new_tokens=recipe.sampling.max_new_tokens,
        )

    def logprobs(self, pairs: Pairs) -> list[tuple[float, ...] | None]:
        """Unavailable: the response is text in another model's tokens."""
        return [None] * len(pairs)

    def warnings(self) -> list[str]:
        """Responses that were truncated."""
        return self.retokenizer.warnings()

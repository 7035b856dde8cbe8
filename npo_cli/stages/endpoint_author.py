"""A model at an address answers, in words: they are told in the learner's tokens, and verified here."""

from collections.abc import Sequence
from dataclasses import dataclass

from npo_cli.engines.endpoint import Endpoint, Patience, TextRequest, checked_address
from npo_cli.errors import NpoError
from npo_cli.policy.model import Policy
from npo_cli.records import Prompt
from npo_cli.seeds import derive_seed
from npo_cli.stages.authors import Answers, Pairs, drawn_in_rounds, mean_logps
from npo_cli.stages.guide_plan import OpenSource, Plan, quiet_world
from npo_cli.stages.retelling import Retelling, Said
from npo_cli.stages.world import World
from npo_cli.tasks.prompts import Task


@dataclass(frozen=True, kw_only=True, slots=True)
class EndpointAuthor:
    """Whose answers are kept. How far they repeat themselves is the server's affair: it is given seeds."""

    world: World
    """With the learner's weights."""
    endpoint: Endpoint
    retelling: Retelling
    label: tuple[str, ...]
    """In the sampling seeds."""

    def ask(self, prompts: Sequence[Prompt]) -> list[Answers]:
        """Rounds of samples."""
        return drawn_in_rounds(self.world.recipe.guide, prompts, self._drawn)

    def _drawn(self, prompts: Sequence[Prompt], slots: range) -> list[Answers]:
        asked = [(prompt, slot) for prompt in prompts for slot in slots]
        heard = self.endpoint.ask([self._request(prompt, slot) for prompt, slot in asked])
        rollouts = self.retelling.rollouts(
            [
                Said(prompt=prompt, slot=slot, text=answer.text, finished=answer.finished)
                for (prompt, slot), answer in zip(asked, heard, strict=True)
            ]
        )
        tokens = [
            len(rollout.response_ids) if answer.num_tokens is None else answer.num_tokens
            for rollout, answer in zip(rollouts, heard, strict=True)
        ]
        width = len(slots)
        return [
            Answers(
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
        recipe = self.world.recipe
        heat = recipe.guide.cache.temperature
        return TextRequest(
            prompt=prompt,
            seed=derive_seed(recipe.train.seed, *self.label, prompt.prompt_id, slot),
            temperature=recipe.sampling.temperature if heat is None else heat,
            max_new_tokens=recipe.sampling.max_new_tokens,
        )

    def logps(self, pairs: Pairs) -> list[tuple[float, ...] | None]:
        """Nobody knows them."""
        return [None] * len(pairs)

    def nearness(self, pairs: Pairs) -> list[float]:
        """Under the learner, whose weights are at hand."""
        return mean_logps(self.world, pairs)

    def remarks(self) -> list[str]:
        """Answers that the learner has no room for."""
        return self.retelling.remarks()


def open_endpoint(plan: Plan, task: Task, policy: Policy) -> OpenSource:
    """The address, once it has shown that it has the model."""
    settings = plan.learner.recipe.guide
    patience = Patience(
        concurrency=settings.endpoint.concurrency,
        timeout=settings.endpoint.timeout,
        retries=settings.endpoint.max_retries,
    )
    endpoint = Endpoint(url=checked_address(plan.origin), model=plan.ask.model or "", patience=patience)
    endpoint.refuse_unknown_model()
    world = quiet_world(plan, task, policy)
    return OpenSource(
        plan=plan,
        world=world,
        author=EndpointAuthor(
            world=world,
            endpoint=endpoint,
            retelling=Retelling(world=world, learner=policy),
            label=(plan.purpose, plan.ask.source),
        ),
        digest="",
        tokenizer_digest=policy.tokenizer_digest,
        origin=f"{endpoint.url} model {endpoint.model}",
    )

"""Prefix slots: an injected rollout that begins with a guide's tokens and that the policy continues.

Of a guide response of T tokens the first max(1, round(f T)), never its last one, follow the prompt in a sampling
request; the policy's own tokens follow until an end token or sampling.max_new_tokens. Prefix and continuation are
verified as one response. Provenance per token says which is which, so the prefix is masked, weighted or trained.
(BREAD, arXiv 2506.17211; Prefix-RFT, arXiv 2507.01679.)
"""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from npo_cli.config.guides import PrefixSettings
from npo_cli.inference.base import SampleRequest, check_samples
from npo_cli.rollout.mixing import GuidesByPrompt, MixStrategy
from npo_cli.seeds import derive_seed
from npo_cli.session.session import Session
from npo_cli.types.rollouts import Group, Prompt, Rollout, TokenSpan

PREFIX = "prefix"
"""First part of the seed labels of lengths and continuations."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GuidePrefix:
    """What a rollout begins with."""

    prompt: Prompt
    guide: Rollout
    num_tokens: int
    seed: int
    """Of the continuation."""

    @property
    def response_ids(self) -> tuple[int, ...]:
        """Its tokens."""
        return self.guide.response_ids[: self.num_tokens]


def continue_prefixes(
    session: Session,
    groups: Sequence[Group],
    guides: GuidesByPrompt,
    strategy: MixStrategy,
    *,
    fraction: float,
    seed_label: tuple[str | int, ...],
    sampler_step: int,
) -> Mapping[str, Sequence[Rollout]]:
    """For the prompt of each group that receives guide rollouts: prefixes of these, continued by the policy of
    `sampler_step` and verified."""
    prefixes = [
        prefix
        for group in groups
        if strategy.is_eligible(group.accuracy)
        for prefix in cut_prefixes(session, group.prompt, guides, strategy, fraction=fraction, seed_label=seed_label)
    ]
    if not prefixes:
        return {}
    settings, policy = session.recipe.sampling, session.policy
    version = session.sync.sync_weights(sampler_step)
    prompt_ids = policy.encode_all([prefix.prompt for prefix in prefixes])
    requests = [
        SampleRequest(
            prompt_id=prefix.prompt.prompt_id,
            prompt_ids=(*ids, *prefix.response_ids),
            slot=prefix.guide.slot,
            seed=prefix.seed,
            version=version,
            images=prefix.prompt.images,
            max_new_tokens=settings.max_new_tokens - prefix.num_tokens,
        )
        for prefix, ids in zip(prefixes, prompt_ids, strict=True)
    ]
    limits = {"temperature": settings.temperature, "max_new_tokens": settings.max_new_tokens}
    samples = session.engine.generate(requests, **limits)
    check_samples(requests, samples, kind=session.recipe.engine.kind)
    whole = [(*prefix.response_ids, *sample.response_ids) for prefix, sample in zip(prefixes, samples, strict=True)]
    texts = [
        policy.tokenizer.decode(ids[:-1] if sample.finished else ids)
        for ids, sample in zip(whole, samples, strict=True)
    ]
    graded = session.task.grade(
        [prefix.prompt for prefix in prefixes], texts, finished=[sample.finished for sample in samples]
    )
    found: dict[str, list[Rollout]] = {}
    for prefix, ids, sample, text, result in zip(prefixes, whole, samples, texts, graded, strict=True):
        rollout = Rollout(
            prompt_id=prefix.prompt.prompt_id,
            slot=prefix.guide.slot,
            response_ids=ids,
            behavior_logps=(*_prefix_logps(prefix), *sample.logps),
            text=text,
            finished=sample.finished,
            sampler_step=prefix.guide.sampler_step,
            source=prefix.guide.source,
            spans=make_spans(
                prefix, len(ids), sampler_step=sampler_step, weight=session.recipe.guide.inject.prefix.weight
            ),
            verdict=result.verdict,
            reward=result.reward,
            reward_parts=result.parts,
        )
        found.setdefault(rollout.prompt_id, []).append(rollout)
    return found


def cut_prefixes(
    session: Session,
    prompt: Prompt,
    guides: GuidesByPrompt,
    strategy: MixStrategy,
    *,
    fraction: float,
    seed_label: tuple[str | int, ...],
) -> list[GuidePrefix]:
    """The prefixes of a prompt's guide rollouts, as many as the strategy has slots; none of a response of one token."""
    settings, seed = session.recipe.guide.inject.prefix, session.recipe.train.seed
    found = []
    for place, guide in enumerate(strategy.select(guides.get(prompt.prompt_id, ()))):
        label = (PREFIX, *seed_label, prompt.prompt_id, place)
        if guide.num_tokens > 1:
            length = choose_length(guide.num_tokens, settings, fraction=fraction, seed=derive_seed(seed, "cut", *label))
            found.append(GuidePrefix(prompt=prompt, guide=guide, num_tokens=length, seed=derive_seed(seed, *label)))
    return found


def choose_length(num_tokens: int, settings: PrefixSettings, *, fraction: float, seed: int) -> int:
    """Tokens of the prefix of a response of `num_tokens`: max(1, round(f num_tokens)), at most all but the last.

    f is `fraction`, the schedule's value of the step, or with schedule=uniform uniform in [0, fraction).
    """
    drawn = fraction * random.Random(seed).random() if settings.schedule == "uniform" else fraction
    return min(max(1, round(drawn * num_tokens)), num_tokens - 1)


def make_spans(prefix: GuidePrefix, length: int, *, sampler_step: int, weight: float) -> tuple[TokenSpan, ...]:
    """Provenance of a continued prefix: the guide's tokens, then the policy's own. Weight 0: the prefix is masked."""
    return (
        TokenSpan(
            start=0,
            end=prefix.num_tokens,
            source=prefix.guide.source,
            sampler_step=prefix.guide.sampler_step,
            has_logprobs=prefix.guide.behavior_logps is not None,
            is_trained=weight > 0,
            weight=weight if weight > 0 else 1.0,
        ),
        TokenSpan(start=prefix.num_tokens, end=length, sampler_step=sampler_step),
    )


def _prefix_logps(prefix: GuidePrefix) -> tuple[float, ...]:
    """Under the guide; where these are unknown, zeros that are never read."""
    known = prefix.guide.behavior_logps
    return (0.0,) * prefix.num_tokens if known is None else known[: prefix.num_tokens]


def prefix_metrics(groups: Sequence[Group]) -> dict[str, float]:
    """Guide tokens at the start of injected rollouts, the policy's tokens after them, and the number of correct ones of
    these rollouts; empty without any."""
    rollouts = [one for group in groups for one in group.rollouts if one.is_off_policy and one.num_on_policy_tokens]
    if not rollouts:
        return {}
    continued = sum(rollout.num_on_policy_tokens for rollout in rollouts)
    return {
        "inject/prefix_tokens": float(sum(rollout.num_tokens for rollout in rollouts) - continued),
        "inject/continued_tokens": float(continued),
        "inject/correct": float(sum(rollout.is_correct for rollout in rollouts)),
    }

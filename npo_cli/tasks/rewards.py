"""The reward of a response: the weighted sum of what one or several verifiers say about it.

The first verifier that applies to a response says whether it is correct. Advantages are computed from the reward;
whatever needs a verdict (guides, gates, Q, pass@k, accuracy, failed prompts, replay buffer) takes that.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from npo_cli.errors import NpoError, RunFailed
from npo_cli.tasks.base import Verifier
from npo_cli.types.rollouts import Prompt, VerifierResult

MAX_REWARD = 1e15
"""Larger rewards, whose squares are summed in float32, are refused."""


@dataclass(frozen=True, kw_only=True, slots=True)
class WeightedVerifier:
    """One term of the reward."""

    name: str
    """Unique among the terms; the metric `reward/NAME` is its mean."""
    verifier: Verifier
    weight: float = 1.0


def grade_weighted(
    terms: Sequence[WeightedVerifier], prompts: Sequence[Prompt], responses: Sequence[str], finished: Sequence[bool]
) -> list[VerifierResult]:
    """The summed result for each response. One that did not finish is never correct, whatever its text says."""
    graded = [term.verifier.grade(prompts, responses) for term in terms]
    rows = zip(prompts, finished, *graded, strict=True)
    return [_add_up(terms, prompt, [_mark_truncated(one, is_whole) for one in row]) for prompt, is_whole, *row in rows]


def _mark_truncated(result: VerifierResult | None, is_finished: bool) -> VerifierResult | None:
    """A truncated response is wrong. A verifier's number stays its reward; a verdict alone is then worth 0."""
    if result is None or is_finished or not result.is_correct:
        return result
    return replace(result, verdict="wrong")


def _add_up(
    terms: Sequence[WeightedVerifier], prompt: Prompt, results: Sequence[VerifierResult | None]
) -> VerifierResult:
    applicable = [(term, result) for term, result in zip(terms, results, strict=True) if result is not None]
    if not applicable:
        names = ", ".join(term.name for term in terms)
        raise RunFailed(
            f"a response to prompt {prompt.prompt_id} has no reward: no verifier applies to it ({names} returned None)",
            "return a number from at least one verifier, then continue with npo resume",
        )
    first = applicable[0][1]
    total = sum(term.weight * result.reward for term, result in applicable)
    if not abs(total) <= MAX_REWARD:  # NaN of a plug-in included
        names = ", ".join(f"{term.name} {result.reward:g}" for term, result in applicable)
        raise RunFailed(
            f"the reward of a response to prompt {prompt.prompt_id} is {total:g} ({names})",
            f"rewards are finite and at most {MAX_REWARD:g}: scale them down, then continue with npo resume",
        )
    if len(terms) == 1 and terms[0].weight == 1:
        return first
    parts = dict(first.parts)
    if len(terms) > 1:
        parts = {term.name: result.reward for term, result in applicable}
        parts |= {f"{term.name}/{name}": value for term, result in applicable for name, value in result.parts.items()}
    return VerifierResult(verdict=first.verdict, extracted=first.extracted, score=total, parts=parts)


def name_terms(verifiers: Sequence[str]) -> list[str]:
    """A unique short name for each: that of a function, with its file where another function is named alike."""
    short = [name.rpartition(":")[2] for name in verifiers]
    names = [
        f"{Path(verifier.rpartition(':')[0]).stem}.{name}" if short.count(name) > 1 and ":" in verifier else name
        for verifier, name in zip(verifiers, short, strict=True)
    ]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise NpoError(f"task.verifier names two verifiers {twice!r}", "rename one of the functions")
    return names

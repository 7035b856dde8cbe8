"""Every `extrapolation.refresh` steps: which k and a is the policy pushed by, and is it worth asking at all?

The learner and every push of the grid answer the newest failed prompts, `extrapolation.samples_per_group` times each.
Everything is a function of seed and step, so a killed run decides the same again. Its tokens, and
the forward passes that sampled them, are charged to the step that follows; those that score them afterwards are in no
count.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product

from npo_cli.config.extrapolation import ExtrapolationSettings
from npo_cli.extrapolation.choice import PushTrial, best_of, choice_of, lower_net, row_of
from npo_cli.extrapolation.in_loop import Extrapolator, select_extrapolation
from npo_cli.guides.source import compute_logprobs
from npo_cli.policy.optimizer import TrainerState
from npo_cli.scoring.quality import PromptPassCount
from npo_cli.scoring.ranking import CandidateResults, quality_k, rank_candidates
from npo_cli.scoring.variance import SignalFormula
from npo_cli.seeds import derive_seed
from npo_cli.session.policy_ratios import CandidateSample, compute_learner_ratios
from npo_cli.session.session import Session, sample_groups
from npo_cli.storage.metrics import append_event
from npo_cli.types.guides import ExtrapolationSpec, ExtrapolationState
from npo_cli.types.rollouts import Group, Prompt

ITSELF = 0
"""Number of the learner's own arm; the pushes count from 1."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Refresh:
    """What a choice came to, and what it took."""

    choice: ExtrapolationState
    best: PushTrial | None
    tokens: int
    forwards: int
    """Of sampling: the older copy reads the tokens of pushed logits too."""

    def metrics(self) -> dict[str, float]:
        """For the line of the step that follows."""
        told = {
            "extrapolate/asking": float(self.choice.is_active),
            "extrapolate/k": float(self.choice.spec.k),
            "extrapolate/a": self.choice.spec.a,
            "extrapolate/choice_tokens": float(self.tokens),
        }
        if self.best is not None:
            told |= {
                "extrapolate/quality_net": self.best.quality_net,
                "extrapolate/quality_net_low": self.best.quality_net_low,
                "extrapolate/kl_per_sequence": self.best.kl_per_sequence,
            }
        return told


def with_choice(metrics: Mapping[str, float], refresh: Refresh) -> dict[str, float]:
    """A step's metrics, charged with the choice that was made before it."""
    tokens = metrics["tokens"]
    forwards = metrics.get("forwards", tokens)
    charged = {"tokens": tokens + refresh.tokens, "forwards": forwards + refresh.forwards}
    return {**metrics, **refresh.metrics(), **charged}


def refreshed(extrapolator: Extrapolator, state: TrainerState, *, seed_name: str) -> Refresh | None:
    """A new choice where one is due after `state` and something was failed; None where the old one stands."""
    session, settings = extrapolator.session, extrapolator.session.recipe.extrapolation
    due = settings.refresh and state.step % settings.refresh == 0 and state.step >= min(settings.k_grid)
    prompts = newest_mistakes(session, state) if due else []
    if not prompts:
        return None
    label = ("refresh", seed_name, state.step)
    own = sample_groups(
        session, prompts, seed_label=label, slots=range(settings.samples_per_group), sampler_step=state.step
    )
    itself, tokens = arm_of(session, own, compute_logprobs(session, _pairs(own)), number=ITSELF), _tokens(own)
    forwards, arms = tokens, {}
    for push in pushes_in_reach(settings, step=state.step):
        ahead = extrapolator.open_sampler(push, step=state.step)
        assert ahead is not None, "a copy lies so far back"
        groups = ahead.sample_groups(prompts, label=(*label, push.name), slots=range(settings.samples_per_group))
        arms[push] = arm_of(session, groups, ahead.logprobs(_pairs(groups)), number=len(arms) + 1)
        tokens += _tokens(groups)
        forwards += ahead.forwards_per_token * _tokens(groups)
    trials = trials_of(session, itself, arms, step=state.step)
    best = best_of(trials, max_kl=settings.max_kl)
    choice = choice_of(best, standing=select_extrapolation(session.recipe, state.extrapolation_choice))
    details = {"branch": extrapolator.branch, "step": state.step, "num_prompts": len(prompts), "tokens": tokens}
    decided = {"push": choice.spec.name, "asking": choice.is_active, "trials": [row_of(trial) for trial in trials]}
    append_event(session.run, "extrapolated", details | decided)
    return Refresh(choice=choice, best=best, tokens=tokens, forwards=forwards)


def pushes_in_reach(settings: ExtrapolationSettings, *, step: int) -> list[ExtrapolationSpec]:
    """The grid, as far as there was time to move."""
    return [
        ExtrapolationSpec(space=settings.space, k=k, a=a)
        for k, a in product(settings.k_grid, settings.a_grid)
        if k <= step
    ]


def newest_mistakes(session: Session, state: TrainerState) -> list[Prompt]:
    """Distinct prompts of the pool of mistakes that the gate would let in, the newest first."""
    known = {prompt.prompt_id: prompt for prompt in session.task.train}
    gate = session.recipe.guide.inject.max_accuracy
    failed = dict.fromkeys(each.prompt_id for each in reversed(state.failed_prompts) if each.accuracy <= gate)
    return [known[name] for name in failed if name in known][: session.recipe.extrapolation.prompts]


def arm_of(
    session: Session, groups: Sequence[Group], logps: Sequence[tuple[float, ...]], *, number: int
) -> CandidateResults:
    """Outcomes prompt by prompt, and the ratios of the learner to who wrote; the learner's weights are at hand."""
    pairs = _pairs(groups)
    samples = [
        (prompt, CandidateSample.from_rollout(number, rollout, logps_T))
        for (prompt, rollout), logps_T in zip(pairs, logps, strict=True)
    ]
    outcomes = [
        PromptPassCount(
            prompt_id=group.prompt.prompt_id,
            num_samples=len(group.rollouts),
            num_correct=sum(one.verdict == "correct" and one.finished for one in group.rollouts),
        )
        for group in groups
    ]
    ratios = compute_learner_ratios(session, samples, cap=session.recipe.scoring.weight_cap)
    return CandidateResults(step=number, distance=number, pass_counts=outcomes, ratios=ratios)


def trials_of(
    session: Session, itself: CandidateResults, arms: Mapping[ExtrapolationSpec, CandidateResults], *, step: int
) -> list[PushTrial]:
    """S and KL of each push as every scoring measures them, and its Q_net."""
    recipe, settings = session.recipe, session.recipe.extrapolation
    seed = derive_seed(recipe.train.seed, "refresh", step)
    scoring = recipe.scoring.model_copy(update={"samples_per_prompt": settings.samples_per_group})
    formula = SignalFormula(settings=scoring, group_size=recipe.train.group_size)
    trials = []
    for (push, arm), found in zip(
        arms.items(), rank_candidates(itself, list(arms.values()), formula, seed=seed), strict=True
    ):
        net, low = lower_net(arm.pass_counts, itself.pass_counts, k=quality_k(formula), confidence=settings.confidence)
        trials.append(
            PushTrial(
                push=push,
                quality_net=net,
                quality_net_low=low,
                signal=found.signal,
                kl_per_sequence=found.kl_per_sequence,
            )
        )
    return trials


def _pairs(groups: Sequence[Group]) -> list[tuple]:
    return [(group.prompt, rollout) for group in groups for rollout in group.rollouts]


def _tokens(groups: Sequence[Group]) -> int:
    return sum(len(rollout.response_ids) for group in groups for rollout in group.rollouts)

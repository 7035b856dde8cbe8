"""Hand-made importance ratios and sampling results for tests of scoring and of rollback choice."""

from collections.abc import Sequence

import numpy as np

from npo_cli.config.guides import InjectSettings, ScoringSettings
from npo_cli.scoring.quality import PromptPassCount
from npo_cli.scoring.ranking import CandidateResults, rank_candidates
from npo_cli.scoring.variance import SampleRatio, SignalFormula

CAP = 10.0
FORMULA = SignalFormula(
    settings=ScoringSettings(
        samples_per_prompt=4,
        quality="pass@k",
        variance="group2",
        kl_scale=1.0,
        weight_cap=CAP,
        kl_average="sequence",
        variance_exponent=1.0,
        selection_rule="argmax",
        bootstrap_resamples=400,
    ),
    group_size=8,
    inject=InjectSettings(ratio="none"),
    clip_high=0.2,
)
"""No importance weight, so that V of group2 is cut by CAP."""


def formula(variance: str = "group2", **changes: object) -> SignalFormula:
    """FORMULA with another kind of V and other settings."""
    return FORMULA.with_variance(variance, **changes)


def make_ratio(
    log_rho_T: Sequence[float], *, prompt_id: str = "p", correct: bool = False, grads_T: Sequence[float] | None = None
) -> SampleRatio:
    """A sample from its log token ratios; every token has gradient norm 1 unless given."""
    rho_T = np.exp(np.asarray(log_rho_T, dtype=np.float64))
    grads = np.ones_like(rho_T) if grads_T is None else np.asarray(grads_T)
    return SampleRatio(
        prompt_id=prompt_id,
        num_tokens=len(rho_T),
        log_w=float(np.log(rho_T).sum()),
        sum_rho2=float((np.minimum(rho_T, CAP) ** 2).sum()),
        sum_rho2_grad=float((rho_T**2 * grads).sum()),
        sum_rho_grad=float((rho_T * grads).sum()),
        is_correct=correct,
    )


def make_drifted_ratio(log_w: float, num_tokens: int, *, prompt_id: str = "p", correct: bool = False) -> SampleRatio:
    """A sample whose drift is spread evenly over its tokens."""
    return make_ratio([log_w / num_tokens] * num_tokens, prompt_id=prompt_id, correct=correct)


def make_candidate(
    step: int, correct_P: Sequence[int], *, num_samples: int = 4, log_w: float = 0.0, num_tokens: int = 10
) -> CandidateResults:
    """A candidate whose samples all drifted alike; prompts are p00, p01, ..."""
    outcomes, ratios = [], []
    for p, num_correct in enumerate(correct_P):
        prompt_id = f"p{p:02}"
        outcomes.append(PromptPassCount(prompt_id=prompt_id, num_samples=num_samples, num_correct=num_correct))
        ratios += [
            make_drifted_ratio(log_w, num_tokens, prompt_id=prompt_id, correct=j < num_correct)
            for j in range(num_samples)
        ]
    return CandidateResults(
        candidate=f"checkpoint:{step}",
        source="checkpoint",
        step=step,
        distance=step,
        pass_counts=tuple(outcomes),
        ratios=tuple(ratios),
    )


def rank(learner: CandidateResults, results: Sequence[CandidateResults], **changes: object):
    """Scores of candidates by FORMULA with other settings, without that of "no guide"."""
    return rank_with_none(learner, results, **changes)[:-1]


def rank_with_none(learner: CandidateResults, results: Sequence[CandidateResults], *, seed: int = 0, **changes: object):
    """The same, with "no guide" as the last."""
    kind = changes.pop("variance", FORMULA.settings.variance)
    return rank_candidates(learner, results, formula(kind, **changes), seed=seed)

"""Hand-made evidence, shared by the tests of this room."""

from collections.abc import Sequence

import numpy as np

from npo_cli.scoring.evidence import CandidateResults, PromptPassCount, SignalKnobs
from npo_cli.scoring.variance import SampleRatio, VarianceKnobs

CAP = 10.0
KNOBS = VarianceKnobs(kappa=1.0, cap=CAP, average="sequence", group_size=8)
SIGNAL = SignalKnobs(
    quality="pass@k",
    k=4,
    variance="group2",
    kappa=1.0,
    cap=CAP,
    average="sequence",
    alpha=1.0,
    rule="argmax",
    group_size=8,
    resamples=400,
    seed=0,
)


def make_ratio(
    log_rho_T: Sequence[float], *, prompt_id: str = "p", correct: bool = False, grads_T: Sequence[float] | None = None
) -> SampleRatio:
    """A sample from its log token ratios; every token has gradient norm 1 unless told."""
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
    return CandidateResults(step=step, distance=step, pass_counts=tuple(outcomes), ratios=tuple(ratios))

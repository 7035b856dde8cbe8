"""Records of scoring: Q, V and S of one guide candidate."""

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True, slots=True)
class CandidateScore:
    """Q, V and S = Q/V of one guide candidate for one learner (paper section 3; algorithms sections 10-11).

    V, S and what is derived from them are None where the candidate's log-probabilities are unavailable.
    """

    candidate: str
    """Its SPEC, such as `checkpoint:60`, `self` or `model:FOLDER`."""
    source: str
    """Name of the guide source, such as `checkpoint`."""
    step: int | None
    """Step of a checkpoint of the learner's line; else None."""
    distance: int | None
    """Optimizer steps ahead of the learner, negative behind it; None where it is not on the learner's line."""
    quality: float
    quality_low: float
    quality_high: float
    quality_kind: str
    """`pass@1`, `pass@k`, or `any` (recorded responses: the share of prompts with a correct one)."""
    quality_self: float
    """The same quality of fresh samples of the learner on the candidate's prompts."""
    quality_net: float
    """quality - quality_self."""
    pass_at_1: float
    """Share of correct samples."""
    pass_at_k: float
    variance: float | None = None
    variance_low: float | None = None
    variance_high: float | None = None
    variance_kind: str
    variances: Mapping[str, float] = field(default_factory=dict)
    """Every other kind of V, from the same samples."""
    signal: float | None = None
    signal_low: float | None = None
    signal_high: float | None = None
    p_best: float | None = None
    """Share of paired bootstrap resamples in which this candidate has the largest S."""
    p_best_by_variance_kind: Mapping[str, float] = field(default_factory=dict)
    best_for_variance_kinds: tuple[str, ...] = ()
    """Kinds of V under which it has the largest S."""
    is_selected: bool = False
    selection_by_profile: Mapping[str, str] = field(default_factory=dict)
    """The candidate that each selection rule, and each other profile of V, would select."""
    num_prompts: int
    num_samples: int
    kl_per_token: float | None = None
    """KL(candidate || learner) per token in nats, the KL of the learner to itself subtracted."""
    kl_per_sequence: float | None = None
    mean_length: float | None = None
    """Tokens per response of the samples behind V."""
    ess_fraction: float | None = None
    is_unreliable: bool = False
    """V rests on a few samples (effective sample size below a tenth, or fewer than 32 samples)."""
    note: str = ""
    """A limitation of these figures, such as missing log-probabilities."""

    @property
    def samples_per_prompt(self) -> float:
        """On average."""
        return self.num_samples / self.num_prompts

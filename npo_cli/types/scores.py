"""Records of scoring: Q, V, S and the forecast of one guide candidate, and the choice."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

NO_GUIDE = "none"
"""Candidate id of "no guide": the learner's own second try, Q_net = 0, V = 1, price 0. Always a candidate."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CandidateScore:
    """Q, V and S = max(0, Q - Q_self)/V of one guide candidate for one learner, or of no guide at all.

    V, S and what is derived from them are None where the candidate's log-probabilities are unavailable.
    """

    candidate: str
    """Its SPEC, such as `checkpoint:60`, `self` or `model:FOLDER`; `none` for no guide."""
    source: str
    """Name of the guide source, such as `checkpoint`."""
    step: int | None
    """Step of a checkpoint of this run; else None."""
    distance: int | None
    """Optimizer steps ahead of the learner, negative behind it; None where it is no checkpoint of this run."""
    quality: float
    quality_low: float
    quality_high: float
    quality_kind: str
    """`pass@1`, `pass@k`, or `any` (recorded responses: the share of prompts with a correct one)."""
    quality_self: float
    """The same quality of fresh samples of the learner on the candidate's prompts."""
    quality_net: float
    """quality - quality_self."""
    quality_net_low: float | None = None
    """95 % interval of the difference, paired over prompts."""
    quality_net_high: float | None = None
    quality_net_split: float | None = None
    """Of the candidate with the largest S: Q - Q_self on prompts that did not choose it. One half of the prompts
    chooses, the other measures, averaged both ways; the choice of each half may be another candidate."""
    pass_at_1: float
    """Share of correct samples, averaged over prompts; 0 for a prompt without samples."""
    pass_at_k: float
    variance: float | None = None
    variance_low: float | None = None
    variance_high: float | None = None
    variance_kind: str
    is_distance: bool = False
    """V is a distance between policies, not a variance: `guide.inject.ratio` gives injected responses no weight."""
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
    """The choice; of `none`: no guide is worth it."""
    selection_by_profile: Mapping[str, str] = field(default_factory=dict)
    """The candidate that each selection rule, and each other profile of V, would select; `none` for no guide."""
    steps_saved: float | None = None
    """Forecast: training steps that the injected responses of the replay are worth."""
    price: float | None = None
    """Forecast: steps thrown away, guide tokens and scoring tokens, in training steps."""
    value: float | None = None
    """steps_saved / price; worth it from 1 on. None where the run has no record of the segment."""
    value_low: float | None = None
    """From the interval of quality_net alone: it does not cover the model's own error."""
    value_high: float | None = None
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


@dataclass(frozen=True, kw_only=True, slots=True)
class GuideChoice:
    """The result of a scoring."""

    chosen: str | None
    """SPEC of the selected guide; None: no guide is worth it, or none could be ranked."""
    reason: str
    """Why no guide was selected; empty if one was."""


NOT_RANKED = "no candidate has a V, so none can be ranked"


def choose_guide(scores: Sequence[CandidateScore]) -> GuideChoice:
    """The selected guide of a scoring, or why there is none."""
    selected = next((one for one in scores if one.is_selected), None)
    if selected is None or selected.candidate == NO_GUIDE:
        return GuideChoice(chosen=None, reason=NOT_RANKED if selected is None else selected.note)
    return GuideChoice(chosen=selected.candidate, reason="")

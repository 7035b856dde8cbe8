"""Records that all packages share: prompts, rollouts and their provenance, groups, checkpoints, step reports.

The policy samples *rollouts* for a *prompt*; those of one prompt at one step form a *group*. The paper's Q, V and
S are quality, variance and signal.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Verdict = Literal["correct", "wrong", "unparseable", "timeout"]
RolloutSource = Literal["own", "guide", "extrapolated", "teacher", "past"]
"""What sampled a token: the policy itself, another checkpoint of its run, the extrapolated policy, an external model,
an earlier policy of the run (replayed)."""
InjectionStatus = Literal["injected", "gate_closed", "no_guide", "off"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Message:
    """One turn of a chat prompt."""

    role: str
    content: str


IMAGE_PLACEHOLDER = "<image>"
"""Marks the place of an image in the text of a prompt."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageRef:
    """An image by reference: where its bytes are, and their digest."""

    location: str
    """A file, `FILE.parquet#COLUMN/ROW/NUMBER` (counted from 0), or any name where `data` holds the bytes."""
    sha256: str
    """Of the encoded bytes, hexadecimal."""
    width: int
    """Pixels, in upright orientation."""
    height: int
    data: bytes | None = field(default=None, repr=False, compare=False)
    """The bytes themselves where they are in no file; never written to disk."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Prompt:
    """A problem: exactly one of `text` (used as it is) and `messages` (put through the chat template)."""

    prompt_id: str
    """Unique in the task, stable between runs."""
    answer: str
    """Reference answer as text, for the verifier."""
    text: str | None = None
    messages: tuple[Message, ...] = ()
    dataset: str = ""
    """The task's data set that it is row `row` of; chooses the verifier of a mixture."""
    row: int = 0
    images: tuple[ImageRef, ...] = ()
    """In the order of their placeholders in the text or messages: one per placeholder, or none at all."""
    columns: Mapping[str, Any] = field(default_factory=dict, repr=False, compare=False)
    """Its row of the data by column, without images, for custom verifiers; never written to disk."""


@dataclass(frozen=True, kw_only=True, slots=True)
class VerifierResult:
    """Result of verifying one response: its verdict, and its reward."""

    verdict: Verdict
    extracted: str | None = None
    """The part of the response that was compared with the answer; None if there is none."""
    score: float | None = None
    """The reward, a finite number, of a verifier that returns numbers; None: it gives verdicts only."""
    parts: Mapping[str, float] = field(default_factory=dict)
    """Components of the reward by name, which are logged."""

    @property
    def is_correct(self) -> bool:
        """Whether the verdict is `correct`, which is all that guides, gates, Q and accuracy depend on."""
        return self.verdict == "correct"

    @property
    def reward(self) -> float:
        """What advantages are computed from: the score; without one 1 for a correct response, else 0."""
        return float(self.is_correct) if self.score is None else self.score


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenSpan:
    """Provenance of consecutive response tokens, start <= t < end."""

    start: int
    end: int
    source: RolloutSource = "own"
    """What sampled the tokens."""
    sampler_step: int | None = None
    """Step of the weights that sampled them; None if these are not of this run."""
    has_logprobs: bool = True
    """Whether the rollout's `behavior_logps` are known here; where not, their values are never read."""
    is_trained: bool = True
    """Whether the tokens enter the loss."""
    weight: float = 1.0
    """Factor on their policy loss, in (0, 1]."""

    @property
    def is_off_policy(self) -> bool:
        """Whether another policy than the one being trained sampled the tokens."""
        return self.source != "own"


@dataclass(frozen=True, kw_only=True, slots=True)
class Rollout:
    """One response to one prompt, with what the loss needs to know about the policies that sampled it."""

    prompt_id: str
    slot: int
    """Place in the group, from 0."""
    response_ids: tuple[int, ...]
    """Token ids, the end token included when `finished`."""
    behavior_logps: tuple[float, ...] | None
    """Log-probability of each token (nats) under the policy that sampled it; None if unavailable."""
    text: str
    finished: bool
    """Ends with an end token. A truncated response is never used as a guide."""
    sampler_step: int | None
    """Step of the weights that sampled it; None if these are not of this run."""
    source: RolloutSource = "own"
    """What sampled it; of a response with `spans`, its off-policy part."""
    spans: tuple[TokenSpan, ...] = ()
    """Provenance per token where it differs within the response: spans in order that cover it. Empty: one span."""
    mean_entropy: float | None = None
    """Mean over its tokens of the sampling distribution's entropy (nats)."""
    verdict: Verdict | None = None
    reward: float | None = None
    """What its advantage is computed from; any finite number."""
    reward_parts: Mapping[str, float] = field(default_factory=dict, hash=False)
    """Components of the reward by name, if it has any."""

    def __post_init__(self) -> None:
        """Spans, where given, cover the response without a gap."""
        edges = [edge for span in self.spans for edge in (span.start, span.end)]
        if edges and (edges[0], edges[1:-1:2], edges[-1]) != (0, edges[2::2], len(self.response_ids)):
            raise ValueError(f"spans {edges} do not cover a response of {len(self.response_ids)} tokens")

    @property
    def provenance(self) -> tuple[TokenSpan, ...]:
        """Spans that cover the response: one if a single policy sampled it and all of it is trained."""
        return self.spans or (
            TokenSpan(
                start=0,
                end=len(self.response_ids),
                source=self.source,
                sampler_step=self.sampler_step,
                has_logprobs=self.behavior_logps is not None,
            ),
        )

    @property
    def is_off_policy(self) -> bool:
        """Whether another policy sampled any of its tokens."""
        return any(span.is_off_policy for span in self.provenance)

    @property
    def is_correct(self) -> bool:
        """Verified correct and complete."""
        return self.verdict == "correct" and self.finished

    @property
    def num_tokens(self) -> int:
        """Response tokens."""
        return len(self.response_ids)

    @property
    def num_on_policy_tokens(self) -> int:
        """Response tokens that the policy itself sampled."""
        return sum(span.end - span.start for span in self.provenance if not span.is_off_policy)

    @property
    def guide_step(self) -> int | None:
        """Step of the guide checkpoint that sampled it; None of any other source."""
        return self.sampler_step if self.source == "guide" else None


@dataclass(frozen=True, kw_only=True, slots=True)
class PromptSamples:
    """What one policy sampled for one prompt: counts, and the rollouts that were kept (all but in a guide cache)."""

    prompt_id: str
    num_sampled: int
    """Responses sampled."""
    num_correct: int
    """How many of them were verified correct: an estimate of p_g(x), the constant that token ratios ignore."""
    num_tokens: int
    """Tokens generated for them; responses that were there before cost none."""
    rollouts: tuple[Rollout, ...]
    """A guide cache keeps correct ones, best first; with guide.cache.keep=all wrong ones where none is correct."""
    images: tuple[ImageRef, ...] = ()
    """What the sampler was shown."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Group:
    """All rollouts of one prompt at one step."""

    prompt: Prompt
    rollouts: tuple[Rollout, ...]
    injection_status: InjectionStatus = "off"
    """Whether guide responses were injected, or why not; `off` without a guide."""
    on_policy_accuracy: float | None = None
    """Accuracy of the on-policy rollouts before injection."""
    unused_guide_rollouts: tuple[Rollout, ...] = ()
    """Guide responses sampled at this step that were not injected."""

    @property
    def on_policy(self) -> "Group":
        """The on-policy rollouts alone, before injection."""
        return Group(prompt=self.prompt, rollouts=tuple(one for one in self.rollouts if not one.is_off_policy))

    @property
    def samples(self) -> PromptSamples:
        """The verified group as samples of its prompt, all of them kept."""
        return PromptSamples(
            prompt_id=self.prompt.prompt_id,
            num_sampled=len(self.rollouts),
            num_correct=self.num_correct,
            num_tokens=self.num_tokens,
            rollouts=self.rollouts,
            images=self.prompt.images,
        )

    @property
    def num_tokens(self) -> int:
        """Response tokens of all rollouts."""
        return sum(rollout.num_tokens for rollout in self.rollouts)

    @property
    def num_correct(self) -> int:
        """Rollouts verified correct."""
        assert all(rollout.verdict is not None for rollout in self.rollouts), "the group is not verified yet"
        return sum(rollout.is_correct for rollout in self.rollouts)

    @property
    def accuracy(self) -> float:
        """Fraction of the rollouts verified correct; the group must not be empty."""
        return self.num_correct / len(self.rollouts)


@dataclass(frozen=True, kw_only=True, slots=True)
class GroupOutcome:
    """A recorded group without its responses: those of a whole run may not fit into memory."""

    prompt_id: str
    step: int
    num_rollouts: int
    """On-policy rollouts."""
    num_correct: int
    """How many of them were verified correct."""
    has_guide: bool
    """Whether another policy sampled any of its tokens."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Segment:
    """A stretch of training on one branch: the run's lineage is the list of these."""

    branch: str
    parent: str | None
    """Branch this one left; None for the first."""
    fork_step: int
    """Step of the parent it started from (0 for the first branch)."""
    guide_cache: str | None
    """Name of the guide cache mixed in, or None for plain GRPO."""
    guide_until: int | None
    """Last step at which the guide is mixed in."""
    teacher: tuple[str, int] | None = None
    """Branch (the parent, or a scout) and step of the checkpoint that is the teacher of the branch's dense target; None
    without one of this run."""
    merge_weight: float | None = None
    """w of a merged start: the branch starts from theta + w (theta_plus - theta_minus), theta being the checkpoint that
    it was forked from; None: from theta itself."""
    merge_plus: tuple[str, int] | None = None
    """Branch and step of theta_plus; None without a merged start."""
    merge_minus: tuple[str, int] | None = None
    """Branch and step of theta_minus."""
    is_scout: bool = False
    """A disposable scout: it makes guides and a teacher, and is no result of the run."""
    removed: tuple[str, ...] = ()
    """Not empty: the branch ends here (`npo rm`); folders that were deleted, relative to the run directory."""

    @property
    def merged_checkpoints(self) -> tuple[tuple[str, int], ...]:
        """Branch and step of theta_plus and theta_minus of a merged start; none without one."""
        return tuple((branch, step) for branch, step in filter(None, (self.merge_plus, self.merge_minus)))

    @property
    def merge_spec(self) -> str:
        """What `--merge` was given, such as `main:80,minus=main:40,weight=0.25`; empty without a merged start."""
        if not self.merged_checkpoints:
            return ""
        plus, minus = (f"{branch}:{step}" for branch, step in self.merged_checkpoints)
        return f"{plus},minus={minus},weight={self.merge_weight!r}"


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointEntry:
    """One line of the index."""

    branch: str
    step: int
    parent: str | None
    """`branch:step` of the checkpoint it grew from."""
    tier: Literal["full", "weights"]
    size_bytes: int
    complete: bool
    digest: str | None
    """sha256 over the weights, hexadecimal."""
    path: str
    """Relative to the run directory."""
    reward: float | None = None
    """Mean on-policy reward of the batch at that step."""
    entropy: float | None = None
    """Mean token entropy at that step (nats)."""
    accuracy: float | None = None
    """Held-out accuracy, from the evaluation with the most samples."""
    quality: float | None = None
    variance: float | None = None
    signal: float | None = None
    learner_step: int | None = None
    """Step of the learner that quality, variance and signal refer to (the newest score)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EvalReport:
    """Held-out accuracy of one checkpoint, k = num_samples a prompt, 95 % intervals from a bootstrap over prompts."""

    branch: str
    step: int
    num_prompts: int
    num_samples: int
    accuracy: float
    """avg@k: mean over prompts of the share correct."""
    accuracy_low: float
    accuracy_high: float
    pass_at_k: float
    pass_at_k_low: float
    pass_at_k_high: float
    mean_length: float
    truncated_fraction: float
    """Share of responses that hit the length limit."""
    num_tokens: int


@dataclass(frozen=True, kw_only=True, slots=True)
class StepReport:
    """What one training step measured. `metrics` is a function of the seed alone; `timings` is not."""

    branch: str
    step: int
    metrics: Mapping[str, float]
    timings: Mapping[str, float]

    @property
    def distinct_accuracy(self) -> float | None:
        """Accuracy of the on-policy rollouts; None where it equals the mean reward, as verdicts alone make it."""
        accuracy = self.metrics.get("accuracy")
        return None if accuracy == self.metrics.get("reward") else accuracy


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointSaved:
    """A checkpoint that training saved: a folder that `from_pretrained` opens."""

    branch: str
    step: int
    path: str
    """Relative to the run directory."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Progress:
    """How far a long stage is; drawn as a bar on a terminal, as a line now and then elsewhere."""

    description: str
    done: int
    total: int
    note: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Notice:
    """Something a person should read once: what was restored, what was saved, what looks odd."""

    message: str
    level: Literal["info", "warning"] = "info"


TrainingRecord = StepReport | EvalReport | CheckpointSaved | Notice
"""What training yields."""

"""Records of off-policy rollouts: guide caches, and the run's own past successes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

SCOUT_SOURCE = "scout"
"""Name of the guide source whose options are branch and step of a disposable scout."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceSpec:
    """Which guide source, with its options: the parsed form of `--source SPEC`, and the provenance in guide.json."""

    name: str
    """Name in the registry of guide sources, such as `checkpoint`."""
    options: Mapping[str, str | int | float] = field(default_factory=dict, hash=False)
    """Options of that source by name, such as {"step": 100}; an optional one that was not given is absent."""
    text: str
    """The SPEC that gives this again, such as `checkpoint:100`; for `--source` and for tables, never parsed here."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GuideCacheInfo:
    """Where a guide cache came from and whom it may serve."""

    name: str
    run_id: str
    branch: str
    """Branch of the learner; a checkpoint that is the guide is found on the same line of descent."""
    learner_step: int
    """Step of the learner; the cache is for prompts visited in steps (learner_step, learner_step + num_steps]."""
    source: SourceSpec
    """Provenance: the guide source with all its options."""
    guide_step: int | None
    """Step of the guide's weights; None where these are not of this run."""
    guide_digest: str
    """Digest of the guide's weights, or of the file that the traces were read from; empty for a server and the past."""
    num_steps: int
    tokenizer_digest: str
    sampling: str
    """samples_per_prompt, samples_per_round and select of guide.cache, such as `8 by 1, random`."""
    num_prompts: int
    """Distinct prompts sampled."""
    num_prompts_with_rollouts: int
    """Prompts with a rollout."""
    num_samples: int
    num_tokens: int
    """Tokens generated to make the cache."""
    complete: bool = False
    has_logps: bool = True
    """Whether every rollout has behavior log-probabilities; without them only the ratios `proximal`, `unit` and `none`
    can be used."""
    num_rollouts: int = 0
    external_tokens: int = 0
    """Tokens of rollouts that were not generated here (a file of traces)."""
    guide_training_tokens: int = 0
    """Tokens that training the guide had cost in another run."""
    max_accuracy: float | None = None
    """guide.inject.max_accuracy by which prompts were selected from the record; None: prompts of any accuracy."""
    older_step: int | None = None
    """Of an extrapolated guide the step of its older copy."""
    lazy_settings: Mapping[str, Any] = field(default_factory=dict, hash=False)
    """Section guide.cache by which a replay samples prompts while it trains; empty: the cache was filled before."""

    @property
    def scout(self) -> tuple[str, int] | None:
        """Branch and step of the disposable scout that was sampled; None of any other source."""
        if self.source.name != SCOUT_SOURCE:
            return None
        return str(self.source.options["branch"]), int(self.source.options["step"])


@dataclass(frozen=True, kw_only=True, slots=True)
class Success:
    """A correct response of the run's own past."""

    response_ids: tuple[int, ...]
    behavior_logps: tuple[float, ...]
    """Under the weights that wrote it, from the trainer's forward pass of that step."""
    text: str
    step: int
    """Step of the weights that wrote it."""
    reward: float


@dataclass(frozen=True, kw_only=True, slots=True)
class ReplayBuffer:
    """ExGRPO's memory, part of the training state (algorithms, section 6)."""

    is_collecting: bool = False
    """A batch had passed the success rate from which on successes are collected."""
    successes: Mapping[str, tuple[Success, ...]] = field(default_factory=dict)
    """By prompt id, oldest first."""
    num_correct: Mapping[str, int] = field(default_factory=dict)
    """Newest number of correct rollouts in the group of each prompt that has successes."""
    retired_epochs: Mapping[str, int] = field(default_factory=dict)
    """Prompt id to the epoch in which every slot of its group was correct."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ReplayRequest:
    """What `npo replay` is to do: score guide candidates, sample the chosen one, and train with it."""

    at: int
    """Step of the learner."""
    branch: str
    """Branch of the learner."""
    sources: Sequence[SourceSpec] | None
    """Candidates; None: every later checkpoint."""
    name: str
    """Of the guide cache and of the new branch."""
    steps: int | None
    """Steps with the guide; None: by default."""
    until: int | None
    """The last step to train; None: all that the settings name."""
    overrides: Sequence[str]


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoutRequest:
    """What `npo scout` is to do: train a disposable scout."""

    at: int
    """Step that it starts from."""
    branch: str
    """Branch of that step."""
    steps: int | None = None
    """Its length at most; None: `scout.num_steps`."""
    name: str
    """Of the scout's branch."""
    overrides: Sequence[str] = ()
    """`scout.*`, and settings that may change at a fork."""
    undo: Mapping[str, Any] = field(default_factory=dict, hash=False)
    """Settings of the branch, by dotted key, that the scout does not inherit: those of an AutoNPO window."""

    def format_command(self, run: str, *, name: str = "NEW") -> str:
        """The command that trains it in the run directory, already quoted, under another name."""
        return f"npo scout {run} --branch {self.branch} --at {self.at} --name {name}"

"""The base class of guide sources, the SPEC grammar, and what sources share. Imports nothing heavy.

A guide source is one class in one file: class attributes describe it, `parse` reads its options from the command line,
`validate` checks them against a run, `open` loads what it needs, `sample` and `logprobs` give verified responses.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Literal

from npo_cli.errors import NpoError, RunFailed
from npo_cli.registry import GUIDE_SOURCES
from npo_cli.types.guides import SourceSpec
from npo_cli.types.rollouts import Group, Prompt, Rollout

if TYPE_CHECKING:
    from npo_cli.config.guides import GuideSettings
    from npo_cli.config.recipe import Recipe
    from npo_cli.guides.dense_target import TeacherModel
    from npo_cli.policy.extrapolated import ExtrapolatedPolicy
    from npo_cli.policy.model import Policy
    from npo_cli.session.learner import Learner
    from npo_cli.session.session import Session
    from npo_cli.storage.layout import RunDir
    from npo_cli.tasks.task import Task

OptionValue = str | int | float
Pairs = Sequence[tuple[Prompt, Rollout]]


@dataclass(frozen=True, kw_only=True, slots=True)
class ReplayTarget:
    """The learner that a guide is for, and the segment of training in which it will be replayed."""

    run: RunDir
    learner: Learner
    steps: int | None = None
    """Length of the segment; None: guide.replay.num_steps, else guide.cache.coverage of the guide's steps ahead, else
    the rest of the run."""
    purpose: Literal["guide", "score"] = "guide"
    """Part of the sampling seeds: the samples that a source is chosen by are not those that are learned from."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PromptResponses:
    """The responses of a source to one prompt."""

    prompt: Prompt
    rollouts: tuple[Rollout, ...]
    duplicates: tuple[Rollout, ...] = ()
    """Responses equal to one of `rollouts`: counted, never cached."""
    num_tokens: int = 0
    """Tokens generated for these responses by this command."""

    @property
    def correct_rollouts(self) -> list[Rollout]:
        """Verified-correct and finished."""
        return filter_correct(self.rollouts)

    @property
    def num_sampled(self) -> int:
        """Responses, duplicates included."""
        return len(self.rollouts) + len(self.duplicates)

    @property
    def num_correct(self) -> int:
        """Correct responses, duplicates included."""
        return len(self.correct_rollouts) + len(filter_correct(self.duplicates))


class GuideSource(ABC):
    """A source of guide responses. Life cycle: parse, construct, validate, open, sample and logprobs, close."""

    name: ClassVar[str]
    usage: ClassVar[str]
    """The form of its SPEC, such as `checkpoint:STEP`."""
    example: ClassVar[str]
    """A SPEC that parses."""
    summary: ClassVar[str]
    """What it is, in one line."""
    options: ClassVar[Mapping[str, str]] = {}
    """Option name to its meaning."""
    optional: ClassVar[frozenset[str]] = frozenset()
    """Options that may be left out."""

    is_fresh: ClassVar[bool] = True
    """Responses are generated on request. False: they were recorded, as many per prompt as there happen to be."""
    is_external: ClassVar[bool] = False
    """Recorded outside this run: their tokens are counted as external."""
    differs_by_seed: ClassVar[bool] = False
    """Its SPEC names a file or run, another one for each seed of a method: comparisons show only its name."""
    has_logprobs: ClassVar[bool | None] = True
    """Whether the log-probabilities of its responses under their behavior policy are available; None: it depends."""
    has_distribution: ClassVar[bool] = False
    """Whether it is a model whose distribution at any token can be computed: it can be the teacher of a dense
    target."""
    is_of_run: ClassVar[bool] = False
    """A checkpoint of the learner's own run."""
    uses_engine: bool = False
    """Samples with the engine of the learner's session; otherwise that session starts no inference server."""
    extrapolates_weights: bool = False
    """That engine must accept extrapolated LoRA weights."""
    forwards_per_token: int = 1
    """Forward passes per sampled token."""

    def __init_subclass__(cls) -> None:
        """Raise TypeError for a source with a name that does not describe itself."""
        super().__init_subclass__()
        missing = [word for word in ("usage", "example", "summary") if hasattr(cls, "name") and not hasattr(cls, word)]
        if missing:
            raise TypeError(f"{cls.__name__} has no {', '.join(missing)}")

    def __init__(self, spec: SourceSpec, target: ReplayTarget) -> None:
        self.spec, self.target = spec, target
        self.session: Session
        """Holds the learner's weights; set by `open`."""

    # Before a model is loaded

    @classmethod
    def parse(cls, argument: str) -> dict[str, OptionValue]:
        """Options from what follows `NAME:` in a SPEC; empty where nothing does. Raises NpoError."""
        if argument:
            raise NpoError(f"source {cls.name!r} takes no argument, got {argument!r}", f"use --source {cls.name}")
        return {}

    @classmethod
    def format(cls, options: Mapping[str, OptionValue]) -> str:
        """The argument that parses to these options."""
        return ""

    def validate(self) -> None:  # noqa: B027 - nothing to check by default
        """Check the options against the run without loading a model; fill in options left out. Raises NpoError."""

    @property
    def guide_step(self) -> int | None:
        """Step of the guide where it is a checkpoint of the learner's line."""
        return None

    @property
    def place(self) -> tuple[str, int] | None:
        """Branch and step of the guide where it is a checkpoint of this run."""
        return None if self.guide_step is None else (self.target.learner.branch, self.guide_step)

    @property
    def default_label(self) -> str:
        """Part of the default name of a guide cache."""
        return self.name

    @property
    def steps_ahead(self) -> int:
        """Training steps that the guide is ahead of the learner; 0 or less where that means nothing."""
        return 0 if self.guide_step is None else self.guide_step - self.target.learner.step

    @property
    def num_steps(self) -> int:
        """Length of the segment in which the guide is used."""
        learner, ahead = self.target.learner, self.steps_ahead
        guide = learner.recipe.guide
        rest = learner.recipe.train.num_steps - learner.step
        by_default = guide.cache.count_covered(ahead) if ahead > 0 else rest
        num_steps = self.target.steps or guide.replay.num_steps or by_default
        if num_steps < 1:
            raise NpoError(f"step {learner.step} is the run's last: there is no step to replay", "add --steps N")
        return num_steps

    def fingerprint(self) -> str:
        """Digest of what lies behind the SPEC, as far as it can be had without loading a model; else empty."""
        return ""

    def session_recipe(self) -> Recipe:
        """Recipe of the learner's session in which this source is opened."""
        recipe = self.target.learner.recipe
        if self.uses_engine:
            return recipe
        return recipe.model_copy(update={"engine": recipe.engine.model_copy(update={"kind": "transformers"})})

    def check(self, task: Task, policy: Policy) -> Sequence[str]:
        """Open and close, to refuse early a source that cannot be sampled; returns its warnings."""
        with open_source(self, task=task, policy=policy):
            return self.warnings()

    # At work

    def open(self, session: Session) -> None:
        """Load what is needed. `session` holds the learner's weights; extend this, and call it first."""
        self.session = session

    @abstractmethod
    def sample(self, prompts: Sequence[Prompt]) -> list[PromptResponses]:
        """Verified responses to each prompt, in order; a function of the prompts and the run's seed."""

    def logprobs(self, pairs: Pairs) -> list[tuple[float, ...] | None]:
        """Log-probability (nats) of each token under its behavior policy; None where unavailable."""
        return [rollout.behavior_logps for _, rollout in pairs]

    def learner_logprob(self, pairs: Pairs) -> list[float]:
        """Mean log-probability per token (nats) of each response under the learner."""
        return compute_mean_logprobs(self.session, pairs)

    def load_teacher(self) -> TeacherModel:
        """The model itself, if it `has_distribution`, without a session: the teacher of a dense target."""
        raise NotImplementedError(f"{self.name} has no distribution per token")

    def warnings(self) -> list[str]:
        """Warnings about the source or its responses so far."""
        return []

    def close(self) -> None:  # noqa: B027 - nothing to release by default
        """Release what `open` loaded; the session belongs to the caller."""

    # Provenance, for guide.json

    @property
    def digest(self) -> str:
        """Digest of the guide's weights or file; empty where there is none."""
        return self.fingerprint()

    @property
    def older_step(self) -> int | None:
        """Step of the older checkpoint of an extrapolated guide."""
        return None

    @property
    def guide_training_tokens(self) -> int:
        """Tokens that training the guide took in another run."""
        return 0


@contextmanager
def open_source(source: GuideSource, *, task: Task, policy: Policy) -> Iterator[Session]:
    """Open a validated source in a session of its own; `policy` holds the learner's weights."""
    from npo_cli.session.session import build_session
    from npo_cli.session.startup import measure_startup

    session = build_session(
        source.target.run,
        source.session_recipe(),
        task=task,
        policy=policy,
        extrapolates_weights=source.extrapolates_weights,
    )
    with closing(session), closing(source):
        with measure_startup("load", "the guide"):
            source.open(session)
        yield session


def sample_source(source: GuideSource, prompts: Sequence[Prompt]) -> list[PromptResponses]:
    """Responses of an open source; raises RunFailed unless it returns one entry per prompt, in order."""
    responses = source.sample(prompts)
    given, wanted = [entry.prompt.prompt_id for entry in responses], [prompt.prompt_id for prompt in prompts]
    if given != wanted:
        order = " in another order" if len(given) == len(wanted) else ""
        raise RunFailed(
            f"--source {source.spec.text} returned responses to {len(given)} prompts, not to the {len(wanted)} "
            f"requested{order}",
            "fix the source: npo docs how-to/add-a-guide-source",
        )
    return responses


MIN_SAMPLES_FOR_YIELD = 32
"""Samples in the last rounds below which their yield is not judged."""
SampleFunction = Callable[[Sequence[Prompt], range], Sequence[PromptResponses]]
"""New responses to each prompt, one per slot, the unwanted ones with the verdict `wrong`."""


def sample_in_rounds(
    settings: GuideSettings,
    prompts: Sequence[Prompt],
    draw: SampleFunction,
    *,
    prior_rollouts: Mapping[str, Sequence[Rollout]] | None = None,
) -> list[PromptResponses]:
    """Up to `samples_per_prompt` samples per prompt, `samples_per_round` at a time, until a prompt is solved.

    Ends early where the yield of the last rounds is below guide.cache.min_yield. With `draws_all` solved prompts are
    sampled further. `prior_rollouts`, by prompt id, count as the first samples and cost no tokens. Raises ValueError
    where `draw` leaves out a slot, which would be drawn again without end.
    """
    cache = settings.cache
    per_round = cache.draws_per_round
    responses = {
        prompt.prompt_id: PromptResponses(
            prompt=prompt, rollouts=tuple((prior_rollouts or {}).get(prompt.prompt_id, ()))
        )
        for prompt in prompts
    }
    rounds: list[tuple[int, int]] = []
    while True:
        unfinished = [
            entry
            for entry in responses.values()
            if len(entry.rollouts) < cache.samples_per_prompt and (cache.draws_all or not entry.correct_rollouts)
        ]
        if not unfinished or is_yield_low(rounds, cache.min_yield):
            return list(responses.values())
        # Prompts with the fewest responses are sampled together, so that no slot is sampled twice.
        first = min(len(entry.rollouts) for entry in unfinished)
        slots = range(first, min(first + per_round, cache.samples_per_prompt))
        batch = [entry.prompt for entry in unfinished if len(entry.rollouts) == first]
        drawn = draw(batch, slots)
        if any(len(new.rollouts) != len(slots) for new in drawn):
            raise ValueError("a guide source draws one rollout per prompt and slot; those it does not want are wrong")
        rounds.append((sum(new.num_sampled for new in drawn), sum(new.num_correct for new in drawn)))
        for new in drawn:
            before = responses[new.prompt.prompt_id]
            responses[new.prompt.prompt_id] = replace(
                before, rollouts=before.rollouts + new.rollouts, num_tokens=before.num_tokens + new.num_tokens
            )


def is_yield_low(rounds: Sequence[tuple[int, int]], min_yield: float) -> bool:
    """Whether in the last rounds, as few as have 32 samples, correct / samples is below `min_yield`.

    `rounds`: pairs (samples, correct ones). 40 samples with 2 correct: 0.05. False before there are 32 samples.
    """
    num_sampled = num_correct = 0
    for sampled, correct in reversed(rounds):
        num_sampled, num_correct = num_sampled + sampled, num_correct + correct
        if num_sampled >= MIN_SAMPLES_FOR_YIELD:
            return num_correct < min_yield * num_sampled
    return False


def responses_per_prompt(groups: Sequence[Group]) -> list[PromptResponses]:
    """Sampled groups, with the tokens that sampling them took."""
    return [
        PromptResponses(
            prompt=group.prompt,
            rollouts=group.rollouts,
            num_tokens=group.num_tokens,
        )
        for group in groups
    ]


def filter_correct(rollouts: Sequence[Rollout]) -> list[Rollout]:
    """Verified-correct and finished."""
    return [rollout for rollout in rollouts if rollout.is_correct]


def dedupe_rollouts(prompt: Prompt, rollouts: Sequence[Rollout]) -> PromptResponses:
    """Recorded responses to a prompt; of several with equal tokens the first is used."""
    first: dict[tuple[int, ...], Rollout] = {}
    repeats = []
    for rollout in rollouts:
        if rollout.response_ids in first:
            repeats.append(rollout)
        else:
            first[rollout.response_ids] = rollout
    return PromptResponses(prompt=prompt, rollouts=tuple(first.values()), duplicates=tuple(repeats))


def compute_logprobs(
    session: Session,
    pairs: Pairs,
    *,
    temperature: float | None = None,
    policy: Policy | ExtrapolatedPolicy | None = None,
) -> list[tuple[float, ...]]:
    """Log-probability (nats) of each token, from the trainer's forward pass; default: the session's policy."""
    from npo_cli.session.logprob_pass import run_logprob_pass

    policy = policy or session.policy
    rows = [policy.row(prompt, rollout.response_ids) for prompt, rollout in pairs]
    scored = run_logprob_pass(policy, session.recipe, rows, temperature=temperature)
    return [tuple(scores.logps_T.tolist()) for scores in scored]


def read_or_compute_logprobs(
    session: Session, pairs: Pairs, *, temperature: float | None = None
) -> list[tuple[float, ...]]:
    """The same of responses that the session's engine sampled with the policy's weights, at this temperature: with
    engine.reuse_logprobs as the engine gave them."""
    known = [rollout.behavior_logps for _, rollout in pairs]
    if session.recipe.reuses_logprobs and None not in known:
        return [logps for logps in known if logps is not None]
    return compute_logprobs(session, pairs, temperature=temperature)


def compute_mean_logprobs(session: Session, pairs: Pairs, *, policy: Policy | None = None) -> list[float]:
    """Mean log-probability per token (nats) of each response."""
    return [sum(logps_T) / len(logps_T) for logps_T in compute_logprobs(session, pairs, policy=policy)]


# The grammar of --source SPEC: NAME[:ARGUMENT], or a bare STEP for checkpoint:STEP


def parse_spec(text: str) -> SourceSpec:
    """The source and options of a SPEC such as `100`, `self`, `run:DIR@100` or `extrapolated:logits,k=20,a=1`."""
    name, _, argument = ("checkpoint", "", text) if text.isdecimal() else text.partition(":")
    return make_spec(name, GUIDE_SOURCES.get(name).parse(argument))


def make_spec(name: str, options: Mapping[str, OptionValue]) -> SourceSpec:
    """A source with its options by name; NpoError if an option is unknown or missing."""
    source: type[GuideSource] = GUIDE_SOURCES.get(name)
    unknown = [option for option in options if option not in source.options]
    if unknown:
        known = ", ".join(source.options) or "none"
        raise NpoError(f"source {name!r} has no option {', '.join(unknown)} (options: {known})", f"use {source.usage}")
    missing = [option for option in source.options if option not in options and option not in source.optional]
    if missing:
        raise NpoError(f"source {name!r} needs {', '.join(missing)}", f"use {source.usage}, such as {source.example}")
    argument = source.format(options)
    return SourceSpec(name=name, options=dict(options), text=f"{name}:{argument}" if argument else name)


def create_source(spec: SourceSpec, target: ReplayTarget) -> GuideSource:
    """The source for a learner, validated against the run; its `spec` then has every option."""
    source: GuideSource = GUIDE_SOURCES.get(spec.name)(spec, target)
    source.validate()
    return source


def describe_sources() -> str:
    """One line per registered source: its usage and summary; of a plug-in that cannot be used, what is wrong."""
    lines = {}
    for name in GUIDE_SOURCES.names():
        try:
            source: type[GuideSource] = GUIDE_SOURCES.get(name)
            lines[source.usage] = source.summary
        except NpoError as error:
            lines[name] = f"not available: {error.message}"
    width = max(map(len, lines))
    return "\n".join(f"{usage:<{width}}  {summary}" for usage, summary in lines.items())

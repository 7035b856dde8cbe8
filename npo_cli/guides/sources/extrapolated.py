"""The learner extrapolated along its own update direction: in its logits, or in its weights. Needs no later checkpoint.

    logits:  pi_t (pi_t / pi_{t-k})^a, normalised per token; two models, two forward passes per token
    weights: theta_t + a (theta_t - theta_{t-k})

The older copy is a checkpoint of the line. Training saves one every `train.save_every` steps, so it is the newest of
these that lies at least k steps back; if its lag is more than k, a is scaled by k / lag: the extrapolation is always by
a k steps.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, ClassVar, Literal

from npo_cli.errors import NpoError, quote_path
from npo_cli.guides.source import (
    GuideSource,
    OptionValue,
    Pairs,
    PromptResponses,
    ReplayTarget,
    compute_logprobs,
    responses_per_prompt,
    sample_in_rounds,
)
from npo_cli.types.guides import SourceSpec
from npo_cli.types.rollouts import Group, Prompt

if TYPE_CHECKING:
    from npo_cli.policy.extrapolated import ExtrapolatedPolicy
    from npo_cli.policy.model import Policy
    from npo_cli.session.session import Session
    from npo_cli.storage.checkpoints import Checkpoint
    from npo_cli.storage.layout import RunDir

SPACES = ("logits", "weights")


@dataclass(frozen=True, kw_only=True, slots=True)
class Extrapolation:
    """What is extrapolated: the policy of a step, away from an older checkpoint."""

    space: Literal["logits", "weights"]
    k: int
    """Distance of the older copy, in steps."""
    a: float
    """Extrapolation factor, in multiples of the update of k steps."""
    step: int
    """Step of the policy."""
    older_checkpoint: Checkpoint

    @property
    def lag(self) -> int:
        """Steps between the two: k, or more where no checkpoint lies exactly there."""
        return self.step - self.older_checkpoint.step

    @property
    def strength(self) -> float:
        """a k / lag."""
        return self.a * self.k / self.lag

    @property
    def forwards_per_token(self) -> int:
        """Forward passes per sampled token."""
        return 2 if self.space == "logits" else 1


def find_older_checkpoint(run: RunDir, branch: str, *, k: int, step: int, every: int) -> Checkpoint | None:
    """The newest checkpoint of the line at least k steps back; None before step k.

    Only multiples of `every` count, so that it does not depend on where a run was stopped and resumed.
    """
    from npo_cli.storage.checkpoints import list_ancestry_checkpoints

    if step < k:
        return None
    older = [
        found for found in list_ancestry_checkpoints(run, branch) if found.step <= step - k and found.step % every == 0
    ]
    newest = max(older, key=lambda found: found.step, default=None)
    if newest is None or step - newest.step >= 2 * k:
        raise NpoError(
            f"{run.root} has no checkpoint of {branch} in steps {max(0, step - 2 * k + 1)} to {step - k}, "
            f"where the older copy of k={k} belongs",
            f"train with train.save_every at most {k} and a higher train.keep_weights_only, or choose another k: "
            f"npo index {quote_path(run.root)}",
        )
    return newest


class ExtrapolatedSource(GuideSource):
    """Samples of the extrapolated learner; between them the session's policy has the learner's weights."""

    name = "extrapolated"
    usage = "extrapolated:SPACE,k=K,a=A"
    example = "extrapolated:logits,k=20,a=1"
    summary = "the learner along its own update direction"
    has_distribution = True
    is_of_run = True
    options: ClassVar[Mapping[str, str]] = {
        "space": "what is extrapolated: logits (two forward passes per token) or weights",
        "k": "distance of the older checkpoint in steps",
        "a": "extrapolation factor, in multiples of the update of k steps",
    }

    def __init__(self, spec: SourceSpec, target: ReplayTarget) -> None:
        super().__init__(spec, target)
        # Any engine samples from extrapolated weights; logits have an engine of their own, of two models.
        self.uses_engine = self.extrapolates_weights = spec.options["space"] == "weights"
        self.forwards_per_token = 1 if self.uses_engine else 2

    @classmethod
    def parse(cls, argument: str) -> dict[str, OptionValue]:
        """`SPACE,k=K,a=A`."""
        space, *rest = argument.split(",")
        options: dict[str, OptionValue] = {"space": space} if space else {}
        for part in rest:
            key, equals, value = part.partition("=")
            convert = {"k": int, "a": float}.get(key.strip(), str)
            try:
                options[key.strip()] = convert(value)
            except ValueError as error:
                raise _wrong_value(argument) from error
            if not equals:
                raise _wrong_value(argument)
        space, k, a = (options.get(name) for name in cls.options)
        known = {"space", "k", "a"} >= options.keys()
        if known and (
            (space is not None and space not in SPACES)
            or (k is not None and int(k) < 1)
            or (a is not None and not 0 < float(a) < float("inf"))
        ):
            raise _wrong_value(argument)
        return options

    @classmethod
    def format(cls, options: Mapping[str, OptionValue]) -> str:
        """`SPACE,k=K,a=A`."""
        return f"{options['space']},k={options['k']},a={options['a']:g}"

    def validate(self) -> None:
        """There is an older checkpoint."""
        run, learner, options = self.target.run, self.target.learner, self.spec.options
        k, every = int(options["k"]), learner.recipe.train.save_every
        older = find_older_checkpoint(run, learner.branch, k=k, step=learner.step, every=every)
        if older is None:
            raise NpoError(
                f"step {learner.step} has no checkpoint {k} steps back",
                "choose a later learner with --at, or a smaller k",
            )
        space = "weights" if self.extrapolates_weights else "logits"
        self.extrapolation = Extrapolation(
            space=space, k=k, a=float(options["a"]), step=learner.step, older_checkpoint=older
        )

    def fingerprint(self) -> str:
        """Digest of the older checkpoint."""
        return self.extrapolation.older_checkpoint.digest

    @property
    def older_step(self) -> int | None:
        """Step of the older copy."""
        return self.extrapolation.older_checkpoint.step

    def load_teacher(self) -> Policy | ExtrapolatedPolicy:
        """The learner extrapolated once, at its step: a model with these weights, or the two models of the logits."""
        from npo_cli.policy.extrapolated import ExtrapolatedPolicy, replace_by_extrapolated
        from npo_cli.policy.model import load_policy
        from npo_cli.storage.checkpoints import verify_checkpoint

        learner, used = self.target.learner, self.extrapolation
        for checkpoint in (learner.checkpoint, used.older_checkpoint):
            verify_checkpoint(checkpoint)
        newer = load_policy(learner.recipe.model, learner.checkpoint.path)
        if used.space == "weights":
            replace_by_extrapolated(newer, used.older_checkpoint.path, strength=used.strength)
            return newer
        older = load_policy(learner.recipe.model, used.older_checkpoint.path)
        return ExtrapolatedPolicy(newer=newer, older=older, strength=used.strength)

    def open(self, session: Session) -> None:
        """Load the older copy."""
        super().open(session)
        older = load_older_policy(session, self.extrapolation)
        self.sampler = open_extrapolated_sampler(session, self.extrapolation, older=older)

    def sample(self, prompts: Sequence[Prompt]) -> list[PromptResponses]:
        """In rounds, until a prompt is solved or all samples are drawn."""
        settings, used = self.session.recipe.guide, self.extrapolation
        label = (self.target.purpose, self.name, f"{used.space}:{used.k}:{used.a:g}", used.step)

        def draw(batch: Sequence[Prompt], slots: range) -> list[PromptResponses]:
            groups = self.sampler.sample_groups(batch, label=label, slots=slots, temperature=settings.cache.temperature)
            return responses_per_prompt(groups)

        return sample_in_rounds(settings, prompts, draw)

    def logprobs(self, pairs: Pairs) -> list[tuple[float, ...] | None]:
        """From the trainer's forward pass of the extrapolated policy."""
        return [*self.sampler.logprobs(pairs, temperature=self.session.recipe.guide.cache.temperature)]


def _wrong_value(argument: str) -> NpoError:
    return NpoError(
        f"extrapolated:{argument}: SPACE must be {' or '.join(SPACES)}, k a whole number >= 1, a a number > 0",
        f"use {ExtrapolatedSource.usage}, such as {ExtrapolatedSource.example}",
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class ExtrapolatedSampler:
    """Samples and log-probabilities of the extrapolated policy: two models, or one whose weights are extrapolated."""

    session: Session
    """Its engine samples from the extrapolated policy inside `activate()`."""
    policy: Policy | ExtrapolatedPolicy
    """Computes its log-probabilities inside `activate()`."""
    extrapolation: Extrapolation
    activate: Callable[[], AbstractContextManager[None]]

    def sample_groups(
        self,
        prompts: Sequence[Prompt],
        *,
        label: tuple[str | int, ...],
        slots: Sequence[int],
        temperature: float | None = None,
    ) -> list[Group]:
        """Verified groups; each seed derives from (run seed, *label, prompt id, slot)."""
        from npo_cli.session.session import sample_groups

        with self.activate():
            groups = sample_groups(
                self.session,
                prompts,
                seed_label=label,
                slots=slots,
                sampler_step=self.extrapolation.step,
                temperature=temperature,
            )
        return [
            replace(group, rollouts=tuple(replace(rollout, source="extrapolated") for rollout in group.rollouts))
            for group in groups
        ]

    def logprobs(self, pairs: Pairs, *, temperature: float | None = None) -> list[tuple[float, ...]]:
        """Log-probability (nats) of each token, from the trainer's forward pass."""
        with self.activate():
            return compute_logprobs(self.session, pairs, temperature=temperature, policy=self.policy)


def load_older_policy(session: Session, used: Extrapolation, *, into: Policy | None = None) -> Policy | None:
    """The older copy, verified, as a second model (`into`, if it is loaded already); None for weights."""
    from npo_cli.session.session import load_checkpoint, load_second_policy
    from npo_cli.storage.checkpoints import verify_checkpoint

    if session.policy.sharding is not None:
        raise NpoError("an extrapolated policy is sampled by one process", "start this command without torchrun")
    if used.space == "logits" and into is not None:
        load_checkpoint(into, used.older_checkpoint)
        return into
    if used.space == "weights":
        verify_checkpoint(used.older_checkpoint)
        return None
    return load_second_policy(session, used.older_checkpoint)


def open_extrapolated_sampler(
    session: Session, used: Extrapolation, *, older: Policy | None = None
) -> ExtrapolatedSampler:
    """A sampler in a session that holds the weights of `used.step`; `older` is the second model for logits.

    Extrapolated weights are served by any engine; extrapolated logits by an engine of two models.
    """
    from npo_cli.inference.extrapolated_engine import ExtrapolatedEngine
    from npo_cli.policy.extrapolated import ExtrapolatedPolicy, extrapolate_weights
    from npo_cli.session.session import make_model_handle

    policy, strength = session.policy, used.strength
    if used.space == "weights":
        activate = partial(extrapolate_weights, policy, used.older_checkpoint.path, strength=strength)
        return ExtrapolatedSampler(session=session, policy=policy, extrapolation=used, activate=activate)
    assert older is not None, "extrapolated logits need the older model"
    handle = make_model_handle(policy, session.recipe)
    engine = ExtrapolatedEngine(session.recipe.engine, handle, older=older.model, strength=strength)
    return ExtrapolatedSampler(
        session=replace(session, engine=engine, sync=replace(session.sync, engine=engine, verified_version=None)),
        policy=ExtrapolatedPolicy(newer=policy, older=older, strength=strength),
        extrapolation=used,
        activate=nullcontext,
    )

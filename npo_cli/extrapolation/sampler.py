"""The policy pushed along its own motion, asked like any other: which older copy, how far, in logits or in weights.

The older copy is a checkpoint of the line. Training leaves one every `train.save_every` steps, so it is the newest of
these that lies at least k steps back; of a copy that lies further the motion is longer, and a is made smaller by as
much: what is forecast is always a k steps.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial

from npo_cli.errors import NpoError, quote_path
from npo_cli.extrapolation.engine import ExtrapolatedEngine
from npo_cli.guides.source import Pairs, compute_logprobs
from npo_cli.policy.extrapolated import ExtrapolatedPolicy, extrapolate_weights
from npo_cli.policy.lora import share_base_weights
from npo_cli.policy.model import Policy, load_policy
from npo_cli.session.session import Session, load_checkpoint, sample_groups
from npo_cli.storage.checkpoints import Checkpoint, list_ancestry_checkpoints, verify_checkpoint
from npo_cli.storage.layout import RunDir
from npo_cli.types.guides import ExtrapolationSpec
from npo_cli.types.rollouts import Group, Prompt


@dataclass(frozen=True, kw_only=True, slots=True)
class ResolvedExtrapolation:
    """What is pushed: from an older copy to the policy of a step, and beyond."""

    spec: ExtrapolationSpec
    step: int
    """Of the policy."""
    older_checkpoint: Checkpoint

    @property
    def lag(self) -> int:
        """Steps between the two; k, or a little more where no checkpoint lies exactly there."""
        return self.step - self.older_checkpoint.step

    @property
    def strength(self) -> float:
        """a k / lag."""
        return self.spec.a * self.spec.k / self.lag


def find_extrapolation(
    run: RunDir, branch: str, push: ExtrapolationSpec, *, step: int, every: int
) -> ResolvedExtrapolation | None:
    """From the newest checkpoint of the line that lies at least k steps back; None while there is none so far back.

    Only steps that training leaves by plan count: where a run was stopped and resumed decides nothing.
    """
    if step < push.k:
        return None
    steps = [
        found
        for found in list_ancestry_checkpoints(run, branch)
        if found.step <= step - push.k and found.step % every == 0
    ]
    newest = max(steps, key=lambda found: found.step, default=None)
    if newest is None or step - newest.step >= 2 * push.k:
        raise NpoError(
            f"{run.root} has no checkpoint of {branch} in steps {max(0, step - 2 * push.k + 1)} to {step - push.k}, "
            f"where the older copy of k={push.k} belongs",
            f"set train.save_every to {push.k} or less and train.keep_weights_only higher when it is trained, or "
            "choose "
            f"another k: npo index {quote_path(run.root)}",
        )
    return ResolvedExtrapolation(spec=push, step=step, older_checkpoint=newest)


@dataclass(frozen=True, kw_only=True, slots=True)
class ExtrapolatedSampler:
    """The pushed policy at work: two models side by side, or one whose weights are moved for as long as it is asked."""

    session: Session
    """Its engine samples from the pushed policy while `in_place` holds."""
    policy: Policy | ExtrapolatedPolicy
    """What scores for it while `in_place` holds."""
    extrapolation: ResolvedExtrapolation
    activate: Callable[[], AbstractContextManager[None]]
    forwards_per_token: int
    """Forward passes behind one token."""

    def sample_groups(
        self,
        prompts: Sequence[Prompt],
        *,
        label: tuple[str | int, ...],
        slots: Sequence[int],
        temperature: float | None = None,
    ) -> list[Group]:
        """Verified answers; the seed of each is that of (run seed, *label, prompt id, slot)."""
        step = self.extrapolation.step
        with self.activate():
            return _told(
                sample_groups(
                    self.session, prompts, seed_label=label, slots=slots, sampler_step=step, temperature=temperature
                )
            )

    def logprobs(self, pairs: Pairs, *, temperature: float | None = None) -> list[tuple[float, ...]]:
        """Per-token log-probabilities (nats) under the pushed policy, from the trainer's pass."""
        with self.activate():
            return compute_logprobs(self.session, pairs, temperature=temperature, policy=self.policy)


def load_older_policy(session: Session, motion: ResolvedExtrapolation, *, into: Policy | None = None) -> Policy | None:
    """The older copy, whole to the last byte: in a second model where logits are pushed, perhaps one at hand."""
    if session.policy.sharding is not None:
        raise NpoError("an extrapolated policy is asked by one process", "start this command without a launcher")
    if motion.spec.space == "weights":
        verify_checkpoint(motion.older_checkpoint)
        return None
    if into is not None:
        load_checkpoint(into, motion.older_checkpoint)
        return into
    verify_checkpoint(motion.older_checkpoint)
    opened = load_policy(session.recipe.model, motion.older_checkpoint.path)
    opened.model.requires_grad_(False)
    if opened.adapters is not None:
        share_base_weights(opened.model, session.policy.model)
    return opened


def open_extrapolated_sampler(
    session: Session, motion: ResolvedExtrapolation, *, older: Policy | None = None
) -> ExtrapolatedSampler:
    """The pushed policy; the world holds the weights of the motion's step, and `old` those of its older copy.

    In weights any engine serves, which is sent the moved ones; in logits it is an engine of two models.
    """
    policy, strength = session.policy, motion.strength
    if motion.spec.space == "weights":
        in_place = partial(extrapolate_weights, policy, motion.older_checkpoint.path, strength=strength)
        return ExtrapolatedSampler(
            session=session, policy=policy, extrapolation=motion, activate=in_place, forwards_per_token=1
        )
    assert older is not None, "logits are pushed away from those of a second model"
    twin = ExtrapolatedEngine(
        policy.model,
        policy.tokenizer,
        older=older.model,
        strength=strength,
        eos_ids=policy.eos_ids,
        pad_id=policy.pad_id,
        max_rows=session.recipe.engine.max_num_seqs,
        dtype=policy.compute_dtype,
        vision=policy.vision,
    )
    return ExtrapolatedSampler(
        session=replace(session, engine=twin, sync=replace(session.sync, engine=twin, verified_version=None)),
        policy=ExtrapolatedPolicy(newer=policy, older=older, strength=strength),
        extrapolation=motion,
        activate=nullcontext,
        forwards_per_token=2,
    )


def _told(groups: Sequence[Group]) -> list[Group]:
    """Who wrote these answers is on record."""
    return [
        replace(group, rollouts=tuple(replace(rollout, source="extrapolated") for rollout in group.rollouts))
        for group in groups
    ]

"""The policy pushed along its own motion, asked like any other: which older copy, how far, in logits or in weights.

The older copy is a checkpoint of the line. Training leaves one every `train.save_every` steps, so it is the newest of
these that lies at least k steps back; of a copy that lies further the motion is longer, and a is made smaller by as
much: what is forecast is always a k steps.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial

from npo_cli.engines.twin_engine import TwinEngine
from npo_cli.errors import NpoError, as_typed
from npo_cli.guide_records import Push
from npo_cli.policy.adapters import share_base
from npo_cli.policy.extrapolated import PushedPolicy, pushed
from npo_cli.policy.model import Policy, load_policy
from npo_cli.records import Group, Prompt
from npo_cli.run_dir.checkpoints import Checkpoint, history, require_whole
from npo_cli.run_dir.paths import RunDir
from npo_cli.stages.authors import Pairs, forward_logps
from npo_cli.stages.world import World, answer, load_checkpoint


@dataclass(frozen=True, kw_only=True, slots=True)
class Motion:
    """What is pushed: from an older copy to the policy of a step, and beyond."""

    push: Push
    step: int
    """Of the policy."""
    older: Checkpoint

    @property
    def lag(self) -> int:
        """Steps between the two; k, or a little more where no checkpoint lies exactly there."""
        return self.step - self.older.step

    @property
    def strength(self) -> float:
        """a k / lag."""
        return self.push.a * self.push.k / self.lag


def motion_at(run: RunDir, branch: str, push: Push, *, step: int, every: int) -> Motion | None:
    """From the newest checkpoint of the line that lies at least k steps back; None while there is none so far back.

    Only steps that training leaves by plan count: where a run was stopped and resumed decides nothing.
    """
    if step < push.k:
        return None
    steps = [found for found in history(run, branch) if found.step <= step - push.k and found.step % every == 0]
    newest = max(steps, key=lambda found: found.step, default=None)
    if newest is None or step - newest.step >= 2 * push.k:
        raise NpoError(
            f"{run.root} has no checkpoint of {branch} in steps {max(0, step - 2 * push.k + 1)} to {step - push.k}, "
            f"where the older copy of k={push.k} belongs",
            f"set train.save_every to {push.k} or less and train.keep_weights_only higher when it is trained, or "
            "choose "
            f"another k: npo index {as_typed(run.root)}",
        )
    return Motion(push=push, step=step, older=newest)


@dataclass(frozen=True, kw_only=True, slots=True)
class Ahead:
    """The pushed policy at work: two models side by side, or one whose weights are moved for as long as it is asked."""

    world: World
    """Its engine samples from the pushed policy while `in_place` holds."""
    policy: Policy | PushedPolicy
    """What scores for it while `in_place` holds."""
    motion: Motion
    in_place: Callable[[], AbstractContextManager[None]]
    forwards_per_token: int
    """Forward passes behind one token."""

    def answer(
        self,
        prompts: Sequence[Prompt],
        *,
        label: tuple[str | int, ...],
        slots: Sequence[int],
        temperature: float | None = None,
    ) -> list[Group]:
        """Verified answers; the seed of each is that of (run seed, *label, prompt id, slot)."""
        step = self.motion.step
        with self.in_place():
            return _told(
                answer(self.world, prompts, label=label, slots=slots, sampler_step=step, temperature=temperature)
            )

    def logps(self, pairs: Pairs, *, temperature: float | None = None) -> list[tuple[float, ...]]:
        """Per-token log-probabilities (nats) under the pushed policy, from the trainer's pass."""
        with self.in_place():
            return forward_logps(self.world, pairs, temperature=temperature, policy=self.policy)


def older_policy(world: World, motion: Motion, *, into: Policy | None = None) -> Policy | None:
    """The older copy, whole to the last byte: in a second model where logits are pushed, perhaps one at hand."""
    if world.policy.shared is not None:
        raise NpoError("an extrapolated policy is asked by one process", "start this command without a launcher")
    if motion.push.space == "weights":
        require_whole(motion.older)
        return None
    if into is not None:
        load_checkpoint(into, motion.older)
        return into
    require_whole(motion.older)
    opened = load_policy(world.recipe.model, motion.older.path)
    opened.model.requires_grad_(False)
    if opened.adapters is not None:
        share_base(opened.model, world.policy.model)
    return opened


def open_ahead(world: World, motion: Motion, *, old: Policy | None = None) -> Ahead:
    """The pushed policy; the world holds the weights of the motion's step, and `old` those of its older copy.

    In weights any engine serves, which is sent the moved ones; in logits it is an engine of two models.
    """
    policy, strength = world.policy, motion.strength
    if motion.push.space == "weights":
        in_place = partial(pushed, policy, motion.older.path, strength=strength)
        return Ahead(world=world, policy=policy, motion=motion, in_place=in_place, forwards_per_token=1)
    assert old is not None, "logits are pushed away from those of a second model"
    twin = TwinEngine(
        policy.model,
        policy.tokenizer,
        older=old.model,
        strength=strength,
        eos_ids=policy.eos_ids,
        pad_id=policy.pad_id,
        max_rows=world.recipe.engine.max_num_seqs,
        dtype=policy.compute_dtype,
        sight=policy.vision,
    )
    return Ahead(
        world=replace(world, engine=twin, sync=replace(world.sync, engine=twin, proved=None)),
        policy=PushedPolicy(new=policy, old=old, strength=strength),
        motion=motion,
        in_place=nullcontext,
        forwards_per_token=2,
    )


def _told(groups: Sequence[Group]) -> list[Group]:
    """Who wrote these answers is on record."""
    return [
        replace(group, rollouts=tuple(replace(rollout, source="extrapolated") for rollout in group.rollouts))
        for group in groups
    ]

"""The dense target of a branch: its teacher as a frozen model beside the policy, or the policy itself, and the window
of its use.

The coefficient is a function of the step. Nothing of it is training state.
"""

from dataclasses import dataclass, replace
from pathlib import Path

from npo_cli.config.recipe import Recipe
from npo_cli.config.target import TargetSettings
from npo_cli.errors import NpoError
from npo_cli.guides.privileged import PrivilegedText
from npo_cli.guides.served_teacher import ServedDistillation, ServedTeacher
from npo_cli.guides.teacher import find_teacher, named_in_errors
from npo_cli.losses.target import Target
from npo_cli.policy.extrapolated import ExtrapolatedPolicy
from npo_cli.policy.lora import share_base_weights
from npo_cli.policy.model import Distillation, Policy, TeacherComparison
from npo_cli.registry import TARGETS
from npo_cli.session.distributed import shard_policy
from npo_cli.storage.layout import RunDir
from npo_cli.types.rollouts import Rollout

TeacherModel = Policy | ExtrapolatedPolicy | ServedTeacher


@dataclass(frozen=True, kw_only=True, slots=True)
class StepTarget:
    """The dense target of one step."""

    settings: TargetSettings
    teacher: TeacherModel
    coefficient: float
    """`target.weight` by its schedule."""
    privileged: PrivilegedText | None = None
    """What the teacher is shown; None: the policy's prompts."""

    @property
    def kind(self) -> Target:
        """What the teacher does in the loss."""
        return TARGETS.get(self.settings.kind)

    @property
    def adds_term(self) -> bool:
        """Whether rows without advantage have a gradient too."""
        return self.kind.per_token is not None

    @property
    def replaces_policy_gradient(self) -> bool:
        """Whether it is all that the step learns from."""
        return self.adds_term and not self.settings.policy_gradient

    @property
    def reads_logps(self) -> bool:
        """Whether the teacher's log-probability of each token is computed."""
        return self.kind.reads == "logps"

    @property
    def distillation(self) -> TeacherComparison | None:
        """The comparison with the teacher's distributions; None if they are not read."""
        settings = self.settings
        if self.kind.reads != "distribution":
            return None
        if isinstance(self.teacher, ServedTeacher):
            return ServedDistillation(teacher=self.teacher, divergence=settings.divergence)
        return Distillation(
            teacher=self.teacher,
            divergence=settings.divergence,
            top_k=settings.top_k,
            temperature=settings.temperature,
        )

    @property
    def can_share_prompts(self) -> bool:
        """Whether the teacher can read several responses in a row with their prompt; a server reads each by itself."""
        return isinstance(self.teacher, ServedTeacher) or self.teacher.packing is not None

    def applies_to(self, rollout: Rollout) -> bool:
        """Whether a rollout has the target: one of the policy's own, and with `wrong` one that is not correct."""
        chosen = self.settings.rollouts or self.kind.default_rollouts
        return not rollout.is_off_policy and (chosen == "all" or not rollout.is_correct)


@dataclass(frozen=True, kw_only=True, slots=True)
class ActiveTarget:
    """The dense target of a branch."""

    settings: TargetSettings
    teacher: TeacherModel
    fork_step: int
    """Step that the branch starts from."""

    @property
    def start_step(self) -> int:
        """The window begins after this step."""
        return self.fork_step if self.settings.start_step is None else self.settings.start_step

    def at_step(self, step: int, *, privileged: PrivilegedText | None = None) -> StepTarget | None:
        """The target of a training step; None outside the window."""
        coefficient = self.settings.coefficient_at(step, start_step=self.start_step)
        if coefficient is None:
            return None
        return StepTarget(settings=self.settings, teacher=self.teacher, coefficient=coefficient, privileged=privileged)


def open_teacher(
    run: RunDir, recipe: Recipe, policy: Policy, *, parent: str | None, fork_step: int, step: int | None = None
) -> TeacherModel | None:
    """The teacher as a frozen model, with the policy's tokenizer; adapters share the policy's base. None without a
    target, or where training continues at a `step` (None: the fork) after its window. The policy that teaches itself is
    returned as it is."""
    last = recipe.target.find_last_step(fork_step=fork_step)
    if not recipe.has_target or (last is not None and (step or fork_step) >= last):
        return None
    if recipe.target.is_self_taught:
        return policy
    source = find_teacher(run, recipe, parent=parent, fork_step=fork_step)
    with named_in_errors(source.spec.text):
        teacher = source.load_teacher()
        if isinstance(teacher, ServedTeacher):
            check_served_teacher(teacher, recipe, policy)
            return teacher
        if isinstance(teacher, ExtrapolatedPolicy):
            if policy.sharding is not None:
                raise NpoError(
                    "extrapolated logits are those of two whole models in one process",
                    "start without torchrun, or use target.teacher=extrapolated:weights,k=K,a=A",
                )
            return replace(teacher, newer=freeze(teacher.newer, policy), older=freeze(teacher.older, policy))
        check_teacher(teacher, policy)
        teacher = freeze(teacher, policy)
    return teacher if policy.sharding is None else shard_policy(teacher, recipe, folder=Path(source.spec.text))


def freeze(teacher: Policy, policy: Policy) -> Policy:
    """The model without gradients; its adapters on the policy's base weights, unless these are sharded."""
    teacher.model.requires_grad_(False)
    if policy.sharding is None and teacher.adapters is not None and policy.adapters is not None:
        share_base_weights(teacher.model, policy.model)
    return teacher


def check_teacher(teacher: Policy, policy: Policy) -> None:
    """Refuse a teacher whose probabilities are of other tokens, or that cannot read the policy's images."""
    if teacher.tokenizer_digest != policy.tokenizer_digest:
        raise NpoError(
            "it has another tokenizer than the policy: its probabilities are of other tokens",
            "choose a teacher with the policy's tokenizer, or use it as a guide: npo sample-guide",
        )
    if policy.vision is not None and type(teacher.model) is not type(policy.model):
        raise NpoError(
            f"it is a {type(teacher.model).__name__}, and the policy's images are inputs of a "
            f"{type(policy.model).__name__}",
            "choose a teacher of the policy's architecture",
        )


def check_served_teacher(teacher: ServedTeacher, recipe: Recipe, policy: Policy) -> None:
    """Refuse what a server's log-probabilities do not say, and a server with other tokens."""
    settings = recipe.target
    temperature = recipe.sampling.temperature if settings.temperature is None else settings.temperature
    if temperature != 1:
        raise NpoError(
            f"a server's log-probabilities are those of temperature 1, not {temperature:g}",
            "sampling.temperature=1, or target.temperature=1",
        )
    if policy.vision is not None:
        raise NpoError("images are not sent to a server", "use the model's weights: target.teacher=model:FOLDER_OR_ID")
    if TARGETS.get(settings.kind).reads == "distribution" and settings.top_k is None:
        raise NpoError(
            "a server returns the most probable tokens only", "target.top_k=20   # at most its --max-logprobs"
        )
    teacher.check(policy)


def describe_target(target: ActiveTarget) -> str:
    """One line: kind, teacher, what it is shown, window and group size."""
    settings, first = target.settings, target.start_step + 1
    last = settings.find_last_step(fork_step=target.fork_step) or "the end"
    size = "" if settings.group_size is None else f", {settings.group_size} rollouts per prompt"
    shown = "" if settings.privileged is None else f", which is shown the {settings.privileged}"
    return f"dense target: {settings.kind} from {settings.teacher}{shown}, steps {first} to {last}{size}"

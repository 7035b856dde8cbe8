"""The rungs of AutoNPO's ladder: what each switches on for a window of steps, and when it is available.

A rung is an object of the registry `npo_cli.registry.RUNGS`; `autonpo.ladder` names those in use, cheapest first. All
but the published rollback are the same thing, a fork with other settings in a window: at the newest step, so that no
step is lost, or (`dense`) at that of a short rollback. Their forecast and measurement are in `rung_effect.py`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from npo_cli.autonpo.signals import read_trigger_inputs
from npo_cli.autonpo.trigger import Trigger
from npo_cli.config.autonpo import EARLY_RUNG, RungSettings
from npo_cli.config.loading import apply_overrides, recipe_from_dict, recipe_to_dict, replace_values
from npo_cli.config.recipe import Recipe
from npo_cli.errors import NpoError
from npo_cli.guides.source import ReplayTarget, create_source, parse_spec
from npo_cli.guides.teacher import make_teacher_absolute, settle_teacher
from npo_cli.policy.model_folder import find_model, is_packaged
from npo_cli.registry import RUNGS
from npo_cli.session.learner import Learner
from npo_cli.storage.autonpo_log import read_transitions
from npo_cli.storage.checkpoints import find_checkpoint, list_ancestry_checkpoints
from npo_cli.storage.layout import FIRST_BRANCH, RunDir
from npo_cli.types.autonpo import Transition
from npo_cli.types.guides import SCOUT_SOURCE

ANY_TEACHER = "base"
"""Stands for the teacher where only the settings are checked."""
OUTSIDE_SOURCES = ("run", "model", "file", "endpoint")
"""Guide sources that need nothing of the run: whether they are there is known before it begins."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RungPlace:
    """Where a rung would be applied."""

    run: RunDir
    recipe: Recipe
    """With no rung in effect."""
    branch: str
    step: int
    """The newest of the branch, which has a checkpoint."""
    distance: int = 0
    """Steps that the window begins before it."""
    is_early: bool = False
    """The rung is the early bootstrap."""
    scout: str | None = None
    """Disposable scout that was trained for the rung; None before."""

    @property
    def fork_step(self) -> int:
        """The window begins after this step."""
        return self.step - self.distance

    @property
    def num_steps(self) -> int:
        """Length of the window."""
        autonpo = self.recipe.autonpo
        wanted = autonpo.early.replay_steps if self.is_early else autonpo.rungs.num_steps
        return min(wanted, self.distance) if self.distance else wanted

    @property
    def scout_steps(self) -> int:
        """Length of the scout that a rung trains from here."""
        autonpo = self.recipe.autonpo
        return autonpo.early.scout_steps if self.is_early else autonpo.rungs.scout_steps


@dataclass(frozen=True, kw_only=True, slots=True)
class Rung:
    """One name of `autonpo.ladder`."""

    name: str
    off: tuple[str, Any] | None = None
    """Setting that it switches on, and the value that leaves it off."""
    settings: Callable[[RungSettings, int, str], tuple[str, ...]] = lambda rungs, num_steps, teacher: ()
    """KEY=VALUE of a window of so many steps, given the teacher's SPEC."""
    choose_teacher: Callable[[RungPlace], str] | None = None
    """SPEC of the teacher of its dense target; raises NpoError where there is none. None: it has no dense target."""
    samples_guide: bool = False
    """Whether autonpo.rungs.guide is sampled in the window, into a lazy guide cache."""
    trains_scout: bool = False
    """Whether a disposable scout is trained before the window (`RungPlace.scout`)."""
    needs_probe: bool = False
    """Whether a probe of failed prompts decides about it, and how far it rolls back."""
    has_window: bool = True
    """False: the published rollback, a replay with a guide cache that is sampled before."""

    def check(self, recipe: Recipe, *, is_early: bool = False) -> None:
        """Refuse a recipe in which it could never be applied, or whose own setting it would switch off. `is_early`: as
        the early bootstrap."""
        rungs = recipe.autonpo.rungs
        where = "autonpo.early.scout is disposable" if is_early else f"autonpo.ladder has {self.name}"
        without = "autonpo.early.scout=run" if is_early else f"a ladder without {self.name}"
        if self.off is not None:
            section, _, name = self.off[0].partition(".")
            value = getattr(getattr(recipe, section), name)
            if value != self.off[1]:
                raise NpoError(
                    f"{where}, which switches {self.off[0]} on for a window, but it is {value} already",
                    f"{self.off[0]}={self.off[1]}, or {without}",
                )
        teacher = rungs.teacher if self.choose_teacher is choose_best_checkpoint else None
        if self.samples_guide:
            check_outside_source(rungs.guide, recipe)
            if recipe.train.staleness:
                raise NpoError(
                    "a guide that is sampled while training is not available with train.staleness above 0",
                    f"train.staleness=0, or {without}",
                )
        if self.trains_scout:
            check_scout_available(recipe, where=where, without=without)
        try:
            window = self.make_window_recipe(recipe, ANY_TEACHER if teacher is None else teacher)
            if teacher is not None:
                check_outside_source(teacher, window)
        except NpoError as error:
            raise NpoError(f"{where}: {error.message}", without) from error

    def make_window_recipe(self, recipe: Recipe, teacher: str = ANY_TEACHER) -> Recipe:
        """The recipe of a window."""
        rungs = recipe.autonpo.rungs
        return apply_overrides(recipe, self.settings(rungs, rungs.num_steps, teacher))


def check_outside_source(text: str, recipe: Recipe) -> None:
    """Refuse a SPEC that cannot be read, or of a guide source outside of the run that is not there."""
    spec = parse_spec(text)
    if spec.name in OUTSIDE_SOURCES:
        learner = Learner(recipe=recipe, branch=FIRST_BRANCH, checkpoint=None)
        create_source(spec, ReplayTarget(run=RunDir(Path()), learner=learner))
    if spec.name == "model" and not is_packaged(str(spec.options["model"])):
        find_model(str(spec.options["model"]))


@dataclass(frozen=True, kw_only=True, slots=True)
class RungPlan:
    """A rung at one place."""

    settings: tuple[str, ...]
    recipe: Recipe
    """Of the new branch: that of the place with the settings."""
    teacher: tuple[str, int] | None
    """Branch and step of the checkpoint that the teacher needs; None if it needs none."""
    guide: str | None
    """SPEC of the guide source."""


def check_steps_left(rung: Rung, place: RungPlace) -> None:
    """Refuse a window that would have no step; and one that the run ends in, where a scout is to be trained for it."""
    left = place.recipe.train.num_steps - place.fork_step
    if left <= 0:
        raise NpoError(f"step {place.fork_step} is the last one", "more train.num_steps")
    if rung.trains_scout and left < place.num_steps:
        raise NpoError(
            f"{left} of the {place.num_steps} steps of a window are left, too few to train a scout for",
            "more train.num_steps",
        )


def plan_rung(name: str, place: RungPlace) -> RungPlan:
    """What a rung does at a place; an NpoError says why it is not available there."""
    rung: Rung = RUNGS.get(name)
    check_steps_left(rung, place)
    rungs, teacher = place.recipe.autonpo.rungs, ""
    if rung.choose_teacher is not None:
        teacher = make_teacher_absolute(rung.choose_teacher(place))
    recipe = apply_overrides(place.recipe, rung.settings(rungs, place.num_steps, teacher))
    recipe, checkpoint = settle_teacher(place.run, recipe, parent=place.branch, fork_step=place.fork_step)
    settings = rung.settings(rungs, place.num_steps, recipe.target.teacher or "")
    if rung.samples_guide:
        start = find_checkpoint(place.run, place.branch, place.fork_step)
        learner = Learner(recipe=recipe, branch=place.branch, checkpoint=start)
        target = ReplayTarget(run=place.run, learner=learner, steps=place.num_steps)
        create_source(parse_spec(rungs.guide), target)
    source = rungs.guide if rung.samples_guide else None
    return RungPlan(settings=settings, recipe=recipe, teacher=checkpoint, guide=source)


def check_scout_available(recipe: Recipe, *, where: str, without: str) -> None:
    """Refuse a recipe whose scouts are not trained in the session of a run under AutoNPO, or not at all."""
    if recipe.train.staleness:
        raise NpoError(
            f"{where}, whose scout is not available with train.staleness above 0", f"train.staleness=0, or {without}"
        )
    if recipe.scout.lora.rank is not None:
        raise NpoError(
            f"{where}, whose scout trains the run's own model: scout.lora.rank is not available",
            f"scout.lora.rank=null, or {without}",
        )
    try:
        recipe.make_scout(num_steps=recipe.train.num_steps)
    except ValueError as error:
        raise NpoError(f"{where}: {error}", without) from error


def list_rungs(recipe: Recipe) -> list[Rung]:
    """The rungs that AutoNPO may apply, cheapest first, that of the early bootstrap before them."""
    early = recipe.autonpo.early
    first = (EARLY_RUNG,) if early.enabled and early.scout == "disposable" else ()
    return [RUNGS.get(name) for name in dict.fromkeys((*first, *recipe.autonpo.ladder))]


def find_largest_window(recipe: Recipe) -> Recipe:
    """The recipe of the window that takes the most memory, that of the last rung with a teacher; the recipe itself
    where no rung has one."""
    rungs = list_rungs(recipe)
    last = next((rung for rung in reversed(rungs) if rung.choose_teacher is not None), None)
    return recipe if last is None else last.make_window_recipe(recipe)


def draw_mistakes(rungs: RungSettings, num_steps: int, teacher: str) -> tuple[str, ...]:
    """Mistakes first."""
    return f"order.mistakes={rungs.mistakes:g}", f"order.num_steps={num_steps}"


def weigh_tokens(rungs: RungSettings, num_steps: int, teacher: str) -> tuple[str, ...]:
    """Token weights from the teacher."""
    return "target.kind=token_weight", f"target.teacher={teacher}", f"target.num_steps={num_steps}"


def distill(rungs: RungSettings, num_steps: int, teacher: str) -> tuple[str, ...]:
    """On-policy distillation from the teacher, in small groups."""
    return (
        "target.kind=distribution",
        f"target.teacher={teacher}",
        f"target.num_steps={num_steps}",
        f"target.group_size={rungs.group_size}",
    )


def choose_best_checkpoint(place: RungPlace) -> str:
    """`autonpo.rungs.teacher`, or the earlier checkpoint of the line with the highest average reward.

    Both averages are the trigger's, and the difference must be above the noise of its own comparison: a plateau has no
    better checkpoint, a decline has.
    """
    given = place.recipe.autonpo.rungs.teacher
    if given is not None:
        return given
    settings = place.recipe.autonpo.trigger
    trigger, averages, margin = Trigger(settings), {}, 0.0
    for signal in read_trigger_inputs(place.run, place.branch, place.step):
        reading = trigger.observe(signal)
        margin = reading.reward_margin or margin
        if reading.reward_ema is not None:
            averages[reading.step] = reading.reward_ema
    every = place.recipe.train.save_every
    saved = [one.step for one in list_ancestry_checkpoints(place.run, place.branch) if one.step % every == 0]
    known = [step for step in saved if settings.window <= step < place.step and step in averages]
    best = max(known, key=lambda step: averages[step], default=None)
    if best is None or averages[best] - averages[place.step] <= margin:
        raise NpoError(
            "no earlier checkpoint was better than the present one by more than the noise",
            "name a teacher: autonpo.rungs.teacher=SPEC",
        )
    return f"earlier:{best}"


def choose_newest_checkpoint(place: RungPlace) -> str:
    """The checkpoint that the window is rolled back from."""
    return f"checkpoint:{place.step}"


def choose_trained_scout(place: RungPlace) -> str:
    """The scout that was trained for the window."""
    assert place.scout is not None, "the scout is trained before the window is planned"
    return f"{SCOUT_SOURCE}:{place.scout}"


mistakes = Rung(name="mistakes", off=("order.mistakes", 0.0), settings=draw_mistakes)
token_weight = Rung(
    name="token_weight", off=("target.kind", "none"), settings=weigh_tokens, choose_teacher=choose_best_checkpoint
)
guide = Rung(name="guide", off=("guide.source", "cache"), samples_guide=True)
scout = Rung(
    name="scout",
    off=("target.kind", "none"),
    settings=distill,
    choose_teacher=choose_trained_scout,
    trains_scout=True,
)
dense = Rung(
    name="dense",
    off=("target.kind", "none"),
    settings=distill,
    choose_teacher=choose_newest_checkpoint,
    needs_probe=True,
)
rollback = Rung(name="rollback", needs_probe=True, has_window=False)


# A branch with a rung


def find_rung(run: RunDir, branch: str) -> Transition | None:
    """The transition that made a branch for a rung; None for any other branch."""
    made = (one for one in read_transitions(run) if one.event == "rung_applied" and one.state.branch == branch)
    return next(made, None)


def find_undo(run: RunDir, branch: str) -> Mapping[str, Any]:
    """Dotted keys of a branch's window with their values before it."""
    applied = find_rung(run, branch)
    return {} if applied is None else applied.evidence["undo"]


def undo_rung(run: RunDir, recipe: Recipe, branch: str) -> Recipe:
    """The recipe of a branch without the settings of its window."""
    undo = find_undo(run, branch)
    return recipe_from_dict(replace_values(recipe_to_dict(recipe), undo)) if undo else recipe

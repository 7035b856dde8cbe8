"""`npo train`: a GRPO baseline into a new run directory."""

from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from torch.optim import Optimizer

from npo_cli import __version__
from npo_cli.config import Recipe
from npo_cli.guide_records import Experience
from npo_cli.loading import recipe_dict
from npo_cli.policy.model import SHIPPED, Policy, load_policy
from npo_cli.policy.optimizer import TrainerState, seed_streams
from npo_cli.records import EvalReport, Notice, Segment, StepReport
from npo_cli.run_dir.checkpoints import find_checkpoint
from npo_cli.run_dir.lineage import append_segment
from npo_cli.run_dir.lock import writing
from npo_cli.run_dir.paths import create_run, refuse_used
from npo_cli.run_dir.rollouts import RolloutJournal
from npo_cli.run_dir.steps import StepJournals, append_event
from npo_cli.stages.batches import Guidance
from npo_cli.stages.evaluate import evaluate_policy
from npo_cli.stages.extrapolation import extrapolator_of
from npo_cli.stages.loop import Trainer, grpo_steps
from npo_cli.stages.rollback import seed_name
from npo_cli.stages.saving import save_checkpoint
from npo_cli.stages.signals import StopFlag, stop_between_steps
from npo_cli.stages.together import REFERENCE, new_optimizer, shared_among_all
from npo_cli.stages.world import World, open_policy, open_task, open_world
from npo_cli.tasks.user_code import is_user_code

MAIN = "main"
ROUNDED_AWAY = (
    "model.dtype=bfloat16 keeps no float32 copy of the weights: updates below about 0.4 % of a weight are rounded "
    "away, so a small train.lr hardly learns; model.dtype=float32 model.compute_dtype=bfloat16 keeps one"
)


def train_run(
    root: Path, recipe: Recipe, *, allow_code: bool, until: int | None = None
) -> Iterator[StepReport | EvalReport | Notice]:
    """Check everything that can be wrong, then make the directory, save step 0 and train, perhaps not to the end."""
    with new_world(root, recipe, allow_code=allow_code) as (world, stop):
        yield from birth_notices(world)
        optimizer = new_optimizer(world.policy, world.recipe.train)
        state = yield from begin(world, optimizer)
        trainer = open_trainer(world, optimizer, branch=MAIN, guidance=None)
        yield from grpo_steps(trainer, state, stop, until=until)


Check = Callable[[Recipe, int], None]
"""Refuses a recipe, given the number of training prompts."""


def nothing_more(recipe: Recipe, num_prompts: int) -> None:
    """Plain training has no demands of its own."""


@contextmanager
def new_world(
    root: Path, recipe: Recipe, *, allow_code: bool, check: Check = nothing_more
) -> Iterator[tuple[World, StopFlag]]:
    """A run directory that did not exist before, open for training; nothing is made before everything was checked."""
    refuse_used(root)
    recipe = with_whole_paths(recipe)
    task = open_task(recipe, allow_code=allow_code)
    try:
        check(recipe, len(task.train))
        policy = open_policy(recipe, task, None)
        run = create_run(root, recipe=recipe_dict(recipe), npo_version=__version__)
        with writing(run), stop_between_steps() as stop:
            # From this line on a killed run can be resumed.
            append_segment(run, Segment(branch=MAIN, parent=None, fork_step=0, guide=None, guide_until=None))
            append_event(run, "trained", {"branch": MAIN, "num_steps": recipe.train.num_steps})
            with closing(open_world(run, recipe, task=task, policy=policy)) as world:
                yield world, stop
    finally:
        task.close()


def birth_notices(world: World) -> Iterator[Notice]:
    """What a person should know before the first step."""
    yield Notice(message=batch_arithmetic(world.recipe, num_prompts=len(world.task.train)))
    if world.recipe.model.dtype == "bfloat16" and world.policy.adapters is None:
        yield Notice(message=ROUNDED_AWAY, level="warning")
    yield from engine_notices(world)


def engine_notices(world: World) -> Iterator[Notice]:
    """Where the same seed may give another response, a run says so whenever it begins or goes on."""
    if world.engine.remark:
        yield Notice(message=world.engine.remark, level="warning")


def with_whole_paths(recipe: Recipe) -> Recipe:
    """The same recipe with whole paths of data, verifier and the base of adapters: a run is resumed from any folder."""
    task, model = recipe.task, recipe.model
    whole = {
        "path": task.path and whole_path(task.path),
        "heldout_path": task.heldout_path and whole_path(task.heldout_path),
    }
    if is_user_code(task.verifier):
        file, _, function = task.verifier.rpartition(":")
        whole["verifier"] = f"{whole_path(file)}:{function}"
    # Without adapters a checkpoint is a model of its own, and nobody comes back to the base.
    if model.lora.rank is not None and Path(model.path).expanduser().is_dir() and model.path not in SHIPPED:
        model = model.model_copy(update={"path": whole_path(model.path)})
    return recipe.model_copy(update={"task": task.model_copy(update=whole), "model": model})


def whole_path(path: str) -> str:
    """From the root, whatever folder it was written in."""
    return str(Path(path).expanduser().absolute())


def begin(world: World, optimizer: Optimizer) -> Generator[EvalReport, None, TrainerState]:
    """Step 0 of a run: streams seeded, the base evaluated where evaluations are wanted, and saved."""
    seed_streams(world.recipe.train.seed)
    memory = Experience() if world.recipe.guide.experience.replay_fraction else None
    state = TrainerState(step=0, position=0, trackers={}, experience=memory)
    if world.recipe.eval.every:
        yield evaluate_policy(world, branch=MAIN, step=0)
    save_checkpoint(world, optimizer, state, branch=MAIN)
    return state


def open_trainer(world: World, optimizer: Optimizer, *, branch: str, guidance: Guidance | None) -> Trainer:
    """Journals mended after a kill, and the frozen base where the loss measures a distance to it."""
    run = world.run
    steps, rollouts = StepJournals(run, branch), RolloutJournal(run.rollouts_path(branch))
    rollouts.repair()
    reference = frozen_base(world) if world.recipe.loss.kl_coef > 0 else None
    return Trainer(
        world=world,
        optimizer=optimizer,
        steps=steps,
        rollouts=rollouts,
        branch=branch,
        seed_name=seed_name(run, branch),
        guidance=guidance,
        reference=reference,
        extrapolator=extrapolator_of(world, branch),
    )


def frozen_base(world: World) -> Policy:
    """What the run began with: with adapters the same model without them, else a second copy from step 0."""
    if world.policy.adapters is not None:
        return world.policy.base
    folder = find_checkpoint(world.run, MAIN, 0).path
    copy = load_policy(world.recipe.model, folder)
    copy.model.requires_grad_(False)
    return shared_among_all(copy, world.recipe, folder=folder, name=REFERENCE)


def batch_arithmetic(recipe: Recipe, *, num_prompts: int) -> str:
    """What follows from prompts a step and group size."""
    train = recipe.train
    rollouts = train.prompts_per_step * train.group_size
    epochs = train.num_steps * train.prompts_per_step / num_prompts
    return (
        f"{train.prompts_per_step} prompts x {train.group_size} rollouts = {rollouts} rollouts a step, "
        f"{train.num_updates} update(s) of {rollouts // train.num_updates} rollouts; "
        f"{train.num_steps} steps = {train.num_steps * rollouts:,} rollouts, {epochs:.2f} epochs"
    )

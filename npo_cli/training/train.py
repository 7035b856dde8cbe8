"""`npo train`: a GRPO baseline into a new run directory."""

from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path

from torch.optim import Optimizer

from npo_cli import __version__
from npo_cli.config.base import is_dataset_id
from npo_cli.config.loading import recipe_to_dict
from npo_cli.config.recipe import BUNDLED_MODELS, Recipe
from npo_cli.guides.dense_target import ActiveTarget, describe_target, open_teacher
from npo_cli.guides.online import open_online_guide
from npo_cli.guides.privileged import check_privileged_text
from npo_cli.guides.teacher import make_teacher_absolute
from npo_cli.policy.model import Policy, load_policy
from npo_cli.policy.model_folder import decide_chat
from npo_cli.policy.optimizer import TrainerState, build_optimizer, seed_random_state
from npo_cli.registry import TASKS
from npo_cli.rollout.batch import ActiveGuide, check_sft_guide
from npo_cli.rollout.mistakes import StandingMistakes
from npo_cli.rollout.review import ReviewQueue
from npo_cli.rollout.revisits import Revisits
from npo_cli.session.distributed import shard_policy
from npo_cli.session.session import Session, build_session, open_policy, open_task, record_code_permissions
from npo_cli.session.startup import begin_session, charge_startup
from npo_cli.session.stop_signal import StopFlag, stop_between_steps
from npo_cli.storage.checkpoints import find_checkpoint
from npo_cli.storage.interrupted import record_finish
from npo_cli.storage.layout import RunDir, check_unused, create_run
from npo_cli.storage.lineage import append_segment, find_first_segment
from npo_cli.storage.lock import lock_run
from npo_cli.storage.metrics import StepLog, append_event, iter_outcomes
from npo_cli.storage.rollout_log import RolloutLog
from npo_cli.tasks.custom_verifier import is_custom_verifier
from npo_cli.training.checkpointing import save_checkpoint
from npo_cli.training.disk import check_disk_space, describe_disk
from npo_cli.training.evaluate import evaluate_policy
from npo_cli.training.loop import Trainer, grpo_steps
from npo_cli.training.rollback import find_seed_name
from npo_cli.types.guides import ReplayBuffer
from npo_cli.types.rollouts import CheckpointSaved, EvalReport, Notice, Segment, TrainingRecord

MAIN = "main"
BFLOAT16_WARNING = (
    "model.dtype=bfloat16 has no float32 copy of the weights: updates below about 0.4 % of a weight are rounded away, "
    "so a small train.lr hardly learns; model.dtype=float32 model.compute_dtype=bfloat16 has one"
)


def train_run(
    root: Path, recipe: Recipe, *, until: int | None = None, stop: StopFlag | None = None
) -> Iterator[TrainingRecord]:
    """Check the recipe, create the run directory, save step 0 and train up to `until` or train.num_steps."""
    with create_session(root, recipe, last_step=until, stop=stop) as (session, stop):
        yield from startup_warnings(session, last_step=until)
        optimizer = build_optimizer(session.policy.model, session.recipe.train)
        state = yield from init_state(session, optimizer)
        trainer = open_trainer(session, optimizer, branch=MAIN, step=state.step, active_guide=None)
        yield from trainer_notices(trainer)
        yield from grpo_steps(trainer, state, stop, until=until)
        record_finish(session.run, MAIN)


@contextmanager
def create_session(
    root: Path,
    recipe: Recipe,
    *,
    check: Callable[[Recipe, int], None] | None = None,
    last_step: int | None = None,
    stop: StopFlag | None = None,
) -> Iterator[tuple[Session, StopFlag]]:
    """A new run directory, open for training; nothing is written before all checks have passed and the engine runs.

    `check` raises for an unusable recipe, given the number of training prompts. `last_step` of this training (None:
    train.num_steps) tells what it takes on disk.
    """
    check_unused(root)
    begin_session()
    recipe = settle_recipe(recipe)
    with closing(open_task(recipe)) as task:
        if check is not None:
            check(recipe, len(task.train))
        policy = open_policy(recipe, task, None)
        check_disk_space(root, recipe, policy, last_step=last_step or recipe.train.num_steps)
        check_privileged_text(recipe, policy, task.train)
        check_sft_guide(recipe, None, last_step=recipe.train.num_steps)
        teacher = open_teacher(RunDir(root), recipe, policy, parent=None, fork_step=0)
        with closing(build_session(RunDir(root), recipe, task=task, policy=policy, trains=True)) as session:
            session = replace(session, teacher=teacher)
            first = Segment(branch=MAIN, parent=None, fork_step=0, guide_cache=None, guide_until=None)
            run = create_run(
                root,
                recipe=recipe_to_dict(recipe),
                npo_version=__version__,
                prompts_sha256=task.compute_digest(),
                prepare=lambda new: append_segment(new, first),
            )
            record_code_permissions(run, recipe)
            # From here on a killed run can be resumed.
            with lock_run(run), stop_between_steps(stop) as stop:
                append_event(run, "trained", {"branch": MAIN, "num_steps": recipe.train.num_steps})
                charge_startup(run, branch=MAIN, step=0)
                yield session, stop


def startup_warnings(session: Session, *, last_step: int | None = None) -> Iterator[Notice]:
    """Batch sizes, disk space, and what is questionable about the settings, before the first step."""
    recipe, last_step = session.recipe, last_step or session.recipe.train.num_steps
    yield Notice(message=describe_batch_sizes(recipe, num_prompts=len(session.task.train)))
    if TASKS.get(recipe.task.source).formats_prompts:
        yield Notice(message=describe_prompt_form(session))
    yield Notice(message=describe_disk(session.run.root, recipe, session.policy, last_step=last_step))
    if session.recipe.model.dtype == "bfloat16" and session.policy.adapters is None:
        yield Notice(message=BFLOAT16_WARNING, level="warning")
    yield from engine_warnings(session)


def describe_prompt_form(session: Session) -> str:
    """Whether the model reads chat messages or plain text, and what decided it."""
    settings, has_template = session.recipe.task, bool(session.policy.tokenizer.chat_template)
    if settings.chat:
        return "prompts: chat messages, by the tokenizer's chat template (task.chat=true)"
    if any(prompt.messages for prompt in session.task.train):
        return "prompts: the data's chat messages, by the tokenizer's chat template; plain questions as they are"
    return "prompts: plain text" + (
        " (task.chat=false), though the tokenizer has a chat template"
        if has_template
        else ", since the tokenizer has no chat template"
    )


def engine_warnings(session: Session) -> Iterator[Notice]:
    """Report, whenever a run starts or resumes, that the same seed may give another response."""
    if session.engine.reproducibility_warning:
        yield Notice(message=session.engine.reproducibility_warning, level="warning")


def settle_recipe(recipe: Recipe) -> Recipe:
    """The recipe with what is decided once, when a run is created: absolute paths, and task.chat."""
    return decide_chat(make_paths_absolute(recipe))


def make_paths_absolute(recipe: Recipe) -> Recipe:
    """The recipe with absolute paths of data, verifier and model: a run can be resumed from any folder."""
    task, model = recipe.task, recipe.model
    paths = {
        "path": task.path and _make_data_absolute(task.path),
        "heldout_path": task.heldout_path and _make_data_absolute(task.heldout_path),
    }
    verifiers = tuple(map(_make_verifier_absolute, task.verifiers))
    paths["function"] = task.function and _make_verifier_absolute(task.function)
    paths["verifier"] = verifiers[0] if isinstance(task.verifier, str) else verifiers
    if model.path and model.path not in BUNDLED_MODELS and Path(model.path).expanduser().is_dir():
        model = model.model_copy(update={"path": absolute_path(model.path)})
    target = recipe.target
    if target.teacher is not None:
        target = target.model_copy(update={"teacher": make_teacher_absolute(target.teacher)})
    return recipe.model_copy(update={"task": task.model_copy(update=paths), "model": model, "target": target})


def _make_data_absolute(path: str) -> str:
    return path if is_dataset_id(path) else absolute_path(path)


def _make_verifier_absolute(verifier: str) -> str:
    file, _, function = verifier.rpartition(":")
    return f"{absolute_path(file)}:{function}" if is_custom_verifier(verifier) else verifier


def absolute_path(path: str) -> str:
    """The path from the root of the file system."""
    return str(Path(path).expanduser().absolute())


def init_state(session: Session, optimizer: Optimizer) -> Generator[EvalReport | CheckpointSaved, None, TrainerState]:
    """Step 0 of a run: seed the random streams, evaluate the base model if eval.every is set, and save it."""
    seed_random_state(session.recipe.train.seed)
    buffer = ReplayBuffer() if session.recipe.guide.experience.replay_fraction else None
    state = TrainerState(step=0, position=0, running_metrics={}, replay_buffer=buffer)
    if session.recipe.eval.every:
        yield evaluate_policy(session, branch=MAIN, step=0)
    yield save_checkpoint(session, optimizer, state, branch=MAIN)
    return state


def trainer_notices(trainer: Trainer) -> Iterator[Notice]:
    """What differs from GRPO in the data order."""
    if trainer.target is not None:
        yield Notice(message=describe_target(trainer.target))
    if trainer.revisits is not None:
        yield Notice(message=trainer.revisits.describe())


def open_trainer(
    session: Session, optimizer: Optimizer, *, branch: str, step: int, active_guide: ActiveGuide | None
) -> Trainer:
    """Repair the logs after a kill, and load the frozen reference model if the loss has a KL term. `step`: the last one
    that was trained."""
    run = session.run
    steps, rollouts = (
        StepLog(run, branch, updates_per_step=session.recipe.train.num_updates),
        RolloutLog(run.rollouts_path(branch)),
    )
    rollouts.repair()
    fork_step = find_first_segment(run, branch).fork_step
    reference = load_reference_policy(session) if session.recipe.loss.kl_coef > 0 else None
    return Trainer(
        session=session,
        optimizer=optimizer,
        steps=steps,
        rollouts=rollouts,
        branch=branch,
        seed_name=find_seed_name(run, branch),
        fork_step=fork_step,
        active_guide=active_guide,
        reference=reference,
        target=open_target(session, fork_step),
        revisits=open_revisits(session, branch, fork_step=fork_step, step=step),
        online_guide=open_online_guide(session, branch),
    )


def open_target(session: Session, fork_step: int) -> ActiveTarget | None:
    """The dense target of a branch, if its recipe has one."""
    if session.teacher is None:
        return None
    return ActiveTarget(settings=session.recipe.target, teacher=session.teacher, fork_step=fork_step)


def open_revisits(session: Session, branch: str, *, fork_step: int, step: int) -> Revisits | None:
    """Standing mistakes or the review queue, from a branch's record up to `step`; None without `order.*`."""
    order, gate = session.recipe.order, session.recipe.guide.inject.max_accuracy
    outcomes = iter_outcomes(session.run, branch, last_step=step)
    if order.review.fraction:
        return ReviewQueue(order.review, seed=session.recipe.train.seed, outcomes=outcomes)
    if not order.mistakes:
        return None
    return StandingMistakes(
        order,
        threshold=gate if order.threshold is None else order.threshold,
        fork_step=fork_step,
        outcomes=outcomes,
    )


def load_reference_policy(session: Session) -> Policy:
    """The base model: with adapters the same model without them, else a second copy from step 0."""
    if session.policy.adapters is not None:
        return session.policy.base_policy
    folder = find_checkpoint(session.run, MAIN, 0).path
    copy = load_policy(session.recipe.model, folder)
    copy.model.requires_grad_(False)
    return shard_policy(copy, session.recipe, folder=folder)


def describe_batch_sizes(recipe: Recipe, *, num_prompts: int) -> str:
    """Rollouts, updates and epochs that follow from the batch settings."""
    train = recipe.train
    updates = "1 update" if train.num_updates == 1 else f"{train.num_updates} updates"
    rollouts = train.prompts_per_step * train.group_size
    epochs = train.num_steps * train.prompts_per_step / num_prompts
    return (
        f"each step: {train.prompts_per_step} prompts x {train.group_size} rollouts = {rollouts} rollouts, {updates}; "
        f"{train.num_steps} steps: {train.num_steps * rollouts:,} rollouts, {epochs:.2f} epochs"
    )

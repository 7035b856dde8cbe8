"""`npo resume`: continue from the newest training state, or roll back to a step and replay from there with a guide.

A rollback is a new branch with weights, optimizer, schedule and data order of the old step and new sampling seeds (the
branch's name is part of every seed). Existing files are not changed.
"""

from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path

from torch.optim import Optimizer

from npo_cli.config.loading import recipe_to_dict
from npo_cli.errors import NpoError, quote_path
from npo_cli.guides.dense_target import open_teacher
from npo_cli.guides.lazy import open_lazy_guide
from npo_cli.guides.privileged import check_privileged_text
from npo_cli.losses.importance_ratio import check_ratio_available
from npo_cli.policy.optimizer import TrainerState, build_optimizer
from npo_cli.rollout.batch import ActiveGuide, check_sft_guide
from npo_cli.rollout.replay_buffer import check_single_guide_source
from npo_cli.session.session import Session, open_session
from npo_cli.session.startup import charge_startup
from npo_cli.session.stop_signal import StopFlag, stop_between_steps
from npo_cli.storage.checkpoints import (
    find_damage,
    list_checkpoints,
)
from npo_cli.storage.costs import append_fork_cost
from npo_cli.storage.files import damaged_file_error
from npo_cli.storage.guide_cache import format_source_option, load_guide, read_cache_info
from npo_cli.storage.interrupted import record_finish
from npo_cli.storage.layout import RunDir, open_run
from npo_cli.storage.lineage import (
    append_segment,
    find_first_segment,
)
from npo_cli.storage.lock import lock_run
from npo_cli.storage.metrics import append_event
from npo_cli.storage.sample_store import SampleStore
from npo_cli.storage.scouts import drop_used_scouts, forget_base
from npo_cli.training.checkpointing import init_state_from_weights, restore_state
from npo_cli.training.loop import grpo_steps
from npo_cli.training.merge import merge_weights, save_merged_start
from npo_cli.training.reward_stop import RewardStop
from npo_cli.training.rollback import apply_rollback_settings
from npo_cli.training.start_point import ResumePoint, choose_start
from npo_cli.training.train import (
    describe_batch_sizes,
    engine_warnings,
    init_state,
    make_paths_absolute,
    open_trainer,
    trainer_notices,
)
from npo_cli.types.guides import GuideCacheInfo
from npo_cli.types.rollouts import CheckpointSaved, EvalReport, Notice, PromptSamples, Segment, TrainingRecord


def resume_run(
    root: Path,
    *,
    overrides: Sequence[str],
    at: int | None,
    guide: str | None,
    source_branch: str | None,
    new_branch: str | None,
    steps: int | None,
    until: int | None = None,
    fresh: bool = False,
    merge: str | None = None,
    stop: StopFlag | None = None,
) -> Iterator[TrainingRecord]:
    """Continue a branch (None: see `find_resume_target`) up to `until`, or fork it at `at` and mix in `guide` for
    `steps` steps, or start from weights that are merged by `merge`."""
    run = open_run(root)
    with lock_run(run), stop_between_steps(stop) as stop:
        drop_used_scouts(run)  # a kill may have come before it
        start = choose_start(
            run,
            overrides=overrides,
            at=at,
            guide=guide,
            source_branch=source_branch,
            new_branch=new_branch,
            steps=steps,
            until=until,
            fresh=fresh,
            merge=merge,
        )
        with (
            open_session(run, start.recipe, checkpoint=start.loaded, trains=True) as session,
            open_active_guide(session, start.segment) as guidance,
        ):
            yield from train_from(session, start, stop, guidance=guidance, overrides=overrides, until=until)


def train_from(
    session: Session,
    start: ResumePoint,
    stop: StopFlag,
    *,
    guidance: ActiveGuide | None = None,
    overrides: Sequence[str] = (),
    until: int | None = None,
) -> Iterator[TrainingRecord]:
    """Train a branch from its start on, in a session that holds the start's weights and recipe."""
    run = session.run
    first = start.segment if start.is_new else find_first_segment(run, start.branch)
    step = 0 if start.checkpoint is None else start.checkpoint.step
    place = {"parent": first.parent, "fork_step": first.fork_step, "step": step}
    check_privileged_text(start.recipe, session.policy, session.task.train, guide=guidance)
    check_sft_guide(start.recipe, guidance, last_step=until or start.recipe.train.num_steps)
    session = replace(session, teacher=open_teacher(run, start.recipe, session.policy, **place))
    optimizer = build_optimizer(session.policy.model, start.recipe.train)
    state = yield from load_first_state(session, optimizer, start)
    record_start(run, start, overrides)
    charge_startup(run, branch=start.branch, step=state.step)
    is_unusual = start.has_fresh_optimizer and not start.segment.is_scout
    yield Notice(message=resume_message(start, state, guidance), level="warning" if is_unusual else "info")
    if start.is_merge_due:
        yield from save_merged_start(session, optimizer, state, branch=start.branch)
    yield Notice(message=describe_batch_sizes(start.recipe, num_prompts=len(session.task.train)))
    yield from damage_warnings(run, start)
    yield from gate_warnings(run, start)
    yield from engine_warnings(session)
    trainer = open_trainer(session, optimizer, branch=start.branch, step=state.step, active_guide=guidance)
    yield from trainer_notices(trainer)
    reward = RewardStop.read(run, start.branch, start.recipe, step=state.step)
    if not reward.is_reached:
        yield from grpo_steps(trainer, state, stop, should_pause=reward.observe, until=until)
    if reward.is_reached:
        yield Notice(message=reward.describe())
    record_finish(run, start.branch)


@contextmanager
def open_active_guide(session: Session, segment: Segment) -> Iterator[ActiveGuide | None]:
    """The segment's guide cache, checked against tokenizer, prompts and vocabulary; a lazy one with its source."""
    if segment.guide_cache is None or segment.guide_until is None:
        yield None
        return
    check_single_guide_source(session, other=f"guide {segment.guide_cache}")
    info, prompts = load_guide(session.run, segment.guide_cache)
    if info.lazy_settings and session.recipe.train.staleness:
        raise NpoError(
            f"guide {info.name} is sampled while training: it is not available with train.staleness above 0",
            f"sample another one before: npo sample-guide {quote_path(session.run.root)} {format_source_option(info)} "
            f"--at {info.learner_step} --name NEW guide.cache.lazy=false",
        )
    if info.tokenizer_digest != session.policy.tokenizer_digest:
        raise NpoError(
            f"guide {info.name} was sampled with another tokenizer; its token ids do not fit this model",
            f"npo sample-guide {quote_path(session.run.root)} {format_source_option(info)} --at {info.learner_step} --name NEW",  # noqa: E501
        )
    check_guide_logprobs(session, info)
    known = {prompt.prompt_id for prompt in session.task.train}
    unknown = sorted(prompts.keys() - known)
    if unknown:
        raise NpoError(
            f"guide {info.name} has prompts that this task does not have: {unknown[0]}", "use this run's own data"
        )
    for samples in prompts.values():
        check_guide_images(session, info, samples)
    rollouts = {prompt_id: samples.rollouts for prompt_id, samples in prompts.items()}
    largest_id = max((max(rollout.response_ids) for kept in rollouts.values() for rollout in kept), default=0)
    if largest_id >= session.policy.model.get_input_embeddings().num_embeddings:
        path = SampleStore(session.run.guide_folder(info.name)).path
        raise damaged_file_error(path, f"the model has no token {largest_id}")
    guide = ActiveGuide(rollouts=rollouts, until_step=segment.guide_until, start_step=segment.fork_step)
    with open_lazy_guide(session, info, guide) if info.lazy_settings else nullcontext(guide) as opened:
        yield opened


def check_guide_images(session: Session, info: GuideCacheInfo, samples: PromptSamples) -> None:
    """Refuse responses to other images than those of the task's prompt."""
    expected = [image.sha256 for image in session.task.prompt(samples.prompt_id).images]
    if expected != [image.sha256 for image in samples.images]:
        raise NpoError(
            f"guide {info.name} was sampled with other images for prompt {samples.prompt_id} than this task has",
            f"restore the old images, or: npo sample-guide {quote_path(session.run.root)} {format_source_option(info)} "
            f"--at {info.learner_step} --name NEW",
        )


def check_guide_logprobs(session: Session, info: GuideCacheInfo) -> None:
    """Refuse an importance ratio that needs log-probabilities of a guide without any."""
    ratio = session.recipe.guide.inject.ratio
    check_ratio_available(ratio, has_logprobs=info.has_logps, guide=f"guide {info.name!r}")


def damage_warnings(run: RunDir, start: ResumePoint) -> Iterator[Notice]:
    """Name the branch's newer checkpoints that are not resumed from, because their training state is damaged."""
    step = -1 if start.checkpoint is None else start.checkpoint.step
    for found in [] if start.is_new else list_checkpoints(run, start.branch):
        damage = find_damage(found.path, training_state=True, deep=False)
        if found.step > step and found.training_state_path.exists() and damage:
            yield Notice(
                message=f"skipped step {found.step} of {start.branch}, whose training state is damaged: {damage}",
                level="warning",
            )


def gate_warnings(run: RunDir, start: ResumePoint) -> Iterator[Notice]:
    """Warn of a guide that was sampled for a lower gate: it lacks prompts of groups that are now injected into."""
    if start.segment.guide_cache is None:
        return
    info, gate = read_cache_info(run.guide_folder(start.segment.guide_cache)), start.recipe.guide.inject.max_accuracy
    if info.max_accuracy is not None and info.max_accuracy < gate:
        yield Notice(
            message=f"guide {info.name} was only sampled on prompts with a recorded accuracy <= {info.max_accuracy}, "
            f"but guide.inject.max_accuracy is {gate}: sample it again with guide.inject.max_accuracy={gate}",
            level="warning",
        )


def record_start(run: RunDir, start: ResumePoint, overrides: Sequence[str]) -> None:
    """Write the recipe, then the segment: a branch that is listed can be opened."""
    recipe = forget_base(run, start.recipe, start.segment) if start.segment.is_scout else start.recipe
    run.save_recipe(start.branch, recipe_to_dict(make_paths_absolute(recipe)))
    if start.is_new:
        append_fork_cost(run, start.segment)
    append_segment(run, start.segment, overrides=overrides)
    if not start.is_new:
        append_event(run, "resumed", {"branch": start.branch})
        return
    details = {"branch": start.branch, "from": start.segment.parent, "at": start.segment.fork_step}
    append_event(run, "scout" if start.segment.is_scout else "rolled_back", details)


def load_first_state(
    session: Session, optimizer: Optimizer, start: ResumePoint
) -> Generator[EvalReport | CheckpointSaved, None, TrainerState]:
    """The checkpoint's state, with merged weights where the branch starts from such, or the state of a run that was
    killed before step 0 was saved."""
    if start.checkpoint is not None:
        restore = init_state_from_weights if start.has_fresh_optimizer else restore_state
        state = restore(session, optimizer, start.checkpoint)
        segment = start.segment if start.is_new else find_first_segment(session.run, start.branch)
        if start.is_merge_due:
            merge_weights(session, segment)
        if segment.is_scout:
            return state
        return apply_rollback_settings(session, optimizer, state, branch_segment=segment)
    return (yield from init_state(session, optimizer))


def resume_message(start: ResumePoint, state: TrainerState, guidance: ActiveGuide | None) -> str:
    """One line about what was restored."""
    if start.checkpoint is None:
        return f"{start.branch} starts from the base model: no checkpoint was saved"
    origin = f"{start.checkpoint.branch} step {state.step}"
    where = f"{origin}: weights, optimizer, data position {state.position}, random streams"
    if not start.is_new:
        return f"{start.branch} continues from {where}"
    if start.begins_adapters:
        where = f"{origin}: new adapters on its frozen weights, data position {state.position}"
    elif start.has_fresh_optimizer:
        where = f"{origin}: weights and data position {state.position} only"
    kind = "scout" if start.segment.is_scout else "new branch"
    so_far = " so far" if guidance and guidance.sample_missing else ""
    suffix = f", {len(guidance.rollouts)} guide rollouts{so_far} until step {guidance.until_step}" if guidance else ""
    merged = f", merged with {start.segment.merge_spec}" if start.is_merge_due else ""
    return f"{kind} {start.branch} from {where}{suffix}{merged}"

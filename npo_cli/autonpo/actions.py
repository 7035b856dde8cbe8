"""What AutoNPO does between two stretches of training, each ending in the fact that the state machine waits for.

GUIDE_GEN: one verified answer of the present policy for each mistake of the slice that will be replayed.

Correct answers of the probe are guides already; the other prompts are sampled up to
`guide.cache.samples_per_prompt` times, the probe's samples included. The cache is an ordinary
one: `npo show RUN guides` lists it, `npo resume` could use it.
"""

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, replace

from npo_cli.autonpo.acceptance_test import run_paired_test
from npo_cli.autonpo.events import (
    ExtrapolationStarted,
    GuideBuilt,
    PrerequisiteMissing,
    ProbeFinished,
    ReplayJudged,
    RollbackDone,
)
from npo_cli.autonpo.probe import find_rollback_candidates, run_probe, start_probe
from npo_cli.errors import NpoError, RunFailed
from npo_cli.extrapolation.in_loop import EXTRAPOLATED_SEED_LABEL, select_extrapolation
from npo_cli.extrapolation.sampler import find_extrapolation
from npo_cli.guides.build_cache import CacheBuild, describe_sampling, fill_cache
from npo_cli.guides.source import PromptResponses
from npo_cli.guides.sources.checkpoint import CheckpointSource
from npo_cli.policy.optimizer import read_trainer_state
from npo_cli.rollout.mistake_pool import stratify_failed_prompts
from npo_cli.session.learner import find_data_position
from npo_cli.session.session import Session, load_checkpoint
from npo_cli.storage.autonpo_log import read_transitions
from npo_cli.storage.checkpoints import Checkpoint, find_checkpoint
from npo_cli.storage.guide_cache import (
    cache_identity,
    cache_info_path,
    finish_guide_cache,
    load_guide,
    open_guide_cache,
    read_cache_info,
)
from npo_cli.storage.layout import RunDir
from npo_cli.storage.lineage import find_first_segment, list_branches
from npo_cli.training.checkpointing import TRAINING_STATE_FOLDER, require_training_state
from npo_cli.training.resume import ResumePoint, record_start
from npo_cli.types.autonpo import AutoNPOState
from npo_cli.types.guides import GuideCacheInfo
from npo_cli.types.rollouts import Progress, Prompt, Rollout, Segment


@dataclass(frozen=True, kw_only=True, slots=True)
class GuideRequest:
    """A guide cache to be made."""

    name: str
    branch: str
    learner: Checkpoint
    """Where the run goes back to."""
    guide: Checkpoint
    """The present policy."""
    num_steps: int
    prompts: tuple[Prompt, ...]
    probe_rollouts: Mapping[str, tuple[Rollout, ...]]
    """What the probe heard, by prompt id."""


def build_guides(session: Session, wanted: GuideRequest) -> Generator[Progress, None, GuideBuilt]:
    """Fill the cache, or find it filled: a killed run asks nothing twice."""
    info = choose_cache_name(session.run, _info(session, wanted))
    folder = session.run.guide_folder(info.name)
    load_checkpoint(session.policy, wanted.guide)
    if cache_info_path(folder).exists() and read_cache_info(folder).complete:
        done = read_cache_info(folder)
    else:
        cache = CacheBuild(info=info, store=open_guide_cache(session.run, info))
        author = CheckpointSource(
            session=session, learner=wanted.learner, guide=wanted.guide, prior_rollouts=wanted.probe_rollouts
        )
        yield from fill_cache(session, cache, wanted.prompts, source=author)
        done = finish_guide_cache(session.run, info)
    return GuideBuilt(
        guide=done.name,
        num_prompts=done.num_prompts,
        num_found=done.num_prompts_with_rollouts,
        num_reused=sum(bool(select_correct_rollouts(wanted.probe_rollouts, prompt)) for prompt in wanted.prompts),
        num_tokens=done.num_tokens,
    )


def select_correct_rollouts(probed: Mapping[str, Sequence[Rollout]], prompt: Prompt) -> list[Rollout]:
    """Answers of the probe that can be guides as they are."""
    return PromptResponses(prompt=prompt, rollouts=tuple(probed.get(prompt.prompt_id, ()))).correct_rollouts


def choose_cache_name(run: RunDir, info: GuideCacheInfo) -> GuideCacheInfo:
    """The name wished for, or `NAME-2`, ... where a cache of another identity has it."""
    number = 1
    while True:
        tried = replace(info, name=info.name if number == 1 else f"{info.name}-{number}")
        path = cache_info_path(run.guide_folder(tried.name))
        if not path.exists() or cache_identity(read_cache_info(path.parent)) == cache_identity(tried):
            return tried
        number += 1


def _info(session: Session, wanted: GuideRequest) -> GuideCacheInfo:
    return GuideCacheInfo(
        name=wanted.name,
        run_id=session.run.run_id,
        branch=wanted.branch,
        learner_step=wanted.learner.step,
        guide_step=wanted.guide.step,
        guide_digest=wanted.guide.digest,
        num_steps=wanted.num_steps,
        tokenizer_digest=session.policy.tokenizer_digest,
        sampling=f"probe {session.recipe.autonpo.probe.samples_per_prompt}, then {describe_sampling(session.recipe)}",
        num_prompts=len(wanted.prompts),
        num_prompts_with_rollouts=0,
        num_samples=0,
        num_tokens=0,
    )


EARLY_GUIDE_NAME = "early"


def perform_probe(
    session: Session, state: AutoNPOState
) -> Generator[Progress, None, ProbeFinished | PrerequisiteMissing]:
    """PROBE: ask again, and choose how far to go back."""
    present = find_present_checkpoint(session.run, state)
    if isinstance(present, str):
        return PrerequisiteMissing(what=present)
    probe = start_probe(session, state.branch, present)
    if not find_rollback_candidates(probe):
        return PrerequisiteMissing(what=f"no full state at any of autonpo.rollback.distances before step {state.step}")
    found = yield from run_probe(probe)
    return ProbeFinished(confirmation=found)


def perform_extrapolation(
    session: Session, state: AutoNPOState
) -> Generator[Progress, None, ExtrapolationStarted | PrerequisiteMissing]:
    """PUSH: a branch is born that goes on from here, its hard groups answered by the policy pushed along its motion."""
    yield Progress(description="push", done=0, total=1)
    push, every = select_extrapolation(session.recipe, None), session.recipe.train.save_every
    try:
        motion = find_extrapolation(session.run, state.branch, push, step=state.step, every=every)
    except NpoError as error:
        return PrerequisiteMissing(what=error.message)
    if motion is None:
        return PrerequisiteMissing(what=f"step {state.step} is less than extrapolation.k={push.k} steps from the start")
    until = state.step + session.recipe.autonpo.extrapolate
    segment = Segment(
        branch=EXTRAPOLATED_SEED_LABEL,
        parent=state.branch,
        fork_step=state.step,
        guide_cache=None,
        guide_until=None,
        extrapolation_until=until,
    )
    return ExtrapolationStarted(branch=create_branch(session, segment), until_step=until)


def perform_guide_build(
    session: Session, state: AutoNPOState
) -> Generator[Progress, None, GuideBuilt | PrerequisiteMissing]:
    """GUIDE_GEN: answers of the present policy for the mistakes of the slice, and for nothing else."""
    present = find_present_checkpoint(session.run, state)
    if isinstance(present, str):
        return PrerequisiteMissing(what=present)
    to_step = rollback_target(state)
    try:
        learner = find_checkpoint(session.run, state.branch, to_step)
        require_training_state(session.run, learner)
    except NpoError as error:
        return PrerequisiteMissing(what=error.message)
    wanted = GuideRequest(
        name=EARLY_GUIDE_NAME if state.is_early else f"auto-{state.num_interventions + 1}",
        branch=state.branch,
        learner=learner,
        guide=present,
        num_steps=session.recipe.autonpo.early.replay_steps if state.is_early else state.step - to_step,
        prompts=select_failed_prompts(session, state, present),
        probe_rollouts={} if state.is_early else read_probe_rollouts(session, state, present),
    )
    return (yield from build_guides(session, wanted))


def perform_rollback(
    session: Session, state: AutoNPOState
) -> Generator[Progress, None, RollbackDone | PrerequisiteMissing]:
    """ROLLBACK: a branch is born that leaves the present one `distance` steps ago; the old one stays as it is."""
    yield Progress(description="roll back", done=0, total=1)
    guide = next(move.evidence["guide"] for move in reversed(read_transitions(session.run)) if move.event == "guided")
    try:
        info, _ = load_guide(session.run, guide)
    except NpoError as error:
        return PrerequisiteMissing(what=error.message)
    until = info.learner_step + info.num_steps
    segment = Segment(
        branch=guide, parent=state.branch, fork_step=info.learner_step, guide_cache=guide, guide_until=until
    )
    return RollbackDone(branch=create_branch(session, segment), to_step=info.learner_step, until_step=until)


def create_branch(session: Session, segment: Segment) -> str:
    """Name of the branch, which exists from now on; a killed driver may have made it before."""
    segment = replace(segment, branch=choose_intervention_branch(session.run, segment))
    if segment.branch not in list_branches(session.run):
        start = ResumePoint(recipe=session.recipe, branch=segment.branch, checkpoint=None, segment=segment, is_new=True)
        record_start(session.run, start, ())
    return segment.branch


def perform_acceptance_test(
    session: Session, state: AutoNPOState
) -> Generator[Progress, None, ReplayJudged | PrerequisiteMissing]:
    """JUDGE: the replayed policy against the one that was left, on held-out prompts."""
    yield Progress(description="held-out test", done=0, total=1)
    parent = find_first_segment(session.run, state.branch).parent
    assert parent is not None, "a replay left another branch"
    try:
        replayed = find_checkpoint(session.run, state.branch, state.step)
        abandoned = find_checkpoint(session.run, parent, state.step)
        test = run_paired_test(session, replayed, abandoned)
    except RunFailed:
        raise
    except NpoError as error:
        return PrerequisiteMissing(what=error.message)
    return ReplayJudged(is_worse=test.is_worse, evidence=test.to_row(), parent=parent)


def find_present_checkpoint(run: RunDir, state: AutoNPOState) -> Checkpoint | str:
    """The full state of the step at hand, or what is wrong with it."""
    try:
        present = find_checkpoint(run, state.branch, state.step)
        require_training_state(run, present)
    except NpoError as error:
        return error.message
    return present


def rollback_target(state: AutoNPOState) -> int:
    """The step to which the chosen distance leads."""
    assert state.distance is not None, "a distance was chosen"
    return state.step - state.distance


def last_event(run: RunDir) -> str:
    """The event that led into the present phase; new settings are none."""
    return [move.event for move in read_transitions(run) if move.event != "started"][-1]


def select_failed_prompts(session: Session, state: AutoNPOState, present: Checkpoint) -> tuple[Prompt, ...]:
    """The mistakes of the last `distance` steps, in the order in which the replay meets them."""
    distance = state.step - rollback_target(state)
    mistakes = read_trainer_state(present.path / TRAINING_STATE_FOLDER).failed_prompts
    (only,) = stratify_failed_prompts(
        mistakes, step=state.step, distances=[distance], tau=session.recipe.autonpo.pool.max_accuracy
    )
    failed = set(only.prompt_ids)
    num_steps = session.recipe.autonpo.early.replay_steps if state.is_early else distance
    first = find_data_position(session.run, state.branch, rollback_target(state))
    last = find_data_position(session.run, state.branch, rollback_target(state) + num_steps)
    return tuple(prompt for prompt in session.prompts_between(first, last) if prompt.prompt_id in failed)


def read_probe_rollouts(
    session: Session, state: AutoNPOState, present: Checkpoint
) -> Mapping[str, tuple[Rollout, ...]]:
    """What the confirmation heard, by prompt id."""
    journal = start_probe(session, state.branch, present).folder.rollouts
    return {group.prompt.prompt_id: group.rollouts for _, group in journal.iter_groups()}


def choose_intervention_branch(run: RunDir, segment: Segment) -> str:
    """The guide's name for the branch, or `NAME-2`, ...; the branch that a killed driver had made is taken up again.

    A folder that no segment lists is what a driver left that was killed before the branch was born: nothing is in it.
    """
    known, number = list_branches(run), 1
    while True:
        name = segment.branch if number == 1 else f"{segment.branch}-{number}"
        if name not in known or find_first_segment(run, name) == replace(segment, branch=name):
            return name
        number += 1

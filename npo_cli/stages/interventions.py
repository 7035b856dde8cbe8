"""What AutoNPO does between two stretches of training, each ending in the fact that the state machine waits for."""

from collections.abc import Generator, Mapping
from dataclasses import replace

from npo_cli.auto_records import AutoNPOState
from npo_cli.errors import NpoError, RunFailed
from npo_cli.guide.facts import ProbeFinished, GuideBuilt, ReplayJudged, PrerequisiteMissing, ExtrapolationStarted, RollbackDone
from npo_cli.guide.mistakes import stratify_failed_prompts
from npo_cli.policy.optimizer import read_trainer_state
from npo_cli.records import Progress, Prompt, Rollout, Segment
from npo_cli.run_dir.auto import read_transitions
from npo_cli.run_dir.checkpoints import Checkpoint, find_checkpoint
from npo_cli.run_dir.guides import load_guide
from npo_cli.run_dir.lineage import find_first_segment, list_branches
from npo_cli.run_dir.paths import RunDir
from npo_cli.stages.ahead import find_extrapolation
from npo_cli.stages.auto_guides import GuideRequest, build_guides
from npo_cli.stages.confirm import run_probe, start_probe, find_rollback_candidates
from npo_cli.stages.extrapolation import EXTRAPOLATED_SEED_LABEL, select_extrapolation
from npo_cli.stages.judge import run_paired_test
from npo_cli.stages.resume import ResumePoint, record_start
from npo_cli.stages.saving import TRAINING_STATE_FOLDER, require_training_state
from npo_cli.stages.segment import find_data_position
from npo_cli.stages.world import Session

EARLY_GUIDE_NAME = "early"


def perform_probe(world: Session, state: AutoNPOState) -> Generator[Progress, None, ProbeFinished | PrerequisiteMissing]:
    """PROBE: ask again, and choose how far to go back."""
    present = find_present_checkpoint(world.run, state)
    if isinstance(present, str):
        return PrerequisiteMissing(what=present)
    probe = start_probe(world, state.branch, present)
    if not find_rollback_candidates(probe):
        return PrerequisiteMissing(what=f"no full state at any of autonpo.rollback.distances before step {state.step}")
    found = yield from run_probe(probe)
    return ProbeFinished(confirmation=found)


def perform_extrapolation(world: Session, state: AutoNPOState) -> Generator[Progress, None, ExtrapolationStarted | PrerequisiteMissing]:
    """PUSH: a branch is born that goes on from here, its hard groups answered by the policy pushed along its motion."""
    yield Progress(description="push", done=0, total=1)
    push, every = select_extrapolation(world.recipe, None), world.recipe.train.save_every
    try:
        motion = find_extrapolation(world.run, state.branch, push, step=state.step, every=every)
    except NpoError as error:
        return PrerequisiteMissing(what=error.message)
    if motion is None:
        return PrerequisiteMissing(what=f"step {state.step} is less than extrapolation.k={push.k} steps from the start")
    until = state.step + world.recipe.autonpo.extrapolate
    segment = Segment(
        branch=EXTRAPOLATED_SEED_LABEL, parent=state.branch, fork_step=state.step, guide_cache=None, guide_until=None, extrapolation_until=until
    )
    return ExtrapolationStarted(branch=create_branch(world, segment), until_step=until)


def perform_guide_build(world: Session, state: AutoNPOState) -> Generator[Progress, None, GuideBuilt | PrerequisiteMissing]:
    """GUIDE_GEN: answers of the present policy for the mistakes of the slice, and for nothing else."""
    present = find_present_checkpoint(world.run, state)
    if isinstance(present, str):
        return PrerequisiteMissing(what=present)
    to_step = rollback_target(state)
    try:
        learner = find_checkpoint(world.run, state.branch, to_step)
        require_training_state(world.run, learner)
    except NpoError as error:
        return PrerequisiteMissing(what=error.message)
    wanted = GuideRequest(
        name=EARLY_GUIDE_NAME if state.is_early else f"auto-{state.num_interventions + 1}",
        branch=state.branch,
        learner=learner,
        guide=present,
        num_steps=world.recipe.autonpo.early.replay_steps if state.is_early else state.step - to_step,
        prompts=select_failed_prompts(world, state, present),
        probe_rollouts={} if state.is_early else read_probe_rollouts(world, state, present),
    )
    return (yield from build_guides(world, wanted))


def perform_rollback(world: Session, state: AutoNPOState) -> Generator[Progress, None, RollbackDone | PrerequisiteMissing]:
    """ROLLBACK: a branch is born that leaves the present one `distance` steps ago; the old one stays as it is."""
    yield Progress(description="roll back", done=0, total=1)
    guide = next(move.evidence["guide"] for move in reversed(read_transitions(world.run)) if move.event == "guided")
    try:
        info, _ = load_guide(world.run, guide)
    except NpoError as error:
        return PrerequisiteMissing(what=error.message)
    until = info.learner_step + info.num_steps
    segment = Segment(branch=guide, parent=state.branch, fork_step=info.learner_step, guide_cache=guide, guide_until=until)
    return RollbackDone(branch=create_branch(world, segment), to_step=info.learner_step, until_step=until)


def create_branch(world: Session, segment: Segment) -> str:
    """Name of the branch, which exists from now on; a killed driver may have made it before."""
    segment = replace(segment, branch=choose_intervention_branch(world.run, segment))
    if segment.branch not in list_branches(world.run):
        start = ResumePoint(recipe=world.recipe, branch=segment.branch, checkpoint=None, segment=segment, is_new=True)
        record_start(world.run, start, ())
    return segment.branch


def perform_acceptance_test(world: Session, state: AutoNPOState) -> Generator[Progress, None, ReplayJudged | PrerequisiteMissing]:
    """JUDGE: the replayed policy against the one that was left, on held-out prompts."""
    yield Progress(description="held-out test", done=0, total=1)
    parent = find_first_segment(world.run, state.branch).parent
    assert parent is not None, "a replay left another branch"
    try:
        replayed = find_checkpoint(world.run, state.branch, state.step)
        abandoned = find_checkpoint(world.run, parent, state.step)
        test = run_paired_test(world, replayed, abandoned)
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


def select_failed_prompts(world: Session, state: AutoNPOState, present: Checkpoint) -> tuple[Prompt, ...]:
    """The mistakes of the last `distance` steps, in the order in which the replay meets them."""
    distance = state.step - rollback_target(state)
    mistakes = read_trainer_state(present.path / TRAINING_STATE_FOLDER).failed_prompts
    (only,) = stratify_failed_prompts(mistakes, step=state.step, distances=[distance], tau=world.recipe.autonpo.pool.max_accuracy)
    failed = set(only.prompt_ids)
    num_steps = world.recipe.autonpo.early.replay_steps if state.is_early else distance
    first = find_data_position(world.run, state.branch, rollback_target(state))
    last = find_data_position(world.run, state.branch, rollback_target(state) + num_steps)
    return tuple(prompt for prompt in world.prompts_between(first, last) if prompt.prompt_id in failed)


def read_probe_rollouts(world: Session, state: AutoNPOState, present: Checkpoint) -> Mapping[str, tuple[Rollout, ...]]:
    """What the confirmation heard, by prompt id."""
    journal = start_probe(world, state.branch, present).folder.rollouts
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

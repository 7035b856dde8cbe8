"""What AutoNPO does between two stretches of training, each ending in the fact that the state machine waits for."""

from collections.abc import Generator, Mapping
from dataclasses import replace

from npo_cli.auto_records import AutoState
from npo_cli.errors import NpoError, RunFailed
from npo_cli.guide.facts import Confirmed, Guided, Judged, Missed, Pushed, RolledBack
from npo_cli.guide.mistakes import strata_of
from npo_cli.policy.optimizer import peek_state
from npo_cli.records import Progress, Prompt, Rollout, Segment
from npo_cli.run_dir.auto import transitions
from npo_cli.run_dir.checkpoints import Checkpoint, find_checkpoint
from npo_cli.run_dir.guides import load_guide
from npo_cli.run_dir.lineage import birth_segment, branches
from npo_cli.run_dir.paths import RunDir
from npo_cli.stages.ahead import motion_at
from npo_cli.stages.auto_guides import Wanted, made_guides
from npo_cli.stages.confirm import confirmed, open_confirmation, places_back
from npo_cli.stages.extrapolation import AHEAD, push_in_force
from npo_cli.stages.judge import paired_test
from npo_cli.stages.resume import Start, record_start
from npo_cli.stages.saving import ANCHOR, need_state
from npo_cli.stages.segment import position_at
from npo_cli.stages.world import World

EARLY = "early"


def confirmed_fact(world: World, state: AutoState) -> Generator[Progress, None, Confirmed | Missed]:
    """PROBE: ask again, and choose how far to go back."""
    present = present_policy(world.run, state)
    if isinstance(present, str):
        return Missed(what=present)
    probe = open_confirmation(world, state.branch, present)
    if not places_back(probe):
        return Missed(what=f"no full state at any of autonpo.rollback.distances before step {state.step}")
    found = yield from confirmed(probe)
    return Confirmed(confirmation=found)


def pushed_fact(world: World, state: AutoState) -> Generator[Progress, None, Pushed | Missed]:
    """PUSH: a branch is born that goes on from here, its hard groups answered by the policy pushed along its motion."""
    yield Progress(what="push", done=0, total=1)
    push, every = push_in_force(world.recipe, None), world.recipe.train.save_every
    try:
        motion = motion_at(world.run, state.branch, push, step=state.step, every=every)
    except NpoError as error:
        return Missed(what=error.message)
    if motion is None:
        return Missed(what=f"step {state.step} is less than extrapolation.k={push.k} steps from the start")
    until = state.step + world.recipe.autonpo.extrapolate
    segment = Segment(
        branch=AHEAD, parent=state.branch, fork_step=state.step, guide=None, guide_until=None, ahead_until=until
    )
    return Pushed(branch=born(world, segment), until=until)


def guided_fact(world: World, state: AutoState) -> Generator[Progress, None, Guided | Missed]:
    """GUIDE_GEN: answers of the present policy for the mistakes of the slice, and for nothing else."""
    present = present_policy(world.run, state)
    if isinstance(present, str):
        return Missed(what=present)
    to_step = back_to(state)
    try:
        learner = find_checkpoint(world.run, state.branch, to_step)
        need_state(world.run, learner)
    except NpoError as error:
        return Missed(what=error.message)
    wanted = Wanted(
        name=EARLY if state.early else f"auto-{state.interventions + 1}",
        branch=state.branch,
        learner=learner,
        guide=present,
        num_steps=world.recipe.autonpo.early.replay_steps if state.early else state.step - to_step,
        prompts=slice_prompts(world, state, present),
        probed={} if state.early else probed_answers(world, state, present),
    )
    return (yield from made_guides(world, wanted))


def rolled_back_fact(world: World, state: AutoState) -> Generator[Progress, None, RolledBack | Missed]:
    """ROLLBACK: a branch is born that leaves the present one `distance` steps ago; the old one stays as it is."""
    yield Progress(what="roll back", done=0, total=1)
    guide = next(move.evidence["guide"] for move in reversed(transitions(world.run)) if move.event == "guided")
    try:
        info, _ = load_guide(world.run, guide)
    except NpoError as error:
        return Missed(what=error.message)
    until = info.at_step + info.num_steps
    segment = Segment(branch=guide, parent=state.branch, fork_step=info.at_step, guide=guide, guide_until=until)
    return RolledBack(branch=born(world, segment), to_step=info.at_step, until=until)


def born(world: World, segment: Segment) -> str:
    """Name of the branch, which exists from now on; a killed driver may have made it before."""
    segment = replace(segment, branch=branch_for(world.run, segment))
    if segment.branch not in branches(world.run):
        start = Start(recipe=world.recipe, branch=segment.branch, checkpoint=None, segment=segment, is_new=True)
        record_start(world.run, start, ())
    return segment.branch


def judged_fact(world: World, state: AutoState) -> Generator[Progress, None, Judged | Missed]:
    """JUDGE: the replayed policy against the one that was left, on held-out prompts."""
    yield Progress(what="held-out test", done=0, total=1)
    parent = birth_segment(world.run, state.branch).parent
    assert parent is not None, "a replay left another branch"
    try:
        replayed = find_checkpoint(world.run, state.branch, state.step)
        abandoned = find_checkpoint(world.run, parent, state.step)
        test = paired_test(world, replayed, abandoned)
    except RunFailed:
        raise
    except NpoError as error:
        return Missed(what=error.message)
    return Judged(worse=test.worse, evidence=test.row(), parent=parent)


def present_policy(run: RunDir, state: AutoState) -> Checkpoint | str:
    """The full state of the step at hand, or what is wrong with it."""
    try:
        present = find_checkpoint(run, state.branch, state.step)
        need_state(run, present)
    except NpoError as error:
        return error.message
    return present


def back_to(state: AutoState) -> int:
    """The step to which the chosen distance leads."""
    assert state.distance is not None, "a distance was chosen"
    return state.step - state.distance


def last_event(run: RunDir) -> str:
    """The event that led into the present phase; new settings are none."""
    return [move.event for move in transitions(run) if move.event != "started"][-1]


def slice_prompts(world: World, state: AutoState, present: Checkpoint) -> tuple[Prompt, ...]:
    """The mistakes of the last `distance` steps, in the order in which the replay meets them."""
    distance = state.step - back_to(state)
    mistakes = peek_state(present.path / ANCHOR).mistakes
    (only,) = strata_of(mistakes, step=state.step, distances=[distance], tau=world.recipe.autonpo.pool.max_accuracy)
    failed = set(only.prompt_ids)
    num_steps = world.recipe.autonpo.early.replay_steps if state.early else distance
    first = position_at(world.run, state.branch, back_to(state))
    last = position_at(world.run, state.branch, back_to(state) + num_steps)
    return tuple(prompt for prompt in world.prompts_between(first, last) if prompt.prompt_id in failed)


def probed_answers(world: World, state: AutoState, present: Checkpoint) -> Mapping[str, tuple[Rollout, ...]]:
    """What the confirmation heard, by prompt id."""
    journal = open_confirmation(world, state.branch, present).folder.rollouts
    return {group.prompt.prompt_id: group.rollouts for _, group in journal.iter_groups()}


def branch_for(run: RunDir, segment: Segment) -> str:
    """The guide's name for the branch, or `NAME-2`, ...; the branch that a killed driver had made is taken up again.

    A folder that no segment lists is what a driver left that was killed before the branch was born: nothing is in it.
    """
    known, number = branches(run), 1
    while True:
        name = segment.branch if number == 1 else f"{segment.branch}-{number}"
        if name not in known or birth_segment(run, name) == replace(segment, branch=name):
            return name
        number += 1

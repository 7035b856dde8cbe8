"""What the driver does in PROBE, GUIDE_GEN, ROLLBACK and ACCEPTANCE_TEST; each action ends in an event.

GUIDE_GEN builds an ordinary guide cache with responses of the current policy to the failed prompts of the segment that
will be replayed. Correct rollouts of the probe are reused; the other prompts are sampled up to
`guide.cache.samples_per_prompt` times, the probe's samples included. A killed action samples nothing twice.
"""

import time
from collections.abc import Generator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace

import numpy

from npo_cli.autonpo.controller import (
    GuideBuilt,
    PrerequisiteMissing,
    ProbeFinished,
    ReplayTested,
    RollbackDone,
)
from npo_cli.autonpo.probe import find_rollback_candidates, run_probe, select_failed_prompts, start_probe
from npo_cli.errors import NpoError, RunFailed
from npo_cli.guides.build_cache import fill_cache, new_cache_info
from npo_cli.guides.source import ReplayTarget, filter_correct, make_spec
from npo_cli.guides.sources.checkpoint import CheckpointSource
from npo_cli.policy.weights_io import hold_weights
from npo_cli.scoring.quality import cluster_interval
from npo_cli.seeds import derive_seed
from npo_cli.session.learner import Learner
from npo_cli.session.session import Session, count_generated_tokens, load_checkpoint, sample_groups
from npo_cli.storage.autonpo_log import read_transitions
from npo_cli.storage.checkpoints import Checkpoint, find_checkpoint
from npo_cli.storage.costs import append_cost
from npo_cli.storage.guide_cache import (
    cache_identity,
    cache_info_path,
    finish_guide_cache,
    load_guide,
    open_guide_cache,
    read_cache_info,
)
from npo_cli.storage.layout import RunDir
from npo_cli.storage.lineage import find_first_segment, list_branches, list_recorded_branches
from npo_cli.training.checkpointing import require_training_state
from npo_cli.training.resume import record_start
from npo_cli.training.start_point import ResumePoint
from npo_cli.types.autonpo import AutoNPOState
from npo_cli.types.guides import GuideCacheInfo
from npo_cli.types.rollouts import Group, Progress, Rollout, Segment

EARLY_GUIDE_NAME = "early"
"""Of the guide cache of an early bootstrap and of its branch."""
NUM_TEST_RESAMPLES = 2000

ProbeRollouts = Mapping[str, tuple[Rollout, ...]]
"""Rollouts of a probe by prompt id."""


def require_full_checkpoint(run: RunDir, branch: str, step: int) -> Checkpoint:
    """The checkpoint with its training state; an NpoError says what is missing."""
    checkpoint = find_checkpoint(run, branch, step)
    require_training_state(run, checkpoint)
    return checkpoint


# PROBE


def perform_probe(
    session: Session, state: AutoNPOState
) -> Generator[Progress, None, ProbeFinished | PrerequisiteMissing]:
    """Sample failed prompts again, and choose how far to roll back."""
    try:
        current = require_full_checkpoint(session.run, state.branch, state.step)
    except NpoError as error:
        return PrerequisiteMissing(reason=error.message)
    probe = start_probe(session, state, current)
    if not find_rollback_candidates(probe):
        return PrerequisiteMissing(
            reason=f"no full checkpoint {' or '.join(map(str, probe.distances))} steps before step {state.step}"
        )
    with hold_weights():
        return ProbeFinished(result=(yield from run_probe(probe)))


# GUIDE_GEN


def perform_guide_build(
    session: Session, state: AutoNPOState
) -> Generator[Progress, None, GuideBuilt | PrerequisiteMissing]:
    """Build the guide cache of the segment's failed prompts, and of no others; a complete cache is only read."""
    run, autonpo, to_step = session.run, session.recipe.autonpo, rollback_target(state)
    try:
        current = require_full_checkpoint(run, state.branch, state.step)
        learner = require_full_checkpoint(run, state.branch, to_step)
    except NpoError as error:
        return PrerequisiteMissing(reason=error.message)
    prompts = select_failed_prompts(session, state, current)
    probe_rollouts = read_probe_rollouts(session, state, current)
    num_steps = autonpo.early.replay_steps if state.is_early else state.step - to_step
    target = ReplayTarget(
        run=run, learner=Learner(recipe=session.recipe, branch=state.branch, checkpoint=learner), steps=num_steps
    )
    source = CheckpointSource(make_spec("checkpoint", {"step": current.step}), target)
    source.checkpoint, source.prior_rollouts = current, probe_rollouts
    source.open(session)
    name = EARLY_GUIDE_NAME if state.is_early else f"auto-{state.num_interventions + 1}"
    wanted = new_cache_info(source, name, num_prompts=len(prompts))
    sampling = f"probe {autonpo.probe.samples_per_prompt}, then {wanted.sampling}"
    info = choose_cache_name(run, replace(wanted, sampling=sampling))
    if not is_complete(run, info.name):
        yield from fill_cache(source, info, open_guide_cache(run, info), prompts)
        finish_guide_cache(run, info)
    done = read_cache_info(run.guide_folder(info.name))
    if not done.num_prompts_with_rollouts:
        charge_empty_cache(session, state, done)
    return GuideBuilt(
        guide=done.name,
        num_prompts=done.num_prompts,
        num_prompts_with_rollouts=done.num_prompts_with_rollouts,
        num_reused=sum(bool(filter_correct(probe_rollouts.get(prompt.prompt_id, ()))) for prompt in prompts),
        num_tokens=done.num_tokens,
    )


def charge_empty_cache(session: Session, state: AutoNPOState, info: GuideCacheInfo) -> None:
    """The branch that continues without a rollback pays for the guide samples, from its next step on."""
    folder = session.run.guide_folder(info.name)
    append_cost(
        session.run, "guide_empty", branch=state.branch, step=state.step, piece=info.name, seconds=0.0, charged=[folder]
    )


def rollback_target(state: AutoNPOState) -> int:
    """The step that the chosen distance leads to."""
    assert state.distance is not None, "a distance was chosen"
    return state.step - state.distance


def read_probe_rollouts(session: Session, state: AutoNPOState, current: Checkpoint) -> ProbeRollouts:
    """Everything that the probe of the current policy sampled."""
    store = start_probe(session, state, current).store
    return {prompt_id: samples.rollouts for prompt_id, samples in store.read_prompts().items()}


def choose_cache_name(run: RunDir, info: GuideCacheInfo) -> GuideCacheInfo:
    """The wanted name, or `NAME-2`, `NAME-3`, ... if a cache of another identity has it."""
    number = 1
    while True:
        named = replace(info, name=info.name if number == 1 else f"{info.name}-{number}")
        path = cache_info_path(run.guide_folder(named.name))
        if not path.exists() or cache_identity(read_cache_info(path.parent)) == cache_identity(named):
            return named
        number += 1


def is_complete(run: RunDir, name: str) -> bool:
    """Whether a guide cache exists and is complete."""
    folder = run.guide_folder(name)
    return cache_info_path(folder).exists() and read_cache_info(folder).complete


# ROLLBACK


def perform_rollback(
    session: Session, state: AutoNPOState
) -> Generator[Progress, None, RollbackDone | PrerequisiteMissing]:
    """Create a branch that forks from the current one `distance` steps ago; the current branch stays as it is."""
    yield Progress(description="roll back", done=0, total=1)
    built = [transition for transition in read_transitions(session.run) if transition.event == "guide_built"]
    guide = built[-1].evidence["guide"]
    try:
        info, _ = load_guide(session.run, guide)
    except NpoError as error:
        return PrerequisiteMissing(reason=error.message)
    until = info.learner_step + info.num_steps
    segment = Segment(
        branch=guide, parent=state.branch, fork_step=info.learner_step, guide_cache=guide, guide_until=until
    )
    segment = replace(segment, branch=choose_intervention_branch(session.run, segment))
    if segment.branch not in list_branches(session.run):
        start = ResumePoint(recipe=session.recipe, branch=segment.branch, checkpoint=None, segment=segment, is_new=True)
        record_start(session.run, start, ())
    return RollbackDone(branch=segment.branch, to_step=info.learner_step, until_step=until)


def choose_intervention_branch(run: RunDir, segment: Segment) -> str:
    """The guide's name, or `NAME-2`, `NAME-3`, ...; a branch that a killed driver created for it is used again.

    A folder without a segment was left by a driver that was killed before the branch existed: it is empty.
    """
    branches, taken, number = list_branches(run), list_recorded_branches(run), 1
    while True:
        name = segment.branch if number == 1 else f"{segment.branch}-{number}"
        if name not in taken or (name in branches and find_first_segment(run, name) == replace(segment, branch=name)):
            return name
        number += 1


# ACCEPTANCE_TEST


@dataclass(frozen=True, kw_only=True, slots=True)
class PairedTest:
    """Held-out accuracy of two policies at one step, and the difference with its 95 % interval."""

    replayed_accuracy: float
    abandoned_accuracy: float
    difference: float
    """replayed - abandoned."""
    difference_low: float
    difference_high: float
    num_prompts: int
    num_tokens: int

    @property
    def is_worse(self) -> bool:
        """The whole interval of the difference lies below 0."""
        return self.difference_high < 0


def perform_acceptance_test(
    session: Session, state: AutoNPOState
) -> Generator[Progress, None, ReplayTested | PrerequisiteMissing]:
    """Compare the replayed policy with the one that it replaces, on held-out prompts.

    With this test the held-out split has selected a branch: its accuracy is no longer that of unseen data.
    """
    yield Progress(description="held-out test", done=0, total=1)
    parent = find_first_segment(session.run, state.branch).parent
    assert parent is not None, "a replay forks from another branch"
    try:
        replayed = find_checkpoint(session.run, state.branch, state.step)
        abandoned = find_checkpoint(session.run, parent, state.step)
        test = run_paired_test(session, replayed, abandoned)
    except RunFailed:
        raise
    except NpoError as error:
        return PrerequisiteMissing(reason=error.message)
    return ReplayTested(is_worse=test.is_worse, evidence=asdict(test), parent=parent)


def run_paired_test(session: Session, replayed: Checkpoint, abandoned: Checkpoint) -> PairedTest:
    """eval.samples_per_prompt responses of each policy to the same prompts with the same seeds.

    The interval is a bootstrap of the paired differences over prompts.
    """
    began = time.perf_counter()
    ours, theirs = _sample_heldout(session, replayed), _sample_heldout(session, abandoned)
    tokens = count_generated_tokens(ours) + count_generated_tokens(theirs)
    seconds = time.perf_counter() - began
    differences = [_accuracy(mine) - _accuracy(other) for mine, other in zip(ours, theirs, strict=True)]
    rng = numpy.random.default_rng(derive_seed(session.recipe.train.seed, "judge", replayed.branch, replayed.step))
    low, high = paired_interval(differences, rng)
    test = PairedTest(
        replayed_accuracy=sum(map(_accuracy, ours)) / len(ours),
        abandoned_accuracy=sum(map(_accuracy, theirs)) / len(theirs),
        difference=sum(differences) / len(differences),
        difference_low=low,
        difference_high=high,
        num_prompts=len(differences),
        num_tokens=tokens,
    )
    charge_acceptance_test(session.run, replayed, abandoned, test=test, seconds=seconds)
    return test


def charge_acceptance_test(
    run: RunDir, replayed: Checkpoint, abandoned: Checkpoint, *, test: PairedTest, seconds: float
) -> None:
    """The branch that continues pays for the test; if the replay is rejected, also for the replay and its guide."""
    guide = find_first_segment(run, replayed.branch).guide_cache
    rejected = [run.branch_folder(replayed.branch), *([] if guide is None else [run.guide_folder(guide)])]
    append_cost(
        run,
        "acceptance_test",
        branch=abandoned.branch if test.is_worse else replayed.branch,
        step=replayed.step,
        artifact=run.branch_folder(replayed.branch) / "acceptance_test",
        tokens=test.num_tokens,
        seconds=seconds,
        charged=rejected if test.is_worse else (),
    )


def paired_interval(differences: Sequence[float], rng: numpy.random.Generator) -> tuple[float, float]:
    """95 % interval of the mean difference.

    Differences in [-1, 1] are mapped to [0, 1] and back, so that equal differences do not give a width of zero.
    """
    low, high = cluster_interval([(1 + each) / 2 for each in differences], rng, NUM_TEST_RESAMPLES)
    return 2 * low - 1, 2 * high - 1


def _sample_heldout(session: Session, checkpoint: Checkpoint) -> list[Group]:
    load_checkpoint(session.policy, checkpoint)
    slots = range(session.recipe.eval.samples_per_prompt)
    return sample_groups(
        session, session.task.heldout, seed_label=("judge",), slots=slots, sampler_step=checkpoint.step
    )


def _accuracy(group: Group) -> float:
    return sum(rollout.verdict == "correct" for rollout in group.rollouts) / len(group.rollouts)

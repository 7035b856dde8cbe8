"""JUDGE: is the replayed branch worse than the one it replaces? A paired test on the held-out prompts.

Both policies answer the same prompts with the same seeds; prompts are resampled in pairs. With this test on, the
held-out split has chosen a branch, and its accuracy is no longer that of unseen data.
"""

import time
from dataclasses import asdict, dataclass

import numpy

from npo_cli.scoring.quality import cluster_interval
from npo_cli.seeds import derive_seed
from npo_cli.session.session import Session, count_generated_tokens, load_checkpoint, sample_groups
from npo_cli.storage.checkpoints import Checkpoint
from npo_cli.storage.costs import append_cost
from npo_cli.storage.layout import RunDir
from npo_cli.storage.lineage import find_first_segment
from npo_cli.types.rollouts import Group


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

    def to_row(self) -> dict[str, float]:
        """As evidence of a transition."""
        return asdict(self)


def run_paired_test(session: Session, replayed: Checkpoint, abandoned: Checkpoint) -> PairedTest:
    """eval.samples_per_prompt responses of each policy; interval: a bootstrap of the paired differences over "
    "prompts."""
    began = time.perf_counter()
    ours, theirs = _answers(session, replayed), _answers(session, abandoned)
    tokens = count_generated_tokens(ours) + count_generated_tokens(theirs)
    seconds = time.perf_counter() - began
    differences = [_share(mine) - _share(other) for mine, other in zip(ours, theirs, strict=True)]
    rng = numpy.random.default_rng(derive_seed(session.recipe.train.seed, "judge", replayed.branch, replayed.step))
    low, high = paired_interval(differences, rng)
    test = PairedTest(
        replayed_accuracy=sum(map(_share, ours)) / len(ours),
        abandoned_accuracy=sum(map(_share, theirs)) / len(theirs),
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
    """The branch that goes on pays for the test; where the replay is reverted, also for the replay and its guide."""
    guide = find_first_segment(run, replayed.branch).guide_cache
    reverted = [run.branch_folder(replayed.branch), *([] if guide is None else [run.guide_folder(guide)])]
    append_cost(
        run,
        "acceptance_test",
        branch=abandoned.branch if test.is_worse else replayed.branch,
        step=replayed.step,
        artifact=run.branch_folder(replayed.branch) / "acceptance_test",
        tokens=test.num_tokens,
        seconds=seconds,
        charged=reverted if test.is_worse else (),
    )


def paired_interval(differences: list[float], rng: numpy.random.Generator) -> tuple[float, float]:
    """Of the mean difference; from -1 to 1 seen as shares of [0, 1], so that no spread is no false certainty."""
    low, high = cluster_interval([(1 + each) / 2 for each in differences], rng, 2000)
    return 2 * low - 1, 2 * high - 1


def _answers(session: Session, checkpoint: Checkpoint) -> list[Group]:
    load_checkpoint(session.policy, checkpoint)
    slots = range(session.recipe.eval.samples_per_prompt)
    return sample_groups(
        session, session.task.heldout, seed_label=("judge",), slots=slots, sampler_step=checkpoint.step
    )


def _share(group: Group) -> float:
    return sum(rollout.verdict == "correct" for rollout in group.rollouts) / len(group.rollouts)

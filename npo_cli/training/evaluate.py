"""`npo eval`: held-out accuracy of checkpoints, avg@k and pass@k, with intervals."""

import statistics
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy

from npo_cli.activity import name_samples
from npo_cli.config.loading import override_saved_recipe
from npo_cli.errors import NpoError, quote_path
from npo_cli.scoring.quality import cluster_interval, pass_at_k
from npo_cli.seeds import derive_seed
from npo_cli.session.session import Session, count_generated_tokens, load_checkpoint, open_session, sample_groups
from npo_cli.storage.checkpoints import Checkpoint, find_checkpoint, list_ancestry_checkpoints
from npo_cli.storage.costs import append_cost
from npo_cli.storage.evals import (
    PromptResults,
    append_eval,
    append_prompt_results,
    hash_prompt,
    read_evals,
    read_prompt_results,
)
from npo_cli.storage.layout import RunDir, open_run
from npo_cli.storage.lineage import find_main_branch
from npo_cli.storage.lock import lock_run
from npo_cli.types.rollouts import EvalReport, Group, Notice, Progress


def evaluate_policy(session: Session, *, branch: str, step: int) -> EvalReport:
    """Sample the held-out prompts with the current weights; an evaluation already on record is not repeated."""
    count = session.recipe.eval.samples_per_prompt
    key = (branch, step, count)
    is_recorded = any((one.branch, one.step, one.num_samples) == key for one in read_prompt_results(session.run))
    for report in read_evals(session.run):
        if is_recorded and (report.branch, report.step, report.num_samples) == key:
            return report
    started = time.perf_counter()
    groups = sample_heldout(session, step=step)
    report = summarize_eval(groups, branch=branch, step=step, seed=session.recipe.train.seed)
    append_cost(
        session.run,
        "evaluate",
        branch=branch,
        step=step,
        piece=str(count),
        tokens=report.num_tokens,
        seconds=time.perf_counter() - started,
    )
    # The report comes last: a killed process leaves none without its results per prompt.
    append_prompt_results(session.run, collect_prompt_results(groups, branch=branch, step=step))
    append_eval(session.run, report)
    return report


@name_samples("held-out samples")
def sample_heldout(session: Session, *, step: int) -> list[Group]:
    """Samples of every held-out prompt with the current weights, those of `step`.

    Seeds do not depend on the step, so checkpoints are compared on common random numbers.
    """
    slots = range(session.recipe.eval.samples_per_prompt)
    return sample_groups(session, session.task.heldout, seed_label=("eval",), slots=slots, sampler_step=step)


def collect_prompt_results(groups: Sequence[Group], *, branch: str, step: int) -> PromptResults:
    """Number of correct samples per prompt."""
    return PromptResults(
        branch=branch,
        step=step,
        num_samples=len(groups[0].rollouts),
        prompt_keys=tuple(hash_prompt(group.prompt) for group in groups),
        num_correct=tuple(group.num_correct for group in groups),
    )


def summarize_eval(groups: Sequence[Group], *, branch: str, step: int, seed: int) -> EvalReport:
    """Accuracy and pass@k over prompts, 95 % intervals by resampling prompts."""
    count = len(groups[0].rollouts)
    correct = [group.num_correct for group in groups]
    shares = [number / count for number in correct]
    solved = [pass_at_k(count, number, count) for number in correct]
    rng = numpy.random.default_rng(derive_seed(seed, "eval-interval"))
    low, high = cluster_interval(shares, rng, 2000)
    pass_low, pass_high = cluster_interval(solved, rng, 2000)
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    tokens = count_generated_tokens(groups)
    return EvalReport(
        branch=branch,
        step=step,
        num_prompts=len(groups),
        num_samples=count,
        accuracy=statistics.fmean(shares),
        accuracy_low=low,
        accuracy_high=high,
        pass_at_k=statistics.fmean(solved),
        pass_at_k_low=pass_low,
        pass_at_k_high=pass_high,
        mean_length=tokens / len(rollouts),
        truncated_fraction=statistics.fmean(not rollout.finished for rollout in rollouts),
        num_tokens=tokens,
    )


def evaluate_run(
    root: Path, *, step: int | None, every_step: bool, branch: str | None, overrides: Sequence[str]
) -> Iterator[Progress | Notice | EvalReport]:
    """Evaluate the newest checkpoint, the one at `step`, or every one on the branch's line of descent."""
    run = open_run(root)
    branch = branch or find_main_branch(run)
    recipe = override_saved_recipe(run.read_recipe(branch), overrides, path=run.recipe_path(branch), purpose="measure")
    checkpoints = (
        _select(list_ancestry_checkpoints(run, branch), run, every_step=every_step)
        if step is None
        else [find_checkpoint(run, branch, step)]
    )
    with lock_run(run), open_session(run, recipe, checkpoint=checkpoints[0]) as session:
        for done, checkpoint in enumerate(checkpoints):
            yield Progress(description="evaluate", done=done, total=len(checkpoints), note=f"step {checkpoint.step}")
            load_checkpoint(session.policy, checkpoint)
            yield evaluate_policy(session, branch=checkpoint.branch, step=checkpoint.step)


def _select(found: Sequence[Checkpoint], run: RunDir, *, every_step: bool) -> list[Checkpoint]:
    if not found:
        raise NpoError(f"{run.root} has no complete checkpoint yet", f"train first: npo resume {quote_path(run.root)}")
    ordered = sorted(found, key=lambda checkpoint: checkpoint.step)
    return ordered if every_step else ordered[-1:]

"""Time sampling from two models against sampling from each of them, on one run's model and prompts.

    python recipes/extrapolation.py RUN --source extrapolated:logits,k=20,a=1 --at 80 --prompts 16 --k 8 --repeats 9

With --cpu the process's own seconds count instead of the clock's: on a CPU that other work shares they are steadier.
The three take turns (A B C A B C ...), so that a machine that slows down slows all. What is compared is seconds a token
step of the batch (the longest response of each batch decides how many there are): two models side by side against the
sum of the newer and the older model alone.
"""

import argparse
import statistics
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path

from npo_cli.config.loading import recipe_from_dict
from npo_cli.guides.source import ReplayTarget, create_source, parse_spec
from npo_cli.guides.sources.extrapolated import ExtrapolatedSampler
from npo_cli.inference.base import Engine
from npo_cli.inference.transformers_engine import TransformersEngine
from npo_cli.policy.extrapolated import ExtrapolatedPolicy
from npo_cli.session.learner import find_learner
from npo_cli.session.session import Session, build_session, make_model_handle, open_policy, open_task, sample_groups
from npo_cli.storage.checkpoints import find_checkpoint
from npo_cli.storage.layout import open_run
from npo_cli.storage.lineage import find_newest_branch


def time_step(session: Session, given: argparse.Namespace, *, number: int) -> float:
    """Of one batch."""
    clock = time.process_time if given.cpu else time.perf_counter
    prompts = session.task.train[: given.prompts]
    began = clock()
    groups = sample_groups(session, prompts, seed_label=("bench", number), slots=range(given.k), sampler_step=0)
    longest = max(len(each.response_ids) for group in groups for each in group.rollouts)
    return (clock() - began) / longest


def open_sessions(session: Session, ahead: ExtrapolatedSampler) -> dict[str, Session]:
    """The same run with each of three engines."""
    assert isinstance(ahead.policy, ExtrapolatedPolicy), "both models are there only where logits are pushed"
    older = ahead.policy.older
    alone: Engine = TransformersEngine(session.recipe.engine, make_model_handle(older, session.recipe))
    old = replace(
        session,
        engine=alone,
        policy=older,
        sync=replace(session.sync, engine=alone, policy=older),
    )
    return {"newer alone": session, "older alone": old, "both": ahead.session}


def measure_engines(session: Session, ahead: ExtrapolatedSampler, given: argparse.Namespace) -> dict[str, list[float]]:
    """Seconds a token step of every turn, the first of which does not count."""
    found: dict[str, list[float]] = {}
    for number in range(-1, given.repeats):
        for name, one in open_sessions(session, ahead).items():
            spent = time_step(one, given, number=number)
            if number >= 0:
                found.setdefault(name, []).append(spent)
    return found


def table(found: dict[str, list[float]]) -> Sequence[str]:
    """Medians in milliseconds, and the ratio turn by turn."""
    rows = [
        f"| {name} | {1000 * statistics.median(each):.2f} | {1000 * min(each):.2f} |" for name, each in found.items()
    ]
    sums = [new + old for new, old in zip(found["newer alone"], found["older alone"], strict=True)]
    ratios = [both / alone for both, alone in zip(found["both"], sums, strict=True)]
    last = f"both / (newer + older), median of {len(ratios)} turns: {statistics.median(ratios):.2f}"
    return ["| sampler | ms a token step, median | least |", "|---|---|---|", *rows, "", last]


def main() -> None:
    """Read the command line, measure, print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--source", default="extrapolated:logits,k=20,a=1")
    parser.add_argument("--at", type=int, required=True)
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--k", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--cpu", action="store_true")
    given = parser.parse_args()
    run = open_run(given.run)
    branch = find_newest_branch(run)
    recipe = recipe_from_dict(run.read_recipe(branch))
    task = open_task(recipe)
    policy = open_policy(recipe, task, find_checkpoint(run, branch, given.at))
    learner = find_learner(run, at=given.at, branch=branch, overrides=())
    source = create_source(parse_spec(given.source), ReplayTarget(run=run, learner=learner))
    with closing(task), closing(build_session(run, recipe, task=task, policy=policy)) as session:
        source.open(session)
        print("\n".join(table(measure_engines(session, source.sampler, given))))


if __name__ == "__main__":
    main()

"""Time the engines side by side on one run's model and prompts, and one engine that walks all checkpoints against many.

    python recipes/engines.py RUN --engines transformers,vllm --prompts 16 --k 8 --repeats 5
    python recipes/engines.py RUN --walk 6

Rates are medians over repeats, the engines in turn (A B A B ...), so that a machine that slows down slows both. The
walk samples the same prompts from each of the newest checkpoints of the run: with one engine whose weights are swapped
and proved, and with an engine started anew for each.
"""

import argparse
import statistics
import time
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

from npo_cli.config.loading import apply_overrides, recipe_from_dict
from npo_cli.session.session import Session, build_session, load_checkpoint, open_policy, open_task, sample_groups
from npo_cli.storage.checkpoints import Checkpoint, list_ancestry_checkpoints
from npo_cli.storage.layout import open_run
from npo_cli.storage.lineage import find_newest_branch


def open_run_session(root: Path, kind: str, overrides: Sequence[str]) -> Session:
    """The run's newest branch with another engine."""
    run = open_run(root)
    branch = find_newest_branch(run)
    recipe = apply_overrides(recipe_from_dict(run.read_recipe(branch)), [*overrides, f"engine.kind={kind}"])
    task = open_task(recipe)
    return build_session(
        run, recipe, task=task, policy=open_policy(recipe, task, list_ancestry_checkpoints(run, branch)[0])
    )


def time_sampling(session: Session, *, num_prompts: int, k: int, number: int) -> tuple[int, float]:
    """Tokens and seconds of one batch, verification included."""
    began = time.perf_counter()
    prompts = session.task.train[:num_prompts]
    groups = sample_groups(session, prompts, seed_label=("bench", number), slots=range(k), sampler_step=0)
    return sum(len(each.response_ids) for group in groups for each in group.rollouts), time.perf_counter() - began


def measure_rates(root: Path, kinds: Sequence[str], given: argparse.Namespace) -> None:
    """Start, sync and tokens a second of every engine."""
    worlds, starts = {}, {}
    for kind in kinds:
        began = time.perf_counter()
        worlds[kind] = open_run_session(root, kind, given.set)
        starts[kind] = time.perf_counter() - began
        time_sampling(worlds[kind], num_prompts=2, k=1, number=-1)
    found: dict[str, list[float]] = {kind: [] for kind in kinds}
    syncs: dict[str, list[float]] = {kind: [] for kind in kinds}
    for number in range(given.repeats):
        for kind, session in worlds.items():
            touch_weights(session)
            began = time.perf_counter()
            session.sync.sync_weights(number)
            syncs[kind].append(time.perf_counter() - began)
            tokens, seconds = time_sampling(session, num_prompts=given.prompts, k=given.k, number=number)
            found[kind].append(tokens / seconds)
    print("| engine | start, s | sync and proof, s | tokens a second | min | max |\n|---|---|---|---|---|---|")
    for kind in kinds:
        middle, sync = statistics.median(found[kind]), statistics.median(syncs[kind])
        low, high = min(found[kind]), max(found[kind])
        print(f"| {kind} | {starts[kind]:.1f} | {sync:.2f} | {middle:,.0f} | {low:,.0f} | {high:,.0f} |")
    for session in worlds.values():
        session.close()


def touch_weights(session: Session) -> None:
    """Write to a tensor, so that the next sync has to send all of them."""
    next(session.policy.model.parameters()).detach().mul_(1.0)


def compare_walks(root: Path, given: argparse.Namespace) -> None:
    """Seconds for the same samples of each of the newest checkpoints, both ways."""
    run = open_run(root)
    places = list_ancestry_checkpoints(run, find_newest_branch(run))[-given.walk :]
    began = time.perf_counter()
    with closing(open_run_session(root, "vllm", given.set)) as session:
        one = [sample_checkpoint(session, place, given) for place in places]
    with_one = time.perf_counter() - began
    began = time.perf_counter()
    many = []
    for place in places:
        with closing(open_run_session(root, "vllm", given.set)) as session:
            many.append(sample_checkpoint(session, place, given))
    with_many = time.perf_counter() - began
    assert one == many, "the same seeds and weights answer alike"
    print(f"| {len(places)} checkpoints, {one[0][1]:,} tokens of the first | seconds |\n|---|---|")
    print(
        f"| one engine, weights swapped and proved | {with_one:.1f} |\n| an engine started for each | {with_many:.1f} |"
    )


def sample_checkpoint(session: Session, place: Checkpoint, given: argparse.Namespace) -> tuple[int, int]:
    """Step, and tokens sampled from it."""
    load_checkpoint(session.policy, place)
    prompts = session.task.train[: given.prompts]
    groups = sample_groups(session, prompts, seed_label=("walk",), slots=range(given.k), sampler_step=place.step)
    return place.step, sum(len(each.response_ids) for group in groups for each in group.rollouts)


def main() -> None:
    """Parse, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--engines", default="transformers,vllm")
    parser.add_argument("--walk", type=int, default=0)
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--k", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE")
    given = parser.parse_args()
    if given.walk:
        compare_walks(given.run, given)
    else:
        measure_rates(given.run, given.engines.split(","), given)


if __name__ == "__main__":
    main()

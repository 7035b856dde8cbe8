"""`npo compare`: what each arm reached, what it cost on five axes, how far they lie apart, and how sure that is.

Reads run directories and writes into none. Cost is the ledger's (`ledger.py`): everything that an arm needed, what
was rolled back and asked included. The statistics are `guide/arms.py` and `guide/arrivals.py`.
"""

import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path

from npo_cli.compare_records import ArmDifference, ArmSummary, Arrival, Axis, Over, SeedPoint, SpeedUp
from npo_cli.errors import as_typed
from npo_cli.guide.arms import Resampler, apart_estimates, arm_estimates, num_shared, paired_estimates, quarters
from npo_cli.guide.arrivals import Way, arrived_ratio, restricted_mean, restricted_ratio
from npo_cli.records import Notice
from npo_cli.report.compare_figure import arms_figure
from npo_cli.report.sheet import write_points
from npo_cli.stages.accounting import account
from npo_cli.stages.alignment import method_differences, mismatches, paid_elsewhere
from npo_cli.stages.arm_figures import Common, bands, common_ground, cost_of, named_figures, standing_at
from npo_cli.stages.arms import Arm, SeedRun, read_arms
from npo_cli.stages.ledger import crossing

THRESHOLDS = (0.6, 0.9)

Shown = ArmSummary | ArmDifference | Arrival | SpeedUp | SeedPoint | Notice


def compare_runs(
    texts: Sequence[str], *, thresholds: Sequence[float], baseline: str | None, csv: Path | None, figure: Path | None
) -> Iterator[Shown]:
    """Read, align, estimate; then the table of points and the picture, where they are wanted."""
    arms = read_arms(texts, baseline=baseline)
    common = common_ground(arms)
    yield from warnings(arms, common)

    # Each arm by itself.
    resampler = Resampler()
    summaries = [summary(arm, arms[0], common=common, resampler=resampler) for arm in arms]
    yield from summaries

    # Each arm next to the baseline.
    yield from (difference(arm, arms[0], common=common, resampler=resampler) for arm in arms[1:])
    for threshold in dict.fromkeys(thresholds or THRESHOLDS):
        ways = {arm.name: ways_to(threshold, arm, common) for arm in arms}
        yield from (arrival(name, threshold, ways=found, common=common) for name, found in ways.items())
        for arm in arms[1:]:
            pair = (arm.name, arms[0].name)
            yield speed_up(pair, threshold, ways=ways, common=common)

    # What others may draw and count for themselves.
    points = [point for arm in arms for one in arm.runs for point in one.points]
    yield from points
    if csv is not None:
        write_points(points, csv)
        yield Notice(message=f"points: {csv}")
    if figure is not None:
        arms_figure(bands(arms, common, resampler), figure, title=headline(summaries))
        yield Notice(message=f"picture: {figure}")


def headline(arms: Sequence[ArmSummary]) -> str:
    """What the picture shows, and what its bands are taken over."""
    over = sorted({arm.over for arm in arms})
    seeds = sorted({len(arm.seeds) for arm in arms})
    words = f"{' or '.join(map(str, seeds))} seed{'' if seeds == [1] else 's'} an arm"
    return f"{words}; band: 95 % over {' or over '.join(over)}"


def warnings(arms: Sequence[Arm], common: Common) -> Iterator[Notice]:
    """What makes the comparison less than fair, or smaller than it looks."""
    for arm in arms:
        for what in mismatches(arm, arms[0]):
            yield Notice(message=f"not alike: {what} ({arm.name})", level="warning")
        if arm.seeds != arms[0].seeds:
            said = f"{arm.name} has seeds {_listed(arm.seeds)}, {arms[0].name} has {_listed(arms[0].seeds)}"
            yield Notice(message=f"{said}: only common seeds are paired", level="warning")
        elsewhere = paid_elsewhere(arm)
        if elsewhere:
            said = f"{arm.name}: its guides had cost {elsewhere:,} tokens outside of its runs; no figure counts them"
            yield Notice(message=said, level="warning")
        bare = [one.place for one in arm.runs if not one.outcomes]
        if bare:
            said = f"{arm.name}: evaluations of {len(bare)} of {len(arm.runs)} seeds kept no outcomes prompt by prompt"
            mend = f"npo eval {as_typed(bare[0].run.root)} --all --branch {bare[0].branch}"
            yield Notice(message=f"{said}; {mend} adds them where there are checkpoints", level="warning")
    shortest = min((one for arm in arms for one in arm.runs), key=lambda one: one.points[-1].step)
    if any(one.points[-1].step > common.horizon for arm in arms for one in arm.runs):
        said = f"{shortest.place.name} was last evaluated at step {common.horizon}"
        yield Notice(message=f"{said}: final accuracies of all arms are taken there", level="warning")


def summary(arm: Arm, baseline: Arm, *, common: Common, resampler: Resampler) -> ArmSummary:
    """Accuracy with intervals, costs, entropy and injected share of one arm."""
    names, figures = named_figures(arm, common)
    found = dict(zip(names, arm_estimates(figures, resampler), strict=True))
    steps = [row for one in arm.runs for step, row in one.steps.items() if step <= common.horizon]
    shares = [row["inject/grad_share"] for row in steps if row.get("inject/slots") and "inject/grad_share" in row]
    return ArmSummary(
        arm=arm.name,
        seeds=arm.seeds,
        runs=tuple(one.place.name for one in arm.runs),
        num_prompts=min(len(one.prompts) for one in arm.runs) or None,
        over=drawn(len(arm.runs), with_prompts=all(one.prompts for one in arm.runs)),
        horizon=common.horizon,
        final=found.pop("final"),
        areas=found,
        entropies=mean_entropies(arm, common.horizon),
        slots_per_step=statistics.fmean(row.get("inject/slots", 0.0) for row in steps) if steps else 0.0,
        grad_share=statistics.fmean(shares) if shares else None,
        spent=standing_at(arm, common),
        run_tokens=statistics.fmean(account(one.place.run, one.place.branch).tokens for one in arm.runs),
        differs=method_differences(arm, baseline),
        mismatched=mismatches(arm, baseline),
    )


def drawn(num_seeds: int, *, with_prompts: bool) -> Over:
    """What a resample draws anew."""
    if num_seeds > 1:
        return "seeds and prompts" if with_prompts else "seeds"
    return "prompts" if with_prompts else "nothing"


def mean_entropies(arm: Arm, horizon: int) -> tuple[float | None, ...]:
    """Mean over the seeds of each quarter's mean; a quarter without any step in any seed has none."""
    by_seed = [
        quarters({step: row["entropy"] for step, row in one.steps.items() if "entropy" in row}, horizon)
        for one in arm.runs
    ]
    known = [[value for value in column if value is not None] for column in zip(*by_seed, strict=True)]
    return tuple(statistics.fmean(some) if some else None for some in known)


def difference(arm: Arm, baseline: Arm, *, common: Common, resampler: Resampler) -> ArmDifference:
    """Over the seeds that both have, pair by pair; over all seeds of both, drawn apart, where they share none."""
    seeds = set(arm.seeds) & set(baseline.seeds)
    sides = [[one for one in side.runs if one.place.seed in seeds or not seeds] for side in (arm, baseline)]
    (names, mine), (_, theirs) = (named_figures(Arm(name="", runs=tuple(side)), common) for side in sides)
    estimate = paired_estimates if seeds else apart_estimates
    found = dict(zip(names, estimate(mine, theirs, resampler), strict=True))
    pairs = list(zip(mine, theirs, strict=True)) if seeds else []
    place = names.index("final")
    return ArmDifference(
        arm=arm.name,
        baseline=baseline.name,
        num_pairs=len(pairs),
        num_prompts=min((num_shared(*pair) for pair in pairs), default=0) or None,
        over=drawn(
            len(seeds) or min(len(mine), len(theirs)), with_prompts=all(one.prompts for one in (*mine, *theirs))
        ),
        final=found.pop("final"),
        areas=found,
        num_not_lower=sum(
            bool(one.values_PF[:, place].mean() >= other.values_PF[:, place].mean() - 1e-12) for one, other in pairs
        ),
    )


def ways_to(threshold: float, arm: Arm, common: Common) -> dict[Axis, list[Way]]:
    """What every seed had spent on arrival, and at its end, by axis."""
    ways: dict[Axis, list[Way]] = {axis: [] for axis in common.ends}
    for one in arm.runs:
        arrived = arrival_of(one, threshold)
        for axis, some in ways.items():
            cost = None if arrived is None else cost_of(arrived, axis)
            some.append(Way(seed=one.place.seed, cost=cost, end=cost_of(one.points[-1], axis)))
    return ways


def arrival_of(one: SeedRun, threshold: float) -> SeedPoint | None:
    """The evaluation at which the threshold counts as reached; None where it never was."""
    step = crossing(one.curve, threshold).step
    return next((point for point in one.points if point.step == step), None)


def arrival(name: str, threshold: float, *, ways: dict[Axis, list[Way]], common: Common) -> Arrival:
    """Means over the seeds of one arm."""
    some = next(iter(ways.values()))
    return Arrival(
        arm=name,
        threshold=threshold,
        num_runs=len(some),
        num_reached=sum(way.cost is not None for way in some),
        costs={axis: statistics.fmean(way.bound for way in found) for axis, found in ways.items()},
        restricted={axis: restricted_mean(found, common.ends[axis]) for axis, found in ways.items()},
        horizons=dict(common.ends),
    )


def speed_up(
    pair: tuple[str, str],
    threshold: float,
    *,
    ways: dict[str, dict[Axis, list[Way]]],
    common: Common,
) -> SpeedUp:
    """Both ratios of an arm and the baseline on every axis; a ratio that nothing can be said of is left out."""
    arm, baseline = pair
    mine, theirs = ways[arm], ways[baseline]
    arrived = {axis: arrived_ratio(mine[axis], theirs[axis]) for axis in mine}
    restricted = {axis: restricted_ratio(mine[axis], theirs[axis], horizon=common.ends[axis]) for axis in mine}
    return SpeedUp(
        arm=arm,
        baseline=baseline,
        threshold=threshold,
        arrived={axis: found for axis, found in arrived.items() if found is not None},
        restricted={axis: found for axis, found in restricted.items() if found is not None},
    )


def _listed(seeds: Sequence[int]) -> str:
    return ", ".join(map(str, seeds))

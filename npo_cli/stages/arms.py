"""The arms of a comparison, read from run directories: `[NAME=]RUN[:BRANCH]`, the same name again another seed."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from npo_cli.compare_records import SeedPoint
from npo_cli.config import Recipe
from npo_cli.costs import CurvePoint
from npo_cli.errors import NpoError, as_typed
from npo_cli.loading import from_dict
from npo_cli.run_dir.bench_arms import arms_in, is_bench
from npo_cli.run_dir.index import best_evals
from npo_cli.run_dir.lineage import Stretch, branches, descent, newest_branch
from npo_cli.run_dir.outcomes import Outcomes, outcomes_of
from npo_cli.run_dir.paths import RunDir, open_run
from npo_cli.run_dir.steps import measured_steps
from npo_cli.stages.ledger import curve


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """One line of descent, under the name of its arm."""

    arm: str
    run: RunDir
    branch: str
    recipe: Recipe

    @property
    def name(self) -> str:
        """`RUN:BRANCH`, as it is typed."""
        return f"{self.run.root}:{self.branch}"

    @property
    def seed(self) -> int:
        """train.seed."""
        return self.recipe.train.seed


@dataclass(frozen=True, kw_only=True, slots=True)
class SeedRun:
    """One seed of an arm, with everything that was measured of it."""

    place: Place
    points: tuple[SeedPoint, ...]
    """Its evaluations; a replay's fork stands twice, the second time with all of the guide's costs."""
    curve: tuple[CurvePoint, ...]
    """The same as the ledger says them."""
    outcomes: dict[int, Outcomes]
    """By step; empty unless every evaluation has its own, all on the same prompts."""
    steps: dict[int, dict[str, Any]]
    """The metrics of every step of its line of descent."""

    @property
    def prompts(self) -> tuple[str, ...]:
        """Keys of its held-out prompts; none where outcomes were not kept."""
        return next((one.prompts for one in self.outcomes.values()), ())


@dataclass(frozen=True, kw_only=True, slots=True)
class Arm:
    """One method, a run a seed, by seed."""

    name: str
    runs: tuple[SeedRun, ...]

    @property
    def seeds(self) -> tuple[int, ...]:
        """The seeds it was trained with."""
        return tuple(one.place.seed for one in self.runs)


def read_arms(texts: Sequence[str], *, baseline: str | None) -> list[Arm]:
    """Every arm, the baseline first, else in the order given."""
    places = [place for text in texts for place in places_of(text)]
    by_arm: dict[str, list[Place]] = {}
    for place in places:
        by_arm.setdefault(place.arm, []).append(place)
    for name, some in by_arm.items():
        refuse_repeated(name, some)
    first = next(iter(by_arm)) if baseline is None else baseline
    if first not in by_arm:
        raise NpoError(f"--baseline: there is no arm {first!r}", f"the arms are: {', '.join(by_arm)}")
    if len(places) < 2:
        raise NpoError(
            f"one run alone is compared with nothing: {places[0].name}",
            f"name another run or branch, or look at this one: npo show {as_typed(places[0].run.root)} costs",
        )
    ordered = [first, *(name for name in by_arm if name != first)]
    return [
        Arm(name=name, runs=tuple(read_seed(place) for place in sorted(by_arm[name], key=lambda one: one.seed)))
        for name in ordered
    ]


def refuse_repeated(name: str, places: Sequence[Place]) -> None:
    """A seed counted twice would make an arm look surer than it is."""
    seen: dict[int, Place] = {}
    for place in places:
        if place.seed in seen:
            raise NpoError(
                f"arm {name!r} has seed {place.seed} twice: {seen[place.seed].name} and {place.name}",
                "leave one out, or give it a name of its own: NAME=RUN:BRANCH",
            )
        seen[place.seed] = place


def places_of(text: str) -> Iterator[Place]:
    """What one argument names: branches of a run, or the newest one of every run of a bench."""
    name, path, branch = split_arm(text)
    if not is_bench(path):
        yield from places_in(path, name=name, branch=branch)
        return
    if name or branch:
        raise NpoError(f"{path} holds the runs of a bench, which have names", f"npo compare {as_typed(path)}")
    for arm, root in arms_in(path):
        yield from places_in(root, name=arm, branch=None)


def places_in(path: Path, *, name: str | None, branch: str | None) -> Iterator[Place]:
    """One run's: the branch, or the newest one where only the arm has a name, else all."""
    run = open_run(path)
    known = branches(run)
    if branch is not None and branch not in known:
        named = ", ".join(known) or "none yet"
        raise NpoError(f"{path} has no branch {branch!r}: {named}", f"npo show {as_typed(path)} lineage")
    # A run without a single step has no branch; newest_branch has the words for it.
    chosen = known if branch is None and name is None and known else [branch or newest_branch(run)]
    for one in chosen:
        recipe = from_dict(run.recipe(one), source=str(run.recipe_path(one)))
        yield Place(arm=name or f"{recipe.name}:{one}", run=run, branch=one, recipe=recipe)


def split_arm(text: str) -> tuple[str | None, Path, str | None]:
    """Name, run and branch. A path that exists is meant as it is, whatever signs are in it."""
    given, name = text, None
    if "=" in text and not Path(text).exists():
        name, _, text = text.partition("=")
        if not name.strip() or "/" in name:
            raise NpoError(f"{name!r} cannot name an arm", "write NAME=RUN or NAME=RUN:BRANCH")
    branch: str | None = None
    if ":" in text and not Path(text).exists():
        text, _, branch = text.rpartition(":")
    if not text or branch == "":
        raise NpoError(f"an arm is [NAME=]RUN[:BRANCH], got {given!r}", "name a run directory: npo=runs/a:late")
    return name, Path(text), branch


def read_seed(place: Place) -> SeedRun:
    """Curve, outcomes and metrics of one line of descent; without a held-out evaluation there is nothing to compare."""
    run, branch = place.run, place.branch
    line = descent(run, branch)
    found = curve(run, branch, arm=place.arm)
    if not found:
        raise NpoError(
            f"{place.name} has no held-out evaluation", f"npo eval {as_typed(run.root)} --all --branch {branch}"
        )
    per_step, timed = place.recipe.train.num_updates, found[-1].total_seconds > 0
    points = tuple(
        SeedPoint(
            arm=place.arm,
            seed=place.seed,
            run=str(run.root),
            branch=branch,
            step=point.step,
            updates=point.total_steps * per_step,
            tokens=point.total_tokens,
            forwards=point.total_forwards,
            seconds=point.total_seconds if timed else None,
            accuracy=point.accuracy,
            entropy=point.entropy,
        )
        for point in found
    )
    return SeedRun(
        place=place,
        points=points,
        curve=tuple(found),
        outcomes=whole_outcomes(run, line, {point.step for point in points}),
        steps={
            row["step"]: row
            for stretch in line
            for row in measured_steps(run, stretch.branch)
            if stretch.owns(row["step"])
        },
    )


def whole_outcomes(run: RunDir, line: Sequence[Stretch], steps: set[int]) -> dict[int, Outcomes]:
    """The outcomes of every evaluation on the line, by step; none at all where one has none or other prompts."""
    found = {
        step: one
        for (owner, step), one in outcomes_of(best_evals(run), run).items()
        if any(stretch.branch == owner and stretch.owns(step) for stretch in line)
    }
    same = len({one.prompts for one in found.values()}) == 1
    return found if same and set(found) == steps else {}

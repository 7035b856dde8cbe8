"""Are arms comparable? What must be alike and is not, and in what the methods differ.

Everything that is neither a method's own nor must be alike (seeds, length, what is kept, how the machine is used) is
passed over: it changes what a run costs to keep, not what it learns.
"""

from collections.abc import Iterator, Sequence

from npo_cli.config import Recipe
from npo_cli.guide_records import GuideInfo
from npo_cli.loading import differences
from npo_cli.run_dir.auto import transitions
from npo_cli.run_dir.guides import read_info
from npo_cli.run_dir.lineage import birth_segment, descent
from npo_cli.run_dir.manifests import read_manifest
from npo_cli.run_dir.paths import FIRST_BRANCH
from npo_cli.settings import walk_fields
from npo_cli.stages.arms import Arm, Place, SeedRun

COMPARISON = {key: marks.get("comparison", "differs") for key, _, marks in walk_fields(Recipe())}
"""Dotted key -> `must_match`, `ignored`, or `differs` (the difference is part of the method); see "
"`npo_cli.settings`."""
IF_WATCHED = ("autonpo.",)
IF_GUIDED = ("guide.source", "guide.inject.", "guide.cache.", "guide.endpoint.", "guide.replay.", "scoring.")
"""Sections without effect where AutoNPO did not watch, or where no guide had a seat."""
NOBODY = "by nobody"


def method_differences(arm: Arm, baseline: Arm) -> tuple[str, ...]:
    """`KEY OLD -> NEW` of every setting in which the arm's method is not the baseline's, and what stepped in."""
    changes = [change for change in settings_apart(arm, baseline) if not _must_match(change)]
    for what in (guided, watched):
        mine, theirs = {what(one.place) for one in arm.runs}, {what(one.place) for one in baseline.runs}
        if mine != theirs:
            changes.append(f"{what.__name__} {_one_of(theirs)} -> {_one_of(mine)}")
    return tuple(changes)


def mismatches(arm: Arm, baseline: Arm) -> tuple[str, ...]:
    """What a fair comparison needs alike: base weights, task, group, batch, sampling; and seeds of one method."""
    found = [change for change in settings_apart(arm, baseline) if _must_match(change)]
    for bases in base_digests((*arm.runs, *baseline.runs)):
        if len(bases) > 1:
            found.append(f"base weights {' and '.join(sorted(digest[:12] for digest in bases))}")
    return (*found, *(f"{change} within the arm" for change in settings_within(arm)))


def settings_apart(arm: Arm, baseline: Arm) -> list[str]:
    """Settings of the arm's first seed that differ from the baseline's first."""
    return list(_changes(baseline.runs[0].place, arm.runs[0].place))


def settings_within(arm: Arm) -> list[str]:
    """Settings in which seeds of one arm differ, which makes them two methods."""
    first = arm.runs[0].place
    return list(dict.fromkeys(change for one in arm.runs[1:] for change in _changes(first, one.place)))


def _must_match(change: str) -> bool:
    """Of a `KEY OLD -> NEW`."""
    return COMPARISON[change.split(" ", 1)[0]] == "must_match"


def _changes(before: Place, after: Place) -> Iterator[str]:
    """Only of settings that had an effect on both."""
    idle: tuple[str, ...] = ()
    for sections, what in ((IF_WATCHED, watched), (IF_GUIDED, guided)):
        idle += sections if NOBODY in (what(before), what(after)) else ()
    for key, old, new in differences(before.recipe, after.recipe):
        if COMPARISON[key] != "ignored" and not key.startswith(idle):
            yield f"{key} {old} -> {new}"


def base_digests(runs: Sequence[SeedRun]) -> tuple[set[str], set[str]]:
    """Of the weights that training began with, where those checkpoints are there: trained whole, and beside adapters.

    The two are digests of different things, so a base is only known to be another among runs of one kind.
    """
    whole, beside = set(), set()
    for one in runs:
        folder = one.place.run.checkpoint_folder(FIRST_BRANCH, 0)
        if not folder.is_dir():
            continue
        if one.place.recipe.model.lora.rank is None:
            whole.add(str(read_manifest(folder)["digest"]))
        else:
            from npo_cli.policy.adapters import base_beside

            beside.add(base_beside(folder))
    return whole, beside


def guided(place: Place) -> str:
    """Who had a seat on the line of descent, and of which learner."""
    past = ["its past"] if place.recipe.guide.experience.replay_fraction else []
    return ", ".join([*past, *(f"{_author(info)} at {info.at_step}" for info in guides_of(place))]) or NOBODY


def guides_of(place: Place) -> list[GuideInfo]:
    """The caches that the branches of the line of descent were given."""
    given = [birth_segment(place.run, stretch.branch).guide for stretch in descent(place.run, place.branch)]
    return [read_info(place.run.guide_folder(guide)) for guide in given if guide is not None]


def paid_elsewhere(arm: Arm) -> int:
    """Tokens that its guides took outside its runs, all seeds: training another run, writing a file of traces."""
    return sum(info.side_tokens + info.given_tokens for one in arm.runs for info in guides_of(one.place))


def _author(info: GuideInfo) -> str:
    """A later checkpoint by its step, an outside model by its name, anybody else by what it is.

    A file, or another run, is another one for each seed.
    """
    if info.source == "checkpoint":
        return str(info.guide_step)
    return info.source if info.source in ("run", "file") else f"{info.source} {info.origin}".rstrip()


def watched(place: Place) -> str:
    """Whether AutoNPO decided on the line of descent."""
    names = {stretch.branch for stretch in descent(place.run, place.branch)}
    return "by AutoNPO" if any(move.state.branch in names for move in transitions(place.run)) else NOBODY


def _one_of(values: set[str]) -> str:
    return next(iter(values)) if len(values) == 1 else "varies"

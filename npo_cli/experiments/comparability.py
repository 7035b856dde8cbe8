"""Comparability of methods: settings that must match and do not, and settings in which the methods differ.

Everything that is neither a method's own nor must be alike (seeds, length, what is kept, how the machine is used) is
passed over: it changes what a run costs to keep, not what it learns.
"""

from collections.abc import Iterator, Sequence

from npo_cli.config.base import walk_fields
from npo_cli.config.loading import diff_recipes
from npo_cli.config.recipe import Recipe
from npo_cli.experiments.load_methods import MethodRuns, RunBranch, SeedRun
from npo_cli.storage.autonpo_log import read_transitions
from npo_cli.storage.checkpoints import read_manifest
from npo_cli.storage.guide_cache import read_cache_info
from npo_cli.storage.layout import FIRST_BRANCH
from npo_cli.storage.lineage import ancestry, find_first_segment
from npo_cli.types.guides import GuideCacheInfo

COMPARISON = {key: marks.get("comparison", "differs") for key, _, marks in walk_fields(Recipe())}
"""Dotted key -> `must_match`, `ignored`, or `differs` (the difference is part of the method); see "
"`npo_cli.config.base`."""
AUTONPO_SECTIONS = ("autonpo.",)
GUIDE_SECTIONS = ("guide.source", "guide.inject.", "guide.cache.", "guide.endpoint.", "guide.replay.", "scoring.")
"""Sections without effect where AutoNPO did not watch, or where no guide had a seat."""
NOT_USED = "none"


def method_differences(method: MethodRuns, baseline: MethodRuns) -> tuple[str, ...]:
    """`KEY OLD -> NEW` of every setting that differs from the baseline, and of the guides and AutoNPO at work."""
    changes = [change for change in diff_settings(method, baseline) if not _must_match(change)]
    for label, describe in (("guides", describe_guides), ("AutoNPO", describe_autonpo)):
        mine, theirs = (
            {describe(one.run_branch) for one in method.runs},
            {describe(one.run_branch) for one in baseline.runs},
        )
        if mine != theirs:
            changes.append(f"{label} {_one_of(theirs)} -> {_one_of(mine)}")
    return tuple(changes)


def find_mismatches(method: MethodRuns, baseline: MethodRuns) -> tuple[str, ...]:
    """What a fair comparison needs alike: base weights, task, group, batch, sampling; and seeds of one method."""
    found = [change for change in diff_settings(method, baseline) if _must_match(change)]
    for bases in base_digests((*method.runs, *baseline.runs)):
        if len(bases) > 1:
            found.append(f"base weights {' and '.join(sorted(digest[:12] for digest in bases))}")
    return (*found, *(f"{change} between seeds" for change in diff_seed_settings(method)))


def diff_settings(method: MethodRuns, baseline: MethodRuns) -> list[str]:
    """Settings of the method's first seed that differ from the baseline's first."""
    return list(_changes(baseline.runs[0].run_branch, method.runs[0].run_branch))


def diff_seed_settings(method: MethodRuns) -> list[str]:
    """Settings in which seeds of one method differ: then they are two methods."""
    first = method.runs[0].run_branch
    return list(dict.fromkeys(change for one in method.runs[1:] for change in _changes(first, one.run_branch)))


def _must_match(change: str) -> bool:
    """Of a `KEY OLD -> NEW`."""
    return COMPARISON[change.split(" ", 1)[0]] == "must_match"


def _changes(before: RunBranch, after: RunBranch) -> Iterator[str]:
    """Only of settings that had an effect on both."""
    idle: tuple[str, ...] = ()
    for sections, what in ((AUTONPO_SECTIONS, describe_autonpo), (GUIDE_SECTIONS, describe_guides)):
        idle += sections if NOT_USED in (what(before), what(after)) else ()
    for key, old, new in diff_recipes(before.recipe, after.recipe):
        if COMPARISON[key] != "ignored" and not key.startswith(idle):
            yield f"{key} {old} -> {new}"


def base_digests(runs: Sequence[SeedRun]) -> tuple[set[str], set[str]]:
    """Of the weights that training began with, where those checkpoints are there: trained whole, and beside adapters.

    The two are digests of different things, so a base is only known to be another among runs of one kind.
    """
    whole, beside = set(), set()
    for one in runs:
        folder = one.run_branch.run.checkpoint_folder(FIRST_BRANCH, 0)
        if not folder.is_dir():
            continue
        if one.run_branch.recipe.model.lora.rank is None:
            whole.add(str(read_manifest(folder)["digest"]))
        else:
            from npo_cli.policy.lora import read_base_digest

            beside.add(read_base_digest(folder))
    return whole, beside


def describe_guides(place: RunBranch) -> str:
    """Who had a seat on the line of descent, and of which learner."""
    past = ["its past"] if place.recipe.guide.experience.replay_fraction else []
    return (
        ", ".join([*past, *(f"{_author(info)} at {info.learner_step}" for info in read_guide_infos(place))]) or NOT_USED
    )


def read_guide_infos(place: RunBranch) -> list[GuideCacheInfo]:
    """The caches that the branches of the line of descent were given."""
    given = [find_first_segment(place.run, span.branch).guide_cache for span in ancestry(place.run, place.branch)]
    return [read_cache_info(place.run.guide_folder(guide)) for guide in given if guide is not None]


def count_external_tokens(method: MethodRuns) -> int:
    """Tokens that its guides took outside its runs, all seeds: training another run, writing a file of traces."""
    return sum(
        info.guide_training_tokens + info.external_tokens
        for one in method.runs
        for info in read_guide_infos(one.run_branch)
    )


def _author(info: GuideCacheInfo) -> str:
    """A later checkpoint by its step, an outside model by its name, anybody else by what it is.

    A file, or another run, is another one for each seed.
    """
    if info.source.name == "checkpoint":
        return str(info.guide_step)
    return info.source.name if info.source.name in ("run", "file") else info.source.text


def describe_autonpo(place: RunBranch) -> str:
    """Whether AutoNPO decided on the line of descent."""
    names = {span.branch for span in ancestry(place.run, place.branch)}
    return "by AutoNPO" if any(move.state.branch in names for move in read_transitions(place.run)) else NOT_USED


def _one_of(values: set[str]) -> str:
    return next(iter(values)) if len(values) == 1 else "varies"

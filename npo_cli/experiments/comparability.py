"""Comparability of methods: settings that must match and do not, and settings in which the methods differ.

Settings with the mark `ignored` (seeds, length, retention, hardware) do not affect what a run learns and are left out.
"""

from collections.abc import Iterator, Sequence

from npo_cli.config.base import walk_fields
from npo_cli.config.loading import diff_recipes
from npo_cli.config.recipe import Recipe
from npo_cli.config.target import name_of_source
from npo_cli.experiments.load_methods import MethodRuns, RunBranch, SeedRun
from npo_cli.registry import GUIDE_SOURCES
from npo_cli.storage.autonpo_log import read_transitions
from npo_cli.storage.checkpoints import read_manifest
from npo_cli.storage.guide_cache import describe_guide_source, read_cache_info
from npo_cli.storage.layout import FIRST_BRANCH
from npo_cli.storage.lineage import ancestry, find_first_segment
from npo_cli.types.guides import GuideCacheInfo

COMPARISON = {key: marks.get("comparison", "differs") for key, _, marks in walk_fields(Recipe())}
"""Dotted key -> `must_match`, `ignored`, or `differs` (the difference is part of the method); see "
"`npo_cli.config.base`."""
AUTONPO_SECTIONS = ("autonpo.",)
GUIDE_SECTIONS = ("guide.source", "guide.inject.", "guide.cache.", "guide.endpoint.", "guide.replay.", "scoring.")
"""Sections without effect where AutoNPO made no decision, or where no guide was injected."""
NOT_USED = "none"


def method_differences(method: MethodRuns, baseline: MethodRuns) -> tuple[str, ...]:
    """`KEY OLD -> NEW` of every setting that differs from the baseline, and of the guides and AutoNPO."""
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
        same_teacher = key == "target.teacher" and old and new and _is_one_teacher(old, new)
        if COMPARISON[key] != "ignored" and not key.startswith(idle) and not same_teacher:
            yield f"{key} {old} -> {new}"


def _is_one_teacher(old: str, new: str) -> bool:
    """Whether two SPECs name one source that has another file or run for each seed."""
    name = name_of_source(old)
    is_known = name == name_of_source(new) and name in GUIDE_SOURCES.names()
    return is_known and GUIDE_SOURCES.get(name).differs_by_seed


def base_digests(runs: Sequence[SeedRun]) -> tuple[set[str], set[str]]:
    """Digests of the base weights: of runs that train all weights, and of runs that train adapters.

    The two kinds of digest are not comparable. Runs without a saved step 0 are left out.
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
    """The guides injected along the ancestry, each with its learner's step."""
    past = ["its past"] if place.recipe.guide.experience.replay_fraction else []
    caches = [f"{_name_guide(info)} at {info.learner_step}" for info in read_guide_infos(place)]
    return ", ".join([*past, *caches]) or NOT_USED


def read_guide_infos(place: RunBranch) -> list[GuideCacheInfo]:
    """The guide caches of the branches in the ancestry."""
    given = [find_first_segment(place.run, span.branch).guide_cache for span in ancestry(place.run, place.branch)]
    return [read_cache_info(place.run.guide_folder(guide)) for guide in given if guide is not None]


def count_external_tokens(method: MethodRuns) -> int:
    """Tokens of its guides outside its runs, all seeds: training of another run, responses of a trace file."""
    return sum(
        info.guide_training_tokens + info.external_tokens
        for one in method.runs
        for info in read_guide_infos(one.run_branch)
    )


def _name_guide(info: GuideCacheInfo) -> str:
    """A checkpoint by its step, another source by its SPEC, or by its name alone if the SPEC differs by seed."""
    name = info.source.name
    differs_by_seed = name in GUIDE_SOURCES.names() and GUIDE_SOURCES.get(name).differs_by_seed
    return name if differs_by_seed else describe_guide_source(info)


def describe_autonpo(place: RunBranch) -> str:
    """Whether AutoNPO made a decision in the ancestry."""
    names = {span.branch for span in ancestry(place.run, place.branch)}
    return "by AutoNPO" if any(move.state.branch in names for move in read_transitions(place.run)) else NOT_USED


def _one_of(values: set[str]) -> str:
    return next(iter(values)) if len(values) == 1 else "varies"

"""Guide caches: verified trajectories of another policy, whoever that is, and every prompt it was asked.

guide.json is replaced whole, at birth and when the cache is finished; the two journals beside it only grow, so
sampling that was interrupted goes on where it stopped. An unfinished cache is never used for training.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import get_args

from npo_cli.errors import NpoError, quote_path
from npo_cli.storage.files import damaged_file_error, decode_record, make_folder, read_json, to_row, write_json_atomic
from npo_cli.storage.jsonl import AppendResult, JsonlLog
from npo_cli.storage.layout import RunDir
from npo_cli.storage.rollout_log import decode_float32, decode_images, encode_float32, encode_images
from npo_cli.types.guides import GuideCacheInfo, GuideRollout
from npo_cli.types.rollouts import RolloutSource, Verdict

COUNT_FIELDS = (
    *("num_prompts", "num_found", "num_samples", "num_tokens", "complete"),
    *("has_logps", "num_trajectories", "given_tokens"),
)
"""Fields of GuideInfo that sampling fills; the others say what the cache is."""

RolloutsByPrompt = Mapping[str, tuple[GuideRollout, ...]]
"""By prompt id, in the order of their numbers."""


@dataclass(frozen=True, kw_only=True, slots=True)
class QueriedPrompt:
    """One prompt that the guide was asked."""

    prompt_id: str
    num_sampled: int
    num_correct: int
    num_tokens: int
    """Tokens generated."""


@dataclass(slots=True)
class GuideCacheWriter:
    """An unfinished cache, open for writing."""

    folder: Path
    _asked: JsonlLog = field(init=False)
    _trajectories: JsonlLog = field(init=False)

    def __post_init__(self) -> None:
        self._asked = JsonlLog(queried_prompts_path(self.folder))
        self._trajectories = JsonlLog(guide_rollouts_path(self.folder))

    def add_rollout(self, rollout: GuideRollout) -> AppendResult:
        """Keep one trajectory. Write it before `add_asked` of its prompt: asked means wholly dealt with."""
        logps = rollout.behavior_logps
        row = to_row(rollout) | {"behavior_logps": None if logps is None else encode_float32(logps)}
        row.pop("images")
        row |= {"images": encode_images(rollout.images)} if rollout.images else {}
        return self._trajectories.append_once(row, ("prompt_id", "number"))

    def add_queried_prompt(self, prompt: QueriedPrompt) -> AppendResult:
        """Note that a prompt was dealt with, whether or not a trajectory was found."""
        return self._asked.append_once(prompt, "prompt_id")

    def read_queried_prompts(self) -> dict[str, QueriedPrompt]:
        """Prompts already dealt with, by prompt id."""
        return read_queried_prompts(self.folder)

    def read_rollouts(self) -> RolloutsByPrompt:
        """Trajectories found so far."""
        return read_guide_rollouts(self.folder)

    def sync(self) -> None:
        """Force both journals down to the disk, the trajectories first."""
        self._trajectories.sync()
        self._asked.sync()


def cache_info_path(folder: Path) -> Path:
    """What the cache is and how far it is."""
    return folder / "guide.json"


def queried_prompts_path(folder: Path) -> Path:
    """One line a prompt asked."""
    return folder / "asked.jsonl"


def guide_rollouts_path(folder: Path) -> Path:
    """One line a trajectory kept."""
    return folder / "trajectories.jsonl"


def open_guide_cache(run: RunDir, info: GuideCacheInfo) -> GuideCacheWriter:
    """Open a cache for writing: a new one, or an unfinished one of the same identity, which goes on.

    Any other cache of that name is a user's error. Identity: every field but the counts and `complete`.
    """
    folder = run.guide_folder(info.name)
    if not cache_info_path(folder).exists():
        make_folder(folder)
        write_json_atomic(cache_info_path(folder), replace(info, complete=False))
        return GuideCacheWriter(folder)
    there = read_cache_info(folder)
    if there.complete:
        raise NpoError(
            f"{run.root} already has a finished guide {info.name!r} ({describe_guide_source(there)} for step {there.learner_step})",  # noqa: E501
            "choose another name with --name, or use it: "
            f"npo resume {quote_path(run.root)} --at {there.learner_step} --guide {info.name}",
        )
    other = [name for name, value in cache_identity(info).items() if cache_identity(there)[name] != value]
    if other:
        raise NpoError(
            f"{run.root} has an unfinished guide {info.name!r} with another {', '.join(other)}",
            "choose another name with --name, or ask for the same guide again to finish it",
        )
    return GuideCacheWriter(folder)


def describe_guide_source(info: GuideCacheInfo) -> str:
    """Who wrote a cache, in few words: `step 100`, `model FOLDER`, `past`."""
    if info.guide_step is not None and info.source != "run":
        return f"step {info.guide_step}"
    return f"{info.source} {info.origin}".rstrip()


def format_guide_source_options(info: GuideCacheInfo) -> str:
    """The options of `npo sample-guide` that name the same author again."""
    if info.source == "checkpoint":
        return f"--guide {info.guide_step}"
    what, tail = info.origin, ""
    if info.source == "endpoint":
        what, _, model = info.origin.partition(" model ")
        tail = f" --model {quote_path(model)}"
    elif info.source == "extrapolated":
        what = info.origin.partition(" of ")[0]
    elif info.source == "run":
        what, _, place = info.origin.rpartition(" step ")
        tail = f" --guide {place.split()[0]}"
    return f"--source {info.source}" + (f" --from {quote_path(what)}{tail}" if what else "")


def cache_identity(info: GuideCacheInfo) -> dict[str, object]:
    """What tells one cache from another: its fields without the counts."""
    return {name: value for name, value in asdict(info).items() if name not in COUNT_FIELDS}


def finish_guide_cache(run: RunDir, info: GuideCacheInfo) -> GuideCacheInfo:
    """Declare a cache complete, with its counts taken from its journals, and return what was written."""
    folder = run.guide_folder(info.name)
    store = GuideCacheWriter(folder)
    store.sync()
    every = store.read_queried_prompts().values()
    found = store.read_rollouts()
    kept = [each for several in found.values() for each in several]
    done = replace(
        info,
        num_prompts=len(every),
        num_prompts_with_rollouts=len(found),
        num_rollouts=len(kept),
        has_logps=all(each.behavior_logps is not None for each in kept),
        external_tokens=sum(len(each.response_ids) for each in kept) if info.source == "file" else 0,
        num_samples=sum(asked.num_sampled for asked in every),
        num_tokens=sum(asked.num_tokens for asked in every),
        complete=True,
    )
    write_json_atomic(cache_info_path(folder), done)
    return done


def read_cache_info(folder: Path) -> GuideCacheInfo:
    """guide.json of a cache."""
    return decode_record(GuideCacheInfo, read_json(cache_info_path(folder)), cache_info_path(folder))


def read_queried_prompts(folder: Path) -> dict[str, QueriedPrompt]:
    """Prompts that were asked, by prompt id."""
    return {asked.prompt_id: asked for asked in JsonlLog(queried_prompts_path(folder)).read_records(QueriedPrompt)}


def read_guide_rollouts(folder: Path) -> RolloutsByPrompt:
    """Trajectories kept."""
    path = guide_rollouts_path(folder)
    found: dict[str, tuple[GuideRollout, ...]] = {}
    for number, kept in enumerate(JsonlLog(path).read_records(GuideRollout), start=1):
        ids, logps = kept.response_ids, kept.behavior_logps
        whole = len(ids) > 0 and all(isinstance(token, int) and token >= 0 for token in ids)
        if logps is not None:
            whole = whole and len(ids) == len(logps) and all(isinstance(logp, float | int) for logp in logps)
        # A wrong one is kept only where there is no right one.
        fits = kept.verdict == "correct" or (kept.verdict in get_args(Verdict) and kept.num_correct == 0)
        if not whole or not fits or kept.source not in get_args(RolloutSource):
            raise damaged_file_error(f"{path}, line {number}", f"it is no verified answer to prompt {kept.prompt_id}")
        exact = None if logps is None else decode_float32(logps)
        images = decode_images(kept.images, path)
        whole_one = replace(kept, response_ids=tuple(ids), behavior_logps=exact, images=images)
        found[kept.prompt_id] = (*found.get(kept.prompt_id, ()), whole_one)
    return found


def load_guide(run: RunDir, name: str) -> tuple[GuideCacheInfo, RolloutsByPrompt]:
    """A finished cache of this run, ready for training: what it is, and its trajectories by prompt id."""
    folder = run.guide_folder(name)
    if not cache_info_path(folder).exists():
        names = ", ".join(info.name for info in list_guide_caches(run)) or "none"
        raise NpoError(
            f"{run.root} has no guide {name!r}; it has: {names}",
            f"make one: npo sample-guide {quote_path(run.root)} --guide STEP --at STEP --name {name}",
        )
    info = read_cache_info(folder)
    if info.run_id != run.run_id:
        raise NpoError(
            f"guide {name!r} was made in another run ({info.run_id}), not in {run.root} ({run.run_id})",
            f"make one here: npo sample-guide {quote_path(run.root)} {format_guide_source_options(info)} --at {info.learner_step}",  # noqa: E501
        )
    if not info.complete:
        raise NpoError(
            f"guide {name!r} of {run.root} is unfinished",
            f"finish it: npo sample-guide {quote_path(run.root)} --branch {info.branch} {format_guide_source_options(info)} "  # noqa: E501
            f"--at {info.learner_step} --name {name}",
        )
    trajectories = read_guide_rollouts(folder)
    count, wanted = sum(map(len, trajectories.values())), info.num_rollouts or info.num_prompts_with_rollouts
    counts = ((len(trajectories), info.num_prompts_with_rollouts, "prompts with answers"), (count, wanted, "answers"))
    for there, said, what in counts:
        if there != said:
            raise damaged_file_error(
                guide_rollouts_path(folder), f"it has {there} {what}, and {cache_info_path(folder).name} counts {said}"
            )
    return info, trajectories


def list_guide_caches(run: RunDir) -> list[GuideCacheInfo]:
    """Every cache by name, unfinished ones included."""
    if not run.guides_folder.is_dir():
        return []
    return [
        read_cache_info(folder) for folder in sorted(run.guides_folder.iterdir()) if cache_info_path(folder).exists()
    ]

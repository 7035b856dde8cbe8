"""Guide caches: verified trajectories of another policy, whoever that is, and every prompt it was asked.

guide.json is replaced whole, at birth and when the cache is finished; the two journals beside it only grow, so
sampling that was interrupted goes on where it stopped. An unfinished cache is never used for training.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import get_args

from npo_cli.errors import NpoError, as_typed
from npo_cli.guide_records import GuideInfo, GuideTrajectory
from npo_cli.records import Source, Verdict
from npo_cli.run_dir.files import build, damaged, make_folder, read_json, row_of, write_json_atomic
from npo_cli.run_dir.journal import Journal, Outcome
from npo_cli.run_dir.paths import RunDir
from npo_cli.run_dir.rollouts import exact_float32, image_rows, images_of, shortest_float32

PROGRESS = (
    *("num_prompts", "num_found", "num_samples", "num_tokens", "complete"),
    *("has_logps", "num_trajectories", "given_tokens"),
)
"""Fields of GuideInfo that sampling fills; the others say what the cache is."""

Trajectories = Mapping[str, tuple[GuideTrajectory, ...]]
"""By prompt id, in the order of their numbers."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Asked:
    """One prompt that the guide was asked."""

    prompt_id: str
    num_sampled: int
    num_correct: int
    num_tokens: int
    """Tokens generated."""


@dataclass(slots=True)
class GuideStore:
    """An unfinished cache, open for writing."""

    folder: Path
    _asked: Journal = field(init=False)
    _trajectories: Journal = field(init=False)

    def __post_init__(self) -> None:
        self._asked = Journal(asked_path(self.folder))
        self._trajectories = Journal(trajectories_path(self.folder))

    def add_trajectory(self, trajectory: GuideTrajectory) -> Outcome:
        """Keep one trajectory. Write it before `add_asked` of its prompt: asked means wholly dealt with."""
        logps = trajectory.behavior_logps
        row = row_of(trajectory) | {"behavior_logps": None if logps is None else shortest_float32(logps)}
        row.pop("images")
        row |= {"images": image_rows(trajectory.images)} if trajectory.images else {}
        return self._trajectories.append_once(row, ("prompt_id", "number"))

    def add_asked(self, asked: Asked) -> Outcome:
        """Note that a prompt was dealt with, whether or not a trajectory was found."""
        return self._asked.append_once(asked, "prompt_id")

    def asked(self) -> dict[str, Asked]:
        """Prompts already dealt with, by prompt id."""
        return read_asked(self.folder)

    def trajectories(self) -> Trajectories:
        """Trajectories found so far."""
        return read_trajectories(self.folder)

    def sync(self) -> None:
        """Force both journals down to the disk, the trajectories first."""
        self._trajectories.sync()
        self._asked.sync()


def info_path(folder: Path) -> Path:
    """What the cache is and how far it is."""
    return folder / "guide.json"


def asked_path(folder: Path) -> Path:
    """One line a prompt asked."""
    return folder / "asked.jsonl"


def trajectories_path(folder: Path) -> Path:
    """One line a trajectory kept."""
    return folder / "trajectories.jsonl"


def new_guide(run: RunDir, info: GuideInfo) -> GuideStore:
    """Open a cache for writing: a new one, or an unfinished one of the same identity, which goes on.

    Any other cache of that name is a user's error. Identity: every field but the counts and `complete`.
    """
    folder = run.guide_folder(info.name)
    if not info_path(folder).exists():
        make_folder(folder)
        write_json_atomic(info_path(folder), replace(info, complete=False))
        return GuideStore(folder)
    there = read_info(folder)
    if there.complete:
        raise NpoError(
            f"{run.root} already has a finished guide {info.name!r} ({author(there)} for step {there.at_step})",
            "choose another name with --name, or use it: "
            f"npo resume {as_typed(run.root)} --at {there.at_step} --guide {info.name}",
        )
    other = [name for name, value in identity(info).items() if identity(there)[name] != value]
    if other:
        raise NpoError(
            f"{run.root} has an unfinished guide {info.name!r} with another {', '.join(other)}",
            "choose another name with --name, or ask for the same guide again to finish it",
        )
    return GuideStore(folder)


def author(info: GuideInfo) -> str:
    """Who wrote a cache, in few words: `step 100`, `model FOLDER`, `past`."""
    if info.guide_step is not None and info.source != "run":
        return f"step {info.guide_step}"
    return f"{info.source} {info.origin}".rstrip()


def asking(info: GuideInfo) -> str:
    """The options of `npo sample-guide` that name the same author again."""
    if info.source == "checkpoint":
        return f"--guide {info.guide_step}"
    what, tail = info.origin, ""
    if info.source == "endpoint":
        what, _, model = info.origin.partition(" model ")
        tail = f" --model {as_typed(model)}"
    elif info.source == "extrapolated":
        what = info.origin.partition(" of ")[0]
    elif info.source == "run":
        what, _, place = info.origin.rpartition(" step ")
        tail = f" --guide {place.split()[0]}"
    return f"--source {info.source}" + (f" --from {as_typed(what)}{tail}" if what else "")


def identity(info: GuideInfo) -> dict[str, object]:
    """What tells one cache from another: its fields without the counts."""
    return {name: value for name, value in asdict(info).items() if name not in PROGRESS}


def finish_guide(run: RunDir, info: GuideInfo) -> GuideInfo:
    """Declare a cache complete, with its counts taken from its journals, and return what was written."""
    folder = run.guide_folder(info.name)
    store = GuideStore(folder)
    store.sync()
    every = store.asked().values()
    found = store.trajectories()
    kept = [each for several in found.values() for each in several]
    done = replace(
        info,
        num_prompts=len(every),
        num_found=len(found),
        num_trajectories=len(kept),
        has_logps=all(each.behavior_logps is not None for each in kept),
        given_tokens=sum(len(each.response_ids) for each in kept) if info.source == "file" else 0,
        num_samples=sum(asked.num_sampled for asked in every),
        num_tokens=sum(asked.num_tokens for asked in every),
        complete=True,
    )
    write_json_atomic(info_path(folder), done)
    return done


def read_info(folder: Path) -> GuideInfo:
    """guide.json of a cache."""
    return build(GuideInfo, read_json(info_path(folder)), info_path(folder))


def read_asked(folder: Path) -> dict[str, Asked]:
    """Prompts that were asked, by prompt id."""
    return {asked.prompt_id: asked for asked in Journal(asked_path(folder)).built(Asked)}


def read_trajectories(folder: Path) -> Trajectories:
    """Trajectories kept."""
    path = trajectories_path(folder)
    found: dict[str, tuple[GuideTrajectory, ...]] = {}
    for number, kept in enumerate(Journal(path).built(GuideTrajectory), start=1):
        ids, logps = kept.response_ids, kept.behavior_logps
        whole = len(ids) > 0 and all(isinstance(token, int) and token >= 0 for token in ids)
        if logps is not None:
            whole = whole and len(ids) == len(logps) and all(isinstance(logp, float | int) for logp in logps)
        # A wrong one is kept only where there is no right one.
        fits = kept.verdict == "correct" or (kept.verdict in get_args(Verdict) and kept.num_correct == 0)
        if not whole or not fits or kept.source not in get_args(Source):
            raise damaged(f"{path}, line {number}", f"it is no verified answer to prompt {kept.prompt_id}")
        exact = None if logps is None else exact_float32(logps)
        images = images_of(kept.images, path)
        whole_one = replace(kept, response_ids=tuple(ids), behavior_logps=exact, images=images)
        found[kept.prompt_id] = (*found.get(kept.prompt_id, ()), whole_one)
    return found


def load_guide(run: RunDir, name: str) -> tuple[GuideInfo, Trajectories]:
    """A finished cache of this run, ready for training: what it is, and its trajectories by prompt id."""
    folder = run.guide_folder(name)
    if not info_path(folder).exists():
        names = ", ".join(info.name for info in list_guides(run)) or "none"
        raise NpoError(
            f"{run.root} has no guide {name!r}; it has: {names}",
            f"make one: npo sample-guide {as_typed(run.root)} --guide STEP --at STEP --name {name}",
        )
    info = read_info(folder)
    if info.run_id != run.run_id:
        raise NpoError(
            f"guide {name!r} was made in another run ({info.run_id}), not in {run.root} ({run.run_id})",
            f"make one here: npo sample-guide {as_typed(run.root)} {asking(info)} --at {info.at_step}",
        )
    if not info.complete:
        raise NpoError(
            f"guide {name!r} of {run.root} is unfinished",
            f"finish it: npo sample-guide {as_typed(run.root)} --branch {info.branch} {asking(info)} "
            f"--at {info.at_step} --name {name}",
        )
    trajectories = read_trajectories(folder)
    count, wanted = sum(map(len, trajectories.values())), info.num_trajectories or info.num_found
    counts = ((len(trajectories), info.num_found, "prompts with answers"), (count, wanted, "answers"))
    for there, said, what in counts:
        if there != said:
            raise damaged(
                trajectories_path(folder), f"it has {there} {what}, and {info_path(folder).name} counts {said}"
            )
    return info, trajectories


def list_guides(run: RunDir) -> list[GuideInfo]:
    """Every cache by name, unfinished ones included."""
    if not run.guides_folder.is_dir():
        return []
    return [read_info(folder) for folder in sorted(run.guides_folder.iterdir()) if info_path(folder).exists()]

"""Guide caches: verified responses of a guide source, and every prompt that it was sampled on.

guide.json is replaced whole, when the cache is created and when it is complete; the two logs beside it only grow, so
interrupted sampling continues where it stopped. An incomplete cache is never used for training.
"""

import shlex
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import get_args

from npo_cli.errors import NpoError, quote_path
from npo_cli.storage.files import damaged_file_error, decode_record, make_folder, read_json, to_row, write_json_atomic
from npo_cli.storage.jsonl import AppendResult, JsonlLog
from npo_cli.storage.layout import RunDir
from npo_cli.storage.rollout_log import decode_float32, decode_images, encode_float32, encode_images
from npo_cli.types.guides import GuideCacheInfo, GuideRollout, SourceSpec
from npo_cli.types.rollouts import RolloutSource, Verdict

COUNT_FIELDS = (
    *("num_prompts", "num_prompts_with_rollouts", "num_samples", "num_tokens", "complete"),
    *("has_logps", "num_rollouts", "external_tokens"),
)
"""Fields of GuideCacheInfo that sampling fills; the others are the identity of the cache."""

RolloutsByPrompt = Mapping[str, tuple[GuideRollout, ...]]
"""By prompt id, in the order of `number`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class QueriedPrompt:
    """One prompt that the guide was sampled on."""

    prompt_id: str
    num_sampled: int
    num_correct: int
    num_tokens: int
    """Tokens generated."""


@dataclass(slots=True)
class GuideCacheWriter:
    """An incomplete cache, open for writing."""

    folder: Path
    _prompts: JsonlLog = field(init=False)
    _rollouts: JsonlLog = field(init=False)

    def __post_init__(self) -> None:
        self._prompts = JsonlLog(queried_prompts_path(self.folder))
        self._rollouts = JsonlLog(guide_rollouts_path(self.folder))

    def add_rollout(self, rollout: GuideRollout) -> AppendResult:
        """Append one response. Write it before `add_queried_prompt` of its prompt, which marks the prompt as done."""
        logps = rollout.behavior_logps
        row = to_row(rollout) | {"behavior_logps": None if logps is None else encode_float32(logps)}
        row.pop("images")
        row |= {"images": encode_images(rollout.images)} if rollout.images else {}
        return self._rollouts.append_once(row, ("prompt_id", "number"))

    def add_queried_prompt(self, prompt: QueriedPrompt) -> AppendResult:
        """Mark a prompt as done, with or without a response."""
        return self._prompts.append_once(prompt, "prompt_id")

    def read_queried_prompts(self) -> dict[str, QueriedPrompt]:
        """Prompts that are done, by prompt id."""
        return read_queried_prompts(self.folder)

    def read_rollouts(self) -> RolloutsByPrompt:
        """Responses so far."""
        return read_guide_rollouts(self.folder)

    def sync(self) -> None:
        """Sync both logs to disk, the responses first."""
        self._rollouts.sync()
        self._prompts.sync()


def cache_info_path(folder: Path) -> Path:
    """Identity, counts, and whether it is complete."""
    return folder / "guide.json"


def queried_prompts_path(folder: Path) -> Path:
    """One line per sampled prompt."""
    return folder / "prompts.jsonl"


def guide_rollouts_path(folder: Path) -> Path:
    """One line per response."""
    return folder / "rollouts.jsonl"


def open_guide_cache(run: RunDir, info: GuideCacheInfo) -> GuideCacheWriter:
    """Open a cache for writing: a new one, or an incomplete one of the same identity.

    Any other cache of that name is an error. Identity: every field but the counts and `complete`.
    """
    folder = run.guide_folder(info.name)
    if not cache_info_path(folder).exists():
        make_folder(folder)
        write_json_atomic(cache_info_path(folder), replace(info, complete=False))
        return GuideCacheWriter(folder)
    there = read_cache_info(folder)
    if there.complete:
        raise NpoError(
            f"{run.root} already has a complete guide {info.name!r} "
            f"({describe_guide_source(there)} for step {there.learner_step})",
            "choose another name with --name, or use it: "
            f"npo resume {quote_path(run.root)} --at {there.learner_step} --guide {info.name}",
        )
    other = [name for name, value in cache_identity(info).items() if cache_identity(there)[name] != value]
    if other:
        raise NpoError(
            f"{run.root} has an incomplete guide {info.name!r} with another {', '.join(other)}",
            "choose another name with --name, or repeat the command that began it",
        )
    return GuideCacheWriter(folder)


def describe_guide_source(info: GuideCacheInfo) -> str:
    """The guide in a few words: `step 100`, `model:FOLDER`, `past`."""
    return f"step {info.guide_step}" if info.source.name == "checkpoint" else info.source.text


def format_source_option(info: GuideCacheInfo) -> str:
    """The option of `npo sample-guide` that names the same guide source."""
    return f"--source {shlex.quote(info.source.text)}"


def cache_identity(info: GuideCacheInfo) -> dict[str, object]:
    """The fields of a cache without the counts."""
    return {name: value for name, value in asdict(info).items() if name not in COUNT_FIELDS}


def finish_guide_cache(run: RunDir, info: GuideCacheInfo, *, is_external: bool = False) -> GuideCacheInfo:
    """Mark a cache complete, with its counts taken from its logs; returns what was written.

    `is_external`: its responses were recorded outside this run.
    """
    folder = run.guide_folder(info.name)
    writer = GuideCacheWriter(folder)
    writer.sync()
    prompts, by_prompt = writer.read_queried_prompts().values(), writer.read_rollouts()
    rollouts = [rollout for each in by_prompt.values() for rollout in each]
    complete = replace(
        info,
        num_prompts=len(prompts),
        num_prompts_with_rollouts=len(by_prompt),
        num_rollouts=len(rollouts),
        has_logps=all(rollout.behavior_logps is not None for rollout in rollouts),
        external_tokens=sum(len(rollout.response_ids) for rollout in rollouts) if is_external else 0,
        num_samples=sum(prompt.num_sampled for prompt in prompts),
        num_tokens=sum(prompt.num_tokens for prompt in prompts),
        complete=True,
    )
    write_json_atomic(cache_info_path(folder), complete)
    return complete


def read_cache_info(folder: Path) -> GuideCacheInfo:
    """guide.json of a cache."""
    path = cache_info_path(folder)
    row = read_json(path)
    if isinstance(row.get("source"), dict):
        row["source"] = decode_record(SourceSpec, row["source"], path)
    return decode_record(GuideCacheInfo, row, path)


def read_queried_prompts(folder: Path) -> dict[str, QueriedPrompt]:
    """Sampled prompts, by prompt id."""
    return {prompt.prompt_id: prompt for prompt in JsonlLog(queried_prompts_path(folder)).read_records(QueriedPrompt)}


def read_guide_rollouts(folder: Path) -> RolloutsByPrompt:
    """The responses of a cache."""
    path = guide_rollouts_path(folder)
    by_prompt: dict[str, tuple[GuideRollout, ...]] = {}
    for number, row in enumerate(JsonlLog(path).read_records(GuideRollout), start=1):
        ids, logps = row.response_ids, row.behavior_logps
        is_valid = len(ids) > 0 and all(isinstance(token, int) and token >= 0 for token in ids)
        if logps is not None:
            is_valid = is_valid and len(ids) == len(logps) and all(isinstance(logp, float | int) for logp in logps)
        # With guide.cache.keep=all a wrong response is kept where there is no correct one.
        is_valid &= row.verdict == "correct" or (row.verdict in get_args(Verdict) and row.num_correct == 0)
        if not is_valid or row.source not in get_args(RolloutSource):
            problem = f"it is not a verified response to prompt {row.prompt_id}"
            raise damaged_file_error(f"{path}, line {number}", problem)
        rollout = replace(
            row,
            response_ids=tuple(ids),
            behavior_logps=None if logps is None else decode_float32(logps),
            images=decode_images(row.images, path),
        )
        by_prompt[row.prompt_id] = (*by_prompt.get(row.prompt_id, ()), rollout)
    return by_prompt


def load_guide(run: RunDir, name: str) -> tuple[GuideCacheInfo, RolloutsByPrompt]:
    """A complete cache of this run: its info, and its responses by prompt id."""
    folder, command = run.guide_folder(name), f"npo sample-guide {quote_path(run.root)}"
    if not cache_info_path(folder).exists():
        names = ", ".join(info.name for info in list_guide_caches(run)) or "none"
        raise NpoError(
            f"{run.root} has no guide {name!r}; it has: {names}",
            f"make one: {command} --source STEP --at STEP --name {name}",
        )
    info = read_cache_info(folder)
    again = f"{format_source_option(info)} --at {info.learner_step}"
    if info.run_id != run.run_id:
        raise NpoError(
            f"guide {name!r} was made in another run ({info.run_id}), not in {run.root} ({run.run_id})",
            f"make one here: {command} {again}",
        )
    if not info.complete:
        raise NpoError(
            f"guide {name!r} of {run.root} is incomplete",
            f"finish it: {command} --branch {info.branch} {again} --name {name}",
        )
    by_prompt = read_guide_rollouts(folder)
    counts = (
        (len(by_prompt), info.num_prompts_with_rollouts, "prompts with responses"),
        (sum(map(len, by_prompt.values())), info.num_rollouts or info.num_prompts_with_rollouts, "responses"),
    )
    for found, expected, what in counts:
        if found != expected:
            problem = f"it has {found} {what}, but guide.json counts {expected}"
            raise damaged_file_error(guide_rollouts_path(folder), problem)
    return info, by_prompt


def list_guide_caches(run: RunDir) -> list[GuideCacheInfo]:
    """Every cache by name, incomplete ones included."""
    if not run.guides_folder.is_dir():
        return []
    return [
        read_cache_info(folder) for folder in sorted(run.guides_folder.iterdir()) if cache_info_path(folder).exists()
    ]

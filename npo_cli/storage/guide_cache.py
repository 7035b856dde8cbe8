"""Guide caches: verified responses of a guide source, and every prompt that it was sampled on.

A cache is a sample store with guide.json, which is replaced whole when the cache is created and when it is complete.
The store only grows, so interrupted sampling continues where it stopped. An incomplete cache is never used for
training.
"""

import math
import shlex
from dataclasses import asdict, replace
from pathlib import Path

from npo_cli.errors import NpoError, quote_path
from npo_cli.storage.files import damaged_file_error, decode_record, read_json, to_row, write_json_atomic
from npo_cli.storage.layout import RunDir, list_folders
from npo_cli.storage.lineage import read_segments
from npo_cli.storage.log_head import encode_head
from npo_cli.storage.sample_store import SampleStore
from npo_cli.types.guides import GuideCacheInfo, SourceSpec
from npo_cli.types.rollouts import PromptSamples

COUNT_FIELDS = (
    *("num_prompts", "num_prompts_with_rollouts", "num_samples", "num_tokens", "complete"),
    *("has_logps", "num_rollouts", "external_tokens"),
)
"""Fields of GuideCacheInfo that sampling fills; the others are the identity of the cache."""


def cache_info_path(folder: Path) -> Path:
    """Identity, counts, and whether it is complete."""
    return folder / "guide.json"


def open_guide_cache(run: RunDir, info: GuideCacheInfo) -> SampleStore:
    """Open a cache for writing: a new one, or an incomplete one of the same identity.

    Any other cache of that name is an error. Identity: every field but the counts and `complete`.
    """
    folder = run.guide_folder(info.name)
    if not check_guide_cache(run, info):
        write_json_atomic(cache_info_path(folder), replace(info, complete=False))
    return SampleStore(folder)


def check_guide_cache(run: RunDir, info: GuideCacheInfo) -> bool:
    """Whether the cache exists and may be added to; one that is complete, or another one, is refused."""
    folder = run.guide_folder(info.name)
    if not cache_info_path(folder).exists():
        if any(f"guides/{info.name}" in segment.removed for segment in read_segments(run)):
            raise NpoError(
                f"guide {info.name} of {run.root} was removed with its branch; its costs keep the name",
                "choose another name with --name",
            )
        return False
    there = read_cache_info(folder)
    if there.complete:
        raise NpoError(
            f"{run.root} already has a complete guide {info.name!r} "
            f"({describe_guide_source(there)} for step {there.learner_step})",
            "choose another name with --name, or use it: "
            f"npo resume {quote_path(run.root)} --at {there.learner_step} --guide {info.name}",
        )
    check_cache_identity(run, there, info)
    return True


def check_cache_identity(run: RunDir, there: GuideCacheInfo, wanted: GuideCacheInfo) -> None:
    """Refuse to add to a cache responses that it was not made for."""
    other = [name for name, value in cache_identity(wanted).items() if cache_identity(there)[name] != value]
    if other:
        raise NpoError(
            f"{run.root} has an incomplete guide {wanted.name!r} with another {', '.join(other)}",
            "choose another name with --name, or repeat the command that began it",
        )


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
    """Mark a cache complete, with its counts taken from its samples; returns what was written.

    `is_external`: its responses were recorded outside this run.
    """
    store = SampleStore(run.guide_folder(info.name))
    sealed = store.seal()
    prompts = read_guide_prompts(store.folder).values()
    rollouts = [rollout for samples in prompts for rollout in samples.rollouts]
    complete = replace(
        info,
        num_prompts=len(prompts),
        num_prompts_with_rollouts=sum(bool(samples.rollouts) for samples in prompts),
        num_rollouts=len(rollouts),
        has_logps=all(rollout.behavior_logps is not None for rollout in rollouts),
        external_tokens=sum(rollout.num_tokens for rollout in rollouts) if is_external else 0,
        num_samples=sum(samples.num_sampled for samples in prompts),
        num_tokens=sum(samples.num_tokens for samples in prompts),
        complete=True,
    )
    write_json_atomic(cache_info_path(store.folder), to_row(complete) | {"samples": encode_head(sealed)})
    return complete


def read_cache_info(folder: Path) -> GuideCacheInfo:
    """guide.json of a cache."""
    path = cache_info_path(folder)
    row = read_json(path)
    if isinstance(row.get("source"), dict):
        row["source"] = decode_record(SourceSpec, row["source"], path)
    return decode_record(GuideCacheInfo, row, path)


def read_guide_prompts(folder: Path) -> dict[str, PromptSamples]:
    """Every prompt sampled so far by prompt id, with or without a rollout."""
    found = {}
    for line, _, samples in SampleStore(folder).iter_samples():
        for rollout in samples.rollouts:
            if not rollout.response_ids or any(map(math.isnan, rollout.behavior_logps or ())):
                problem = f"a rollout of prompt {samples.prompt_id} lacks tokens or log-probabilities"
                raise damaged_file_error(line, problem)
        found[samples.prompt_id] = samples
    return found


def load_guide(run: RunDir, name: str) -> tuple[GuideCacheInfo, dict[str, PromptSamples]]:
    """A complete cache of this run: its info, and by prompt id the prompts that it has rollouts of."""
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
    return info, read_finished_prompts(folder, info)


def read_finished_prompts(folder: Path, info: GuideCacheInfo) -> dict[str, PromptSamples]:
    """The prompts of a complete cache that it has rollouts of; other samples than when it was finished are damage."""
    by_prompt = {key: samples for key, samples in read_guide_prompts(folder).items() if samples.rollouts}
    counts = (
        (len(by_prompt), info.num_prompts_with_rollouts, "prompts with responses"),
        (sum(len(samples.rollouts) for samples in by_prompt.values()), info.num_rollouts, "responses"),
    )
    for found, expected, what in counts:
        # A killed replay leaves the counts of a lazy cache as they were when it began.
        if found != expected and not info.lazy_settings:
            problem = f"it has {found} {what}, but guide.json counts {expected}"
            raise damaged_file_error(SampleStore(folder).path, problem)
    SampleStore(folder).check_finished(read_json(cache_info_path(folder)).get("samples"), cache_info_path(folder))
    return by_prompt


def list_guide_caches(run: RunDir) -> list[GuideCacheInfo]:
    """Every cache by name, incomplete ones included."""
    return [read_cache_info(folder) for folder in list_folders(run.guides_folder) if cache_info_path(folder).exists()]

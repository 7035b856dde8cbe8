"""Real runs of a tiny recipe, and what of them must come out the same whatever happened on the way."""

import hashlib
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from npo_cli.config.loading import load_recipe, recipe_from_dict
from npo_cli.config.recipe import Recipe
from npo_cli.guides.build_cache import build_guide_cache
from npo_cli.guides.score import score_run
from npo_cli.guides.source import parse_spec
from npo_cli.session.session import Session, build_session, open_policy, open_task
from npo_cli.storage.checkpoints import find_checkpoint
from npo_cli.storage.guide_cache import load_guide
from npo_cli.storage.layout import TEXT_LOG_FILE, RunDir, open_run
from npo_cli.storage.lineage import find_newest_branch
from npo_cli.training.resume import resume_run
from npo_cli.training.train import train_run
from npo_cli.types.guides import GuideCacheInfo
from npo_cli.types.rollouts import StepReport
from npo_cli.types.scores import CandidateScore

TINY = (
    *("train.num_steps=4", "train.save_every=2", "train.prompts_per_step=4", "train.group_size=4"),
    *("task.pool_size=16", "task.heldout_size=4", "eval.every=0", "model.threads=1"),
)
"""A step of this takes about 50 ms. Its pool is seen once in 4 steps."""
WHOLE_REPLAY = (
    *("guide.cache.prompts=all", "guide.cache.coverage=1", "guide.cache.min_yield=0"),
    "guide.cache.samples_per_round=2",
)
"""A guide on every prompt that the replay visits, so that a small run has enough of them."""
LORA = ("model.lora.rank=4", "train.lr=1e-3")


def tiny_recipe(*overrides: str) -> Recipe:
    return load_recipe("micro", [*TINY, *overrides])


def train(root: Path, *overrides: str, until: int | None = None) -> list[StepReport]:
    return steps_of(train_run(root, tiny_recipe(*overrides), until=until))


def resume(root: Path, *overrides: str, **options: Any) -> list[StepReport]:
    return steps_of(start_resume(root, *overrides, **options))


def start_resume(root: Path, *overrides: str, **options: Any) -> Any:
    """The generator itself: closing it is a stop between two steps with nothing saved, like a kill."""
    arguments = {"at": None, "guide": None, "source_branch": None, "new_branch": None, "steps": None} | options
    return resume_run(root, overrides=overrides, **arguments)


def sample(root: Path, *overrides: str, source: str = "4", **options: Any) -> GuideCacheInfo:
    """A guide cache of the source with this SPEC, of all prompts of the replay if no override says otherwise."""
    options = {"at": 2, "name": "near"} | options
    unused = {"guide.cache.prompts=all"} if "guide.cache.lazy=true" in overrides else set()
    spec, settings = parse_spec(source), (*(one for one in WHOLE_REPLAY if one not in unused), *overrides)
    return list(build_guide_cache(root, spec=spec, overrides=settings, **options))[-1]


def score(root: Path, *overrides: str, sources: Iterable[str | int] = (), **options: Any) -> list[CandidateScore]:
    """Scores of these SPECs (none: of every later checkpoint), without that of "no guide"."""
    return score_with_none(root, *overrides, sources=sources, **options)[:-1]


def score_with_none(
    root: Path, *overrides: str, sources: Iterable[str | int] = (), **options: Any
) -> list[CandidateScore]:
    """The same, and "no guide" as the last."""
    records = score_records(root, *overrides, sources=sources, **options)
    return [record for record in records if isinstance(record, CandidateScore)]


def score_records(root: Path, *overrides: str, sources: Iterable[str | int] = (), **options: Any) -> Iterator[Any]:
    """Everything that a scoring yields."""
    specs = [parse_spec(str(source)) for source in sources]
    yield from score_run(root, overrides=overrides, sources=specs or None, **({"at": 0, "branch": None} | options))


def steps_of(records: Iterable[Any]) -> list[StepReport]:
    return [record for record in records if isinstance(record, StepReport)]


def stop_after(records: Any, step: int) -> None:
    """Let a run record `step`, then drop it where it stands."""
    for record in records:
        if isinstance(record, StepReport) and record.step == step:
            records.close()


def open_session_at(root: Path, step: int, *, branch: str | None = None) -> Session:
    """A run opened with the weights of one of its checkpoints."""
    run = open_run(root)
    branch = branch or find_newest_branch(run)
    recipe = recipe_from_dict(run.read_recipe(branch))
    task = open_task(recipe)
    return build_session(run, recipe, task=task, policy=open_policy(recipe, task, find_checkpoint(run, branch, step)))


def reproducible_digests(root: Path, branch: str = "main") -> dict[str, str]:
    """Digests of everything that seed and recipe alone decide: weights, moments, streams, metrics, rollouts."""
    folder = RunDir(root).branch_folder(branch)
    weights = ("model.safetensors", "adapter_model.safetensors", "adapter_config.json")
    names = ("metrics.jsonl", "rollouts.jsonl", *weights, "optimizer.safetensors", "state.json")
    return {name: digest for name, digest in file_digests(folder).items() if Path(name).name in names}


def file_digests(folder: Path) -> dict[str, str]:
    """sha256 of every file, by its path in the folder; hidden ones, heads of logs and log.txt left out."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not path.name.startswith(".") and path.suffix != ".head" and path.name != TEXT_LOG_FILE
    }


def copy_run(root: Path, to: Path) -> Path:
    return Path(shutil.copytree(root, to))


def trajectories(root: Path, name: str = "near") -> dict[str, Any]:
    """Of a cache with one trajectory a prompt."""
    every = {prompt_id: samples.rollouts for prompt_id, samples in load_guide(open_run(root), name)[1].items()}
    assert {len(several) for several in every.values()} <= {1}
    return {prompt_id: one for prompt_id, (one,) in every.items()}

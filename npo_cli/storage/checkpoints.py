"""Checkpoints: built under a hidden name, hashed, synced, renamed. A final name means a complete checkpoint.

Two tiers. *weights*: a folder that `from_pretrained` opens. *full*: the same with a `training_state/` folder inside,
which holds what training needs to resume. Demotion renames that folder away and deletes it.
"""

import hashlib
import os
import shutil
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

from npo_cli.distributed.process_group import current_group, on_main_rank
from npo_cli.errors import NpoError, damaged_checkpoint_hint, quote_path
from npo_cli.storage.costs import costs_path
from npo_cli.storage.files import (
    DELETED_SUFFIX,
    damaged_file_error,
    decode_record,
    delete_atomically,
    explain_write_error,
    hash_file,
    now_utc,
    read_json,
    sync_path,
    write_json_atomic,
)
from npo_cli.storage.layout import RunDir, format_step, list_folders, parse_step
from npo_cli.storage.lineage import ancestry, find_first_segment, find_policy_branch, find_policy_owner
from npo_cli.storage.log_head import LogHead, check_size, encode_head, seal_log

PARTIAL_SUFFIX = ".partial"
MANIFEST = "npo.json"
TRAINING_STATE_FOLDER = "training_state"
TRAINING_STATE_MANIFEST = "npo_training_state.json"
WEIGHTS_SUFFIX = ".safetensors"


@dataclass(frozen=True, kw_only=True, slots=True)
class Checkpoint:
    """A complete checkpoint on disk."""

    branch: str
    step: int
    path: Path
    tier: Literal["full", "weights"]

    @property
    def digest(self) -> str:
        """Identity of its weights, from its manifest."""
        return str(read_manifest(self.path)["digest"])

    @property
    def training_state_path(self) -> Path:
        """Folder of the training state; exists where the tier is `full`."""
        return self.path / TRAINING_STATE_FOLDER


@contextmanager
def create_checkpoint(
    run: RunDir, branch: str, step: int, *, log_sizes: Mapping[Path, int] | None = None
) -> Iterator[Path]:
    """Yield a hidden folder to save into; when the block ends well it becomes `step_000120`, else it is removed.

    A complete checkpoint of that name is never overwritten: the same weights saved again are dropped (a lost
    training state is put back), other weights are an error. An incomplete one makes room. `log_sizes`: what
    `measure_logs` found at the step, for a checkpoint that is written while the logs grow.
    """
    home = run.checkpoints_folder(branch)
    hidden = home / f".{format_step(step)}{PARTIAL_SUFFIX}"
    with explain_write_error(home / format_step(step)):
        _start_checkpoint(home, hidden)
        try:
            yield hidden
            sizes = measure_logs(run, branch) if log_sizes is None else log_sizes
            _finish_checkpoint(run, branch, step, hidden=hidden, log_sizes=sizes)
        finally:
            if current_group().is_main:
                shutil.rmtree(hidden, ignore_errors=True)


@on_main_rank
def _start_checkpoint(home: Path, hidden: Path) -> None:
    if not home.exists():
        home.mkdir()
        sync_path(home.parent)
    remove_leftovers(home)
    hidden.mkdir()


@on_main_rank
def _finish_checkpoint(run: RunDir, branch: str, step: int, *, hidden: Path, log_sizes: Mapping[Path, int]) -> None:
    write_manifests(hidden, branch=branch, step=step, logs=_seal_logs(run, log_sizes))
    _publish(hidden, hidden.parent / format_step(step))


def measure_logs(run: RunDir, branch: str) -> dict[Path, int]:
    """Bytes of each log that holds the steps which lead to the branch's newest one."""
    paths = (run.metrics_path(branch), run.timings_path(branch), run.rollouts_path(branch), costs_path(run))
    return {path: path.stat().st_size if path.exists() else 0 for path in (*paths, run.segments_path)}


def _seal_logs(run: RunDir, log_sizes: Mapping[Path, int]) -> dict[str, Any]:
    """A checkpoint is never on the disk without the lines of the steps that led to it, and says how many these are."""
    heads = {path.relative_to(run.root).as_posix(): seal_log(path, size=size) for path, size in log_sizes.items()}
    return {name: encode_head(head) for name, head in heads.items() if head.lines}


def read_recorded_logs(folder: Path) -> dict[str, LogHead]:
    """What each log held when a checkpoint was saved, by path relative to the run directory."""
    source = folder / MANIFEST
    found = read_manifest(folder).get("logs", {})
    if not isinstance(found, dict) or not all(isinstance(head, dict) for head in found.values()):
        raise damaged_file_error(source, "its logs are not listed")
    return {name: decode_record(LogHead, head, source) for name, head in found.items()}


def list_step_folders(run: RunDir, branch: str) -> list[Path]:
    """Folders of a branch that have the name of a checkpoint, by step."""
    steps = {parse_step(folder.name): folder for folder in list_folders(run.checkpoints_folder(branch))}
    return [steps[step] for step in sorted(step for step in steps if step is not None)]


def check_recorded_logs(run: RunDir) -> None:
    """Refuse a run with a log that is shorter than the newest checkpoint of a branch says."""
    for branch in list_folders(run.branches_folder):
        newest = next(filter(is_complete, reversed(list_step_folders(run, branch.name))), None)
        for name, head in read_recorded_logs(newest).items() if newest else ():
            check_size(run.root / name, head)


def _publish(hidden: Path, final: Path) -> None:
    """Give a finished folder its final name."""
    if final.exists() and has_intact_weights(final, deep=True):
        _merge(hidden, final)
        return
    if final.exists():
        delete_atomically(final)
    hidden.rename(final)
    sync_path(final.parent)


def _merge(hidden: Path, final: Path) -> None:
    """The checkpoint is already there: keep it, give it the new training state where its own is gone or damaged."""
    if read_manifest(hidden)["digest"] != read_manifest(final)["digest"]:
        raise NpoError(
            f"{final} exists and holds other weights than the ones to be saved",
            "a checkpoint is never overwritten: replay as a new branch with "
            f"npo resume {quote_path(final.parents[3])} --at STEP --no-guide",
        )
    if (hidden / TRAINING_STATE_FOLDER).is_dir() and not has_intact_training_state(final, deep=True):
        if (final / TRAINING_STATE_FOLDER).exists():
            delete_atomically(final / TRAINING_STATE_FOLDER)
        (hidden / TRAINING_STATE_FOLDER).rename(final / TRAINING_STATE_FOLDER)
        sync_path(final)


def remove_leftovers(home: Path) -> None:
    """Remove what killed writers left among a branch's checkpoints. Needs the run's lock."""
    if not home.is_dir():
        return
    dead = [
        *home.glob(f".step_*{PARTIAL_SUFFIX}"),
        *home.glob(f".*{DELETED_SUFFIX}"),
        *home.glob(f"step_*/.{TRAINING_STATE_FOLDER}{DELETED_SUFFIX}"),
    ]
    for folder in dead:
        shutil.rmtree(folder, ignore_errors=True)


def demote_checkpoint(checkpoint: Checkpoint) -> None:
    """Delete the training state of a full checkpoint, atomically."""
    if checkpoint.training_state_path.exists():
        delete_atomically(checkpoint.training_state_path)


def delete_checkpoint(checkpoint: Checkpoint) -> None:
    """Delete a checkpoint, atomically."""
    delete_atomically(checkpoint.path)


def is_complete(folder: Path, deep: bool = False) -> bool:
    """The folder has a final name and every file of its weights with its size (`deep`: and its sha256)."""
    return parse_step(folder.name) is not None and has_intact_weights(folder, deep=deep)


def list_checkpoints(run: RunDir, branch: str) -> list[Checkpoint]:
    """Complete checkpoints of the branch itself, by step. One with a damaged training state has tier `weights`."""
    home = run.checkpoints_folder(branch)
    found = []
    for folder in home.iterdir() if home.is_dir() else ():
        step = parse_step(folder.name)
        if step is not None and is_complete(folder):
            tier: Literal["full", "weights"] = "full" if has_intact_training_state(folder) else "weights"
            found.append(Checkpoint(branch=branch, step=step, path=folder, tier=tier))
    return sorted(found, key=lambda checkpoint: checkpoint.step)


def list_ancestry_checkpoints(run: RunDir, branch: str) -> list[Checkpoint]:
    """Checkpoints along the line of descent by step: each ancestor's up to the step where the line left it."""
    line = ancestry(run, branch)
    every = (found for span in line for found in list_checkpoints(run, span.branch))
    return [found for found in every if find_policy_owner(line, found.step) == found.branch]


def find_checkpoint(run: RunDir, branch: str, step: int) -> Checkpoint:
    """The checkpoint of a step on the branch's line of descent."""
    every = list_ancestry_checkpoints(run, branch)
    for checkpoint in every:
        if checkpoint.step == step:
            return checkpoint
    _check_not_damaged(run.checkpoint_folder(find_policy_branch(run, branch, step), step))
    steps = ", ".join(str(checkpoint.step) for checkpoint in every) or "none"
    raise NpoError(
        f"{run.root} has no complete checkpoint of step {step} on branch {branch}; it has steps: {steps}",
        f"choose one of these, or see npo index {quote_path(run.root)}",
    )


def verify_checkpoint(checkpoint: Checkpoint, *, training_state: bool = False, tensors: bool = True) -> None:
    """Compare every byte of a checkpoint's weights (or training state) with its digests: a damaged one is refused.

    Without `tensors` only config and tokenizer, which are read before the weights.
    """
    found = find_damage(checkpoint.path, training_state=training_state, tensors=tensors)
    if found:
        raise NpoError(found, damaged_checkpoint_hint(checkpoint.path))


def _check_not_damaged(folder: Path) -> None:
    found = find_damage(folder, deep=False) if folder.exists() else None
    if found:
        raise NpoError(found, damaged_checkpoint_hint(folder))


def check_newer_checkpoints(run: RunDir, branch: str, step: int) -> None:
    """Refuse to resume from `step` where a newer checkpoint is damaged: the user decides about that one."""
    home = run.checkpoints_folder(branch)
    for folder in sorted(home.iterdir()) if home.is_dir() else ():
        found = parse_step(folder.name)
        if found is not None and found > step:
            _check_not_damaged(folder)


def find_resume_checkpoint(run: RunDir, branch: str) -> Checkpoint:
    """The checkpoint that the branch resumes from: its own newest full one, or the one it was forked from. A branch
    with a merged start that was not saved yet begins with the latter, too."""
    first = find_first_segment(run, branch)
    fork_step, every = first.fork_step, list_ancestry_checkpoints(run, branch)
    if first.parent is not None and not any(found.step >= fork_step for found in every):
        every = [found for found in list_ancestry_checkpoints(run, first.parent) if found.step == fork_step]
    full = [found for found in every if found.tier == "full" and found.step >= fork_step]
    check_newer_checkpoints(run, branch, full[-1].step if full else fork_step)
    if not full:
        raise NpoError(
            f"branch {branch} of {run.root} has no complete checkpoint with a training state to resume from",
            f"start again in a new folder with npo train, or look: npo index {quote_path(run.root)}",
        )
    return full[-1]


# Manifests: a complete checkpoint lists every file with its size and sha256


def write_manifests(folder: Path, *, branch: str, step: int, logs: Mapping[str, Any] = MappingProxyType({})) -> None:
    """Sync every file of a checkpoint and write its manifests, the training state's first."""
    state = folder / TRAINING_STATE_FOLDER
    if state.is_dir():
        _write_manifest(state, TRAINING_STATE_MANIFEST, {"step": step, "branch": branch})
    files = _write_manifest(folder, MANIFEST, {"step": step, "branch": branch}, logs)
    assert any(name.endswith(WEIGHTS_SUFFIX) for name in files), f"no weights were saved in {folder}"


def _write_manifest(
    folder: Path, manifest: str, head: Mapping[str, Any], logs: Mapping[str, Any] = MappingProxyType({})
) -> dict[str, Any]:
    files: dict[str, Any] = {}
    for path in list_manifest_files(folder, manifest):
        path.chmod(path.parent.stat().st_mode & 0o666)  # safetensors lets only the owner read what it writes
        sync_path(path)
        files[path.relative_to(folder).as_posix()] = {"size": path.stat().st_size, "sha256": hash_file(path)}
    tail = {"digest": compute_weights_digest(files), "logs": logs} if manifest == MANIFEST else {}
    write_json_atomic(folder / manifest, {**head, "files": files, **tail, "saved": now_utc()})
    for inner in sorted({path.parent for path in list_manifest_files(folder, manifest)}):
        sync_path(inner)
    return files


def list_manifest_files(folder: Path, manifest: str) -> list[Path]:
    """The files that a manifest lists, sorted: all but the manifest itself, hidden ones and `training_state/`."""
    found = []
    for path in sorted(folder.rglob("*")):
        parts = path.relative_to(folder).parts
        hidden = any(part.startswith(".") for part in parts)
        if path.is_file() and not hidden and parts != (manifest,) and parts[0] != TRAINING_STATE_FOLDER:
            found.append(path)
    return found


def compute_weights_digest(files: Mapping[str, Any]) -> str:
    """Identity of the weights: sha256 over `<sha256>  <name>` lines of the weights files in name order.

    The same as `LC_ALL=C sha256sum *.safetensors | sha256sum` in the checkpoint's folder.
    """
    names = sorted(name for name in files if name.endswith(WEIGHTS_SUFFIX) and "/" not in name)
    lines = "".join(f"{files[name]['sha256']}  {name}\n" for name in names)
    return hashlib.sha256(lines.encode("utf-8")).hexdigest()


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a checkpoint's weights."""
    return read_json(folder / MANIFEST)


def has_intact_weights(folder: Path, *, deep: bool = False) -> bool:
    """Every file of the weights part is there with its size; `deep` compares the sha256 sums too."""
    return find_damage(folder, deep=deep) is None


def has_intact_training_state(folder: Path, *, deep: bool = False) -> bool:
    """The folder holds a training state and every file of it is there; `deep` compares the sha256 sums too."""
    return find_damage(folder, training_state=True, deep=deep) is None


def find_damage(folder: Path, *, training_state: bool = False, deep: bool = True, tensors: bool = True) -> str | None:
    """What is wrong with the weights of a checkpoint (or with its training state), as text; None if it is complete."""
    part, manifest = (folder / TRAINING_STATE_FOLDER, TRAINING_STATE_MANIFEST) if training_state else (folder, MANIFEST)
    try:
        files = read_json(part / manifest)["files"]
        damages = (
            _find_file_damage(f"{part}/{name}", entry, deep=deep and (tensors or not name.endswith(".safetensors")))
            for name, entry in files.items()
        )
        return next(filter(None, damages), None)
    except NpoError as error:
        return error.message
    except (KeyError, TypeError, AttributeError):
        return f"{part / manifest} is damaged: it does not list the files"


def _find_file_damage(path: str, entry: Mapping[str, Any], *, deep: bool) -> str | None:
    try:
        found = os.stat(path)
    except OSError:
        return f"{path} is missing"
    if not stat.S_ISREG(found.st_mode):
        return f"{path} is missing"
    if found.st_size != entry["size"]:
        return f"{path} has {found.st_size:,} bytes, but {entry['size']:,} were saved"
    if deep and _hash_version(path, (found.st_ino, found.st_size, found.st_mtime_ns)) != entry["sha256"]:
        return f"{path} does not have the sha256 that was saved"
    return None


@lru_cache(maxsize=4096)
def _hash_version(path: str, version: tuple[int, int, int]) -> str:
    """sha256 of a file, read once for one state of it (inode, size and time)."""
    return hash_file(Path(path))

"""Paths in a run directory, and how one is created and opened. docs/reference/run-directory.md is the contract.

`npo_run.json` makes a folder a run directory; it is written last at creation. This module knows names, not contents.
"""

import copy
import os
import re
import shutil
import uuid
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from npo_cli.config.loading import RECIPE_CHECKSUM, dump_yaml, has_last_setting, parse_yaml
from npo_cli.distributed.process_group import on_main_rank
from npo_cli.errors import NpoError, quote_path
from npo_cli.storage.files import (
    check_text,
    check_time,
    damaged_file_error,
    explain_write_error,
    now_utc,
    read_json,
    write_json_atomic,
    write_text_atomic,
)

FORMAT_VERSION = 3
FIRST_BRANCH = "main"
RUN_INFO_FILE = "npo_run.json"
RECIPE_FILE = "recipe.yaml"
TEXT_LOG_FILE = "log.txt"
NEW_NAMES = {RUN_INFO_FILE, RECIPE_FILE, "branches", "segments.jsonl", "segments.jsonl.head"}
"""What a new run holds."""
NAME_PATTERN = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,63}")
RUN_JOURNALS = ("segments", "events", "autonpo", "evals", "prompt_results", "costs")
BRANCH_JOURNALS = ("metrics", "timings", "rollouts")
STEP_FOLDER_PATTERN = re.compile(r"step_(\d{6,})")


def format_step(step: int) -> str:
    """`step_000120`: padded to six digits, so that names sort like steps (up to 999,999)."""
    assert step >= 0, f"no step {step}"
    return f"step_{step:06d}"


def parse_step(name: str) -> int | None:
    """The step a folder is named after; None for any other name, hidden ones included."""
    found = STEP_FOLDER_PATTERN.fullmatch(name)
    return int(found.group(1)) if found and format_step(int(found.group(1))) == name else None


def validate_name(name: str) -> str:
    """The name itself, if a guide or branch may carry it: 1 to 64 of A-Z a-z 0-9 . _ - and no leading dot."""
    if not NAME_PATTERN.fullmatch(name):
        raise NpoError(
            f"{name!r} cannot name a guide or a branch",
            "use 1 to 64 letters, digits, '.', '_' or '-', not starting with '.'",
        )
    return name


def head_path(log: Path) -> Path:
    """`metrics.jsonl.head`: how many lines a log must have (`log_head.py`)."""
    return log.with_name(f"{log.name}.head")


@dataclass(frozen=True, kw_only=True, slots=True)
class RunInfo:
    """What `npo_run.json` says."""

    format: int
    run_id: str
    """uuid4, 32 hexadecimal digits."""
    created: str
    """ISO 8601, UTC."""
    npo_version: str
    prompts_sha256: str | None = None
    """Of the training and held-out prompts; None: not known."""


@dataclass(frozen=True, slots=True)
class RunDir:
    """A run directory: every path in it has its name here."""

    root: Path

    @property
    def info(self) -> RunInfo:
        """`npo_run.json`, read again."""
        return read_run_info(self.root)

    @property
    def exists(self) -> bool:
        """Whether the run was created."""
        return (self.root / RUN_INFO_FILE).exists()

    @property
    def run_id(self) -> str:
        """uuid4 of the run, 32 hexadecimal digits: ties a guide cache to its run."""
        return self.info.run_id

    @property
    def lock_path(self) -> Path:
        """Locked by the one writer; its content means nothing."""
        return self.root / ".lock"

    @property
    def holder_path(self) -> Path:
        """Who holds the lock, for the error message of the next one."""
        return self.root / ".lock_holder.json"

    @property
    def text_log_path(self) -> Path:
        """What the commands that wrote to the run said."""
        return self.root / TEXT_LOG_FILE

    @property
    def segments_path(self) -> Path:
        """The lineage."""
        return self.root / "segments.jsonl"

    @property
    def events_path(self) -> Path:
        """What happened and when."""
        return self.root / "events.jsonl"

    @property
    def evals_path(self) -> Path:
        """Held-out evaluations."""
        return self.root / "evals.jsonl"

    @property
    def prompt_results_path(self) -> Path:
        """The same, prompt by prompt."""
        return self.root / "prompt_results.jsonl"

    @property
    def branches_folder(self) -> Path:
        """One folder a branch."""
        return self.root / "branches"

    @property
    def guides_folder(self) -> Path:
        """One folder a guide cache."""
        return self.root / "guides"

    @property
    def scores_folder(self) -> Path:
        """One folder a scoring."""
        return self.root / "scores"

    @property
    def probes_folder(self) -> Path:
        """One folder per AutoNPO probe."""
        return self.root / "probes"

    @property
    def calibrations_folder(self) -> Path:
        """One folder per calibrated learner."""
        return self.root / "calibrations"

    def branch_folder(self, branch: str) -> Path:
        """Everything one branch wrote."""
        return self.branches_folder / validate_name(branch)

    def recipe_path(self, branch: str | None = None) -> Path:
        """The recipe in force on a branch; without one, the recipe at the run's creation."""
        return (self.root if branch is None else self.branch_folder(branch)) / RECIPE_FILE

    def metrics_path(self, branch: str) -> Path:
        """Measurements a step: a function of the seed."""
        return self.branch_folder(branch) / "metrics.jsonl"

    def timings_path(self, branch: str) -> Path:
        """Wall clock a step."""
        return self.branch_folder(branch) / "timings.jsonl"

    def rollouts_path(self, branch: str) -> Path:
        """Every group of every step."""
        return self.branch_folder(branch) / "rollouts.jsonl"

    def checkpoints_folder(self, branch: str) -> Path:
        """One folder a checkpoint."""
        return self.branch_folder(branch) / "checkpoints"

    def checkpoint_folder(self, branch: str, step: int) -> Path:
        """The final name of one checkpoint, whether it exists or not."""
        return self.checkpoints_folder(branch) / format_step(step)

    def guide_folder(self, name: str) -> Path:
        """One guide cache."""
        return self.guides_folder / validate_name(name)

    def list_logs(self) -> list[Path]:
        """Every JSON-lines log of the run that exists, or whose head does."""
        found = [self.root / f"{name}.jsonl" for name in RUN_JOURNALS]
        found += [folder / f"{name}.jsonl" for folder in list_folders(self.branches_folder) for name in BRANCH_JOURNALS]
        stores = [self.guides_folder, self.scores_folder, self.probes_folder]
        for calibration in list_folders(self.calibrations_folder):
            found.append(calibration / "replays.jsonl")
            stores += [calibration / "guides", calibration / "scores"]
        found += [folder / "rollouts.jsonl" for parent in stores for folder in list_folders(parent)]
        return [path for path in found if path.exists() or head_path(path).exists()]

    def read_recipe(self, branch: str | None = None) -> dict[str, Any]:
        """The resolved recipe of a branch (at the run's creation without one), as plain data."""
        return read_recipe(self.recipe_path(branch))

    def save_recipe(self, branch: str, recipe: Mapping[str, Any]) -> None:
        """Replace the recipe in force on a branch."""
        write_text_atomic(self.recipe_path(branch), _sign_recipe(recipe))


def list_folders(parent: Path) -> list[Path]:
    """Folders in a folder by name, hidden ones left out; none where it does not exist."""
    found = sorted(parent.iterdir()) if parent.is_dir() else ()
    return [folder for folder in found if folder.is_dir() and not folder.name.startswith(".")]


def dump_recipe(recipe: Mapping[str, Any]) -> str:
    """A recipe as YAML, sections and keys in the order given."""
    return dump_yaml(recipe, width=120)


def _sign_recipe(recipe: Mapping[str, Any]) -> str:
    text = dump_recipe(recipe)
    return f"{text}{RECIPE_CHECKSUM}{zlib.crc32(text.encode())}\n"


def read_recipe(path: Path) -> dict[str, Any]:
    """The recipe saved in `path`, read like a user's: without aliases, which can make a few bytes huge."""
    try:
        data = path.read_bytes()
        check_text(path, data, RECIPE_CHECKSUM)
        found = copy.deepcopy(_parse_saved_recipe(data.decode("utf-8"), path.name))
    except FileNotFoundError as error:
        raise NpoError(f"{path} is missing", "restore it from a copy of the run directory") from error
    except UnicodeDecodeError as error:
        raise damaged_file_error(path, str(error)) from error
    except NpoError as error:
        raise damaged_file_error(path, error.message) from error
    if not isinstance(found, dict):
        raise damaged_file_error(path, "it holds no mapping")
    return found


@lru_cache(maxsize=64)
def _parse_saved_recipe(text: str, source: str) -> Any:
    """Every checkpoint reads the recipes of all branches: parsing one takes 24 ms, copying the result 0.3 ms.

    Without a checksum it was changed on purpose, or cut: then its end is missing.
    """
    found = parse_yaml(text, source=source)[1]
    is_cut = isinstance(found, dict) and not (has_last_setting(found) and text.endswith("\n"))
    if RECIPE_CHECKSUM not in text and is_cut:
        raise NpoError("its end is missing, and its checksum")
    return found


def is_run_directory(path: Path) -> bool:
    """Whether a run was created there; it may be damaged."""
    return (path / RUN_INFO_FILE).is_file()


def read_run_info(root: Path) -> RunInfo:
    """`npo_run.json`, checked: absent, damaged and from-the-future each have their own words."""
    path = root / RUN_INFO_FILE
    if not path.is_file():
        raise NpoError(
            f"{root} is not a run directory: it has no {RUN_INFO_FILE}",
            "name a run directory, or start a new run: npo train RECIPE RUN",
        )
    found = read_json(path)
    version = found.get("format")
    if isinstance(version, bool) or not isinstance(version, int) or version < 1:
        raise damaged_file_error(path, f"format is {version!r}")
    if version < FORMAT_VERSION:
        raise NpoError(
            f"{root} has run directory format {version}; this version of npo reads format {FORMAT_VERSION} only",
            "train again: formats before 3 were never released",
        )
    if version > FORMAT_VERSION:
        raise NpoError(
            f"{root} was written by npo {found.get('npo_version', '?')} in run format {version}; "
            f"this npo reads formats up to {FORMAT_VERSION}",
            "open it with a newer npo: pip install --upgrade npo-cli",
        )
    known = {name: found.get(name) for name in ("run_id", "created", "npo_version")}
    for name, value in known.items():
        if not isinstance(value, str):
            raise damaged_file_error(path, f"{name} is {value!r}")
    check_time(known, "created", path)
    prompts = found.get("prompts_sha256")
    if not isinstance(prompts, str | None):
        raise damaged_file_error(path, f"prompts_sha256 is {prompts!r}")
    return RunInfo(format=version, prompts_sha256=prompts, **known)  # type: ignore[arg-type]


def open_run(root: Path) -> RunDir:
    """An existing run directory of a format this program reads."""
    root = Path(root)
    if not root.exists():
        raise NpoError(f"there is no run directory {root}", f"npo train RECIPE {quote_path(root)}")
    read_run_info(root)
    return RunDir(root)


@on_main_rank
def create_run(
    root: Path,
    *,
    recipe: Mapping[str, Any],
    npo_version: str,
    prompts_sha256: str | None = None,
    prepare: Callable[[RunDir], None] | None = None,
) -> RunDir:
    """A new run directory in a new or empty folder; on failure nothing is left behind.

    `prepare` writes what must be there as soon as the folder is a run.
    """
    root = Path(root)
    check_unused(root)
    made = [folder for folder in (root, *root.parents) if not folder.exists()]
    try:
        with explain_write_error(root):
            _write_new_run(root, recipe, npo_version=npo_version, prompts_sha256=prompts_sha256, prepare=prepare)
    except BaseException as error:
        _undo(root, made, taken=isinstance(error, FileExistsError))
        if isinstance(error, FileExistsError):
            raise used_directory_error(root) from error
        if isinstance(error, OSError):
            raise NpoError(f"cannot make {root}: {error.strerror}", "choose another run directory") from error
        raise
    return RunDir(root)


def _write_new_run(
    root: Path,
    recipe: Mapping[str, Any],
    *,
    npo_version: str,
    prompts_sha256: str | None,
    prepare: Callable[[RunDir], None] | None,
) -> None:
    root.mkdir(parents=True, exist_ok=True)
    # Two processes may create a run in one empty folder: the exclusive mode lets only one continue.
    with (root / RECIPE_FILE).open("x", encoding="utf-8") as file:
        file.write(_sign_recipe(recipe))
    run = RunDir(root)
    run.save_recipe(FIRST_BRANCH, recipe)
    if prepare is not None:
        prepare(run)
    info = RunInfo(
        format=FORMAT_VERSION,
        run_id=uuid.uuid4().hex,
        created=now_utc(),
        npo_version=npo_version,
        prompts_sha256=prompts_sha256,
    )
    write_json_atomic(root / RUN_INFO_FILE, info)


def _undo(root: Path, made: list[Path], *, taken: bool) -> None:
    """Remove what a failed creation left; nothing where another process took the folder."""
    if taken:
        return
    if root.is_dir():
        for name in NEW_NAMES - {"branches"}:
            (root / name).unlink(missing_ok=True)
        shutil.rmtree(root / "branches", ignore_errors=True)
    for folder in made:
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()


def check_unused(root: Path, *, flag: str = "RUN") -> None:
    """A folder with anything in it never becomes a new run, nor does one that cannot be made."""
    if root.exists() and (not root.is_dir() or any(root.iterdir())):
        raise used_directory_error(root, flag=flag)
    around = next(folder for folder in (root, *root.absolute().parents) if folder.exists())
    effective = os.access in os.supports_effective_ids
    if not around.is_dir() or not os.access(around, os.W_OK | os.X_OK, effective_ids=effective):
        problem = "may not be written in" if around.is_dir() else "is a file"
        raise NpoError(f"cannot make {root}: {around} {problem}", f"choose another folder for {flag}")


def used_directory_error(root: Path, *, flag: str = "RUN") -> NpoError:
    """The error for a folder that cannot become a run."""
    if (root / RUN_INFO_FILE).exists():
        return NpoError(
            f"{root} already holds a run",
            f"resume it: npo resume {quote_path(root)}, or choose a new folder for {flag}",
        )
    if not root.is_dir():
        return NpoError(f"{root} is a file, not a folder", f"choose a new folder for {flag}")
    names = {path.name for path in root.iterdir()}
    if names <= NEW_NAMES and (root / "branches" / FIRST_BRANCH / RECIPE_FILE).exists():
        return NpoError(
            f"{root} holds what a training left that was killed before it began",
            f"choose a new folder for {flag}; this one may be removed if no npo is starting in it",
        )
    return NpoError(
        f"{root} is not empty and holds no run",
        f"choose a new or empty folder for {flag} (npo resume continues an existing run)",
    )

"""What a complete checkpoint is: a folder whose manifest lists every file with its size and sha256.

A checkpoint has two parts with a manifest each: the weights (`npo.json`, every file of the folder itself) and,
in a full checkpoint, the training state (`training_state/npo_training_state.json`, every file under `training_state/`).
"""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from npo_cli.errors import NpoError
from npo_cli.storage.files import hash_file, now_utc, read_json, sync_path, write_json_atomic

MANIFEST = "npo.json"
TRAINING_STATE_FOLDER = "training_state"
TRAINING_STATE_MANIFEST = "npo_training_state.json"
WEIGHTS_SUFFIX = ".safetensors"


def write_manifests(folder: Path, *, branch: str, step: int) -> None:
    """Sync every file of a checkpoint and write its manifests, the training state's first."""
    state = folder / TRAINING_STATE_FOLDER
    if state.is_dir():
        _write_manifest(state, TRAINING_STATE_MANIFEST, {"step": step, "branch": branch})
    files = _write_manifest(folder, MANIFEST, {"step": step, "branch": branch})
    assert any(name.endswith(WEIGHTS_SUFFIX) for name in files), f"no weights were saved in {folder}"


def _write_manifest(folder: Path, manifest: str, head: Mapping[str, Any]) -> dict[str, Any]:
    files: dict[str, Any] = {}
    for path in list_manifest_files(folder, manifest):
        sync_path(path)
        files[path.relative_to(folder).as_posix()] = {"size": path.stat().st_size, "sha256": hash_file(path)}
    tail = {"digest": compute_weights_digest(files)} if manifest == MANIFEST else {}
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


def find_damage(folder: Path, *, training_state: bool = False, deep: bool = True) -> str | None:
    """What is wrong with the weights of a checkpoint (or with its training state), as text; None if it is complete."""
    part, manifest = (folder / TRAINING_STATE_FOLDER, TRAINING_STATE_MANIFEST) if training_state else (folder, MANIFEST)
    try:
        files = read_json(part / manifest)["files"]
        damages = (_find_file_damage(part / name, entry, deep=deep) for name, entry in files.items())
        return next(filter(None, damages), None)
    except NpoError as error:
        return error.message
    except (KeyError, TypeError, AttributeError):
        return f"{part / manifest} is damaged: it does not list the files"


def _find_file_damage(path: Path, entry: Mapping[str, Any], *, deep: bool) -> str | None:
    if not path.is_file():
        return f"{path} is missing"
    if path.stat().st_size != entry["size"]:
        return f"{path} has {path.stat().st_size:,} bytes, but {entry['size']:,} were saved"
    if deep and hash_file(path) != entry["sha256"]:
        return f"{path} does not have the sha256 that was saved"
    return None

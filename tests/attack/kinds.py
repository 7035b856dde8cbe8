"""The kind of a file: its path without the names, steps, keys and digests that differ between files of one kind."""

import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

RULES = (
    (r"^.*/run/", "RUN/"),
    (r"^bench/", "OUT/"),
    (r"^(run|stale|auto|ladder|past|imported)/", "RUN/"),
    (r"/branches/[^/]+/", "/branches/BRANCH/"),
    (r"/checkpoints/step_\d+/", "/checkpoints/STEP/"),
    (r"/guides/[^/]+/", "/guides/NAME/"),
    (r"/(scores|probes|calibrations)/[^/]+_step_\d+_[0-9a-f]{8}(?=/)", r"/\1/KEY"),
    (r"^OUT/(runs|tuning)/[^/]+/[^/]+/seed-\d+/", r"OUT/\1/METHOD/SETTING/SEED/"),
    (r"/shard-\d+-model-\d+-of-\d+\.safetensors$", "/shard-N.safetensors"),
    (r"/model-\d+-of-\d+\.safetensors$", "/model-N.safetensors"),
)
PLACEHOLDERS = (
    *((r"/BRANCH_step_\d+_KEY(?=/)", "/KEY"), (r"/step_\d+/", "/STEP/"), (r"/seed-N/", "/SEED/")),
    (r"/shard-[-\da-z]+\.safetensors$", "/shard-N.safetensors"),
)
"""The same of the names in the document's trees."""


def find_kind(path: str) -> str:
    """`RUN/branches/BRANCH/metrics.jsonl` for `run/branches/late/metrics.jsonl`, a path below the workflow's folder."""
    for pattern, replacement in RULES:
        path = re.sub(pattern, replacement, path)
    return path


def group_files(root: Path) -> dict[str, list[Path]]:
    """The files below the workflow's folder by their kind: those of run directories and of the folder of a bench."""
    found: dict[str, list[Path]] = {}
    for path in sorted(root.rglob("*")):
        name = path.relative_to(root)
        kind = find_kind(name.as_posix())
        is_hidden = any(part.startswith(".") for part in name.parts)
        if path.is_file() and kind.startswith(("RUN/", "OUT/")) and not is_hidden:
            found.setdefault(kind, []).append(path)
    return found


def list_documented_kinds(page: str) -> set[str]:
    """The files in the trees of the page on run directories, with the head of each log."""
    kinds = {kind for tree in re.findall(r"```\n((?:RUN|OUT)/\n.*?)```", page, re.DOTALL) for kind in _read_tree(tree)}
    return kinds | {f"{kind}.head" for kind in kinds if kind.endswith(".jsonl")}


def _read_tree(tree: str) -> Iterator[str]:
    folders: list[tuple[int, str]] = []
    for line in tree.splitlines():
        indent = len(line) - len(line.lstrip())
        names = re.split(r"\s{2,}", line.strip())[0].split(", ")
        folders = [folder for folder in folders if folder[0] < indent]
        above = "".join(name for _, name in folders)
        for name in names:
            if name.endswith("/"):
                folders.append((indent, name))
            elif not name.startswith("."):
                path = PurePosixPath(above + name).as_posix()
                for pattern, replacement in PLACEHOLDERS:
                    path = re.sub(pattern, replacement, path)
                yield path

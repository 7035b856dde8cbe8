"""`npo init`."""

from pathlib import Path
from typing import Annotated

import typer

from npo_cli.cli.options import JsonOpt
from npo_cli.cli.output import print_conclusion, to_json_line
from npo_cli.cli.terminal import escape_for_terminal, print_data
from npo_cli.errors import NpoError, quote_path
from npo_cli.types.views import Conclusion, WrittenFile

PROJECT_FILES = {
    "recipe.yaml": "the settings that differ from the defaults",
    "grade.py": "the verifier, a function of your own",
    "data.jsonl": "ten rows of prompt and answer",
}
"""Files of `assets/project`, and what they are."""

FolderArg = Annotated[
    Path,
    typer.Argument(metavar="DIR", help="Folder of the project, created if it does not exist. [default: this folder]"),
]


def init(folder: FolderArg = Path(), *, as_json: JsonOpt = False) -> None:
    """Start a project: a recipe, a verifier and ten rows of data that train at once.

    Existing files are never overwritten.
    """
    files = write_project(folder)
    for written in files:
        print_data(to_json_line(written) if as_json else escape_for_terminal(f"{written.path}  {written.content}"))
    enter = "" if folder == Path() else f"cd {quote_path(folder)} && "
    conclusion = Conclusion(sentence=f"Wrote {len(files)} files of a project.", next=f"{enter}npo check recipe.yaml")
    print_conclusion(conclusion, as_json=as_json)


def write_project(folder: Path) -> list[WrittenFile]:
    """Write the files of a project, all or none of them; what a killed call wrote of them may be there."""
    if folder.exists() and not folder.is_dir():
        raise NpoError(f"{folder} is a file", "npo init DIR   # a new or existing folder")
    templates = Path(__file__).parents[1] / "assets" / "project"
    contents = {name: (templates / name).read_bytes() for name in PROJECT_FILES}
    there = [name for name in PROJECT_FILES if (folder / name).exists() or (folder / name).is_symlink()]
    taken = [name for name in there if not _holds(folder / name, contents[name])]
    if len(there) == len(PROJECT_FILES):
        taken = there
    if taken:
        names = ", ".join(str(folder / name) for name in taken)
        verb = "exists" if len(taken) == 1 else "exist"
        raise NpoError(f"{names} {verb} already; nothing was written", "npo init NEW_DIR   # or move them away")
    from npo_cli.storage.files import write_bytes_atomic

    for name, content in contents.items():
        if name not in there:
            write_bytes_atomic(folder / name, content)
    return [WrittenFile(path=str(folder / name), content=content) for name, content in PROJECT_FILES.items()]


def _holds(path: Path, content: bytes) -> bool:
    """Whether the file is what `npo init` writes."""
    return path.is_file() and not path.is_symlink() and path.read_bytes() == content

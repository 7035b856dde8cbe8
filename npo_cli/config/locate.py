"""Finds recipes and methods by name or path."""

import difflib
from pathlib import Path

from npo_cli.errors import NpoError

METHODS_FOLDER = "methods"
TRACKS = ("matched", "reference", "authors", "controls", "extrapolated")
"""Folders of shipped methods, in the order in which a name without a folder is searched."""
_SUFFIXES = (".yaml", ".yml", ".json")
_PACKAGE = Path(__file__).parents[1]


def find_recipe_folder() -> Path:
    """`npo_cli/recipes` of an installed package; in a source checkout the folder beside the package."""
    installed = _PACKAGE / "recipes"
    return installed if installed.is_dir() else _PACKAGE.parent / "recipes"


def is_shipped(path: Path) -> bool:
    """Whether a file is one of the package's recipes and methods."""
    return path.resolve().is_relative_to(find_recipe_folder().resolve())


def list_recipe_names() -> tuple[str, ...]:
    """Names of the shipped recipes, sorted."""
    return tuple(sorted(path.stem for path in find_recipe_folder().glob("*.yaml")))


def list_method_names() -> tuple[str, ...]:
    """Shipped methods, such as `matched/luffy`, sorted."""
    home = find_recipe_folder() / METHODS_FOLDER
    return tuple(sorted(path.relative_to(home).with_suffix("").as_posix() for path in home.rglob("*.yaml")))


def find_method(name: str) -> Path:
    """The file of a method: a path, `reference/luffy`, or a name that is searched in all tracks."""
    if name.endswith(_SUFFIXES):
        return find_recipe(f"./{name}" if "/" not in name else name)
    for candidate in (name, *(f"{track}/{name}" for track in TRACKS)):
        if candidate in list_method_names():
            return find_recipe_folder() / METHODS_FOLDER / f"{candidate}.yaml"
    near = difflib.get_close_matches(name, list_method_names(), n=1, cutoff=0.4)
    raise NpoError(f"there is no method {name!r}", f"--method {near[0]}" if near else "npo recipes --methods")


def find_recipe(name: str, *, beside: Path | None = None) -> Path:
    """The file of a recipe: a path (relative to `beside` if given), or the name of a shipped recipe."""
    if name.endswith(_SUFFIXES) or "/" in name or "\\" in name:
        path = (beside or Path()) / Path(name).expanduser()
        if not path.is_file():
            raise NpoError(f"there is no recipe file {path}", "npo recipes   # lists the shipped recipes")
        return path
    path = find_recipe_folder() / f"{name}.yaml"
    if path.is_file():
        return path
    near = difflib.get_close_matches(name, list_recipe_names(), n=1, cutoff=0.4)
    hint = f"npo recipes {near[0]}   # similar name" if near else "npo recipes   # lists the shipped recipes"
    raise NpoError(f"there is no shipped recipe named {name!r} (a file needs its suffix: {name}.yaml)", hint)

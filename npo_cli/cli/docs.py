"""`npo docs`: the pages of docs/ in the terminal."""

import difflib
import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from npo_cli.cli.options import JsonOpt
from npo_cli.cli.terminal import is_terminal, open_console, print_data
from npo_cli.errors import NpoError

_PACKAGE = Path(__file__).parents[1]


def docs(
    topic: Annotated[
        str | None,
        typer.Argument(metavar="TOPIC", help="Page, such as glossary or how-to/lora.", show_default=False),
    ] = None,
    *,
    as_json: JsonOpt = False,
) -> None:
    """Print a page of the documentation, or list the pages.

    Formatted on a terminal; the Markdown source when piped.
    """
    if topic is None:
        _print_topics(as_json=as_json)
        return
    page = find_page(topic)
    text = page.read_text(encoding="utf-8")
    if as_json:
        print_data(json.dumps({"record": "page", "topic": topic, "title": read_title(page), "text": text}))
        return
    if not is_terminal(sys.stdout):
        print_data(text.rstrip())
        return
    from rich.markdown import Markdown

    open_console().print(Markdown(text, hyperlinks=False))


def find_docs_folder() -> Path:
    """`npo_cli/docs` of an installed package; in a source checkout the folder beside the package."""
    installed = _PACKAGE / "docs"
    return installed if installed.is_dir() else _PACKAGE.parent / "docs"


def list_topics() -> tuple[str, ...]:
    """Paths of the pages below docs/ without the suffix, such as `how-to/lora`, sorted."""
    folder = find_docs_folder()
    return tuple(sorted(page.relative_to(folder).with_suffix("").as_posix() for page in folder.rglob("*.md")))


def find_page(topic: str) -> Path:
    """The page with this path, or with this last name if only one page has it."""
    topics = list_topics()
    wanted = topic.lower().removesuffix(".md").removeprefix("docs/")
    matches = [name for name in topics if name == wanted] or [
        name for name in topics if name.rpartition("/")[2] == wanted
    ]
    if len(matches) == 1:
        return find_docs_folder() / f"{matches[0]}.md"
    if matches:
        raise NpoError(f"{topic!r} names {len(matches)} pages: {', '.join(matches)}", f"npo docs {matches[0]}")
    names = {name.rpartition("/")[2]: name for name in topics} | {name: name for name in topics}
    near = difflib.get_close_matches(wanted, names, n=1, cutoff=0.4)
    raise NpoError(
        f"there is no page {topic!r}", f"npo docs {names[near[0]]}" if near else "npo docs   # lists the pages"
    )


def read_title(page: Path) -> str:
    """The page's first heading; its name if there is none."""
    with page.open(encoding="utf-8") as lines:
        headings = (line.removeprefix("# ").strip() for line in lines if line.startswith("# "))
        return next(headings, page.stem)


def _print_topics(*, as_json: bool) -> None:
    from npo_cli.cli.output import print_table
    from npo_cli.report.table import Table

    folder = find_docs_folder()
    rows = [(topic, read_title(folder / f"{topic}.md")) for topic in list_topics()]
    if as_json:
        for topic, title in rows:
            print_data(json.dumps({"record": "page", "topic": topic, "title": title}))
        return
    print_table(Table(title="Pages (npo docs TOPIC prints one)", header=("topic", "title"), rows=rows, notes=()))

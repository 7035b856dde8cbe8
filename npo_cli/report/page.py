"""Records in, one HTML page out: it needs no network, runs no script, and opens from a disk or an e-mail alike.

Everything that is put into the template goes through one door: cut where it is too long, characters that a reader
would not see spelled out, then quoted for HTML. Only our own pictures pass it as they are: base64 in an `img`, where a
browser neither runs nor fetches anything. A Content-Security-Policy forbids scripts and every address besides.
"""

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from npo_cli.report.cells import Table
from npo_cli.report.inert import shortened, spelled_out
from npo_cli.report.lines import PromptStory, Visit
from npo_cli.report.pictures import Picture, svg_of
from npo_cli.report.stories import answers, how_far, in_a_sentence, log_ratio, what_happened

if TYPE_CHECKING:
    from jinja2 import Environment

TEMPLATE = Path(__file__).with_name("page.html")
GENERATOR = '<meta name="generator" content="npo report">'
"""By this line a page of ours is known again."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """One prompt: its story, every visit in short, and the one visit whose answers are shown."""

    story: PromptStory
    visits: tuple[Visit, ...]
    shown: Visit


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """A heading with what belongs to it, in this order."""

    title: str
    text: str = ""
    pictures: tuple[Picture, ...] = ()
    tables: tuple[Table, ...] = ()
    samples: tuple[Sample, ...] = ()
    folded: tuple[Table, ...] = ()
    """Shown when asked for."""
    listing: str = ""
    """Plain text, folded."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Chapter:
    """One run, or the overview of several."""

    title: str
    facts: tuple[tuple[str, str], ...]
    parts: tuple[Part, ...]


def page_html(title: str, chapters: Sequence[Chapter]) -> str:
    """The whole page. The same records give the same page, letter by letter."""
    template = _environment().from_string(TEMPLATE.read_text(encoding="utf-8"))
    return template.render(title=title, chapters=chapters)


def pictures_of(chapters: Sequence[Chapter]) -> list[Picture]:
    """Every picture of a page."""
    return [picture for chapter in chapters for part in chapter.parts for picture in part.pictures]


def _environment() -> "Environment":
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    def inlined(picture: Picture) -> Markup:
        return Markup("data:image/svg+xml;base64," + base64.b64encode(svg_of(picture)).decode("ascii"))

    def inert(value: object) -> object:
        return spelled_out(shortened(value), keep="\n") if type(value) is str else value

    environment = Environment(
        autoescape=True, undefined=StrictUndefined, finalize=inert, trim_blocks=True, lstrip_blocks=True
    )
    environment.globals["GENERATOR"] = Markup(GENERATOR)
    environment.tests["number_cell"] = is_number
    environment.filters |= {
        **{"inlined": inlined, "sentence": in_a_sentence, "answers": answers, "happened": what_happened},
        **{
            "ratio": log_ratio,
            "far": how_far,
            "share": lambda visit: round(100 * visit.num_correct / max(1, visit.num_asked)),
        },
    }
    return environment


def is_number(cell: str) -> bool:
    """Whether a cell stands to the right: a number, perhaps with a unit or an interval, or nothing."""
    return cell in ("", "-", "not reached") or cell.lstrip("+-")[:1].isdigit()

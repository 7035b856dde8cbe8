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

from npo_cli.report.plotting import Plot, render_svg
from npo_cli.report.prompt_tables import (
    dedupe_responses,
    describe_guide_distance,
    describe_history,
    describe_log_ratio,
    describe_visit,
)
from npo_cli.report.table import Table
from npo_cli.report.text_sanitizer import escape_control_chars, truncate_middle
from npo_cli.types.views import PromptHistory, PromptVisit

if TYPE_CHECKING:
    from jinja2 import Environment

TEMPLATE = Path(__file__).with_name("page.html")
GENERATOR = '<meta name="generator" content="npo report">'
"""By this line a page of ours is known again."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PromptSample:
    """One prompt: its story, every visit in short, and the one visit whose answers are shown."""

    history: PromptHistory
    visits: tuple[PromptVisit, ...]
    shown_visit: PromptVisit


@dataclass(frozen=True, kw_only=True, slots=True)
class Subsection:
    """A heading with what belongs to it, in this order."""

    title: str
    text: str = ""
    plots: tuple[Plot, ...] = ()
    tables: tuple[Table, ...] = ()
    samples: tuple[PromptSample, ...] = ()
    collapsed_tables: tuple[Table, ...] = ()
    """Shown when asked for."""
    listing: str = ""
    """Plain text, folded."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Section:
    """One run, or the overview of several."""

    title: str
    summary: tuple[tuple[str, str], ...]
    subsections: tuple[Subsection, ...]


def render_page(title: str, chapters: Sequence[Section]) -> str:
    """The whole page. The same records give the same page, letter by letter."""
    template = _environment().from_string(TEMPLATE.read_text(encoding="utf-8"))
    return template.render(title=title, chapters=chapters)


def list_plots(chapters: Sequence[Section]) -> list[Plot]:
    """Every picture of a page."""
    return [picture for chapter in chapters for part in chapter.subsections for picture in part.plots]


def _environment() -> "Environment":
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    def inlined(picture: Plot) -> Markup:
        return Markup("data:image/svg+xml;base64," + base64.b64encode(render_svg(picture)).decode("ascii"))

    def inert(value: object) -> object:
        return escape_control_chars(truncate_middle(value), keep="\n") if type(value) is str else value

    environment = Environment(
        autoescape=True, undefined=StrictUndefined, finalize=inert, trim_blocks=True, lstrip_blocks=True
    )
    environment.globals["GENERATOR"] = Markup(GENERATOR)
    environment.tests["number_cell"] = is_number
    environment.filters |= {
        **{"inlined": inlined, "sentence": describe_history, "answers": dedupe_responses, "happened": describe_visit},
        **{
            "ratio": describe_log_ratio,
            "far": describe_guide_distance,
            "share": lambda visit: round(100 * visit.num_correct / max(1, visit.num_on_policy)),
        },
    }
    return environment


def is_number(cell: str) -> bool:
    """Whether a cell stands to the right: a number, perhaps with a unit or an interval, or nothing."""
    return cell in ("", "-", "not reached") or cell.lstrip("+-")[:1].isdigit()

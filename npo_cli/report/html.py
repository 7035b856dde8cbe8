"""Records to one HTML page: no network, no script; it opens from a disk or as an attachment.

Every value in the template is truncated where it is too long, invisible characters are spelled out, and it is escaped
for HTML. Only our own plots are inserted as they are: base64 in an `img`, where a browser neither runs nor fetches
anything. A Content-Security-Policy forbids scripts and all other addresses.
"""

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from npo_cli.report.plotting import Plot, render_adaptive_svg
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
"""Identifies a page as a report of npo."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PromptSample:
    """One prompt: its history, every visit in short, and the one visit whose responses are shown."""

    history: PromptHistory
    turns: tuple[tuple[str, str], ...]
    """Role and content of each message of the prompt; the role is empty in a plain text."""
    explanation: str = ""
    """What the prompt asks, in words; empty where it explains itself."""
    visits: tuple[PromptVisit, ...]
    shown_visit: PromptVisit


@dataclass(frozen=True, kw_only=True, slots=True)
class Subsection:
    """A heading with its content, in this order."""

    title: str
    text: str = ""
    plots: tuple[Plot, ...] = ()
    tables: tuple[Table, ...] = ()
    samples: tuple[PromptSample, ...] = ()
    collapsed_tables: tuple[Table, ...] = ()
    """Shown on a click."""
    listing: str = ""
    """Plain text, collapsed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SummaryLine:
    """One or a few sentences of a summary under a short label."""

    label: str
    text: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Section:
    """One run, or the overview of several."""

    title: str
    words: tuple[SummaryLine, ...] = ()
    """The summary, read first."""
    commands: tuple[str, ...] = ()
    """Shell commands that make it again."""
    summary: tuple[tuple[str, str], ...]
    """Facts by name."""
    subsections: tuple[Subsection, ...]


def render_page(title: str, sections: Sequence[Section]) -> str:
    """The whole page. The same records give the same page, byte for byte."""
    template = _environment().from_string(TEMPLATE.read_text(encoding="utf-8"))
    return template.render(title=title, sections=sections)


def list_plots(sections: Sequence[Section]) -> list[Plot]:
    """Every plot of a page."""
    return [plot for section in sections for part in section.subsections for plot in part.plots]


def _environment() -> "Environment":
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    def inlined(plot: Plot) -> Markup:
        return Markup("data:image/svg+xml;base64," + base64.b64encode(render_adaptive_svg(plot)).decode("ascii"))

    def sanitize(value: object) -> object:
        return escape_control_chars(truncate_middle(value), keep="\n") if type(value) is str else value

    environment = Environment(
        autoescape=True, undefined=StrictUndefined, finalize=sanitize, trim_blocks=True, lstrip_blocks=True
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
    """Whether a cell is right-aligned: a number, possibly with a unit or an interval, or empty."""
    return cell in ("", "-", "not reached") or cell.lstrip("+-")[:1].isdigit()

"""Tables of `npo config`, wrapped to 80 columns."""

import json
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from npo_cli.report.table import Table
from npo_cli.types.views import SectionView, SettingView

WIDTH = 80
GAP = 2
MIN_TEXT = 28
"""Width of the last column where the others leave less."""
MAX_VALUE = 16
"""Longer defaults are shortened in a list; the setting alone shows them in full."""


def sections_tables(sections: Sequence[SectionView]) -> tuple[Table, ...]:
    """One line per section."""
    header = ("section", "settings", "what it sets")
    rows = wrap_rows(((one.section, str(one.num_settings), one.description) for one in sections), header=header)
    notes = ("npo config SECTION lists its settings, npo config KEY explains one.",)
    return (Table(title="Sections", header=header, rows=tuple(rows), notes=notes),)


def settings_tables(settings: Sequence[SettingView]) -> tuple[Table, ...]:
    """A list of settings; of a single one everything."""
    if len(settings) == 1:
        return (_describe(settings[0]),)
    section = settings[0].key.rpartition(".")[0]
    header = ("setting", "default", "meaning")
    lines = (
        (one.key.rpartition(".")[2], _shorten(_value(one.default, is_required=one.is_required)), one.description)
        for one in settings
    )
    notes = (f"npo config {settings[0].key} explains the first one in full.",)
    return (Table(title=section, header=header, rows=tuple(wrap_rows(lines, header=header)), notes=notes),)


def _describe(one: SettingView) -> Table:
    """A setting in full."""
    lines = [
        ("meaning", one.description),
        ("type", one.type),
        ("default", _value(one.default, is_required=one.is_required)),
        ("allowed", one.allowed),
        ("may change", one.change),
        ("comparison", one.comparison),
        *([("applies when", one.applies_when)] if one.applies_when else []),
    ]
    same: dict[str, list[str]] = {}
    for name, value in one.recipes.items():
        same.setdefault(_value(value), []).append(name)
    lines += [
        (f"{value} in" if len(value) <= MAX_VALUE else "elsewhere", ", ".join(names)) for value, names in same.items()
    ]
    if not one.recipes:
        lines.append(("elsewhere", "every shipped recipe and method has the default"))
    return Table(title=one.key, header=("", ""), rows=tuple(wrap_rows(lines, header=("", ""))))


def wrap_rows(rows: Iterable[tuple[str, ...]], *, header: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    """Rows whose last cell is wrapped so that a line has at most `WIDTH` characters."""
    rows = list(rows)
    widths = (max(len(row[place]) for row in [header, *rows]) + GAP for place in range(len(header) - 1))
    room = max(MIN_TEXT, WIDTH - sum(widths))
    for row in rows:
        first, *more = textwrap.wrap(row[-1], room, break_on_hyphens=False) or [""]
        yield (*row[:-1], first)
        yield from ((*([""] * (len(row) - 1)), line) for line in more)


def _value(value: Any, *, is_required: bool = False) -> str:
    if is_required:
        return "required"
    return value if isinstance(value, str) and value else json.dumps(value, ensure_ascii=False)


def _shorten(text: str) -> str:
    return text if len(text) <= MAX_VALUE else f"{text[: MAX_VALUE - 3]}..."


SETTING_TABLES = {SettingView: settings_tables, SectionView: sections_tables}

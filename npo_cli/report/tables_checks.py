"""Tables of `npo doctor` and `npo check`, wrapped to 80 columns."""

import textwrap
from collections.abc import Iterator, Sequence

from npo_cli.report.table import Table
from npo_cli.types.views import DoctorCheck, ProjectCheck

TEXT_WIDTH = 54
"""Characters of a detail or a fix in one line: with state and part, a line has 80."""
NO_BREAK = "\N{NO-BREAK SPACE}"
STATES = {(True, True): "ok", (True, False): "ok", (False, False): "-", (False, True): "BAD"}


def doctor_tables(checks: Sequence[DoctorCheck]) -> tuple[Table, ...]:
    """`-` marks an optional part that is absent, `BAD` a fault."""
    rows: list[tuple[str, str, str]] = []
    shown: set[str] = set()
    for check in checks:
        if not check.is_ok or not check.group:
            rows += _wrap(STATES[check.is_ok, check.is_required], check.name, check.detail)
            rows += _wrap("", "", f"try: {check.hint}") if check.hint and not check.is_ok else ()
        elif check.group not in shown:
            shown.add(check.group)
            passed = [one for one in checks if one.group == check.group and one.is_ok]
            rows += _wrap("ok", check.group, ", ".join(f"{one.name}{NO_BREAK}{one.detail}" for one in passed))
    return (Table(title="This machine", header=("", "part", "found"), rows=tuple(rows)),)


def project_tables(checks: Sequence[ProjectCheck]) -> tuple[Table, ...]:
    """One line per thing that was looked at; a fault has its fix below it."""
    rows: list[tuple[str, str, str]] = []
    for check in checks:
        state = "BAD" if check.state == "fault" else check.state
        rows += _wrap(state, check.part, check.message)
        rows += _wrap("", "", f"try: {check.hint}") if check.hint else ()
    return (Table(title="Project", header=("", "part", "found"), rows=tuple(rows)),)


def _wrap(state: str, part: str, text: str) -> Iterator[tuple[str, str, str]]:
    """Rows of one line each; those after the first have the text only."""
    for line in textwrap.wrap(text, TEXT_WIDTH, break_on_hyphens=False) or [""]:
        yield state, part, line.replace(NO_BREAK, " ")
        state = part = ""


CHECK_TABLES = {DoctorCheck: doctor_tables, ProjectCheck: project_tables}

"""What a run needs, as tables: each need with the product behind it, a verdict a place, and what each knob would do."""

from collections.abc import Sequence

from npo_cli.plan_records import Knob, Need, Verdict
from npo_cli.report.cells import Table, size


def needs_tables(needs: Sequence[Need]) -> tuple[Table, ...]:
    """One row a need; a GPU's are of each GPU, a host's of each machine."""
    rows = tuple((one.where, one.phase, one.what, size(one.num_bytes), one.how) for one in needs)
    note = "gpu: each one that trains; engine gpu: each one of a server; host: each machine; disk: the whole run"
    return (
        Table(title="Where the bytes go", header=("where", "when", "what", "size", "how"), rows=rows, notes=(note,)),
    )


def verdicts_tables(verdicts: Sequence[Verdict]) -> tuple[Table, ...]:
    """The peak of each place beside its limit."""
    rows = tuple(
        (
            *(one.where, size(one.num_bytes), one.peak),
            *("-" if one.limit is None else size(one.limit), "yes" if one.fits else "NO"),
        )
        for one in verdicts
    )
    return (Table(title="Does it fit", header=("where", "needs", "peak in", "there is", "fits"), rows=rows),)


def knobs_tables(knobs: Sequence[Knob]) -> tuple[Table, ...]:
    """Each setting alone."""
    rows = tuple((one.where, one.setting, size(one.num_bytes), "yes" if one.fits else "no") for one in knobs)
    return (Table(title="What would help, alone", header=("where", "setting", "needs", "fits"), rows=rows),)


PLAN_TABLES = {Need: needs_tables, Verdict: verdicts_tables, Knob: knobs_tables}

"""`npo report`: runs as one page that needs nothing besides itself. It reads; the only files it writes are its own."""

import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from npo_cli.errors import NpoError, as_typed
from npo_cli.records import Notice, Progress
from npo_cli.report.cells import size
from npo_cli.report.page import GENERATOR, page_html, pictures_of
from npo_cli.report.pictures import save_picture
from npo_cli.run_dir.bench_arms import arms_in, is_bench
from npo_cli.run_dir.files import write_text_atomic
from npo_cli.run_dir.lineage import newest_branch
from npo_cli.run_dir.paths import RunDir, open_run
from npo_cli.stages.chapters import chapter
from npo_cli.stages.facts import overview

ENDINGS = (".html", ".htm")
HEAD_BYTES = 2000
"""Where a page of ours says that it is one."""


def report_runs(roots: Sequence[Path], out: Path, *, pictures: Path | None) -> Iterator[Progress | Notice]:
    """A chapter a run, before them an overview if there are several; the pictures as files where asked for."""
    refuse_out(out)
    if pictures is not None and pictures.exists() and not pictures.is_dir():
        raise NpoError(f"--pictures {pictures} is a file", f"name a folder: --pictures {as_typed(pictures)}.d")
    runs = opened(roots)
    began = time.monotonic()
    chapters = [overview(runs)] if len(runs) > 1 else []
    for place, (label, run) in enumerate(runs, start=1):
        yield Progress(what="read runs", done=place - 1, total=len(runs), note=label)
        chapters.append(chapter(run, title=label, prefix=f"run-{place}-" if len(runs) > 1 else ""))
    title = f"npo report: {runs[0][0]}" if len(runs) == 1 else f"npo report: {len(runs)} runs"
    html = page_html(title, chapters)
    write_text_atomic(out, html)
    seconds = time.monotonic() - began
    yield Notice(message=f"report: {out}, {size(len(html.encode()))}, {seconds:.1f} s")
    if pictures is not None:
        every = pictures_of(chapters)
        for picture in every:
            save_picture(picture, pictures)
        yield Notice(message=f"pictures: {len(every)} as PNG and SVG in {pictures}")


def opened(roots: Sequence[Path]) -> list[tuple[str, RunDir]]:
    """The runs with the names that tell them apart: those of their folders, or the whole paths."""
    roots = [one for root in roots for one in (bench_runs(root) if is_bench(root) else [root])]
    places = [root.resolve() for root in roots]
    again = next((root for place, root in enumerate(roots) if places[place] in places[:place]), None)
    if again is not None:
        raise NpoError(f"{again} was given twice", "name each run once")
    runs = [open_run(root) for root in roots]
    for run in runs:
        newest_branch(run)
    names = [place.name for place in places]
    labels = names if len(set(names)) == len(names) else [str(root) for root in roots]
    return list(zip(labels, runs, strict=True))


def bench_runs(folder: Path) -> list[Path]:
    """Every run of a bench."""
    return [run for _, run in arms_in(folder)]


def refuse_out(out: Path) -> None:
    """Only a page of ours is ever replaced."""
    if out.suffix.lower() not in ENDINGS:
        raise NpoError(f"--out {out}: a page ends in .html", f"--out {as_typed(out)}.html")
    if out.is_dir():
        raise NpoError(f"--out {out} is a folder", f"--out {as_typed(out / 'report.html')}")
    if out.exists():
        with out.open("rb") as file:
            if GENERATOR.encode() not in file.read(HEAD_BYTES):
                raise NpoError(f"--out {out} exists and is no report of npo", "name another file, or remove that one")

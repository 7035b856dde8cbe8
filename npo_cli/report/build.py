"""`npo report`: runs as one self-contained HTML page, or as PDF. The run directories are only read."""

import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from npo_cli.errors import NpoError, quote_path
from npo_cli.report.comparison_summary import Comparison
from npo_cli.report.html import GENERATOR, list_plots, render_page
from npo_cli.report.pdf import find_browser, is_report_pdf, write_pdf
from npo_cli.report.plotting import save_plot
from npo_cli.report.run_figures import plot_accuracy
from npo_cli.report.run_page import build_overview, build_run_section
from npo_cli.report.table import format_bytes
from npo_cli.storage.bench_dir import is_bench, load_bench_index
from npo_cli.storage.files import write_text_atomic
from npo_cli.storage.layout import RunDir, open_run
from npo_cli.storage.lineage import check_branch, find_main_branch
from npo_cli.types.rollouts import Notice, Progress
from npo_cli.types.views import WrittenFile

HTML_SUFFIXES = (".html", ".htm")
PDF_SUFFIX = ".pdf"
HEAD_BYTES = 2000
"""The start of a page, where the generator tag is."""


def write_report(
    roots: Sequence[Path],
    out: Path,
    *,
    plots_folder: Path | None,
    figure: Path | None = None,
    branch: str | None = None,
    comparison: Comparison | None = None,
) -> Iterator[Progress | Notice | WrittenFile]:
    """One section per run, after an overview if there are several; with `plots_folder` also the plots as files, with
    `figure` also the accuracy curves as one. `comparison`: of a bench, that of its methods."""
    validate_output(out)
    if plots_folder is not None and plots_folder.exists() and not plots_folder.is_dir():
        raise NpoError(f"--figures {plots_folder} is a file", f"name a folder: --figures {quote_path(plots_folder)}.d")
    runs = open_labelled_runs(roots)
    if branch is not None:
        for _, run in runs:
            check_branch(run, branch)
    began = time.monotonic()
    sections = [build_overview(runs, comparison)] if len(runs) > 1 else []
    for number, (label, run) in enumerate(runs, start=1):
        yield Progress(description="read runs", done=number - 1, total=len(runs), note=label)
        prefix = f"run-{number}-" if len(runs) > 1 else ""
        sections.append(build_run_section(run, title=label, prefix=prefix, branch=branch))
    title = f"npo report: {runs[0][0]}" if len(runs) == 1 else f"npo report: {len(runs)} runs"
    html = render_page(title, sections)
    if out.suffix.lower() == PDF_SUFFIX:
        write_pdf(html, out)
    else:
        write_text_atomic(out, html)
    seconds = time.monotonic() - began
    yield Notice(message=f"report: {out}, {format_bytes(out.stat().st_size)}, {seconds:.1f} s")
    yield WrittenFile(path=str(out), content="report")
    if figure is not None:
        plot_accuracy([run for _, run in runs], figure)
        yield Notice(message=f"picture: {figure}")
        yield WrittenFile(path=str(figure), content="figure")
    if plots_folder is not None:
        plots = list_plots(sections)
        for plot in plots:
            save_plot(plot, plots_folder)
        yield Notice(message=f"figures: {len(plots)} as PNG and SVG in {plots_folder}")
        yield WrittenFile(path=str(plots_folder), content="figures")


def open_labelled_runs(roots: Sequence[Path]) -> list[tuple[str, RunDir]]:
    """The runs with unique labels: the names of their folders, or the whole paths."""
    given, roots = roots, [one for root in roots for one in (list_bench_runs(root) if is_bench(root) else [root])]
    paths = [root.resolve() for root in roots]
    duplicate = next((root for index, root in enumerate(roots) if paths[index] in paths[:index]), None)
    if duplicate is not None:
        raise NpoError(f"{duplicate} was given twice", "name each run once")
    runs = [open_run(root) for root in roots]
    for run in runs:
        find_main_branch(run)
    benched = label_bench_runs(given)
    names = [benched.get(path, path.name) for path in paths]
    labels = names if len(set(names)) == len(names) else [str(root) for root in roots]
    return list(zip(labels, runs, strict=True))


def label_bench_runs(roots: Sequence[Path]) -> dict[Path, str]:
    """`METHOD, seed-0` of every run of the benches among these folders, by its path."""
    return {
        run.resolve(): f"{method}, {run.parent.name}"
        for root in roots
        if is_bench(root)
        for method, run in load_bench_index(root)
    }


def list_bench_runs(folder: Path) -> list[Path]:
    """Every run of a bench."""
    return [run for _, run in load_bench_index(folder)]


def validate_output(out: Path) -> None:
    """Only a report of npo is ever replaced."""
    if out.suffix.lower() not in (*HTML_SUFFIXES, PDF_SUFFIX):
        raise NpoError(f"--out {out}: a report ends in .html or .pdf", f"--out {quote_path(out)}.html")
    if out.is_dir():
        raise NpoError(f"--out {out} is a folder", f"--out {quote_path(out / 'report.html')}")
    if out.suffix.lower() == PDF_SUFFIX:
        find_browser(out)
    if out.exists() and not is_report(out):
        raise NpoError(f"--out {out} exists and is not a report of npo", "choose another file, or remove it")


def is_report(path: Path) -> bool:
    """Whether the file is a page or a PDF that `npo report` wrote."""
    if path.suffix.lower() == PDF_SUFFIX:
        return is_report_pdf(path)
    with path.open("rb") as file:
        return GENERATOR.encode() in file.read(HEAD_BYTES)

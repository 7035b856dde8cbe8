"""The page in headless Chromium: what it shows, that nothing is fetched or run, and that it fits a screen and a phone.

Screenshots stay in the folder that NPO_CI_OUT names. Console and network are watched through Chromium's own logs; one
test opens a page that misbehaves, to show that the watch would see it.
"""

import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

from npo_cli.report.build import write_report
from npo_cli.report.pdf import is_report_pdf
from npo_cli.storage.layout import head_path, open_run
from npo_cli.storage.rollout_log import RolloutLog
from tests.helpers.runs import copy_run, resume, score
from tests.report.html_parsing import ParsedPage
from tests.report.test_run_page import hostile

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
QUIETLY = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update", "--disable-quic", "--enable-logging=stderr"),
    *("--virtual-time-budget=5000", "--allow-file-access-from-files"),
)
WIDTHS = (1280, 390)
HEIGHT = 6000
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium: apt-get install chromium"),
]


@dataclass(frozen=True, kw_only=True, slots=True)
class Opened:
    """What Chromium made of a page."""

    dom: ParsedPage
    console: list[str]
    addresses: list[str]
    """On the net, that it asked for."""


def opened(page: Path, *options: str) -> Opened:
    """Open a file; its document after everything has loaded."""
    profile = page.parent / "profile"
    log = page.parent / "net.json"
    command = [CHROMIUM, *QUIETLY, *options, f"--user-data-dir={profile}", f"--log-net-log={log}", "--dump-dom"]
    done = subprocess.run([*command, page.as_uri()], capture_output=True, text=True, timeout=120, check=True)
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    return Opened(dom=ParsedPage(done.stdout), console=console, addresses=asked_by_pages(log.read_text()))


def asked_by_pages(log: str) -> list[str]:
    """Addresses on the net that a page asked for. What Chromium asks for itself is `not an origin`."""
    begun = re.findall(r'"initiator":"([^"]*)".*?"url":"((?:https?|wss?):[^"]*)"', log)
    return [address for initiator, address in begun if initiator != "not an origin"]


def photographed(page: Path, name: str, *, width: int, height: int, mode: str) -> Path:
    folder = Path(os.environ.get("NPO_CI_OUT") or page.parent)
    folder.mkdir(parents=True, exist_ok=True)
    shot = folder / f"{name}.png"
    size = (f"--window-size={width},{height}", f"--screenshot={shot}", f"--user-data-dir={page.parent / 'profile'}")
    scheme = f"--blink-settings=preferredColorScheme={'0' if mode == 'dark' else '1'}"
    subprocess.run([CHROMIUM, *QUIETLY, scheme, *size, page.as_uri()], capture_output=True, timeout=120, check=True)
    return shot


def framed(page: Path, *, width: int, height: int, script: str = "''", mode: str = "light") -> Path:
    """A page that shows ours at a width narrower than any window; its title is what the script says of `frame`."""
    frame = page.with_name(f"frame-{width}.html")
    frame.write_text(
        f'<!DOCTYPE html><html style="color-scheme: {mode}"><body style="margin:0">'
        f'<iframe src="{page.name}" width="{width}" height="{height}" style="border:0" onload="measure(this)"></iframe>'
        f"<script>function measure(frame) {{ document.body.title = String({script}) }}</script></body></html>"
    )
    return frame


def measured(page: Path, script: str, *, width: int) -> str:
    """What a script says of the page at this width."""
    seen = opened(framed(page, width=width, height=900, script=script)).dom.attributes
    (title,) = [value for tag, name, value in seen if (tag, name) == ("body", "title")]
    return title


@pytest.fixture(scope="module")
def page(scout, watched, tmp_path_factory) -> Path:
    """Two runs; every answer of the one's replay would like to be more than text."""
    folder = tmp_path_factory.mktemp("page")
    root = copy_run(scout, folder / "hostile")
    resume(root, "guide.inject.max_accuracy=1.0", "eval.every=1", at=2, guide="near")
    score(root, "scoring.samples_per_prompt=2", "scoring.bootstrap_resamples=50", "guide.inject.max_accuracy=1.0", at=2)
    log_path = open_run(root).rollouts_path("near")
    steps = {step: RolloutLog(log_path).read_step(step) for step in (3, 4)}
    log_path.unlink()
    head_path(log_path).unlink()
    for step, groups in steps.items():
        RolloutLog(log_path).write_step(step, [hostile(group) for group in groups])
    list(write_report([root, watched], folder / "report.html", plots_folder=None))
    return folder / "report.html"


def test_the_browser_finds_the_elements_that_were_written_and_no_more(page):
    seen, written = opened(page), ParsedPage(page.read_text())
    assert seen.dom.elements == written.elements
    assert "<script>alert(1)</script>" in seen.dom.text
    assert "\\x1b[2J\\x1b]0;owned\\x07\\u202e" in seen.dom.text


def test_nothing_is_said_on_the_console_and_nothing_is_asked_of_the_net(page):
    seen = opened(page)
    assert (seen.console, seen.addresses) == ([], [])


def test_the_watch_sees_a_page_that_misbehaves(tmp_path):
    bad = tmp_path / "bad.html"
    bad.write_text('<!DOCTYPE html><img src="http://127.0.0.1:9/x.png"><script>console.error("here")</script>')
    seen = opened(bad)
    assert any("here" in line for line in seen.console)
    assert set(seen.addresses) == {"http://127.0.0.1:9/x.png"}


def test_every_picture_can_be_drawn(page):
    """A broken picture has no size: the pictures of the page in a frame, asked for theirs."""
    drawn = "[...frame.contentDocument.images].filter(one => one.naturalWidth).length"
    assert measured(page, drawn, width=1280) == str(ParsedPage(page.read_text()).elements["img"])


@pytest.mark.parametrize("width", WIDTHS)
def test_the_page_is_no_wider_than_its_window(page, width):
    assert measured(page, "frame.contentDocument.documentElement.scrollWidth", width=width) == str(width)


@pytest.mark.parametrize("width", WIDTHS)
def test_no_table_is_cut(page, width):
    """At 1280 pixels every table fits; on a phone a wider one scrolls inside its box."""
    boxes = "[...frame.contentDocument.querySelectorAll('.table')].filter(one => one.offsetWidth)"
    wider = f"{boxes}.filter(one => one.scrollWidth > one.clientWidth)"
    cut = f"{wider}.filter(one => frame.contentWindow.getComputedStyle(one).overflowX !== 'auto')"
    found = measured(page, f"[{boxes}.length, {wider}.length, {cut}.length]", width=width)
    num_tables, num_wider, num_cut = map(int, found.split(","))
    assert num_tables > 5
    assert num_cut == 0
    assert num_wider == 0 or width < 1280


@pytest.mark.parametrize("mode", ["light", "dark"])
@pytest.mark.parametrize("width", WIDTHS)
def test_page_and_charts_follow_light_and_dark(page, width, mode):
    """The screenshots are kept for people."""
    from PIL import Image

    frame = framed(page, width=width, height=HEIGHT, mode=mode)
    shot = photographed(frame, f"report-{width}-{mode}", width=max(width, 500), height=HEIGHT, mode=mode)
    # A blank picture of this size takes some 20 kB.
    assert shot.stat().st_size > 200_000
    counts = Image.open(shot).convert("L").crop((0, 0, width, HEIGHT)).histogram()
    bright, dark = sum(counts[200:]) / sum(counts), sum(counts[:80]) / sum(counts)
    # Paper and the grounds of all charts: in the other mode each is a large part of the picture.
    assert (bright > 0.85 and dark < 0.1) if mode == "light" else (dark > 0.85 and bright < 0.1)


def test_a_pdf_has_the_whole_report(scout, tmp_path):
    for _ in range(2):  # the second replaces the first
        list(write_report([scout], tmp_path / "r.pdf", plots_folder=None))
    data = (tmp_path / "r.pdf").read_bytes()
    assert is_report_pdf(tmp_path / "r.pdf")
    assert data.startswith(b"%PDF-")
    assert len(data) > 50_000

"""A report page as PDF, printed by a headless Chromium that is already installed.

The last line of the file identifies it as a report of npo, so that only such a file is ever replaced.
"""

import os
import shutil
import subprocess
import tempfile
from pathlib import Path

from npo_cli.errors import NpoError, RunFailed, quote_path
from npo_cli.storage.files import write_bytes_atomic

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
PDF_MARK = b"\n%npo report\n"
"""A comment after the end of the document."""
TIMEOUT_SECONDS = 300


def find_browser(out: Path) -> str:
    """Path of a Chromium; an error where there is none."""
    found = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    if found is None:
        raise NpoError(
            f"--out {out}: a PDF needs Chromium or Chrome, which is not installed here ({', '.join(BROWSERS)})",
            f"install it (apt-get install chromium), or write HTML: --out {quote_path(out.with_suffix('.html'))}",
        )
    return found


def is_report_pdf(path: Path) -> bool:
    """Whether the file is a PDF that `npo report` wrote."""
    with path.open("rb") as file:
        file.seek(-min(len(PDF_MARK), path.stat().st_size), os.SEEK_END)
        return file.read() == PDF_MARK


def write_pdf(html: str, out: Path) -> None:
    """Print the page in light colors; the file appears when it is complete."""
    browser = find_browser(out)
    with tempfile.TemporaryDirectory(prefix="npo-pdf-") as folder:
        page, printed = Path(folder, "page.html"), Path(folder, "page.pdf")
        page.write_text(html, encoding="utf-8")
        options = ["--headless", "--disable-gpu", "--no-first-run", "--disable-sync", "--no-pdf-header-footer"]
        # Chromium's sandbox does not start for root.
        options += ["--no-sandbox"] * (os.geteuid() == 0)
        options += [
            "--disable-background-networking",
            "--disable-component-update",
            f"--user-data-dir={folder}/profile",
        ]
        command = [browser, *options, f"--print-to-pdf={printed}", page.as_uri()]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_SECONDS, check=False)
        except subprocess.TimeoutExpired as error:
            raise RunFailed(f"{browser} printed no PDF within {TIMEOUT_SECONDS} s", "write HTML instead") from error
        if done.returncode or not printed.exists():
            last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
            raise RunFailed(f"{browser} printed no PDF: {last}", f"write HTML: --out {out.with_suffix('.html')}")
        write_bytes_atomic(out, printed.read_bytes() + PDF_MARK)

"""A call that nothing can interrupt ends with its process, and says why."""

import subprocess
import sys

HANGS = """
import time
from npo_cli.inference.process import exit_on_timeout
with exit_on_timeout({seconds}, phase="sample", hint="npo resume RUN"):
    time.sleep({sleep})
print("done")
"""


def run(*, seconds: float, sleep: float) -> subprocess.CompletedProcess[str]:
    code = HANGS.format(seconds=seconds, sleep=sleep)
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)


def test_past_its_limit_the_process_names_the_phase_and_ends():
    ended = run(seconds=0.2, sleep=600)
    assert ended.returncode == 1
    assert ended.stderr == (
        "error: the engine hung while it was to sample: nothing after 0.2 s\n  try: npo resume RUN\n"
    )


def test_within_its_limit_nothing_happens_then_or_later():
    ended = run(seconds=30, sleep=0.01)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "done\n", "")

"""exit_on_timeout: a call that cannot be interrupted ends with its process, and the error names the phase."""

import subprocess
import sys

SCRIPT = """
import time
from npo_cli.inference.process import exit_on_timeout
with exit_on_timeout({seconds}, phase="sample", hint="npo resume RUN"):
    time.sleep({sleep})
print("done")
"""


def run(*, seconds: float, sleep: float) -> subprocess.CompletedProcess[str]:
    code = SCRIPT.format(seconds=seconds, sleep=sleep)
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)


def test_exit_on_timeout_ends_the_process_and_names_the_phase():
    ended = run(seconds=0.2, sleep=600)
    assert ended.returncode == 1
    assert ended.stderr == ("error: the engine hung (phase: sample): no response within 0.2 s\n  try: npo resume RUN\n")


def test_exit_on_timeout_does_nothing_if_the_block_ends_in_time():
    ended = run(seconds=30, sleep=0.01)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "done\n", "")

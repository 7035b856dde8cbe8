"""Ctrl-C and SIGTERM: the step is finished and saved, and what follows equals the run that nobody stopped."""

import signal

import pytest

from npo_cli.session.stop_signal import stop_between_steps
from tests.helpers.runs import TINY, reproducible_digests, resume, train
from tests.helpers.warm_process import ForkServer, num_lines, wait_until

LONGER = ("train.num_steps=12", "train.save_every=100")


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_stop_signal_ends_the_run_after_a_saved_step(warm: ForkServer, tmp_path, number):
    train(tmp_path / "straight", *LONGER)
    root = tmp_path / "stopped"
    child = warm.npo("train", "micro", *TINY, *LONGER, "--run", str(root), err=tmp_path / "err")
    branch = root / "branches" / "main"
    wait_until(lambda: num_lines(branch / "metrics.jsonl") >= 2)
    child.kill(number)
    assert child.wait() == 130
    step = num_lines(branch / "metrics.jsonl")
    assert 2 <= step < 12
    assert child.read_stderr().splitlines()[-2:] == [
        f"stopped by {number.name} after step {step}, which is saved",
        f"  try: npo resume {root}",
    ]
    assert (branch / "checkpoints" / f"step_{step:06d}" / "npo.json").exists()
    assert [report.step for report in resume(root)] == list(range(step + 1, 13))
    # The straight run has no checkpoint at the step of the signal; all else is equal.
    stopped = {name: digest for name, digest in reproducible_digests(root).items() if f"step_{step:06d}" not in name}
    assert stopped == reproducible_digests(tmp_path / "straight")


def test_stop_signal_waits_the_first_time_and_raises_the_second():
    before = signal.getsignal(signal.SIGTERM)
    with stop_between_steps() as stop:
        assert not stop
        signal.raise_signal(signal.SIGTERM)
        assert stop
        assert stop.reason == "SIGTERM"
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGTERM) is before

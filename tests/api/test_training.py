"""`npo.train`, `npo.resume` and callbacks, on real steps of a tiny recipe."""

import random
import signal
import threading
from pathlib import Path

import numpy
import pytest
import torch

import npo_cli as npo
from tests.helpers.cli_errors import npo as npo_command
from tests.helpers.runs import TINY, copy_run, reproducible_digests

EVALS = ("eval.every=2",)


class Recorder(npo.Callback):
    """Keeps what it is called with, and disturbs everything that it can reach."""

    def __init__(self, stop_at: int | None = None) -> None:
        self.calls: list[tuple[str, int]] = []
        self.stop_at = stop_at

    def on_step(self, record: npo.StepReport) -> None:
        self.calls.append(("step", record.step))
        record.metrics["reward"] = 1.0
        random.seed(3)
        numpy.random.seed(3)
        torch.manual_seed(3)
        if record.step == self.stop_at:
            self.stop("far enough")

    def on_eval(self, record: npo.EvalReport) -> None:
        self.calls.append(("eval", record.step))

    def on_save(self, record: npo.CheckpointSaved) -> None:
        self.calls.append(("save", record.step))


class Broken(npo.Callback):
    def on_step(self, record: npo.StepReport) -> None:
        if record.step == 3:
            raise ZeroDivisionError("nothing to divide by")


def tiny(*overrides: str) -> npo.Recipe:
    return npo.Recipe.load("micro", [*TINY, *EVALS, *overrides])


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """4 steps by the command."""
    root = tmp_path_factory.mktemp("straight") / "run"
    assert npo_command("train", "micro", root, *TINY, *EVALS).code == 0
    return root


def test_train_returns_a_result_and_the_same_bytes_as_the_command(straight, tmp_path):
    callback = Recorder()
    result = npo.train(tiny(), tmp_path / "run", callbacks=[callback])
    assert (result.branch, result.step, result.stopped_by) == ("main", 4, None)
    assert [record.step for record in result.steps] == [1, 2, 3, 4]
    assert [record.step for record in result.evals] == [0, 2, 4]
    assert result.accuracy == result.evals[-1].accuracy
    assert [record.path for record in result.checkpoints] == [
        f"branches/main/checkpoints/step_00000{step}" for step in (0, 2, 4)
    ]
    assert callback.calls == [
        *(("eval", 0), ("save", 0), ("step", 1), ("step", 2), ("eval", 2), ("save", 2)),
        *(("step", 3), ("step", 4), ("eval", 4), ("save", 4)),
    ]
    assert reproducible_digests(tmp_path / "run") == reproducible_digests(straight)


def test_a_callback_stops_after_a_saved_step_and_resume_ends_in_the_same_bytes(straight, tmp_path):
    stopped = npo.train(tiny(), tmp_path / "run", callbacks=[Recorder(stop_at=3)])
    assert (stopped.step, stopped.stopped_by) == (3, "callback Recorder (far enough)")
    assert [record.step for record in stopped.checkpoints] == [0, 2, 3]
    resumed = npo.resume(stopped.run)
    assert ([record.step for record in resumed.steps], resumed.step) == ([4], 4)
    again = {name: digest for name, digest in reproducible_digests(tmp_path / "run").items() if "000003" not in name}
    assert again == reproducible_digests(straight)


@pytest.mark.parametrize(("in_background", "last_step"), [(False, 2), (True, 3)])
def test_a_callback_that_stops_on_save_ends_the_training_at_the_trained_step(tmp_path, in_background, last_step):
    class StopAtSave(npo.Callback):
        def on_save(self, record: npo.CheckpointSaved) -> None:
            if record.step == 2:
                self.stop()

    settings = tiny(f"train.save_in_background={str(in_background).lower()}")
    result = npo.train(settings, tmp_path / "run", callbacks=[StopAtSave()])
    assert (result.step, result.stopped_by) == (last_step, "callback StopAtSave")
    assert [record.step for record in result.checkpoints][-1] == last_step


def test_an_exception_in_a_callback_ends_the_run_saved_and_names_the_callback(tmp_path):
    other = Recorder()
    with pytest.raises(npo.CallbackError) as raised:
        npo.train(tiny(), tmp_path / "run", callbacks=[Broken(), other])
    assert raised.value.message == (
        "callback Broken.on_step at step 3 failed: ZeroDivisionError: nothing to divide by; the training is saved"
    )
    assert isinstance(raised.value.__cause__, ZeroDivisionError)
    assert other.calls[-2:] == [("step", 3), ("save", 3)]
    assert npo.resume(tmp_path / "run").step == 4


def test_stream_yields_what_the_command_prints_and_stops_saved(tmp_path):
    stream = npo.train.stream(tiny(), tmp_path / "run")
    kinds = []
    for record in stream:
        kinds.append(type(record).__name__)
        if isinstance(record, npo.StepReport) and record.step == 3:
            stream.stop("the notebook")
    assert kinds == [
        *(
            "Notice",
            "Notice",
            "EvalReport",
            "CheckpointSaved",
            "StepReport",
            "StepReport",
            "EvalReport",
            "CheckpointSaved",
        ),
        *("StepReport", "CheckpointSaved"),
    ]
    assert stream.stopped_by == "the notebook"
    assert npo.Run(tmp_path / "run").metrics(as_list=True)[-1]["step"] == 3


def test_leaving_the_loop_early_is_like_a_kill(straight, tmp_path):
    for record in npo.train.stream(tiny(), tmp_path / "run"):
        if isinstance(record, npo.StepReport) and record.step == 3:
            break
    assert [record.step for record in npo.resume(tmp_path / "run").steps] == [3, 4]
    assert reproducible_digests(tmp_path / "run") == reproducible_digests(straight)


def test_a_signal_ends_the_step_and_raises(tmp_path):
    class Interrupt(npo.Callback):
        def on_step(self, record: npo.StepReport) -> None:
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(npo.StoppedEarly, match="stopped by SIGINT after step 1, which is saved"):
        npo.train(tiny(), tmp_path / "run", callbacks=[Interrupt()])
    assert npo.resume(tmp_path / "run", until=2).step == 2


def test_training_runs_in_a_thread(straight, tmp_path):
    results = []
    thread = threading.Thread(
        target=lambda: results.append(npo.train(tiny(), tmp_path / "run", callbacks=[Recorder(stop_at=1)]))
    )
    thread.start()
    thread.join()
    assert (results[0].step, results[0].stopped_by) == (1, "callback Recorder (far enough)")


def test_resume_forks_with_a_guide(circle, tmp_path):
    root = copy_run(circle, tmp_path / "run")
    result = npo.resume(npo.Run(root), at=0, guide="near", new_branch="third", until=2)
    assert (result.branch, result.step) == ("third", 2)
    assert npo.Run(root).branches == ("main", "again", "third")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda root: npo.train("micor", root), "there is no shipped recipe named 'micor'"),
        (lambda root: npo.train(npo.Recipe.load("micro", {"train.lr": "fast"}), root), "train.lr"),
        (lambda root: npo.Recipe.load("micro", {"train.lr": {1}}), "train.lr cannot be set to {1}"),
        (lambda root: npo.train("micro", root, until=999), "--until 999 is not between"),
        (lambda root: npo.train("micro", root, method="nop"), "there is no method 'nop'"),
        (lambda root: npo.resume(root), "there is no run directory"),
        (lambda root: npo.resume(root, overrides="train.lr=1"), "overrides must be a list"),
        (lambda root: npo.Run(root), "there is no run directory"),
        (lambda root: npo.compare([root / "a"]), "there is no run directory"),
    ],
)
def test_bad_input_is_an_npo_error_and_writes_nothing(tmp_path, call, message):
    with pytest.raises(npo.NpoError) as raised:
        call(tmp_path / "run")
    assert message in raised.value.message
    assert f"try: {raised.value.hint}" in raised.value.__notes__
    assert list(tmp_path.iterdir()) == []


def test_an_object_that_is_no_callback_is_refused(tmp_path):
    with pytest.raises(TypeError, match=r"derive its class from npo\.Callback"):
        npo.train(tiny(), tmp_path / "run", callbacks=[print])


def test_a_method_applies_to_a_recipe_object_and_to_a_name():
    by_name = npo.train.stream("micro", "unused", method="npo-late")
    by_name.close()
    recipe = npo.Recipe.load("micro", {"train.lr": 1e-4}, method="npo-late")
    assert recipe.train.lr == 1e-4
    assert recipe == npo.Recipe.load("micro", ["train.lr=1e-4"], method="npo-late")
    assert recipe == npo.Recipe.load("micro", method="npo-late", train={"lr": 1e-4})

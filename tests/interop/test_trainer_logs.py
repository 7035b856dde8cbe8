"""Other people's metrics: which columns are meant, what counts as a record, what is refused."""

import json
from pathlib import Path

import pytest

from npo_cli.autonpo.log_files import read_rows
from npo_cli.autonpo.trainer_logs import LogColumns, extract_signals, resolve_columns
from npo_cli.autonpo.trigger import TriggerInput
from npo_cli.errors import NpoError


def written(path: Path, *rows: object) -> Path:
    path.write_text("".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows))
    return path


def signals(path: Path, **given: str) -> list[tuple[int, float | None, float | None]]:
    rows = read_rows(path)
    found = extract_signals(rows, resolve_columns(rows, LogColumns(**given), source=path), source=path)
    assert all(isinstance(each, TriggerInput) for each in found)
    return [(each.step, each.reward, each.entropy) for each in found]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "metrics.jsonl"


@pytest.mark.parametrize(
    "row",
    [
        {"step": 3, "reward": 0.5, "entropy": 1.5},
        # TRL, with the reward of each function beside it
        {"step": 3, "reward": 0.5, "entropy": 1.5, "rewards/accuracy/mean": 9, "epoch": 0.1},
        # verl's file logger; its rewards have the KL penalty taken off its scores
        {"step": 3, "data": {"critic/rewards/mean": 0.4, "critic/score/mean": 0.5, "actor/entropy": 1.5}},
        {"training/global_step": 3, "critic/rewards/mean": 0.5, "actor/entropy_loss": 1.5},
        # a history exported from wandb
        {"_step": 3, "train/reward": 0.5, "train/entropy": 1.5},
        {"step": 3, "reward/all/mean": 0.5, "entropy/mean": 1.5},
        {"global_step": 3, "rewards/mean": 0.5, "entropy": 1.5},
    ],
)
def test_columns_of_known_trainers_are_found(path, row):
    assert signals(written(path, row)) == [(3, 0.5, 1.5)]


def test_columns_can_be_named_explicitly(path):
    written(path, {"iter": 3, "acc": 0.5, "H": 1.5, "reward": 9, "entropy": 9, "step": 9})
    assert signals(path, step="iter", reward="acc", entropy="H") == [(3, 0.5, 1.5)]


def test_column_without_numbers_is_skipped_for_the_next_known_name(path):
    written(path, {"step": 1, "reward": None, "critic/score/mean": 0.5, "entropy": 1})
    assert signals(path) == [(1, 0.5, 1.0)]


def test_non_finite_values_are_missing(path):
    written(
        path,
        {"step": 1, "reward": 0.5, "entropy": None},
        '{"step": 2, "reward": NaN, "entropy": 1}',
        '{"step": 3, "reward": Infinity, "entropy": 1}',
        {"step": 4, "reward": "0.5", "entropy": True},
        '{"step": 5, "reward": 1e300, "entropy": 1}',
        {"step": 6, "reward": 1},
    )
    assert signals(path) == [
        *((1, 0.5, None), (2, None, 1.0), (3, None, 1.0), (4, None, None), (5, None, 1.0), (6, 1.0, None))
    ]


def test_rows_without_step_or_signal_are_skipped(path):
    written(
        path,
        {"step": 1, "reward": 0.5, "entropy": 1},
        {"step": 1, "eval_reward": 0.9, "eval_entropy": 7},
        {"reward": 0.7, "entropy": 1},
        {"step": 1.5, "reward": 0.7, "entropy": 1},
        {"step": -1, "reward": 0.7, "entropy": 1},
        {"train_runtime": 12.5},
        "",
        {"step": 2.0, "reward": 0.6, "entropy": 1},
    )
    assert signals(path) == [(1, 0.5, 1.0), (2, 0.6, 1.0)]


def test_steps_are_sorted_and_a_repeated_step_takes_the_later_row(path):
    written(
        path,
        {"step": 2, "reward": 0.2, "entropy": 1},
        {"step": 1, "reward": 0.1, "entropy": 1},
        {"step": 2, "reward": 0.3, "entropy": None},
    )
    assert signals(path) == [(1, 0.1, 1.0), (2, 0.3, None)]


def test_reward_and_entropy_may_be_in_separate_rows(path):
    written(path, {"step": 1, "reward/all/mean": 0.1}, {"step": 1, "entropy/mean": 2.0, "loss/mean": 0.0})
    assert signals(path) == [(1, 0.1, 2.0)]


def test_incomplete_last_line_is_skipped(path):
    path.write_text('{"step": 1, "reward": 0.5, "entropy": 1}\n{"step": 2, "rew')
    assert signals(path) == [(1, 0.5, 1.0)]


def test_trainer_state_json_is_read(path):
    history = [{"step": 5, "reward": 0.5, "entropy": 1}, {"step": 5, "eval_loss": 1}, {"step": 10, "train_loss": 1}]
    path.write_text(json.dumps({"global_step": 10, "log_history": history}, indent=2))
    assert signals(path) == [(5, 0.5, 1.0)]
    path.write_text(json.dumps({"global_step": 10, "log_history": history}))
    assert signals(path) == [(5, 0.5, 1.0)]


def test_byte_order_mark_is_skipped(path):
    path.write_bytes(b'\xef\xbb\xbf{"step": 1, "reward": 0.5, "entropy": 1}\r\n')
    assert signals(path) == [(1, 0.5, 1.0)]


def test_missing_signal_is_reported_with_the_numeric_columns(path):
    written(path, {"step": 1, "loss": 0.1, "accuracy": 0.5, "note": "x", "on": True, "lr": 1e-4})
    with pytest.raises(NpoError) as caught:
        signals(path)
    # what could be meant comes first
    assert caught.value.message == (
        f"{path} has no reward and no entropy under a known name; its numeric columns are: step, accuracy, loss, lr"
    )
    assert caught.value.hint == f"npo autonpo {path} --explain --reward COLUMN --entropy COLUMN"


def test_error_lists_only_some_of_many_columns(path):
    written(path, {"step": 1, "entropy": 1.0, **{f"loss/{number}": 0.0 for number in range(40)}})
    with pytest.raises(
        NpoError, match=r"has no reward under .*: step, entropy, loss/0, .*, loss/13 and 26 more"
    ) as caught:
        signals(path)
    assert caught.value.message.endswith("loss/13 and 26 more")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "is empty"),
        (b"\n\n", "is empty"),
        (b'{"log_history": []}\n', "is empty"),
        (b"\x89PNG\r\n\x1a\n", "is not UTF-8 text (byte 0)"),
        (b"step reward\n1 0.5\n", "line 1: not a JSON object"),
        (b"[1, 2]\n", "line 1: not a JSON object"),
        (b'{"step": 1}\noops\n{"step": 2}\n', "line 2: not a JSON object"),
        (b'{"step": 1', "line 1: not a JSON object"),
        (b"[" * 100_000 + b"\n", "line 1: not a JSON object"),
        (b'{"note": "x"}\n', "has no step and no reward and no entropy"),
        (b'{"step": 0.5, "reward": 1, "entropy": 1}\n', "has no line with a whole 'step' and a 'reward' or 'entropy'"),
    ],
)
def test_malformed_metrics_file_is_refused(path, content, words):
    path.write_bytes(content)
    with pytest.raises(NpoError) as caught:
        signals(path)
    assert words in caught.value.message
    assert caught.value.hint


def test_missing_column_is_refused(path):
    written(path, {"step": 1, "reward": 0.5, "entropy": 1})
    with pytest.raises(
        NpoError, match="has no number in a column 'acc'; its numeric columns are: step, reward, entropy"
    ):
        signals(path, reward="acc")


# Other forms than JSON lines


def test_history_exported_from_wandb_as_csv_is_read(tmp_path):
    path = tmp_path / "history.csv"
    path.write_text("_step,train/global_step,train/reward,train/entropy\n10,1,0.25,1.5\n20,2,,1.25\n")
    assert signals(path) == [(1, 0.25, 1.5), (2, None, 1.25)]


def test_charts_exported_from_wandb_are_joined_by_step(tmp_path):
    for name in ("reward", "entropy"):
        value = {"reward": 0.5, "entropy": 2.0}[name]
        columns = [f"my run - train/{name}{suffix}" for suffix in ("", "__MIN", "__MAX")]
        lines = ['"Step",' + ",".join(f'"{each}"' for each in columns), f'"7","{value}","0","9"']
        (tmp_path / f"{name}.csv").write_text("\n".join(lines))
    assert signals(tmp_path) == [(7, 0.5, 2.0)]


def test_chart_of_several_runs_is_refused(tmp_path):
    path = tmp_path / "chart.csv"
    path.write_text('"Step","a - train/reward","b - train/reward"\n"7","1","0"\n')
    with pytest.raises(NpoError, match="several runs"):
        read_rows(path)


def test_event_files_of_tensorboard_are_read(tmp_path):
    tensorboard = pytest.importorskip("torch.utils.tensorboard")
    with tensorboard.SummaryWriter(tmp_path / "runs") as writer:
        for step in (1, 2):
            writer.add_scalar("train/reward", step / 4, step)
            writer.add_scalar("train/entropy", 2 / step, step)
    expected = [(1, 0.25, 2.0), (2, 0.5, 1.0)]
    assert signals(tmp_path) == expected
    assert signals(next(tmp_path.rglob("events.*"))) == expected


def test_newest_trainer_state_of_a_folder_is_read(tmp_path):
    for step in (9, 10):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        history = [{"step": step, "reward": 0.5, "entropy": 1.0}]
        (folder / "trainer_state.json").write_text(json.dumps({"log_history": history}))
    assert signals(tmp_path) == [(10, 0.5, 1.0)]


def test_folder_without_metrics_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("none")
    with pytest.raises(NpoError, match="no metrics that can be read"):
        read_rows(tmp_path)

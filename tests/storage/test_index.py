import shutil
import threading

from npo_cli.storage.checkpoints import demote_checkpoint, find_checkpoint
from npo_cli.storage.evals import append_eval
from npo_cli.storage.index import build_index
from npo_cli.storage.metrics import StepLog
from npo_cli.storage.sample_store import open_sample_store, save_scores
from npo_cli.types.rollouts import StepReport
from tests.storage.builders import evaluation, fork, new_run, score, write_checkpoint


def test_the_table_joins_what_is_known_of_each_checkpoint(tmp_path):
    run = new_run(tmp_path)
    for step in (0, 20, 40):
        write_checkpoint(run, step)
    demote_checkpoint(find_checkpoint(run, "main", 20))
    metrics = {"tokens": 16, "reward": 0.25, "entropy": 1.5, "loss": 0.1}
    StepLog(run, "main", updates_per_step=1).write(
        StepReport(branch="main", step=20, metrics=metrics, timings={"seconds": 1.0})
    )
    append_eval(run, evaluation(20, accuracy=0.9, num_samples=1))
    append_eval(run, evaluation(20, accuracy=0.5, num_samples=8))
    append_eval(run, evaluation(20, accuracy=0.7, num_samples=2))
    for at, signal in ((0, 3.0), (20, 2.0)):
        save_scores(
            open_sample_store(run.scores_folder, "main", at, checkpoints=[40], settings={}), [score(40, signal=signal)]
        )

    table = build_index(run)
    assert [(entry.step, entry.tier, entry.parent) for entry in table] == [
        (0, "full", None),
        (20, "weights", "main:0"),
        (40, "full", "main:20"),
    ]
    assert (table[1].reward, table[1].entropy, table[1].accuracy) == (0.25, 1.5, 0.5)  # 4 x 8 samples beat 4 x 1
    assert (table[2].signal, table[2].learner_step) == (2.0, 20)  # the newer score
    assert (table[0].reward, table[0].signal, table[0].learner_step) == (None, None, None)
    assert table[2].path == "branches/main/checkpoints/step_000040"
    assert table[2].digest == find_checkpoint(run, "main", 40).digest
    assert table[2].size_bytes == sum(p.stat().st_size for p in (run.root / table[2].path).rglob("*") if p.is_file())


def test_a_branch_grows_from_its_fork_and_its_scores_reach_the_ancestor(tmp_path):
    run = new_run(tmp_path)
    write_checkpoint(run, 0)
    write_checkpoint(run, 20)
    fork(run, "late", parent="main", at=20)
    write_checkpoint(run, 40, branch="late")
    fork(run, "early", parent="late", at=20)
    write_checkpoint(run, 40, branch="early")
    save_scores(
        open_sample_store(run.scores_folder, "late", 0, checkpoints=[20, 40], settings={}),
        [score(20), score(40, signal=2.0)],
    )
    table = {(entry.branch, entry.step): entry for entry in build_index(run)}
    assert table["late", 40].parent == table["early", 40].parent == "main:20"
    assert (table["main", 20].signal, table["late", 40].signal, table["early", 40].signal) == (0.5, 2.0, None)


def test_what_is_not_whole_is_listed_as_incomplete(tmp_path):
    run = new_run(tmp_path)
    write_checkpoint(run, 0)
    (write_checkpoint(run, 20) / "model.safetensors").write_bytes(b"half")
    write_checkpoint(run, 40)
    (run.checkpoints_folder("main") / ".step_000060.partial").mkdir()
    (run.checkpoints_folder("main") / ".step_000010.dead").mkdir()
    table = build_index(run)
    assert [(entry.step, entry.complete, entry.parent) for entry in table] == [
        (0, True, None),
        (20, False, "main:0"),
        (40, True, "main:0"),
        (60, False, "main:40"),
    ]
    assert table[1].digest is None and table[3].size_bytes == 0


def test_checkpoint_with_a_damaged_training_state_is_incomplete(tmp_path):
    run = new_run(tmp_path)
    folder = write_checkpoint(run, 0)
    (folder / "training_state" / "npo_training_state.json").write_text("{")
    assert [(entry.tier, entry.complete) for entry in build_index(run)] == [("full", False)]


def test_a_table_is_made_while_a_writer_saves(tmp_path):
    run = new_run(tmp_path)
    write_checkpoint(run, 0)
    home, stop = run.checkpoints_folder("main"), threading.Event()

    def write() -> None:
        while not stop.is_set():
            partial = home / ".step_000020.partial"
            (partial / "training_state").mkdir(parents=True)
            for number in range(50):
                (partial / f"{number}.json").touch()
            partial.rename(home / "gone")
            shutil.rmtree(home / "gone")

    writer = threading.Thread(target=write)
    writer.start()
    try:
        tables = [build_index(run) for _ in range(300)]
    finally:
        stop.set()
        writer.join()
    assert all(table[0].complete and [entry.step for entry in table[1:]] in ([], [20]) for table in tables)


def test_the_index_is_the_same_when_made_again(tmp_path):
    run = new_run(tmp_path)
    write_checkpoint(run, 0)
    assert build_index(run) == build_index(run)

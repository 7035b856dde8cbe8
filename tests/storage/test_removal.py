"""`npo rm` on real runs: what it refuses, what it deletes, and that costs, logs and heads stay as they were written."""

import shutil
from pathlib import Path

import pytest

import npo_cli.storage.files as files_module
import npo_cli.storage.removal as removal_module
from npo_cli.errors import NpoError
from npo_cli.storage.cost_sums import compute_run_costs
from npo_cli.storage.guide_cache import list_guide_caches
from npo_cli.storage.layout import open_run
from npo_cli.storage.lineage import find_free_branch_name, list_branches, read_segments
from npo_cli.storage.removal import list_leftovers, remove_branch
from npo_cli.storage.sample_store import read_all_scores
from npo_cli.storage.verify import verify_run
from npo_cli.types.views import Damage
from tests.helpers.cli_errors import npo
from tests.helpers.runs import WHOLE_REPLAY, copy_run, file_digests, resume, sample, score, train
from tests.helpers.warm_process import ForkServer

FEW = ("scoring.num_prompts=4", "scoring.samples_per_prompt=2", "scoring.bootstrap_resamples=50")


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """main to 4; `near` from main at 2 with a guide; `child`, the guide cache `late` and a scoring from near at 3."""
    root = tmp_path_factory.mktemp("family") / "run"
    train(root, "train.save_every=1")
    sample(root)
    resume(root, at=2, guide="near")
    resume(root, at=3, source_branch="near", new_branch="child")
    sample(root, branch="near", at=3, name="late", source="4")
    score(root, *FEW, branch="near", at=3)
    return root


def removed(root: Path, branch: str, *, recursive: bool = False, yes: bool = True) -> list[str]:
    return [one.path for one in remove_branch(root, branch, recursive=recursive, is_confirmed=yes)]


def damages(root: Path) -> list[Damage]:
    return [record for record in verify_run(root) if isinstance(record, Damage)]


def test_rm_without_yes_changes_nothing(family):
    before = {path: path.stat().st_mtime_ns for path in family.rglob("*") if path.is_file()}
    assert removed(family, "child", yes=False) == ["branches/child"]
    assert {path: path.stat().st_mtime_ns for path in family.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    ("branch", "message"),
    [
        ("main", "main is the run itself, and near, child fork from it"),
        ("near", "branch child, guide cache late, scoring near_step_000003_.* depend on branch near"),
        ("nope", "has no branch 'nope'; it has: main, near, child"),
    ],
)
@pytest.mark.parametrize("yes", [True, False])
def test_rm_refuses(family, branch, message, yes):
    with pytest.raises(NpoError, match=message):
        removed(family, branch, yes=yes)


def test_rm_deletes_the_branch_and_keeps_its_costs(family, tmp_path):
    root = copy_run(family, tmp_path / "run")
    before = compute_run_costs(open_run(root), "main")
    assert removed(root, "child") == ["branches/child"]
    run = open_run(root)
    assert list_branches(run) == ["main", "near"]
    assert not (root / "branches/child").exists()
    after = compute_run_costs(run, "main")
    assert (after.tokens, after.updates, after.seconds) == (before.tokens, before.updates, before.seconds)
    assert after.abandoned_tokens == before.abandoned_tokens
    assert damages(root) == []
    # the name has costs: it is not used again
    assert find_free_branch_name(run, "child") == "child-2"
    with pytest.raises(NpoError, match="has no branch 'child' any more: it was removed"):
        removed(root, "child")


def test_rm_recursive_deletes_what_depends_on_the_branch(family, tmp_path):
    root = copy_run(family, tmp_path / "run")
    (scoring,) = (f"scores/{path.name}" for path in (root / "scores").iterdir())
    assert removed(root, "near", recursive=True) == ["branches/child", "guides/late", scoring, "branches/near"]
    assert list_branches(open_run(root)) == ["main"]
    # the guide cache that near was trained with is for main
    assert (root / "guides/near").is_dir()
    assert damages(root) == []
    with pytest.raises(NpoError, match="was removed with its branch"):
        sample(root, name="late")
    # training continues on main as before
    resume(root, "train.num_steps=5")
    assert damages(root) == []


@pytest.mark.parametrize("num_deleted", [0, 1, 2, 3])
def test_rm_killed_between_folders_is_finished_by_the_same_command(family, tmp_path, monkeypatch, num_deleted):
    root, calls = copy_run(family, tmp_path / "run"), []

    def die(folder: Path) -> None:
        if len(calls) == num_deleted:
            raise KeyboardInterrupt
        calls.append(folder)
        delete(folder)

    delete = removal_module.delete_folder
    monkeypatch.setattr(removal_module, "delete_folder", die)
    with pytest.raises(KeyboardInterrupt):
        removed(root, "near", recursive=True)
    monkeypatch.undo()
    # whatever is left is whole, and the branch is gone already
    assert damages(root) == []
    assert list_branches(open_run(root)) == ["main"]
    left = removed(root, "near", recursive=True)
    assert len(left) == 4 - num_deleted
    assert not list_leftovers(open_run(root), "near")
    assert not (root / "branches/near").exists() and not (root / "guides/late").exists()
    assert damages(root) == []


@pytest.mark.parametrize("num_deleted", [0, 1, 2, 3])
def test_rm_killed_inside_a_folder_leaves_no_part_of_it_to_a_reader(family, tmp_path, monkeypatch, num_deleted):
    root, calls = copy_run(family, tmp_path / "run"), []

    def die(folder: Path, ignore_errors: bool) -> None:
        if not folder.exists():
            return
        if len(calls) == num_deleted:
            for path in folder.rglob("rollouts.jsonl"):
                path.unlink()
            raise KeyboardInterrupt
        calls.append(folder)
        rmtree(folder)

    rmtree = shutil.rmtree
    monkeypatch.setattr(files_module.shutil, "rmtree", die)
    with pytest.raises(KeyboardInterrupt):
        removed(root, "near", recursive=True)
    monkeypatch.undo()
    run = open_run(root)
    assert damages(root) == []
    assert [info.name for info in list_guide_caches(run)] == ["late", "near"][num_deleted > 0 :]
    assert len(read_all_scores(run)) == (num_deleted < 2)
    assert npo("index", root).code == 0
    assert len(removed(root, "near", recursive=True)) == 4 - num_deleted
    assert not [path for path in root.rglob("*") if path.name.endswith(".dead")]


TIMED = ("segments.jsonl", "events.jsonl")
READERS = (
    *(("show", "lineage"), ("show", "guides"), ("show", "costs"), ("show", "metrics"), ("show", "rollouts")),
    *(("index",), ("verify",), ("report",)),
)
WRITERS = (
    *(("resume", "train.num_steps=5"), ("resume", "--at", "2", "--guide", "near", "--new-branch", "other")),
    *(("eval",), ("score-checkpoints", "--at", "2", *FEW)),
    ("sample-guide", "--at", "2", "--source", "4", "--name", "new", *WHOLE_REPLAY),
    ("calibrate", "--at", "2", "--candidates", "4", "--seeds", "1", "--steps", "4", *FEW),
)


def contents(root: Path) -> dict[str, str]:
    """Every file; of the lineage its lines without times."""
    files = {name: digest for name, digest in file_digests(root).items() if Path(name).name not in TIMED}
    return files | {f"line {number}": str(one) for number, one in enumerate(read_segments(open_run(root)))}


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_rm_killed_before_any_change_of_a_file_leaves_a_run_that_every_command_takes(
    family, tmp_path, warm: ForkServer, monkeypatch
):
    """Killed for good, by the operating system: nothing is tidied up on the way out."""
    monkeypatch.chdir(tmp_path)
    err, places = tmp_path / "err", ("branches", "guides", "scores")

    def remove(root: Path, *, die_at: int | None = None) -> int:
        return warm.npo("rm", f"{root}:near", "--recursive", "--yes", err=err, watched=root, die_at=die_at).wait()

    straight = copy_run(family, tmp_path / "straight")
    assert remove(straight) == 0
    num_changes, tried = int(err.with_suffix(".changes").read_text()), []
    assert num_changes > 50
    for number in range(1, num_changes + 1):
        root = copy_run(family, tmp_path / f"{number}")
        assert remove(root, die_at=number) == -9
        for args in READERS:
            assert npo(args[0], root, *args[1:]).code == 0, (number, args)
        state = (list_branches(open_run(root)), [len(list((root / place).iterdir())) for place in places])
        for args in WRITERS if state not in tried else ():
            written = npo(args[0], copy_run(root, tmp_path / f"{number}-{args[0]}-{len(args)}"), *args[1:])
            assert written.code == 0, (number, args, written.err)
        tried.append(state)
        # once more: what is left, or nothing
        again = remove(root)
        assert again == 0 or "it was removed" in err.read_text(), (number, err.read_text())
        assert contents(root) == contents(straight), number
    assert len(tried) > 3


def test_rm_refuses_the_branch_that_autonpo_is_on(watched):
    run = open_run(watched)
    with pytest.raises(NpoError, match="AutoNPO is on branch"):
        removed(watched, list_branches(run)[-1], recursive=True, yes=False)

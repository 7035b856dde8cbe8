"""`npo rm` on real runs: what it refuses, what it deletes, and that costs, logs and heads stay as they were written."""

from pathlib import Path

import pytest

import npo_cli.storage.removal as removal_module
from npo_cli.errors import NpoError
from npo_cli.storage.cost_sums import compute_run_costs
from npo_cli.storage.layout import open_run
from npo_cli.storage.lineage import find_free_branch_name, list_branches
from npo_cli.storage.removal import list_leftovers, remove_branch
from npo_cli.storage.verify import verify_run
from npo_cli.types.views import Damage
from tests.helpers.runs import copy_run, resume, sample, train


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """main to 4; `near` from main at 2 with a guide; `child` and the guide cache `late` from near at 3."""
    root = tmp_path_factory.mktemp("family") / "run"
    train(root, "train.save_every=1")
    sample(root)
    resume(root, at=2, guide="near")
    resume(root, at=3, source_branch="near", new_branch="child")
    sample(root, branch="near", at=3, name="late", source="4")
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
        ("near", "branch child, guide cache late depend on branch near"),
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
    assert removed(root, "near", recursive=True) == ["branches/child", "guides/late", "branches/near"]
    assert list_branches(open_run(root)) == ["main"]
    # the guide cache that near was trained with is for main
    assert (root / "guides/near").is_dir()
    assert damages(root) == []
    with pytest.raises(NpoError, match="was removed with its branch"):
        sample(root, name="late")
    # training continues on main as before
    resume(root, "train.num_steps=5")
    assert damages(root) == []


@pytest.mark.parametrize("num_deleted", [0, 1, 2])
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
    assert len(left) == 3 - num_deleted
    assert not list_leftovers(open_run(root), "near")
    assert not (root / "branches/near").exists() and not (root / "guides/late").exists()
    assert damages(root) == []


def test_rm_refuses_the_branch_that_autonpo_is_on(watched):
    run = open_run(watched)
    with pytest.raises(NpoError, match="AutoNPO is on branch"):
        removed(watched, list_branches(run)[-1], recursive=True, yes=False)

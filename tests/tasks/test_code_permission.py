"""What --allow-code allowed: per run and content of the file, kept outside of the run directory."""

import json
import stat
from pathlib import Path

import pytest

from npo_cli.tasks.code_permission import (
    has_changed,
    is_permitted,
    permission_file,
    read_permissions,
    record_permissions,
    recorded_permissions,
)


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    return tmp_path


@pytest.fixture
def code(home: Path) -> Path:
    path = home / "grade.py"
    path.write_text("def grade(prompt, response, answer): return 1\n")
    return path


def test_permission_is_of_a_run_and_of_a_content(code):
    record_permissions("one", [code])
    with recorded_permissions(read_permissions("one")):
        assert (is_permitted(code), has_changed(code)) == (True, False)
    with recorded_permissions(read_permissions("two")):
        assert (is_permitted(code), has_changed(code)) == (False, False)
    before = code.read_text()
    code.write_text("import os\n")
    with recorded_permissions(read_permissions("one")):
        assert (is_permitted(code), has_changed(code)) == (False, True)
    code.write_text(before)
    with recorded_permissions(read_permissions("one")):
        assert is_permitted(code)
    assert not is_permitted(code)


def test_permission_is_recorded_once_and_for_this_user_only(code):
    record_permissions("one", [code])
    record_permissions("one", [code])
    record_permissions("two", [code])
    lines = [json.loads(line) for line in permission_file().read_text().splitlines()]
    assert [line["run"] for line in lines] == ["one", "two"]
    assert stat.S_IMODE(permission_file().stat().st_mode) == 0o600


def test_damaged_or_missing_permissions_permit_nothing(code):
    assert read_permissions("one") == {}
    record_permissions("one", [code])
    whole = permission_file().read_text()
    permission_file().write_text('{"run": "one"}\n[1]\ntorn' + "\n" + whole)
    assert set(read_permissions("one")) == {str(code)}
    permission_file().write_bytes(b"\xff\xfe")
    assert read_permissions("one") == {}


def test_permission_that_cannot_be_written_is_asked_for_again(code, home):
    (home / "state").write_text("a file where the folder belongs")
    record_permissions("one", [code])
    assert read_permissions("one") == {}

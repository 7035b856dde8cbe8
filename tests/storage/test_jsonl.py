import math
import resource
from pathlib import Path

import pytest

from npo_cli.errors import NpoError, RunFailed
from npo_cli.storage.files import explain_full_disk
from npo_cli.storage.jsonl import JsonlLog, append_bytes


def test_a_missing_journal_is_empty(tmp_path):
    journal = JsonlLog(tmp_path / "deep" / "a.jsonl")
    assert list(journal.iter_rows()) == []
    assert list(journal.iter_rows()) == []
    assert journal.repair() == 0
    assert not (tmp_path / "deep").exists()


def test_lines_come_back_in_order(tmp_path):
    journal = JsonlLog(tmp_path / "a.jsonl")
    journal.append({"step": 1})
    journal.extend([{"step": 2}, {"step": 3}])
    assert [row["step"] for row in journal.iter_rows()] == [1, 2, 3]
    assert list(journal.iter_rows())[-1] == {"step": 3}
    assert journal.path.read_bytes() == b'{"step":1}\n{"step":2}\n{"step":3}\n'


@pytest.mark.parametrize("tail", [b'{"step":2', b'{"step":2}', b"\x00\x00\x00", b"\x00\x00\n", b"[1]\n"])
def test_a_reader_ignores_a_torn_tail_and_a_writer_cuts_it_off(tmp_path, tail: bytes):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"step":1}\n' + tail)
    assert list(JsonlLog(path).iter_rows()) == [{"step": 1}]
    assert path.read_bytes() == b'{"step":1}\n' + tail  # reading changed nothing
    JsonlLog(path).append({"step": 2, "new": True})
    assert path.read_bytes() == b'{"step":1}\n{"step":2,"new":true}\n'


def test_repair_says_how_much_it_cut(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"step":1}\n{"st')
    assert JsonlLog(tmp_path / "a.jsonl").repair() == 4
    assert JsonlLog(tmp_path / "a.jsonl").repair() == 0


def test_damage_before_the_last_line_is_an_error_that_names_the_line(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"step":1}\noops\n{"step":3}\n')
    with pytest.raises(NpoError, match=r"a\.jsonl, line 2: not a JSON object"):
        list(JsonlLog(tmp_path / "a.jsonl").iter_rows())


def test_a_step_done_again_is_compared_and_not_written(tmp_path):
    path = tmp_path / "a.jsonl"
    journal = JsonlLog(path)
    assert journal.append_once({"step": 1, "reward": 0.5}) == "written"
    assert journal.append_once({"step": 1, "reward": 0.5}) == "same"
    assert journal.append_once({"step": 1, "reward": 0.25}) == "differs"
    assert JsonlLog(path).append_once({"step": 1, "reward": 0.5}) == "same"
    assert JsonlLog(path).append_once({"step": 2, "kl": math.nan}) == "written"
    assert JsonlLog(path).append_once({"step": 2, "kl": math.nan}) == "same"
    assert path.read_bytes() == b'{"step":1,"reward":0.5}\n{"step":2,"dropped":["kl"]}\n'


def test_a_key_may_be_several_fields(tmp_path):
    journal = JsonlLog(tmp_path / "a.jsonl")
    assert journal.append_once({"step": 1, "prompt": "a"}, key=("step", "prompt")) == "written"
    assert journal.append_once({"step": 1, "prompt": "b"}, key=("step", "prompt")) == "written"
    assert journal.append_once({"step": 1, "prompt": "b", "x": 0}, key=("step", "prompt")) == "differs"


def test_append_once_sees_lines_appended_in_between(tmp_path):
    journal = JsonlLog(tmp_path / "a.jsonl")
    journal.append_once({"step": 1})
    journal.append({"step": 2})
    assert journal.append_once({"step": 2}) == "same"


def test_a_full_disk_takes_back_the_line_and_keeps_the_rest(tmp_path):
    journal = JsonlLog(tmp_path / "a.jsonl")
    journal.append({"step": 1})  # 11 bytes
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20, hard))
    try:
        with pytest.raises(RunFailed, match="no room left to write") as caught:
            journal.append({"step": 2, "text": "does not fit into nine bytes"})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "npo resume" in caught.value.hint
    assert journal.path.read_bytes() == b'{"step":1}\n'
    journal.append({"step": 2})
    journal.sync()
    assert journal.path.read_bytes() == b'{"step":1}\n{"step":2}\n'


def test_a_device_without_room_is_a_full_disk():
    device = Path("/dev/full")
    with pytest.raises(RunFailed, match="no room left to write /dev/full"), explain_full_disk(device):
        append_bytes(device, b"{}\n")

import math
import resource
import zlib
from pathlib import Path

import pytest

from npo_cli.errors import NpoError, RunFailed
from npo_cli.storage.files import explain_write_error
from npo_cli.storage.jsonl import JsonlLog, append_bytes
from npo_cli.storage.layout import head_path
from npo_cli.storage.log_head import LogHead, read_head, start_log


def test_a_missing_log_is_empty(tmp_path):
    log = JsonlLog(tmp_path / "deep" / "a.jsonl")
    assert list(log.iter_rows()) == []
    assert list(log.iter_rows()) == []
    assert log.repair() == 0
    assert not (tmp_path / "deep").exists()


def test_lines_come_back_in_order(tmp_path):
    log = JsonlLog(tmp_path / "a.jsonl")
    log.append({"step": 1})
    log.extend([{"step": 2}, {"step": 3}])
    assert [row["step"] for row in log.iter_rows()] == [1, 2, 3]
    assert list(log.iter_rows())[-1] == {"step": 3}
    assert log.path.read_bytes() == b'{"step":1}\n{"step":2}\n{"step":3}\n'


def start(path: Path, data: bytes) -> JsonlLog:
    """A log of a killed command: its lines are not sealed."""
    start_log(path)
    path.write_bytes(data)
    return JsonlLog(path)


@pytest.mark.parametrize("tail", [b'{"step":2', b'{"step":2}', b"\x00\x00\x00", b"["])
def test_a_reader_ignores_a_torn_tail_and_a_writer_cuts_it_off(tmp_path, tail: bytes):
    path = tmp_path / "a.jsonl"
    log = start(path, b'{"step":1}\n' + tail)
    assert list(JsonlLog(path).iter_rows()) == [{"step": 1}]
    assert path.read_bytes() == b'{"step":1}\n' + tail  # reading changed nothing
    log.append({"step": 2, "new": True})
    assert path.read_bytes() == b'{"step":1}\n{"step":2,"new":true}\n'


@pytest.mark.parametrize("tail", [b"\x00\x00\n", b"[1]\n", b"oops\n", b'oops\n{"step":3}\n'])
def test_a_bad_line_with_a_newline_is_damage_and_never_cut_off(tmp_path, tail: bytes):
    path = tmp_path / "a.jsonl"
    start(path, b'{"step":1}\n' + tail)
    with pytest.raises(NpoError, match=r"a\.jsonl, line 2: not a JSON object, left by a killed command") as caught:
        list(JsonlLog(path).iter_rows())
    with pytest.raises(NpoError, match=r"a\.jsonl, line 2"):
        JsonlLog(path).append_once({"step": 2})
    assert path.read_bytes() == b'{"step":1}\n' + tail
    # the remedy: the head counts nothing of it
    assert caught.value.hint.endswith(f"truncate -s 11 {path}")
    path.write_bytes(b'{"step":1}\n' + tail[:0])
    assert list(JsonlLog(path).iter_rows()) == [{"step": 1}]


def test_repair_says_how_much_it_cut(tmp_path):
    path = tmp_path / "a.jsonl"
    assert start(path, b'{"step":1}\n{"st').repair() == 4
    assert JsonlLog(path).repair() == 0


def test_sealed_log_must_hold_every_byte_of_its_head(tmp_path):
    path = tmp_path / "a.jsonl"
    log = JsonlLog(path)
    log.extend([{"step": 1}, {"step": 2}, {"step": 3}])
    head = log.seal()
    whole = path.read_bytes()
    assert head == LogHead(lines=3, size=33, crc32=zlib.crc32(whole))
    damaged = {
        "it has 2 lines, and 3 were written": whole[:22],
        "it has 0 lines, and 3 were written": b"",
        "line 3 of 3 is cut off": whole[:-1],
        "line 2 of 3 is not a JSON object": whole.replace(b'{"step":2}', b'["step":2}'),
        "its first 3 lines are not those that were written": whole.replace(b"2", b"4"),
        "3 lines are not those": whole[:11] + whole[:11] + whole[22:],  # a line in the place of another
        "first 3 lines are not": whole[:11] + whole,  # a line twice
    }
    for message, data in damaged.items():
        path.write_bytes(data)
        with pytest.raises(NpoError, match=message):
            list(JsonlLog(path).iter_rows())
        if len(data) <= len(whole):
            assert JsonlLog(path).seal() == head  # damage stays reported
    path.unlink()
    with pytest.raises(NpoError, match="it is missing, and 3 lines were written"):
        JsonlLog(path).append({"step": 4})
    path.write_bytes(whole)
    assert len(list(JsonlLog(path).iter_rows())) == 3
    head_path(path).unlink()
    with pytest.raises(NpoError, match=r"its head a\.jsonl\.head is missing"):
        list(JsonlLog(path).iter_rows())


def test_sealing_continues_the_checksum_and_leaves_a_torn_tail_out(tmp_path):
    path = tmp_path / "a.jsonl"
    for number in range(4):
        log = JsonlLog(path)
        log.append({"step": number})
        with path.open("ab") as file:
            file.write(b'{"torn')
        assert log.seal().lines == number + 1
    whole = b"".join(b'{"step":%d}\n' % number for number in range(4))
    assert read_head(path) == LogHead(lines=4, size=44, crc32=zlib.crc32(whole))
    assert path.read_bytes() == whole + b'{"torn'


def test_a_step_done_again_is_compared_and_not_written(tmp_path):
    path = tmp_path / "a.jsonl"
    log = JsonlLog(path)
    assert log.append_once({"step": 1, "reward": 0.5}) == "written"
    assert log.append_once({"step": 1, "reward": 0.5}) == "same"
    assert log.append_once({"step": 1, "reward": 0.25}) == "differs"
    assert JsonlLog(path).append_once({"step": 1, "reward": 0.5}) == "same"
    assert JsonlLog(path).append_once({"step": 2, "kl": math.nan}) == "written"
    assert JsonlLog(path).append_once({"step": 2, "kl": math.nan}) == "same"
    assert path.read_bytes() == b'{"step":1,"reward":0.5}\n{"step":2,"dropped":["kl"]}\n'


def test_a_key_may_be_several_fields(tmp_path):
    log = JsonlLog(tmp_path / "a.jsonl")
    assert log.append_once({"step": 1, "prompt": "a"}, key=("step", "prompt")) == "written"
    assert log.append_once({"step": 1, "prompt": "b"}, key=("step", "prompt")) == "written"
    assert log.append_once({"step": 1, "prompt": "b", "x": 0}, key=("step", "prompt")) == "differs"


def test_append_once_sees_lines_appended_in_between(tmp_path):
    log = JsonlLog(tmp_path / "a.jsonl")
    log.append_once({"step": 1})
    log.append({"step": 2})
    assert log.append_once({"step": 2}) == "same"


def test_a_full_disk_takes_back_the_line_and_keeps_the_rest(tmp_path):
    log = JsonlLog(tmp_path / "a.jsonl")
    log.append({"step": 1})  # 11 bytes
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20, hard))
    try:
        with pytest.raises(RunFailed, match="no room left to write") as caught:
            log.append({"step": 2, "text": "does not fit into nine bytes"})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "npo resume" in caught.value.hint
    assert log.path.read_bytes() == b'{"step":1}\n'
    log.append({"step": 2})
    log.sync()
    assert log.path.read_bytes() == b'{"step":1}\n{"step":2}\n'


def test_a_device_without_room_is_a_full_disk():
    device = Path("/dev/full")
    with pytest.raises(RunFailed, match="no room left to write /dev/full"), explain_write_error(device):
        append_bytes(device, b"{}\n")

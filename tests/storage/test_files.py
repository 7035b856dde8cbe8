import math
import zlib
from pathlib import Path

import pytest

from npo_cli.errors import NpoError, RunFailed
from npo_cli.storage.files import (
    cached_by_file,
    check_disk_space,
    encode_record,
    read_json,
    write_json_atomic,
    write_text_atomic,
)


def test_numbers_that_json_lacks_leave_and_are_named():
    row = {"step": 1, "kl": math.nan, "loss": 0.5, "by": {"tok2": math.inf, "ess": 1.0}, "list": [1.0, -math.inf]}
    assert encode_record(row) == (
        '{"step":1,"loss":0.5,"by":{"ess":1.0},"list":[1.0,null],"dropped":["kl","by.tok2","list[1]"]}'
    )


def test_every_text_is_ascii_even_half_a_surrogate():
    assert encode_record({"text": "è\ud800\u2028"}) == '{"text":"\\u00e8\\ud800\\u2028"}'


def test_a_document_is_replaced_whole_and_leaves_no_neighbour(tmp_path):
    write_json_atomic(tmp_path / "a.json", {"x": 1})
    write_json_atomic(tmp_path / "a.json", {"x": 2})
    checksum = zlib.crc32(b'{\n "x": 2')
    assert (tmp_path / "a.json").read_text() == f'{{\n "x": 2,\n "checksum": {checksum}\n}}\n'
    assert read_json(tmp_path / "a.json") == {"x": 2}


@pytest.mark.parametrize("change", [('"x": 2', '"x": 3'), ('checksum": ', 'checksum": 1')])
def test_a_changed_document_is_refused_and_one_without_a_checksum_is_read(tmp_path, change):
    path = tmp_path / "a.json"
    write_json_atomic(path, {"x": 2})
    path.write_text(path.read_text().replace(*change))
    with pytest.raises(NpoError, match="does not fit its checksum"):
        read_json(path)
    path.write_text('{"x": 3}')
    assert read_json(path) == {"x": 3}
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_a_failed_replacement_keeps_the_old_document(tmp_path):
    write_text_atomic(tmp_path / "a.txt", "old")
    with pytest.raises(UnicodeEncodeError):
        write_text_atomic(tmp_path / "a.txt", "\ud800")
    assert (tmp_path / "a.txt").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


@pytest.mark.parametrize(
    ("text", "words"), [("{", "is damaged"), ("[1]", "holds no JSON object"), (None, "is missing")]
)
def test_a_document_that_cannot_be_read_is_named(tmp_path, text: str | None, words: str):
    if text is not None:
        (tmp_path / "a.json").write_text(text)
    with pytest.raises(NpoError, match=words):
        read_json(tmp_path / "a.json")


def test_a_save_that_cannot_fit_is_refused_before_it_begins(tmp_path):
    check_disk_space(tmp_path / "not" / "yet", 1)
    with pytest.raises(RunFailed, match=r"needs 1000000000000\.0 MB and the disk has") as caught:
        check_disk_space(Path(tmp_path), 10**18)
    assert "npo resume" in caught.value.hint
    assert caught.value.exit_code == 1


def test_a_cached_reader_reads_again_what_has_changed(tmp_path):
    path, reads = tmp_path / "a.jsonl", []

    @cached_by_file(lambda path: path)
    def read(path: Path) -> str:
        reads.append(path)
        return path.read_text() if path.exists() else ""

    assert (read(path), read(path), len(reads)) == ("", "", 1)
    path.write_text("1\n")
    assert (read(path), read(path), len(reads)) == ("1\n", "1\n", 2)
    with path.open("a") as file:
        file.write("2\n")
    assert (read(path), len(reads)) == ("1\n2\n", 3)
    write_text_atomic(path, "3\n4\n")
    assert (read(path), len(reads)) == ("3\n4\n", 4)

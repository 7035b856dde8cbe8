from npo_cli.report.text_sanitizer import MAX_TEXT_CHARS, escape_control_chars, truncate_middle


def test_what_a_reader_would_not_see_is_spelled_out_and_a_kept_character_stays():
    assert escape_control_chars("a\x1b[31m\u202eb\x00\nc") == "a\\x1b[31m\\u202eb\\x00\\nc"
    assert escape_control_chars("a\tb\nc", keep="\n") == "a\\tb\nc"
    # half of a pair, which no file can hold
    assert escape_control_chars("\ud800é") == "\\ud800é"


def test_a_long_text_loses_its_middle_and_says_how_much():
    # 10 letters, 6 are shown: 4 from the beginning and 2 from the end
    assert truncate_middle("abcdefghij", max_chars=6, tail_chars=2) == "abcd [... 4 characters left out ...] ij"
    assert truncate_middle("abcdef", max_chars=6, tail_chars=2) == "abcdef"


def test_a_megabyte_in_one_line_ends_with_its_answer():
    cut = truncate_middle("x" * 1_000_000 + "#42")
    assert cut.endswith("x#42")
    assert f" [... {1_000_003 - MAX_TEXT_CHARS:,} characters left out ...] " in cut
    assert len(cut) < MAX_TEXT_CHARS + 50

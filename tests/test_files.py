"""Files are replaced as a whole, and a failure leaves what was there before."""

from __future__ import annotations

import pandas as pd
import pytest

from lightning_nrml.files import read_lines, whole_file, write_frame, write_text


def test_lines_of_any_editor(tmp_path):
    file = tmp_path / "list.txt"
    for encoding, end in (("utf-8", "\n"), ("utf-8-sig", "\r\n")):
        file.write_bytes(f"ä{end} b {end}{end}".encode(encoding))
        assert read_lines(file) == ["ä", "b", "", ""]
    file.write_bytes("ok\nä".encode("latin-1"))
    with pytest.raises(ValueError, match=r"list\.txt is not in UTF-8 \(.* at byte 3\); save it so"):
        read_lines(file)


def test_the_old_content_stays_until_the_end(tmp_path):
    file = tmp_path / "new" / "a.txt"
    write_text(file, "old ä")
    with file.open(encoding="utf-8") as reader:
        with whole_file(file) as part:
            assert part.suffix == ".txt"  # numpy.save adds its own to any other
            part.write_text("new")
            assert file.read_text(encoding="utf-8") == "old ä"
        assert reader.read() == "old ä"  # put in its place, not written over
    assert file.read_text() == "new"
    assert list(file.parent.iterdir()) == [file]


def test_a_failure_leaves_the_old_content_and_nothing_else(tmp_path):
    file = tmp_path / "a.txt"
    write_text(file, "old")

    def fail(part):
        part.write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), whole_file(file) as part:
        fail(part)
    assert file.read_text() == "old"
    assert list(tmp_path.iterdir()) == [file]


def test_two_writers_do_not_meet(tmp_path):
    file = tmp_path / "a.txt"
    with whole_file(file) as first, whole_file(file) as second:
        assert first != second
        first.write_text("first")
        second.write_text("second")
    assert file.read_text() == "first"  # the outer block ended last
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize("name", ["a.csv", "A.CSV", "a.parquet"])
def test_frames_come_back(tmp_path, name):
    frame = pd.DataFrame({"index": [2, 0], "path": ["ü", "b"]})
    write_frame(tmp_path / name, frame)
    read = pd.read_parquet if name.endswith("parquet") else pd.read_csv
    pd.testing.assert_frame_equal(read(tmp_path / name), frame)

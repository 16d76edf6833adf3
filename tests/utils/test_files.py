"""Files that are whole or absent, and files that cannot be read."""

from __future__ import annotations

import hashlib
import math
import os
import stat

import pytest

from svdk.errors import ArtifactError, DataError, InputError
from svdk.utils.files import (
    add_to_hash,
    decode_text,
    new_folder,
    parse_json,
    read_json_lines,
    read_lines,
    read_object,
    read_text,
    unfinished,
    write_file,
    write_json,
)


class Crash(BaseException):
    """Stands for a kill: no handler of Exception sees it."""


def raising(error):
    def fail(*_):
        raise error

    return fail


def test_contents_and_mode(tmp_path):
    path = tmp_path / "a file"
    write_file(path, "naïve\n")
    assert path.read_bytes() == "naïve\n".encode()
    write_file(str(path), b"\0\xff")
    assert path.read_bytes() == b"\0\xff"
    mask = os.umask(0o027)
    try:
        write_file(path, "x")
    finally:
        os.umask(mask)
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    assert os.listdir(tmp_path) == ["a file"]


@pytest.mark.parametrize("step", ["fsync", "replace"])
@pytest.mark.parametrize("error", [Crash, OSError("no space left")])
def test_a_failure_leaves_the_old_file_and_nothing_beside_it(tmp_path, monkeypatch, step, error):
    path = tmp_path / "file"
    write_file(path, "old")
    with monkeypatch.context() as patch:
        patch.setattr(os, step, raising(error))
        with pytest.raises((Crash, OSError)):
            write_file(path, "new")
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["file"]


def test_what_cannot_be_encoded_is_not_written(tmp_path):
    with pytest.raises(UnicodeEncodeError):
        write_file(tmp_path / "file", "\ud800")
    with pytest.raises(ValueError, match="JSON compliant"):
        write_json(tmp_path / "file", math.nan)
    assert not os.listdir(tmp_path)


def test_the_file_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    steps = []
    for name in ("fsync", "replace"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *a, name=name, real=real: (steps.append(name), real(*a)))
    write_file(tmp_path / "file", "x")
    assert steps == ["fsync", "replace"]


def test_what_a_kill_left_is_found_by_its_target(tmp_path):
    assert unfinished(tmp_path / "absent" / "file") == []
    write_file(tmp_path / "f[1].json", "x")
    left = [tmp_path / ".f[1].json.0123456789ab.tmp", tmp_path / ".f[1].json.ba9876543210.tmp"]
    for path in (*left, tmp_path / ".f1.json.00.tmp", tmp_path / ".f[1].json.kept"):
        path.touch()
    assert unfinished(tmp_path / "f[1].json") == left


def test_json(tmp_path):
    path = tmp_path / "file.json"
    write_json(path, {"a": "ï"})
    assert path.read_text() == '{\n  "a": "\\u00ef"\n}\n'
    write_json(path, {"a": "ï"}, indent=1, ensure_ascii=False)
    assert path.read_text(encoding="utf-8") == '{\n "a": "ï"\n}\n'
    write_json(path, {"a": math.inf}, allow_nan=True)
    assert read_object(path) == {"a": math.inf}
    with pytest.raises(InputError, match=r"file\.json is damaged: Infinity is not strict JSON"):
        read_object(path, strict=True)


def test_a_folder_is_whole_or_absent(tmp_path, monkeypatch):
    with pytest.raises(Crash), new_folder(tmp_path / "made" / "new") as partial:
        (partial / "file").write_text("x")
        raise Crash
    assert os.listdir(tmp_path / "made") == []
    synced = []
    monkeypatch.setattr(os, "fsync", synced.append)
    with new_folder(tmp_path / "new") as partial:
        (partial / "file").write_text("first")
    with new_folder(tmp_path / "new") as partial:  # another process was faster: its folder stays
        (partial / "file").write_text("second")
    assert (tmp_path / "new" / "file").read_text() == "first"
    assert sorted(os.listdir(tmp_path)) == ["made", "new"]
    assert len(synced) == 2


def test_hash_of_a_file(tmp_path):
    data = os.urandom((1 << 20) + 7)
    (tmp_path / "file").write_bytes(data)
    assert add_to_hash(hashlib.sha256(b"a"), tmp_path / "file") == hashlib.sha256(b"a" + data).hexdigest()


def test_text_that_cannot_be_read_is_named(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"\xef\xbb\xbfa\r\n")
    assert read_text(path) == "a\n"
    path.write_bytes(b"abc\xff")
    with pytest.raises(DataError, match=r"prompts .*file was not UTF-8 text \(byte 3\)"):
        read_text(path, "prompts")
    with pytest.raises(DataError, match=r"data file .*none does not exist$"):
        read_text(tmp_path / "none")
    with pytest.raises(DataError, match=r"none does not exist; make one$"):
        read_text(tmp_path / "none", hint="make one")
    with pytest.raises(DataError, match="cannot be read: Is a directory"):
        read_text(tmp_path)


def test_lines_end_at_newlines_only(tmp_path):
    path = tmp_path / "file"
    inside = "a\u2028b\u2029c\x85d\x0be\x0cf\x1cg\x1dh\x1ei"
    path.write_bytes(f"\ufeff\n{inside}\r\n \t\r\r\nlast\ufeff".encode())
    assert read_lines(path) == [(f"{path} line 2", inside), (f"{path} line 5", "last\ufeff")]
    path.write_bytes(f'\ufeff"{inside[:7]}"\r\r[1]'.encode())
    assert read_json_lines(path) == [(f"{path} line 1", inside[:7]), (f"{path} line 3", [1])]
    path.write_bytes(b"1\n\n{")
    with pytest.raises(DataError, match="file line 3 was not valid JSON"):
        read_json_lines(path)
    with pytest.raises(DataError, match=r"file of prompts .*none does not exist"):
        read_lines(tmp_path / "none", "file of prompts")


def test_text_comes_as_bytes_or_decoded():
    for content in ("\ufeffa\r\nb\rc\u2028", "\ufeffa\r\nb\rc\u2028".encode()):
        assert decode_text(content, "standard input") == "a\nb\nc\u2028"
    with pytest.raises(DataError, match=r"^standard input was not UTF-8 text \(byte 4\)"):
        decode_text(b"\xef\xbb\xbfa\xff", "standard input")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "line 7 was not valid JSON: .* at column 2"),
        ("[1,\n2", r"was not valid JSON: .* at line 2, column 2"),
        ("[" * 100_000, "was not valid JSON"),
        ("1" * 5000, "was not valid JSON: Exceeds the limit"),
        ("", "was not valid JSON"),
    ],
)
def test_text_that_is_no_json_is_named(text, message):
    assert parse_json("[1, null]", "") == [1, None]
    with pytest.raises(DataError, match=message):
        parse_json(text, "file line 7")


def test_objects(tmp_path):
    path = tmp_path / "file.json"
    with pytest.raises(FileNotFoundError):
        read_object(path, limit=10)
    path.write_text('{"a": 1}')
    assert read_object(path, limit=8) == {"a": 1}
    with pytest.raises(ArtifactError, match="has 8 bytes; allowed: at most 7"):
        read_object(path, ArtifactError, limit=7)
    for text, message in (("[1]", "holds no JSON object"), ("{", "damaged"), ("[" * 100_000, "damaged")):
        path.write_text(text)
        with pytest.raises(ArtifactError, match=message):
            read_object(path, ArtifactError)
    path.write_bytes(b"\xff")
    with pytest.raises(InputError, match=r"file\.json is damaged"):
        read_object(path)

"""Files that are not what their names say: each is named for what it is."""

from __future__ import annotations

import gzip
import os

import pytest

from shards.core.files import is_partial, printable, trouble, without_folders

pytestmark = pytest.mark.fast

RAW = b"\x5c\x01\x00\x00" + bytes(400)  # begins as a NIfTI-1 header does
CONTENT = {
    "notgz_bold.nii.gz": (RAW, "not compressed with gzip", "Rename it to .nii"),
    "gz_bold.nii": (gzip.compress(RAW), "gzip-compressed file", "Rename it to .nii.gz"),
    "zstd_bold.nii.gz": (b"\x28\xb5\x2f\xfd" + RAW, "compressed with zstd", "Convert it to .nii"),
    "zip_bold.nii.gz": (b"PK\x03\x04" + RAW, "compressed with zip", "Convert it to .nii"),
    "named_bold.nii.zst": (RAW, "ends with .zst", "Decompress it"),
    "annex_bold.nii.gz": (b"/annex/objects/MD5E-s26--c3fd.nii.gz\n", "a pointer of git-annex", "datalad get"),
    "lfs_bold.nii.gz": (b"version https://git-lfs.github.com/spec/v1\noid sha256:c3\n", "Git LFS", "git lfs pull"),
    "empty_bold.nii.gz": (b"", "an empty file", "again"),
    "html_bold.nii.gz": (b"\n<!DOCTYPE html><title>403 Forbidden</title>", "an HTML page", "Download it again"),
    "xml_bold.nii.gz": (b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>', "XML message", "Download"),
}


@pytest.mark.parametrize("name", CONTENT)
def test_a_file_is_named_for_what_it_is(tmp_path, name):
    content, got, hint = CONTENT[name]
    (tmp_path / name).write_bytes(content)
    found = trouble(tmp_path / name, image=True)
    assert found is not None and got in found.got and hint in found.hint


def test_sound_files_have_no_trouble(tmp_path):
    for name, content in (
        ("a.nii", RAW),
        ("b.nii.gz", gzip.compress(RAW)),
        ("c.img", RAW),
        ("d.mgz", gzip.compress(RAW)),
    ):
        (tmp_path / name).write_bytes(content)
        assert trouble(tmp_path / name, image=True) is None, name
    (tmp_path / "t.tsv").write_text("x\n")
    assert trouble(tmp_path / "t.tsv") is None


def test_links_folders_and_pipes(tmp_path):
    (tmp_path / "annex.nii.gz").symlink_to("../.git/annex/objects/kx/9F/MD5E-s1--00.nii.gz")
    (tmp_path / "gone.nii.gz").symlink_to("moved.nii.gz")
    (tmp_path / "loop.nii.gz").symlink_to("loop.nii.gz")
    (tmp_path / "folder.nii.gz").mkdir()
    os.mkfifo(tmp_path / "pipe.nii.gz")  # opening one would wait for a writer
    for name, got, hint in (
        ("annex.nii.gz", "git-annex, datalad", "datalad get"),
        ("gone.nii.gz", "a link to moved.nii.gz, which does not exist", "Restore"),
        ("loop.nii.gz", "cannot be opened", "permissions"),
        ("folder.nii.gz", "a folder", "Give a file"),
        ("pipe.nii.gz", "not a regular file", "Give a file"),
        ("none.nii.gz", "no such file", "Check the path"),
    ):
        found = trouble(tmp_path / name)
        assert found is not None and got in found.got and hint in found.hint, name


def test_names_are_printed_as_any_terminal_takes_them():
    assert printable("M\u00fcller/bold.nii") == "M\u00fcller/bold.nii"
    assert printable(os.fsdecode(b"M\xfcller")) == "M\\xfcller"
    assert printable("a\nb\x1b[31m\u2028") == "a\\nb\\x1b[31m\\u2028"
    printable(os.fsdecode(bytes(range(1, 256)))).encode("utf-8")


@pytest.mark.parametrize("name", ["._a.nii.gz", ".DS_Store", "a.nii.gz.part", "a.nii.gz.CRDOWNLOAD", "a.nii~"])
def test_hidden_files_and_unfinished_downloads(name):
    assert is_partial(name) and not is_partial("a_part-mag_bold.nii.gz")


def test_of_absolute_paths_the_last_part_is_left():
    text = (
        'data: /home/jane/study/shards\nout: runs/a\nurl: https://host/a/b, "/x/y z", /d/d.tsv: ~/k/l ./m/n [/a/b,/c/d]'
    )
    assert without_folders(text) == (
        'data: shards\nout: runs/a\nurl: https://host/a/b, "y z", d.tsv: ~/k/l ./m/n [b,d]'
    )

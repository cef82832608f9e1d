"""Digests, manifests and atomic files."""

import hashlib
import shutil
import subprocess
from pathlib import Path

import pytest

from hscr.artifacts import (
    MANIFEST,
    atomic_write,
    bytes_digest,
    file_digest,
    json_digest,
    verify_manifest,
    write_manifest,
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "a" / "sub").mkdir(parents=True)
    (tmp_path / "a" / "x.txt").write_bytes(b"x")
    (tmp_path / "a" / "sub" / "y").write_bytes(b"y" * 100_000)
    return tmp_path / "a"


def test_digests_are_sha256(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"abc")
    expected = "sha256:ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # FIPS 180-2, appendix B.1
    assert file_digest(tmp_path / "f") == bytes_digest(b"abc") == expected


def test_json_digest_does_not_depend_on_the_order_of_keys() -> None:
    assert json_digest({"a": 1, "b": [2]}) == json_digest({"b": [2], "a": 1}) != json_digest({"a": 1, "b": [3]})


def test_a_manifest_is_what_sha256sum_checks(folder: Path) -> None:
    digest = write_manifest(folder)
    assert digest == "sha256:" + hashlib.sha256((folder / MANIFEST).read_bytes()).hexdigest()
    assert verify_manifest(folder) == verify_manifest(folder, digest) == digest
    if shutil.which("sha256sum"):
        assert subprocess.run(["sha256sum", "-c", "--quiet", MANIFEST], cwd=folder, check=False).returncode == 0


def test_a_changed_missing_or_added_file_is_noticed(folder: Path) -> None:
    digest = write_manifest(folder)
    with pytest.raises(ValueError, match="expected sha256:0"):
        verify_manifest(folder, "sha256:0")
    (folder / "z").touch()
    with pytest.raises(ValueError, match="differ"):
        verify_manifest(folder, digest)
    (folder / "z").unlink()
    (folder / "x.txt").write_bytes(b"X")
    with pytest.raises(ValueError, match="differ"):
        verify_manifest(folder)
    (folder / "x.txt").unlink()
    with pytest.raises(ValueError, match="differ"):
        verify_manifest(folder)
    (folder / MANIFEST).unlink()
    with pytest.raises(ValueError, match="has no SHA256SUMS"):
        verify_manifest(folder)


def test_the_digest_depends_on_names_and_bytes_alone(folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "elsewhere"
    shutil.copytree(folder, copy)
    assert write_manifest(copy) == write_manifest(folder)
    (copy / "x.txt").rename(copy / "w.txt")
    assert write_manifest(copy) != write_manifest(folder)


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "f"
    atomic_write(path, b"old")

    def full_disk(fd: int) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr("hscr.artifacts.os.fsync", full_disk)
    with pytest.raises(OSError, match="no space"):
        atomic_write(path, b"new")
    assert path.read_bytes() == b"old"

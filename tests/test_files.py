"""Files are whole or absent, errors name them, and a fingerprint follows the source."""

import os
import stat

import pytest

from course_lib.files import cache_folder, source_hash, write_file


def test_write_file_replaces_in_one_piece_with_the_umask_s_mode(tmp_path):
    path = tmp_path / ("n" * 255)  # as long a name as the file system allows
    old = os.umask(0o027)
    try:
        assert write_file(path, b"one") == path
        assert write_file(str(path), b"two") == path
    finally:
        os.umask(old)
    assert path.read_bytes() == b"two"
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    assert os.listdir(tmp_path) == [path.name]


def test_a_full_disk_names_the_file_and_leaves_the_old_one(tmp_path):
    resource, signal = pytest.importorskip("resource"), pytest.importorskip("signal")
    path = write_file(tmp_path / "kept.bin", b"old")
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))  # a stand-in for no space left
    try:
        with pytest.raises(OSError, match=r"kept\.bin"):
            write_file(path, bytes(5000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["kept.bin"]


def test_errors_keep_their_kind_and_name_the_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        write_file(tmp_path / "nowhere" / "a.net", b"")
    (tmp_path / "folder").mkdir()
    with pytest.raises(IsADirectoryError, match="folder"):
        write_file(tmp_path / "folder", b"")
    assert sorted(os.listdir(tmp_path)) == ["folder"]


def test_source_hash_follows_content_names_and_packages(tmp_path):
    package = tmp_path / "package"
    package.mkdir()
    for name in ("__init__", "inner"):
        (package / f"{name}.py").write_text(f"{name} = 1\n")
    whole = source_hash(package)
    assert whole == source_hash(package / "__init__.py") == source_hash(package, package / "inner.py")
    (package / "inner.py").write_text("inner = 2\n")
    assert source_hash(package) != whole
    with pytest.raises(FileNotFoundError, match="absent"):
        source_hash(tmp_path / "absent.py")


def test_cache_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("COURSE_CACHE", str(tmp_path / "c"))
    assert cache_folder("checkpoints") == tmp_path / "c" / "checkpoints"
    assert not (tmp_path / "c").exists()
    monkeypatch.delenv("COURSE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "x"))
    assert cache_folder("studies").name == "studies"
    assert cache_folder("studies").parent.name == "compression-course"

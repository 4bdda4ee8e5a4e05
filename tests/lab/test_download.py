import errno
import hashlib
import json
import os
import re
import subprocess
import sys
import textwrap
import threading

import numpy as np
import pytest
import torchvision.datasets as tv
from data_files import (
    ARCHIVES,
    BATCHES,
    CIFAR,
    CIFAR_NAMES,
    FILES,
    IDX_NAMES,
    RAW,
    TAR,
    cifar_files,
    flipped,
    gz,
    idx_bytes,
    idx_files,
    listing,
    load,
    refused,
    tar_gz,
    write,
)

from course_lib.lab import download
from course_lib.lab.data import DataError
from course_lib.lab.download import RECORD

# Fetching


def test_download_leaves_the_files_and_their_hashes_and_nothing_else(tmp_path, mirror, capfd):
    root = tmp_path / "new" / "with space"
    data = load(root)
    assert [len(part) for part in (data.train, data.val, data.test)] == [90, 10, 20]
    assert sorted(path.name for path in root.rglob("*") if path.is_file()) == sorted([*IDX_NAMES, RECORD])
    assert {name: (root / RAW / name).read_bytes() for name in IDX_NAMES} == FILES
    lines = {f"{hashlib.sha256(data).hexdigest()}  {name}" for name, data in FILES.items()}
    assert set((root / RAW / RECORD).read_text().splitlines()) == lines
    assert mirror.fetched == dict.fromkeys(ARCHIVES, 1)
    load(root)
    load(root, download=False)
    assert mirror.fetched == dict.fromkeys(ARCHIVES, 1)
    assert capfd.readouterr() == ("", "")


def test_cifar_is_downloaded_and_verified_too(tmp_path, mirror):
    data = load(tmp_path, "cifar10")
    assert len(data.train) + len(data.val) == 100
    assert sorted(os.listdir(tmp_path)) == [CIFAR]
    assert sorted(os.listdir(tmp_path / CIFAR)) == sorted([*CIFAR_NAMES, RECORD])
    path = tmp_path / CIFAR / "data_batch_3"
    path.write_bytes(flipped(BATCHES["data_batch_3"], 5000))  # inside the pixels, where no header can tell
    refused(tmp_path, "data_batch_3 does not match the hash", "[Dd]elete it and call load_dataset", name="cifar10")
    path.unlink()
    load(tmp_path, "cifar10")
    assert listing(tmp_path / CIFAR)["data_batch_3"] == BATCHES["data_batch_3"]


def test_only_what_is_missing_is_fetched(tmp_path, mirror):
    write(tmp_path / RAW, {name: FILES[name] for name in IDX_NAMES[:3]})
    text = refused(
        tmp_path, "t10k-labels-idx1-ubyte missing", r"load_dataset\('mnist', download=True\)", download=False
    )
    assert "train-images" not in text
    load(tmp_path)
    assert mirror.fetched == {"t10k-labels-idx1-ubyte.gz": 1}
    assert (tmp_path / RAW / RECORD).read_text().count("\n") == 1


def test_what_is_fetched_must_fit_what_is_there(tmp_path, mirror):
    write(tmp_path / RAW, {name: data for name, data in idx_files(train=60).items() if name != IDX_NAMES[1]})
    refused(tmp_path, "holds 100 labels, but .*train-images-idx3-ubyte holds 60 images")
    cifar = write(tmp_path / CIFAR, cifar_files(seed=1))
    (cifar / "test_batch").unlink()
    refused(tmp_path, "data_batch_1 is not the same file as data_batch_1 in", name="cifar10")


# What lies in the folder


@pytest.mark.parametrize("options", [{"download": True}, {"download": False}], ids=["download", "offline"])
@pytest.mark.parametrize(
    ("file", "change", "says"),
    [
        (IDX_NAMES[0], lambda data: data[: len(data) // 2], "is truncated"),
        (IDX_NAMES[0], lambda data: b"", "is empty"),
        (IDX_NAMES[2], lambda data: data + b"x", "is too long"),
        (IDX_NAMES[1], lambda data: flipped(data, 3), "does not start with"),
        (IDX_NAMES[3], lambda data: data[:8] + b"\x63" + data[9:], "the label 99 at position 0"),
        (IDX_NAMES[1], lambda data: idx_bytes(np.zeros(99)), "99 labels, but .* 100 images"),
    ],
    ids=["half-extracted", "empty", "trailing", "magic", "label", "length"],
)
def test_damaged_files_are_named_and_left_alone(tmp_path, mirror, options, file, change, says):
    write(tmp_path / RAW, {**FILES, file: change(FILES[file])})
    refused(tmp_path, re.escape(str(tmp_path / RAW / file)), says, "Delete", "download=True", **options)
    assert not mirror.fetched
    (tmp_path / RAW / file).unlink()
    load(tmp_path)


def test_a_flipped_pixel_is_found_by_the_recorded_hash(tmp_path, mirror):
    load(tmp_path)
    path = tmp_path / RAW / IDX_NAMES[0]
    path.write_bytes(flipped(FILES[IDX_NAMES[0]], 5000))
    refused(tmp_path, f"{path} does not match the hash", RECORD, "Delete it", download=False)
    path.unlink()
    load(tmp_path)  # as the error said
    assert path.read_bytes() == FILES[IDX_NAMES[0]]
    (tmp_path / RAW / RECORD).write_text("garbage\n")
    refused(tmp_path, f"{RECORD} is not a list of SHA-256", "Delete it")
    (tmp_path / RAW / RECORD).unlink()
    load(tmp_path, download=False)


def test_a_damaged_file_is_reported_before_the_network_is_asked(tmp_path, mirror):
    write(tmp_path / RAW, {IDX_NAMES[0]: FILES[IDX_NAMES[0]][:-1]})
    refused(tmp_path, "is truncated")
    assert not mirror.fetched


@pytest.mark.parametrize("place", ["root", "above", RAW, "MNIST", f"{RAW}/{IDX_NAMES[0]}"])
@pytest.mark.parametrize("wanted", [True, False])
def test_files_and_folders_in_each_others_place(tmp_path, mirror, place, wanted):
    root = tmp_path / "data"
    if place == "root":
        root.write_text("a file")
        refused(root, f"{root} is not a folder", "root=", download=wanted)
        assert root.read_text() == "a file"
    elif place == "above":
        root.write_text("a file")
        refused(root / "sub", f"{root} is not a folder", download=wanted)
    elif place.endswith("ubyte"):
        write(root / RAW, FILES)
        (root / place).unlink()
        (root / place).mkdir()
        refused(root, f"{root / place} is a folder, and a file should be there", "Delete it", download=wanted)
    else:
        (root / place).parent.mkdir(parents=True)
        (root / place).write_text("a file")
        refused(root, f"{root / place} is not a folder", download=wanted)


def test_missing_files_without_download(tmp_path, mirror):
    text = refused(tmp_path, r"mnist is not complete in .*MNIST", "download=True", "COURSE_DATA", download=False)
    assert all(name in text for name in IDX_NAMES)
    refused(tmp_path / "absent", "not complete", download=False)
    assert not (tmp_path / "absent").exists()
    write(tmp_path / CIFAR, {name: BATCHES[name] for name in ("data_batch_4", "test_batch")})  # an extraction cut short
    refused(tmp_path, "data_batch_1, data_batch_2, data_batch_3, data_batch_5 missing", name="cifar10", download=False)


# Archives laid there by hand


def test_archives_are_used_without_network_and_without_writing(tmp_path):
    write(tmp_path / RAW, ARCHIVES)
    write(tmp_path, {"cifar-10-python.tar.gz": TAR})
    before = listing(tmp_path)
    assert len(load(tmp_path, download=False).test) == 20
    assert len(load(tmp_path, "cifar10", download=False).test) == 20
    assert listing(tmp_path) == before


def test_an_archive_stands_in_for_a_missing_file(tmp_path):
    write(tmp_path / RAW, {name: FILES[name] for name in IDX_NAMES[1:]})
    write(tmp_path / RAW, {f"{IDX_NAMES[0]}.gz": ARCHIVES[f"{IDX_NAMES[0]}.gz"]})
    load(tmp_path)
    write(tmp_path / CIFAR, {name: BATCHES[name] for name in CIFAR_NAMES[:2]})
    write(tmp_path, {"cifar-10-python.tar.gz": TAR})
    load(tmp_path, "cifar10")


@pytest.mark.parametrize("wanted", [True, False])
@pytest.mark.parametrize("change", [lambda data: data[:-30], lambda data: flipped(data, len(data) - 30), lambda _: b""])
def test_damaged_archives_are_named(tmp_path, mirror, wanted, change):
    name = f"{IDX_NAMES[2]}.gz"
    write(tmp_path / RAW, {**ARCHIVES, name: change(ARCHIVES[name])})
    refused(tmp_path, f"{tmp_path / RAW / name} is ", "Delete it and call", download=wanted)
    write(tmp_path, {"cifar-10-python.tar.gz": change(TAR)})
    refused(tmp_path, "cifar-10-python.tar.gz is ", "Delete it and call", name="cifar10", download=wanted)
    assert not mirror.fetched


def test_wrong_content_in_a_whole_archive(tmp_path):
    short = {name: data for name, data in BATCHES.items() if name != "test_batch"}
    write(tmp_path, {"cifar-10-python.tar.gz": tar_gz(short)})
    refused(tmp_path, "tar.gz does not hold cifar-10-batches-py/test_batch", name="cifar10")
    write(tmp_path / RAW, {**ARCHIVES, **gz({IDX_NAMES[0]: b"nonsense"})})
    refused(tmp_path, "train-images-idx3-ubyte.gz does not start with")


# Permission and space


def refuse_below(monkeypatch, root, code):
    """Make every attempt to write below the root fail, as a read-only or a full disk does, for any user."""
    real_open, real_mkdir = os.open, os.mkdir

    def is_below(path):
        return not isinstance(path, int) and str(os.fspath(path)).startswith(str(root))

    def fake_open(path, flags, *args, **kwargs):
        if is_below(path) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            raise OSError(code, os.strerror(code), str(path))
        return real_open(path, flags, *args, **kwargs)

    def fake_mkdir(path, *args, **kwargs):
        if is_below(path):
            raise OSError(code, os.strerror(code), str(path))
        return real_mkdir(path, *args, **kwargs)

    monkeypatch.setattr(os, "open", fake_open)
    monkeypatch.setattr(os, "mkdir", fake_mkdir)


@pytest.mark.parametrize("code", [errno.EACCES, errno.EROFS])
def test_a_read_only_classroom_folder(tmp_path, mirror, monkeypatch, code):
    write(tmp_path / RAW, FILES)
    monkeypatch.setenv("COURSE_DATA", str(tmp_path))
    refuse_below(monkeypatch, tmp_path, code)
    assert len(load(None).test) == 20  # complete: nothing is written, so nothing is refused
    says = ["cannot be written", "Ask the person who keeps it to add cifar10", "root=", "COURSE_DATA"]
    refused(tmp_path, *says, name="cifar10")
    assert not mirror.fetched


def test_a_folder_that_cannot_be_made(tmp_path, mirror, monkeypatch):
    refuse_below(monkeypatch, tmp_path / "data", errno.EACCES)
    refused(tmp_path / "data", "cannot be written", "root=")


def test_a_folder_that_cannot_be_read(tmp_path, monkeypatch):
    write(tmp_path / RAW, FILES)

    def denied(path):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr("pathlib.Path.read_bytes", denied)
    with pytest.raises(DataError, match=r"could not be read from .*Permission denied.*root="):
        load(tmp_path)


@pytest.mark.parametrize("name", ["mnist", "cifar10"])
def test_no_space_while_downloading(tmp_path, mirror, name):
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = listing(tmp_path)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
        with pytest.raises(DataError) as caught:
            load(tmp_path, name)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert re.search(r"there is no space for it there \(about \d+ MB\).*Free some space", str(caught.value))
    assert listing(tmp_path) == before
    load(tmp_path, name)


@pytest.mark.parametrize("fails_at", [1, 2, 5])
def test_moving_in_is_all_or_nothing(tmp_path, mirror, monkeypatch, fails_at):
    calls, real = [], os.replace

    def replace(source, target):
        calls.append(target)
        if len(calls) == fails_at:
            raise OSError(errno.ENOSPC, "No space left on device", str(target))
        real(source, target)

    monkeypatch.setattr(os, "replace", replace)
    refused(tmp_path, "no space")
    assert len(calls) == fails_at


def test_ctrl_c_leaves_nothing(tmp_path, mirror, monkeypatch):
    def interrupted(path, chunk_size=None):
        raise KeyboardInterrupt

    monkeypatch.setattr("torchvision.datasets.utils.calculate_md5", interrupted)  # called after a file arrived
    with pytest.raises(KeyboardInterrupt):
        load(tmp_path)
    assert sum(mirror.fetched.values()) == 1
    assert listing(tmp_path) == {}


# Several processes


def test_leftovers_of_a_killed_run_are_swept(tmp_path, mirror):
    write(tmp_path / ".mnist-partial-abc" / RAW, {"train-images-idx3-ubyte.gz": b"half"})
    write(tmp_path / ".cifar10-partial-abc", {"x": b"of another data set, perhaps alive"})
    write(tmp_path, {".mnist.lock": b"12345\n"})
    load(tmp_path)
    assert sorted(os.listdir(tmp_path)) == [".cifar10-partial-abc", "MNIST"]


def test_waiting_for_another_process_has_an_end(tmp_path, mirror, monkeypatch):
    from filelock import FileLock

    monkeypatch.setattr(download, "LOCK_TIMEOUT_S", 0.1)
    with FileLock(tmp_path / ".mnist.lock"):
        refused(tmp_path, "another process has been fetching mnist", "end it")


def test_two_threads_fetch_once(tmp_path, mirror):
    results = []
    threads = [threading.Thread(target=lambda: results.append(load(tmp_path))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [len(result.test) for result in results] == [20, 20]
    assert mirror.fetched == dict.fromkeys(ARCHIVES, 1)
    assert os.listdir(tmp_path) == ["MNIST"]


def test_a_killed_download_and_then_two_at_once(tmp_path, mirror):
    script = textwrap.dedent(
        """
        import json, sys
        import torchvision.datasets as tv
        from course_lib.lab.data import load_dataset
        settings = json.loads(sys.argv[1])
        tv.MNIST.mirrors, tv.MNIST.resources = settings["mirrors"], settings["resources"]
        sys.stdin.readline()
        print(len(load_dataset("mnist", root=settings["root"]).test))
        """
    )
    settings = {"mirrors": tv.MNIST.mirrors, "resources": tv.MNIST.resources, "root": str(tmp_path)}
    start = [sys.executable, "-c", script, json.dumps(settings)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    victim, *others = [subprocess.Popen(start, **pipes) for _ in range(3)]
    try:
        mirror.gate.clear()
        victim.stdin.write("go\n")
        victim.stdin.flush()
        assert mirror.first.wait(60)
        victim.kill()
        victim.communicate()
        assert [name for name in os.listdir(tmp_path) if "partial" in name], "it was killed in the middle"
        mirror.gate.set()
        mirror.fetched.clear()
        for other in others:
            other.stdin.write("go\n")
            other.stdin.flush()
        for other in others:
            out, err = other.communicate(timeout=60)
            assert (out, err, other.returncode) == ("20\n", "", 0)
    finally:
        for process in (victim, *others):
            process.kill()
            process.wait()
    assert mirror.fetched == dict.fromkeys(ARCHIVES, 1)
    assert os.listdir(tmp_path) == ["MNIST"]
    assert {name: (tmp_path / RAW / name).read_bytes() for name in IDX_NAMES} == FILES

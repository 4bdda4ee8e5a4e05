"""Data sets as files: what lies there is read or refused by name, what is missing is fetched whole, under a lock."""

import gzip
import hashlib
import os
import pickle
import re
import subprocess
import sys
import threading

import numpy as np
import pytest
import torchvision.datasets as tv

from data_files import (  # isort: skip
    ARCHIVES, BATCHES, CIFAR, CIFAR_NAMES, FILES, IDX_NAMES, RAW, TAR, Mirror, cifar_files, flipped, gz, idx_bytes,
    idx_files, listing, md5, refused, write,
)  # fmt: skip

from course_lib.lab import download
from course_lib.lab.download import RECORD, SOURCES, obtain

# What torchvision's failed requests keep open is closed late.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.mark.parametrize("source", SOURCES.values(), ids=SOURCES)
def test_names_agree_with_torchvision(source):
    dataset = getattr(tv, source.dataset)
    published = getattr(dataset, "classes", source.class_names)
    assert [name.split(" - ")[0] for name in published] == list(source.class_names)
    if source.dataset == "CIFAR10":
        assert dataset.base_folder == source.folder
    else:
        assert [file for file, _ in dataset.resources] == [f"{name}.gz" for name in IDX_NAMES]


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "gz"])
@pytest.mark.parametrize("dots", [False, True], ids=["hyphens", "dots"])
def test_idx_is_read_where_it_lies_as_torchvision_reads_it(tmp_path, dots, packed):
    from torchvision.datasets.mnist import read_image_file, read_label_file

    files = {name.replace("-idx", ".idx") if dots else name: data for name, data in FILES.items()}
    write(tmp_path / "root" / RAW, gz(files) if packed else files)
    before = listing(tmp_path)
    raw = obtain("mnist", tmp_path / "root", download=False)
    assert listing(tmp_path) == before
    reference = write(tmp_path / "reference", FILES)
    parts = (raw.train_images, raw.train_labels, raw.test_images, raw.test_labels)
    for array, name in zip(parts, IDX_NAMES, strict=True):
        expected = (read_image_file if "images" in name else read_label_file)(reference / name).numpy()
        np.testing.assert_array_equal(array[:, 0] if array.ndim == 4 else array, expected)
        assert array.dtype == expected.dtype  # uint8 and int64
    assert (raw.class_names, raw.scale) == (tuple("0123456789"), 255)


def test_cifar_is_read_as_torchvision_reads_it(tmp_path, small_cifar):
    write(tmp_path / CIFAR, BATCHES)
    raw = obtain("cifar10", tmp_path, download=False)
    for images, labels, train in (
        (raw.train_images, raw.train_labels, True),
        (raw.test_images, raw.test_labels, False),
    ):
        reference = tv.CIFAR10(tmp_path, train=train)
        np.testing.assert_array_equal(images.transpose(0, 2, 3, 1), reference.data)
        assert (labels.tolist(), labels.dtype) == (reference.targets, np.int64)
    assert raw.class_names[3] == "cat"


# What lies in the folder


@pytest.mark.parametrize("wanted", [True, False], ids=["download", "offline"])
@pytest.mark.parametrize(
    ("number", "change", "says"),
    [
        (0, lambda data: data[: len(data) // 2], r"is truncated: \d+ bytes, while its header \(100x28x28\)"),
        (0, lambda data: data[:12], "does not start with 00 00 08 03"),
        (0, lambda data: gzip.compress(data)[:-30], "is not a whole gzip archive"),
        (0, lambda data: flipped(gzip.compress(data), 5000), "is not a whole gzip archive"),
        (0, lambda data: flipped(data, 4), "truncated"),  # a count of hundreds of millions allocates nothing
        (0, lambda data: idx_bytes(np.zeros((100, 56, 14))), "holds 100x56x14, and this data set has images of 28x28"),
        (2, lambda data: data + b"x", "is too long"),
        (1, lambda data: flipped(data, 3), r"does not start with 00 00 08 01 \(IDX\) but with 00 00 08 11"),
        (1, lambda data: idx_bytes(np.zeros(99)), "99 labels for 100 images"),
        (3, lambda data: data[:9] + b"\x0a" + data[10:], "the label 10: labels go to 9"),
        (3, lambda data: idx_bytes(np.zeros(0)), "0 labels for 20 images"),
    ],
)
def test_damaged_files_are_named_and_left_alone(tmp_path, mirror, wanted, number, change, says):
    file = IDX_NAMES[number]
    write(tmp_path / RAW, {**FILES, file: change(FILES[file])})
    refused(tmp_path, re.escape(str(tmp_path / RAW / file)), says, "delete", "download=True", download=wanted)
    assert not mirror.fetched


def test_missing_files_without_download(tmp_path, mirror):
    text = refused(tmp_path, r"mnist is not complete in .*MNIST", "there is nothing", "download=True", download=False)
    assert all(name in text for name in IDX_NAMES)
    refused(tmp_path / "absent", "not complete", "COURSE_DATA", download=False)
    assert not (tmp_path / "absent").exists()
    write(tmp_path / CIFAR, {name: BATCHES[name] for name in ("data_batch_4", "test_batch")})  # an extraction cut short
    refused(tmp_path, "data_batch_1, .*data_batch_5 missing; there is data_batch_4", name="cifar10", download=False)


# CIFAR's pickles


@pytest.mark.parametrize("protocol", range(6))
def test_a_subset_of_cifar_is_read_in_every_pickle_s_dialect(tmp_path, protocol):
    batches = {name: pickle.loads(data) for name, data in cifar_files(batch=7, seed=1).items()}
    batches["data_batch_2"] = {key.encode(): value for key, value in batches["data_batch_2"].items()}
    batches["data_batch_3"]["labels"] = np.array(batches["data_batch_3"]["labels"])
    batches["data_batch_4"]["labels"] = list(np.array(batches["data_batch_4"]["labels"]))
    batches["data_batch_5"]["filenames"] = [b"a \xff.png"] * 7
    del batches["batches.meta"]
    pickles = {name: pickle.dumps(content, protocol) for name, content in batches.items()}
    old = pickles["data_batch_1"].replace(b"numpy._core", b"numpy.core")  # as numpy 1 wrote it
    write(tmp_path / CIFAR, pickles | ({"data_batch_1": old} if protocol < 4 else {}))
    raw = obtain("cifar10", tmp_path, download=False)
    parts = [{k.decode() if isinstance(k, bytes) else k: v for k, v in b.items()} for b in batches.values()]
    np.testing.assert_array_equal(raw.train_images.reshape(35, 3072), np.concatenate([b["data"] for b in parts[:5]]))
    assert raw.train_labels.tolist() == [int(label) for b in parts[:5] for label in b["labels"]]
    assert (raw.test_labels.tolist(), raw.test_images.shape) == (parts[5]["labels"], (7, 3, 32, 32))


class Calls:
    """Pickles as a call of any function on any arguments."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


GOOD = {"data": np.zeros((2, 3072), np.uint8), "labels": [1, 2]}


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (Calls(os.mkdir, "made"), "it asks for posix.mkdir, which no data set needs"),
        (GOOD | {"labels": Calls(np.load, "made")}, "it asks for numpy"),
        (GOOD | {"data": Calls(np.ndarray, (2, 3072), np.dtype("u1"))}, "not callable"),
        (GOOD | {"data": np.array([[object]])}, "no batch of CIFAR's"),
        (GOOD | {"data": np.zeros((2, 3071), np.uint8)}, r"holds data uint8 \(2, 3071\)"),
        (GOOD | {"labels": [1.0, 2.0]}, "labels float64"),
        (GOOD | {"labels": [[1], [2]]}, r"labels int64 \(2, 1\)"),
        (GOOD | {"labels": [1, -1]}, "the label -1: labels go to 9"),
        ({"data": GOOD["data"]}, "labels object"),
    ],
)
def test_a_pickle_may_hold_arrays_and_nothing_else(tmp_path, monkeypatch, content, says):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / CIFAR, {**BATCHES, "data_batch_2": pickle.dumps(content)})
    refused(tmp_path, f"data_batch_2.*({says})", "delete", name="cifar10")


def test_a_batch_cut_short_is_named_and_numpy_s_own_types_stay(tmp_path):
    for data in (BATCHES["test_batch"][:-9], b"", b"<html>log in</html>"):
        write(tmp_path / CIFAR, {**BATCHES, "test_batch": data})
        refused(tmp_path, "test_batch is no batch of CIFAR's", name="cifar10")
    batch = pickle.dumps(GOOD | {"labels": np.array([1, 2], dtype=">i8")})
    write(tmp_path / CIFAR, {**BATCHES, "test_batch": batch})
    assert obtain("cifar10", tmp_path).test_labels.tolist() == [1, 2]
    assert np.dtype("i8").isnative


# Fetching


def test_download_leaves_the_files_and_their_hashes_and_nothing_else(tmp_path, mirror, monkeypatch, capfd):
    monkeypatch.setenv("COURSE_UNATTENDED", "1")
    root = tmp_path / "new" / "with space"
    write(root / ".MNIST-abc", {"left": b"by a run that was killed"})
    raw = obtain("mnist", root)
    assert (len(raw.train_images), len(raw.test_labels)) == (100, 20)
    assert listing(root).keys() == {"MNIST", RAW, *(f"{RAW}/{name}" for name in (*IDX_NAMES, RECORD))}
    assert {name: (root / RAW / name).read_bytes() for name in IDX_NAMES} == FILES
    lines = {f"{hashlib.sha256(data).hexdigest()}  {name}" for name, data in FILES.items()}
    assert set((root / RAW / RECORD).read_text().splitlines()) == lines
    obtain("mnist", root)
    obtain("mnist", root, download=False)
    assert mirror.fetched == dict.fromkeys(ARCHIVES, 1)
    assert capfd.readouterr() == ("", "")
    monkeypatch.delenv("COURSE_UNATTENDED")
    obtain("cifar10", root)
    assert "100%" in capfd.readouterr().err  # a bar for a person who watches


def test_a_flipped_pixel_is_found_by_the_recorded_hash(tmp_path, mirror):
    obtain("mnist", tmp_path)
    path = tmp_path / RAW / IDX_NAMES[0]
    path.write_bytes(flipped(FILES[IDX_NAMES[0]], 5000))
    refused(tmp_path, f"{path} does not match the hash", RECORD, "delete the file", download=False)
    path.unlink()
    obtain("mnist", tmp_path)  # as the error said
    assert path.read_bytes() == FILES[IDX_NAMES[0]]
    (tmp_path / RAW / RECORD).write_text("garbage\n")
    refused(tmp_path, f"{RECORD} is not a list of SHA-256", "delete the file", download=False)


def test_what_is_fetched_must_fit_what_lies_there(tmp_path, mirror):
    write(tmp_path / RAW, {name: FILES[name] for name in IDX_NAMES[:3]})
    text = refused(tmp_path, "t10k-labels-idx1-ubyte missing; there is t10k-images", download=False)
    assert "train-labels-idx1-ubyte missing" not in text
    obtain("mnist", tmp_path)
    assert (tmp_path / RAW / RECORD).read_text().count("\n") == 1
    write(tmp_path / RAW, idx_files(train=60))
    for name in (IDX_NAMES[1], RECORD):
        (tmp_path / RAW / name).unlink()
    refused(tmp_path, "train-labels-idx1-ubyte as it was fetched holds 100 labels for 60 images")


def test_cifar_from_its_archive_beside_what_is_there(tmp_path, small_cifar, monkeypatch):
    monkeypatch.setattr(tv.CIFAR10, "url", "http://127.0.0.1:9/nobody")
    write(tmp_path, {"cifar-10-python.tar.gz": TAR[:-30]})
    refused(tmp_path, "could not be downloaded", "refused", "copy cifar-10-python.tar.gz, as published", name="cifar10")
    write(tmp_path, {"cifar-10-python.tar.gz": TAR})
    write(tmp_path / CIFAR, {name: BATCHES[name] for name in CIFAR_NAMES[:2]})
    assert len(obtain("cifar10", tmp_path).train_images) == 100
    assert {path.name for path in (tmp_path / CIFAR).iterdir()} == {*CIFAR_NAMES, RECORD}
    path = tmp_path / CIFAR / "data_batch_3"
    path.write_bytes(flipped(path.read_bytes(), 5000))
    refused(tmp_path, f"{path} does not match the hash", name="cifar10")


@pytest.mark.parametrize("name", ["MNIST", "FashionMNIST", "KMNIST", "CIFAR10"])
def test_a_mirror_in_the_classroom(tmp_path, monkeypatch, small_cifar, name):
    paths = {f"{name}/{file}": data for file, data in ARCHIVES.items()}
    with Mirror({"cifar-10-python.tar.gz": TAR} if name == "CIFAR10" else paths) as running:
        monkeypatch.setenv("COURSE_MIRROR", f"{running.url}/")
        if name != "CIFAR10":
            monkeypatch.setattr(getattr(tv, name), "resources", [(f, md5(data)) for f, data in ARCHIVES.items()])
        ours = next(key for key, source in SOURCES.items() if source.dataset == name)
        obtain(ours, tmp_path)
        assert set(running.fetched) == set(running.files)
        assert len(obtain(ours, tmp_path, download=False).test_labels) == 20


@pytest.mark.parametrize("damage", ["cut", "flipped", "absent", "html"])
@pytest.mark.parametrize("name", ["mnist", "cifar10"])
def test_damage_on_the_way(tmp_path, mirror, damage, name):
    path = "t10k-images-idx3-ubyte.gz" if name == "mnist" else "cifar.tar.gz"
    good = mirror.files[path]
    mirror.files[path] = {"flipped": flipped(good, 500), "html": b"<html>log in</html>", "cut": good}.get(damage)
    mirror.cut |= {path} if damage == "cut" else set()
    says = "404" if damage == "absent" else "not found or corrupted"
    refused(tmp_path, says, mirror.url, "try again", "COURSE_MIRROR", re.escape(str(tmp_path)), name=name)
    mirror.files[path] = good
    mirror.cut.clear()
    assert len(obtain(name, tmp_path).test_labels) == 20


def test_no_network_and_a_silent_server(tmp_path, mirror, monkeypatch):
    monkeypatch.setattr(download, "NETWORK_TIMEOUT_S", 0.3)
    mirror.gate.clear()
    refused(tmp_path, "timed out", "try again", "set COURSE_MIRROR")
    monkeypatch.setenv("COURSE_MIRROR", "http://127.0.0.1:9")  # nobody listens there
    refused(tmp_path, "127.0.0.1:9/MNIST/", "refused", "unset COURSE_MIRROR", r"load_dataset\('digits'\)")
    monkeypatch.setenv("COURSE_MIRROR", "not an address")
    refused(tmp_path, "not an address/cifar-10-python.tar.gz", name="cifar10")


# Permission and space


def test_a_folder_that_cannot_be_made(tmp_path, mirror):
    write(tmp_path, {"file": b""})
    refused(tmp_path / "file" / "x", "mnist cannot be read or fetched", "ask who keeps it", "root=", "COURSE_DATA")
    assert not mirror.fetched


@pytest.mark.parametrize("name", ["mnist", "cifar10"])
def test_no_space_while_downloading(tmp_path, mirror, name):
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
        refused(tmp_path, "File too large", "the space that is left", name=name)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    obtain(name, tmp_path)


# Several processes


def test_waiting_for_another_process_has_an_end(tmp_path, mirror, monkeypatch):
    from filelock import FileLock

    monkeypatch.setattr(download, "LOCK_TIMEOUT_S", 0.1)
    with FileLock(tmp_path / ".mnist.lock"):
        refused(tmp_path, r"mnist.lock.*could not be acquired")


def test_two_threads_fetch_once(tmp_path, mirror):
    results = []
    threads = [threading.Thread(target=lambda: results.append(obtain("mnist", tmp_path))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [len(result.test_labels) for result in results] == [20, 20]
    assert mirror.fetched == dict.fromkeys(ARCHIVES, 1)


def test_a_notebook_shows_the_text_alone(tmp_path):
    code = f"from course_lib.lab.download import obtain; obtain('mnist', {str(tmp_path)!r}, download=False)"
    env = os.environ | {"IPYTHONDIR": str(tmp_path / "ipython")}
    shown = subprocess.run(
        [sys.executable, "-m", "IPython", "-c", code], env=env, capture_output=True, text=True
    ).stdout
    assert shown.startswith("DataError: mnist is not complete in ")
    assert "Traceback" not in shown

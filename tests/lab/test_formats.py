import gzip
import os
import pickle

import numpy as np
import pytest
from data_files import cifar_files, flipped, idx_bytes, tar_gz

from course_lib.lab.formats import (
    DamagedFile,
    DataError,
    gunzip,
    parse_cifar_batch,
    parse_cifar_meta,
    parse_idx,
    parse_idx_images,
    parse_idx_labels,
    read_file,
    untar,
)

IMAGES = np.arange(3 * 28 * 28).reshape(3, 28, 28).astype(np.uint8)
GOOD = idx_bytes(IMAGES)
BATCH = {"data": np.arange(2 * 3072).reshape(2, 3072).astype(np.uint8), "labels": [3, 9]}


def test_idx_is_read_as_torchvision_reads_it(tmp_path):
    from torchvision.datasets.mnist import read_image_file, read_label_file

    (tmp_path / "images").write_bytes(GOOD)
    (tmp_path / "labels").write_bytes(idx_bytes(np.array([1, 0, 9])))
    np.testing.assert_array_equal(parse_idx_images(GOOD, "i")[:, 0], read_image_file(str(tmp_path / "images")))
    labels = parse_idx_labels((tmp_path / "labels").read_bytes(), "l")
    np.testing.assert_array_equal(labels, read_label_file(str(tmp_path / "labels")))
    assert labels.dtype == np.int64


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "is empty"),
        (gzip.compress(GOOD), "still compressed"),
        (GOOD[:10], "truncated within its header: 10 bytes instead of 16"),
        (GOOD[:-1], r"truncated: 2367 bytes, while its header \(3x28x28\) promises 2368"),
        (GOOD + b"\0", "too long: 2369 bytes"),
        (flipped(GOOD, 2), "does not start with 00 00 08 03"),  # another type
        (flipped(GOOD, 0), "does not start with"),
        (idx_bytes(IMAGES[0]), "does not start with 00 00 08 03 .* but with 00 00 08 02"),
        (flipped(GOOD, 7), "truncated"),  # another count
        (flipped(GOOD, 4), "truncated"),  # a count of hundreds of millions allocates nothing
        (idx_bytes(IMAGES[:0]), "holds nothing"),
        (idx_bytes(IMAGES.reshape(3, 56, 14)), "images of 56x14 pixels, and this data set has 28x28"),
    ],
)
def test_bad_idx_images_are_refused_by_name(data, says):
    with pytest.raises(DamagedFile, match=says) as caught:
        parse_idx_images(data, "the-file")
    assert str(caught.value).startswith("the-file ")
    assert isinstance(caught.value, DataError)


def test_labels_must_be_classes():
    with pytest.raises(DamagedFile, match="the label 10 at position 2"):
        parse_idx_labels(idx_bytes(np.array([0, 9, 10])), "labels")
    assert parse_idx(idx_bytes(np.array([200])), "x", 1).tolist() == [200]


@pytest.mark.parametrize("protocol", [2, 4, 5])
@pytest.mark.parametrize("as_bytes", [False, True], ids=["str", "bytes"])
def test_cifar_batches_of_every_pickle_protocol(protocol, as_bytes):
    content = {key.encode() if as_bytes else key: value for key, value in BATCH.items()}
    images, labels = parse_cifar_batch(pickle.dumps(content, protocol), "batch")
    np.testing.assert_array_equal(images, BATCH["data"].reshape(2, 3, 32, 32))
    assert images.dtype == np.uint8
    assert labels.tolist() == [3, 9]
    assert labels.dtype == np.int64


def test_cifar_as_python_2_wrote_it():
    pixels = bytes(range(256)) * 12
    state = b"".join(
        [
            b"\x80\x02}(U\x04dataq\x01cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R",
            b"(K\x01K\x01M\x00\x0c\x86cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R",
            b"(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89T\x00\x0c\x00\x00" + pixels + b"tb",
            b"U\x06labels]K\x04au.",
        ]
    )
    images, labels = parse_cifar_batch(state, "batch")
    assert images.tobytes() == pixels
    assert labels.tolist() == [4]


def test_labels_may_be_an_array():
    content = BATCH | {"labels": np.array([1, 2], dtype=np.uint8)}
    assert parse_cifar_batch(pickle.dumps(content), "batch")[1].tolist() == [1, 2]
    content = BATCH | {"labels": list(np.array([1, 2]))}
    assert parse_cifar_batch(pickle.dumps(content), "batch")[1].tolist() == [1, 2]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ({"data": BATCH["data"]}, "lacks the key 'labels'"),
        ({"labels": [1]}, "lacks the key 'data'"),
        (BATCH | {"data": BATCH["data"].astype(np.float32)}, "data of float32"),
        (BATCH | {"data": BATCH["data"][:, :-1]}, r"uint8 \(2, 3071\)"),
        (BATCH | {"data": [1, 2]}, "data of list"),
        ({"data": BATCH["data"][:0], "labels": []}, "holds no images"),
        (BATCH | {"labels": [1]}, "2 images and 1 labels"),
        (BATCH | {"labels": [1, 10]}, "the label 10 at position 1"),
        (BATCH | {"labels": [-1, 1]}, "the label -1 at position 0"),
        (BATCH | {"labels": [0.5, 1]}, "no list of integers"),
        (BATCH | {"labels": [[1], [2, 3]]}, "no list of integers"),
        ([1, 2], "a list instead of a dict"),
    ],
)
def test_bad_cifar_batches_are_refused(content, says):
    with pytest.raises(DamagedFile, match=says):
        parse_cifar_batch(pickle.dumps(content), "batch")


def test_damaged_pickles_are_refused():
    good = pickle.dumps(BATCH, 2)
    for data, says in [
        (b"", "empty"),
        (good[:-100], "not a readable"),
        (good + b"x", "too long"),
        (b"<html>", "not a"),
    ]:
        with pytest.raises(DamagedFile, match=says):
            parse_cifar_batch(data, "batch")


class _Spy:
    def __init__(self, *call):
        self.call = call

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize(
    "attack",
    [
        _Spy(os.mkdir, ("{path}",)),
        _Spy(eval, ("__import__('os').mkdir({path!r})",)),
        _Spy(np.dtype, ("O",)),
        _Spy(np.ndarray, ((2,), "u1", b"ab")),
        np.array([None, "object"], dtype=object),
    ],
    ids=["os", "eval", "object dtype", "raw ndarray", "object array"],
)
def test_a_pickle_cannot_run_code(tmp_path, attack):
    target = str(tmp_path / "made")
    if isinstance(attack, _Spy):
        call, args = attack.call
        attack = _Spy(call, tuple(arg.format(path=target) if isinstance(arg, str) else arg for arg in args))
    with pytest.raises(DamagedFile, match="not a readable CIFAR file"):
        parse_cifar_batch(pickle.dumps({"data": attack, "labels": [1]}), "batch")
    assert not os.path.exists(target)


def test_only_the_harmless_codec_is_allowed():
    data = b"\x80\x02c_codecs\nencode\nX\x01\x00\x00\x00aX\x05\x00\x00\x00utf-7\x86R."
    with pytest.raises(DamagedFile, match="utf-7 is not allowed"):
        parse_cifar_batch(data, "batch")


def test_class_names():
    assert parse_cifar_meta(pickle.dumps({"label_names": ["a", "b"]}), "meta") == ("a", "b")
    assert parse_cifar_meta(pickle.dumps({b"label_names": [b"a", b"b"]}), "meta") == ("a", "b")
    for names, says in [([], "no list"), ("ab", "no list"), ([1], "no text")]:
        with pytest.raises(DamagedFile, match=says):
            parse_cifar_meta(pickle.dumps({"label_names": names}), "meta")


def test_gunzip_verifies_the_whole_archive(tmp_path):
    path = tmp_path / "x.gz"
    packed = gzip.compress(os.urandom(500))
    path.write_bytes(packed)
    assert gunzip(path) == gzip.decompress(packed)
    for damaged in [b"", packed[:-20], flipped(packed, 300), flipped(packed, len(packed) - 6), b"no gzip"]:
        path.write_bytes(damaged)
        with pytest.raises(DamagedFile, match=r"x\.gz is "):
            gunzip(path)


def test_untar_takes_only_what_was_asked_for(tmp_path):
    files = cifar_files(batch=2)
    path = tmp_path / "c.tar.gz"
    path.write_bytes(tar_gz(files | {"../../evil": b"!"}))
    found = untar(path, "cifar-10-batches-py", ["test_batch", "absent"])
    assert found == {"test_batch": files["test_batch"]}
    assert [child.name for child in tmp_path.iterdir()] == ["c.tar.gz"]
    path.write_bytes(gzip.compress(b"this is not a tar archive" * 100))
    with pytest.raises(DamagedFile, match="not a whole tar archive"):
        untar(path, "cifar-10-batches-py", ["test_batch"])


def test_only_regular_files_are_read(tmp_path):
    with pytest.raises(DamagedFile, match="is a folder"):
        read_file(tmp_path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(DamagedFile, match="not a regular file"):
        read_file(tmp_path / "pipe")

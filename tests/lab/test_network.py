import gc
import re
import shutil
import socket
import sys

import pytest
import torchvision.datasets as tv
from data_files import (
    ARCHIVES,
    BATCHES,
    FILES,
    IDX_NAMES,
    TAR,
    Mirror,
    flipped,
    gz,
    idx_files,
    load,
    md5,
    refused,
    tar_gz,
)

from course_lib.lab import network


@pytest.mark.parametrize("name", ["MNIST", "FashionMNIST", "KMNIST", "CIFAR10"])
def test_a_mirror_in_the_classroom(tmp_path, monkeypatch, name):
    paths = {f"{name}/{file}": data for file, data in ARCHIVES.items()}
    with Mirror({"cifar-10-python.tar.gz": TAR} if name == "CIFAR10" else paths) as running:
        monkeypatch.setenv("COURSE_MIRROR", f"{running.url}/")
        if name == "CIFAR10":
            monkeypatch.setattr(tv.CIFAR10, "tgz_md5", md5(TAR))
        else:
            resources = [(file, md5(data)) for file, data in ARCHIVES.items()]
            monkeypatch.setattr(getattr(tv, name), "resources", resources)
        ours = {"MNIST": "mnist", "FashionMNIST": "fashion_mnist", "KMNIST": "kmnist", "CIFAR10": "cifar10"}[name]
        assert load(tmp_path, ours).name == ours
        assert set(running.fetched) == set(running.files)


def test_the_next_mirror_is_tried_and_finished_files_are_not_fetched_twice(tmp_path, mirror, monkeypatch):
    broken = dict(ARCHIVES)
    del broken["t10k-images-idx3-ubyte.gz"]
    with Mirror(broken) as first:
        monkeypatch.setattr(tv.MNIST, "mirrors", [first.url + "/", *tv.MNIST.mirrors])
        load(tmp_path)
    assert "train-images-idx3-ubyte.gz" not in mirror.fetched
    assert mirror.fetched["t10k-images-idx3-ubyte.gz"] == 1


@pytest.mark.parametrize("damage", ["cut", "shorter", "flipped", "absent", "html"])
@pytest.mark.parametrize("name", ["mnist", "cifar10"])
def test_damage_on_the_way(tmp_path, mirror, damage, name):
    path = "t10k-images-idx3-ubyte.gz" if name == "mnist" else "cifar.tar.gz"
    good = mirror.files[path]
    if damage == "cut":
        mirror.cut.add(path)
    elif damage == "absent":
        del mirror.files[path]
    else:
        mirror.files[path] = {"shorter": good[:-50], "flipped": flipped(good, 500), "html": b"<html>log in</html>"}[
            damage
        ]
    says = "404" if damage == "absent" else "arrived damaged or incomplete"
    call = rf"load_dataset\('{name}', download=True\)"
    refused(tmp_path, says, mirror.url, call, "COURSE_MIRROR", re.escape(str(tmp_path)), name=name)
    gc.collect()  # a connection left open would be reported here
    mirror.files[path] = good
    mirror.cut.clear()
    assert load(tmp_path, name).name == name


@pytest.mark.parametrize(
    ("damaged", "says"),
    [
        ({IDX_NAMES[0]: FILES[IDX_NAMES[0]][:-1]}, "train-images-idx3-ubyte from http.* is truncated"),
        ({IDX_NAMES[3]: b"\0" * 99}, "t10k-labels-idx1-ubyte from http.* does not start with 00 00 08 01"),
        ({IDX_NAMES[1]: idx_files(train=90)[IDX_NAMES[1]]}, "90 labels, but .* 100 images"),
    ],
)
def test_a_mirror_with_the_right_checksum_of_a_wrong_file(tmp_path, mirror, monkeypatch, damaged, says):
    mirror.files.update(gz(damaged))
    monkeypatch.setattr(tv.MNIST, "resources", [(f"{name}.gz", md5(mirror.files[f"{name}.gz"])) for name in IDX_NAMES])
    refused(tmp_path, says, "call load_dataset")


def test_an_archive_without_a_batch(tmp_path, mirror, monkeypatch):
    tar = tar_gz({name: data for name, data in BATCHES.items() if name != "data_batch_5"})
    mirror.files["cifar.tar.gz"] = tar
    monkeypatch.setattr(tv.CIFAR10, "tgz_md5", md5(tar))
    refused(tmp_path, "did not send data_batch_5", name="cifar10")


def test_no_network(tmp_path, monkeypatch):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # bound but not listening: connections are refused
        address = f"http://127.0.0.1:{unused.getsockname()[1]}/"
        monkeypatch.setattr(tv.MNIST, "mirrors", [address])
        refused(tmp_path, "could not be downloaded", address, "refused", r"load_dataset\('digits'\)", r"images\S*\.gz")
        monkeypatch.setenv("COURSE_MIRROR", address)
        refused(tmp_path, f"{address}cifar-10-python.tar.gz", "unset COURSE_MIRROR", name="cifar10")
    monkeypatch.setenv("COURSE_MIRROR", "not an address")
    refused(tmp_path, "not an address/MNIST/", "unset COURSE_MIRROR")
    monkeypatch.delenv("COURSE_MIRROR")
    monkeypatch.setattr(tv.MNIST, "mirrors", [])
    refused(tmp_path, "no address")


def test_a_server_that_falls_silent(tmp_path, mirror, monkeypatch):
    monkeypatch.setattr(network, "NETWORK_TIMEOUT_S", 0.3)
    mirror.gate.clear()
    before = socket.getdefaulttimeout()
    refused(tmp_path, r"no answer for 0\.3 s", "call load_dataset")
    assert socket.getdefaulttimeout() == before


def test_bars_are_for_a_person_who_watches(tmp_path, mirror, monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    load(tmp_path)
    assert "100%" in capsys.readouterr().err
    shutil.rmtree(tmp_path / "MNIST")
    monkeypatch.setenv("COURSE_UNATTENDED", "1")
    load(tmp_path)
    assert capsys.readouterr().err == ""

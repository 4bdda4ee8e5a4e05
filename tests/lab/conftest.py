"""A clean environment and a loopback mirror for the tests of the data sets."""

import pytest
from data_files import ARCHIVES, BATCHES, TAR, Mirror, md5


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch):
    for name in ("COURSE_DATA", "COURSE_MIRROR", "CI", "http_proxy", "HTTP_PROXY"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def small_cifar(monkeypatch):
    """torchvision expects the small batches' checksums instead of the published ones."""
    import torchvision.datasets as tv

    pairs = [[name, md5(data)] for name, data in BATCHES.items()]
    monkeypatch.setattr(tv.CIFAR10, "train_list", pairs[:5])
    monkeypatch.setattr(tv.CIFAR10, "test_list", pairs[5:6])
    monkeypatch.setattr(tv.CIFAR10, "meta", {**tv.CIFAR10.meta, "md5": pairs[6][1]})
    monkeypatch.setattr(tv.CIFAR10, "tgz_md5", md5(TAR))


@pytest.fixture
def mirror(monkeypatch, small_cifar):
    """A loopback mirror whose files have the checksums that torchvision expects."""
    import torchvision.datasets as tv

    with Mirror({**ARCHIVES, "cifar.tar.gz": TAR}) as running:
        monkeypatch.setattr(tv.MNIST, "mirrors", [running.url + "/"])
        monkeypatch.setattr(tv.MNIST, "resources", [(name, md5(data)) for name, data in ARCHIVES.items()])
        monkeypatch.setattr(tv.CIFAR10, "url", running.url + "/cifar.tar.gz")
        yield running

"""The data sets that live in files: what they are called, which files they need, how those fit together."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from course_lib.lab.formats import (
    DamagedFile,
    gunzip,
    parse_cifar_batch,
    parse_cifar_meta,
    parse_idx_images,
    parse_idx_labels,
    untar,
)

__all__ = ["SOURCES", "CifarSource", "IdxSource", "RawData", "Source"]


@dataclass(frozen=True, eq=False)
class RawData:
    """A data set as its files hold it: images uint8 [N, C, H, W] in 0..scale, labels int64 [N]."""

    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray
    class_names: tuple[str, ...]
    scale: int = 255


@dataclass(frozen=True)
class Source:
    """A data set in torchvision's standard layout under a root folder.

    Attributes:
        name: what :func:`course_lib.lab.data.load_dataset` calls it.
        torchvision_name: its class in ``torchvision.datasets``.
        class_names: one name a class, in the order of the labels.
        megabytes: disk space that a download needs, archives and extracted files together.
    """

    name: str
    torchvision_name: str
    class_names: tuple[str, ...]
    megabytes: int

    required: ClassVar[tuple[str, ...]] = ()
    optional: ClassVar[tuple[str, ...]] = ()

    @property
    def folder(self) -> str:
        """The folder of the extracted files, relative to the root."""
        raise NotImplementedError

    @property
    def archives(self) -> tuple[str, ...]:
        """The archives that may stand in for extracted files, relative to the root."""
        raise NotImplementedError

    def unpack(self, root: Path, missing: Iterable[str]) -> dict[str, tuple[bytes, str]]:
        """The missing files' bytes out of archives that lie under the root, each with the archive's name."""
        raise NotImplementedError

    def parse(self, name: str, data: bytes, shown: str) -> Any:
        """The content of one file, checked by itself."""
        raise NotImplementedError

    def assemble(self, parts: Mapping[str, Any], shown: Mapping[str, str]) -> RawData:
        """The data set from all its parsed files, checked against each other."""
        raise NotImplementedError

    def attempts(self, dataset: type, missing: Iterable[str], mirror: str | None) -> list[tuple[str, dict]]:
        """For each address to try, the address and the attributes that make the torchvision class use only it."""
        raise NotImplementedError


@dataclass(frozen=True)
class IdxSource(Source):
    """MNIST and its drop-in replacements: four IDX files, 28x28 grey images, ten classes."""

    required: ClassVar[tuple[str, ...]] = (
        "train-images-idx3-ubyte",
        "train-labels-idx1-ubyte",
        "t10k-images-idx3-ubyte",
        "t10k-labels-idx1-ubyte",
    )

    @property
    def folder(self) -> str:
        return f"{self.torchvision_name}/raw"

    @property
    def archives(self) -> tuple[str, ...]:
        return tuple(f"{self.folder}/{name}.gz" for name in self.required)

    def unpack(self, root, missing):
        paths = {name: root / self.folder / f"{name}.gz" for name in missing}
        return {name: (gunzip(path), str(path)) for name, path in paths.items() if path.exists()}

    def parse(self, name, data, shown):
        if "images" in name:
            return parse_idx_images(data, shown)
        return parse_idx_labels(data, shown, len(self.class_names))

    def assemble(self, parts, shown):
        for part in ("train", "t10k"):
            images, labels = f"{part}-images-idx3-ubyte", f"{part}-labels-idx1-ubyte"
            if len(parts[images]) != len(parts[labels]):
                counts = f"holds {len(parts[labels])} labels, but {shown[images]} holds {len(parts[images])} images"
                raise DamagedFile(shown[labels], f"{counts}: one of the two belongs to another set")
        return RawData(*(parts[name] for name in self.required), self.class_names)

    def attempts(self, dataset, missing, mirror):
        mirrors = dataset.mirrors if mirror is None else [f"{mirror}/{self.torchvision_name}/"]
        missing = {f"{name}.gz" for name in missing}
        resources = [(file, md5) for file, md5 in dataset.resources if file.rpartition("/")[2] in missing]
        return [(address, {"mirrors": [address], "resources": resources}) for address in mirrors]


@dataclass(frozen=True)
class CifarSource(Source):
    """CIFAR-10: five training batches and a test batch of 32x32 colour images; the batches may have any size."""

    required: ClassVar[tuple[str, ...]] = (*(f"data_batch_{number}" for number in range(1, 6)), "test_batch")
    optional: ClassVar[tuple[str, ...]] = ("batches.meta",)

    @property
    def folder(self) -> str:
        return "cifar-10-batches-py"

    @property
    def archives(self) -> tuple[str, ...]:
        return ("cifar-10-python.tar.gz",)

    def unpack(self, root, missing):
        path = root / self.archives[0]
        if not path.exists():
            return {}
        files = untar(path, self.folder, self.required + self.optional)
        absent = [name for name in missing if name not in files]
        if absent:
            raise DamagedFile(str(path), f"does not hold {self.folder}/{absent[0]}")
        return {name: (data, str(path)) for name, data in files.items()}

    def parse(self, name, data, shown):
        if name in self.optional:
            return parse_cifar_meta(data, shown)
        return parse_cifar_batch(data, shown, len(self.class_names))

    def assemble(self, parts, shown):
        names = parts.get("batches.meta", self.class_names)
        batches = [parts[name] for name in self.required]
        images, labels = (np.concatenate(arrays) for arrays in zip(*batches[:-1], strict=True))
        most = max(int(labels.max()), int(batches[-1][1].max()))
        if most >= len(names):
            raise DamagedFile(shown["batches.meta"], f"names {len(names)} classes, and the batches have label {most}")
        return RawData(images, labels, *batches[-1], tuple(names))

    def attempts(self, dataset, missing, mirror):
        address = dataset.url if mirror is None else f"{mirror}/{dataset.filename}"
        return [(address, {"url": address})]


_DIGITS = tuple("0123456789")
_FASHION = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")
_KUZUSHIJI = ("o", "ki", "su", "tsu", "na", "ha", "ma", "ya", "re", "wo")
_CIFAR = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")

SOURCES: dict[str, Source] = {
    source.name: source
    for source in (
        IdxSource("mnist", "MNIST", _DIGITS, 65),
        IdxSource("fashion_mnist", "FashionMNIST", _FASHION, 85),
        IdxSource("kmnist", "KMNIST", _KUZUSHIJI, 75),
        CifarSource("cifar10", "CIFAR10", _CIFAR, 360),
    )
}

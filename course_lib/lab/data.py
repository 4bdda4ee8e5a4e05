"""Image data in three parts, normalised and held in memory: train, validation and test.

Every choice is made on validation; test is looked at once. The default data set is inside scikit-learn and needs no
network; the others come through torchvision, whose standard folder layout they keep.
"""

import difflib
import functools
import operator
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from course_lib.lab.download import obtain
from course_lib.lab.formats import DataError
from course_lib.lab.sources import SOURCES, RawData

__all__ = ["DATASETS", "DataError", "DataSplits", "Split", "load_dataset"]

DATASETS = ("digits", *SOURCES)
"""The names that :func:`load_dataset` knows."""


@dataclass(frozen=True, eq=False)
class Split:
    """Images with their labels.

    Attributes:
        images: float32 [N, C, H, W], normalised per channel.
        labels: int64 [N], from 0.

    >>> split = Split(torch.zeros(3, 1, 8, 8), torch.tensor([4, 0, 9]))
    >>> len(split), split.subset([2, 0]).labels.tolist()
    (3, [9, 4])

    Raises:
        TypeError: not tensors of those types.
        ValueError: not of those shapes, or not as many labels as images.
    """

    images: Tensor
    labels: Tensor

    def __post_init__(self):
        for name, dtype in (("images", torch.float32), ("labels", torch.int64)):
            value = getattr(self, name)
            if not isinstance(value, Tensor) or value.dtype != dtype:
                given = value.dtype if isinstance(value, Tensor) else type(value).__name__
                raise TypeError(f"{name} must be a {dtype} tensor, got {given}")
        if self.images.dim() != 4 or self.labels.dim() != 1 or len(self.images) != len(self.labels):
            shapes = f"{tuple(self.images.shape)} and {tuple(self.labels.shape)}"
            raise ValueError(f"a split needs images [N, C, H, W] and labels [N], got {shapes}")

    def __len__(self) -> int:
        return len(self.labels)

    def subset(self, indices) -> "Split":
        """The images at those positions, in that order, as a copy.

        Args:
            indices: positions [M] in -N..N-1 (a list, range, array or int64 tensor), or a bool mask [N].
        """
        if not isinstance(indices, Tensor):
            indices = torch.as_tensor(np.asarray(indices))
        if indices.numel() == 0 and indices.dtype != torch.bool:
            indices = indices.long()  # an empty list has no type of its own
        if indices.dtype.is_floating_point or indices.dtype.is_complex:
            raise TypeError(f"indices must be integers or a bool mask, got {indices.dtype}")
        if indices.dim() != 1:
            raise ValueError(f"indices must have one dimension, got shape {tuple(indices.shape)}")
        if indices.dtype == torch.bool:
            if len(indices) != len(self):
                raise ValueError(f"a mask needs one entry an image, got {len(indices)} for {len(self)} images")
        else:
            indices = indices.long()  # uint8 would be taken for a mask
            if len(indices) and not (-len(self) <= int(indices.min()) and int(indices.max()) < len(self)):
                reach = f"{int(indices.min())}..{int(indices.max())}"
                raise ValueError(f"indices reach over {reach}, and this split has {len(self)} images")
        return Split(self.images[indices], self.labels[indices])


@dataclass(frozen=True, eq=False)
class DataSplits:
    """A data set in three disjoint parts, all normalised by the mean and spread of the training part alone.

    Attributes:
        train, val, test: the parts.
        name: one of :data:`DATASETS`.
        class_names: one name a class, in the order of the labels.
        mean, std: one number a channel, of training pixels in [0, 1]. ``images * std + mean`` gives such pixels back;
            for a channel that never changes ``std`` is 1.
    """

    train: Split
    val: Split
    test: Split
    name: str
    class_names: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """The shape (C, H, W) of one image."""
        return tuple(self.train.images.shape[1:])

    @property
    def num_classes(self) -> int:
        """The number of classes, whether or not each has images here."""
        return len(self.class_names)


def load_dataset(
    name: str = "digits", *, root: str | os.PathLike | None = None, seed: int = 0, download: bool = True
) -> DataSplits:
    """Load a data set as normalised train, validation and test splits.

    ``"digits"`` (Alpaydin & Kaynak 1998, 1,797 images of 8x8) splits into 1,257 / 270 / 270, stratified. The others
    keep their official test set and give a stratified tenth of the official training set to validation (and at least
    as many images as there are classes): ``"mnist"`` (LeCun 1998), ``"fashion_mnist"`` (Xiao 2017), ``"kmnist"``
    (Clanuwat 2018), ``"cifar10"`` (Krizhevsky 2009). A smaller set in the standard layout (raw IDX files, CIFAR
    batches of any size) is taken as it is. Training and validation images come shuffled by the seed.

    Args:
        name: one of :data:`DATASETS`.
        root: folder with torchvision's layout (``MNIST/raw/...``, ``cifar-10-batches-py/...``); by default
            ``$COURSE_DATA``, else a folder in the user's cache. A folder that holds the set is never written to.
        seed: decides which images fall into which part, 0 to 2**32 - 1; the same seed gives the same parts.
        download: fetch what is missing, from ``$COURSE_MIRROR`` if set (``<mirror>/MNIST/<file>.gz``,
            ``<mirror>/FashionMNIST/...``, ``<mirror>/KMNIST/...``, ``<mirror>/cifar-10-python.tar.gz``).

    Raises:
        ValueError, TypeError: unknown name, bad seed or root.
        DataError: files missing, damaged or not readable, no network, space or permission; says what to do.

    >>> data = load_dataset("digits")
    >>> len(data.train), len(data.val), len(data.test), data.input_shape, data.num_classes
    (1257, 270, 270, (1, 8, 8), 10)
    """
    _check_name(name)
    seed = _check_seed(seed)
    if name == "digits":
        raw = _digits()
        rest, test = _stratified(raw.train_labels, np.arange(len(raw.train_labels)), 270, seed)
        train, val = _stratified(raw.train_labels, rest, 270, seed)
        parts = [(raw.train_images, raw.train_labels, index) for index in (train, val, test)]
    else:
        folder = _data_root(root)
        raw = obtain(SOURCES[name], folder, download=download)
        train, val = _tenth(raw.train_labels, seed, name, folder)
        parts = [(raw.train_images, raw.train_labels, index) for index in (train, val)]
        parts.append((raw.test_images, raw.test_labels, slice(None)))
    mean, std = _channel_statistics(raw.train_images[train], raw.scale)
    splits = [_normalised(images[index], labels[index], raw.scale, mean, std) for images, labels, index in parts]
    return DataSplits(*splits, name, raw.class_names, mean, std)


def _check_name(name) -> None:
    if not isinstance(name, str):
        raise TypeError(f"name must be a string, one of {', '.join(DATASETS)}, got {type(name).__name__}")
    if name not in DATASETS:
        close = difflib.get_close_matches(name.lower().replace("-", "_"), DATASETS, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"unknown data set {name!r}: choose one of {', '.join(DATASETS)}{hint}")


def _check_seed(seed) -> int:
    if isinstance(seed, bool | np.bool_):
        raise TypeError(f"seed must be an integer, got {seed!r}")
    try:
        value = operator.index(seed)
    except TypeError:
        raise TypeError(f"seed must be an integer, got {type(seed).__name__} {seed!r}") from None
    if not 0 <= value < 2**32:
        raise ValueError(f"seed must be within 0..2**32 - 1, got {value}")
    return value


def _data_root(root) -> Path:
    if root is None:
        root = os.environ.get("COURSE_DATA")
        if not root:
            from platformdirs import user_cache_path

            return user_cache_path("compression-course", appauthor=False) / "data"
    elif not isinstance(root, str | os.PathLike) or isinstance(os.fspath(root), bytes):
        raise TypeError(f"root must be a path or None, got {type(root).__name__}")
    if not os.fspath(root) or "\0" in os.fspath(root):
        raise ValueError(f"root must name a folder, got {os.fspath(root)!r}")
    try:
        return Path(root).expanduser().absolute()
    except RuntimeError as error:  # a ~ without a home folder behind it
        raise ValueError(f"root {os.fspath(root)!r} cannot be expanded: {error}") from None


@functools.cache
def _digits() -> RawData:
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images, labels = bunch.images.astype(np.uint8)[:, None], bunch.target.astype(np.int64)
    images.flags.writeable = labels.flags.writeable = False  # shared by every call to come
    return RawData(images, labels, images[:0], labels[:0], tuple("0123456789"), scale=16)


def _stratified(labels: np.ndarray, among: np.ndarray, held_out: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Positions of the larger and of the held-out part, each shuffled, with the classes in equal shares."""
    from sklearn.model_selection import train_test_split

    return train_test_split(among, test_size=held_out, stratify=labels[among], random_state=seed)


def _tenth(labels: np.ndarray, seed: int, name: str, folder: Path) -> tuple[np.ndarray, np.ndarray]:
    classes, counts = np.unique(labels, return_counts=True)
    if counts.min() < 2:
        lonely = f"class {classes[counts.argmin()]} has a single training image"
        raise DataError(
            f"{name} in {folder} cannot be split into train and validation: {lonely}, and each class needs at least 2. "
            "Use a subset with more images a class."
        )
    held_out = max(round(len(labels) / 10), len(classes))
    return _stratified(labels, np.arange(len(labels)), held_out, seed)


def _channel_statistics(images: np.ndarray, scale: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel of uint8 images [N, C, H, W] over ``scale``, exact from counts."""
    levels = np.arange(256) / scale
    means, stds = [], []
    for channel in range(images.shape[1]):
        share = np.bincount(images[:, channel].ravel(), minlength=256) / images[:, channel].size
        mean = float(share @ levels)
        std = float(np.sqrt(share @ (levels - mean) ** 2))
        means.append(mean)
        # Rounding leaves a trace of spread in a constant channel; one grey level in all of MNIST is far above it.
        stds.append(std if std > 1e-9 else 1.0)
    return tuple(means), tuple(stds)


def _normalised(images: np.ndarray, labels: np.ndarray, scale: int, mean, std) -> Split:
    tensor = torch.tensor(images, dtype=torch.float32).div_(scale)
    tensor.sub_(torch.tensor(mean).view(-1, 1, 1)).div_(torch.tensor(std).view(-1, 1, 1))
    return Split(tensor, torch.tensor(labels, dtype=torch.int64))

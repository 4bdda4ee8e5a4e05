"""Image data in three parts, normalised and held in memory: train, validation and test.

Every choice is made on validation; test is looked at once. The default data set is inside scikit-learn and needs no
network; the others come through torchvision, whose folder layout they keep. :func:`load_dataset` gives one split,
:func:`load_replicas` one for each replica, so that an interval over replicas covers the luck of the split as well.
"""

import difflib
import functools
import operator
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from course_lib.files import cache_folder
from course_lib.gate import whole_number
from course_lib.lab.download import SOURCES, DataError, RawData, obtain

__all__ = ["DATASETS", "DataError", "DataSplits", "Split", "Splits", "load_dataset", "load_replicas"]

DATASETS = ("digits", *SOURCES)
"""The names that :func:`load_dataset` knows."""

DIGITS_HELD_OUT = 270
QUICK_TRAINING_IMAGES = 4000
"""A replica of a larger data set trains on at most this many images in the quick profile."""


@dataclass(frozen=True, eq=False)
class Split:
    """Images with their labels: float32 [N, C, H, W], normalised per channel, and int64 [N], from 0.

    >>> split = Split(torch.zeros(3, 1, 8, 8), torch.tensor([4, 0, 9]))
    >>> len(split), split.subset([2, 0]).labels.tolist()
    (3, [9, 4])
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
        """The images at those positions [M] (in -N..N-1, or a bool mask [N]), in that order, as a copy."""
        index = _positions(indices, len(self))
        return Split(self.images[index], self.labels[index])


class Splits(Sequence):
    """One :class:`Split` a replica, all of one size: ``index``, int64 [R, N], holds its images' positions in ``pool``.

    >>> pool = Split(torch.zeros(4, 1, 8, 8), torch.tensor([0, 1, 2, 3]))
    >>> splits = Splits(pool, torch.tensor([[0, 1, 2], [3, 2, 1]]))
    >>> len(splits), splits.images_each, splits[1].labels.tolist(), splits.subset([0]).labels.tolist()
    (2, 3, [3, 2, 1], [[0], [3]])
    """

    def __init__(self, pool: Split, index: Tensor):
        if index.dim() != 2 or index.dtype != torch.int64 or not index.numel():
            raise ValueError(f"index must be int64 [replicas, images], got {index.dtype} {tuple(index.shape)}")
        self.pool, self.index = pool, index

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, replica):
        if isinstance(replica, slice):
            return Splits(self.pool, self.index[replica])
        return self.pool.subset(self.index[operator.index(replica)])

    @property
    def images_each(self) -> int:
        """How many images a replica has."""
        return self.index.shape[1]

    @property
    def labels(self) -> Tensor:
        """Labels [R, N] of all replicas' images."""
        return self.pool.labels[self.index]

    def subset(self, indices) -> "Splits":
        """Those of *each* replica's split: ``range(100)`` is its first hundred, or all where it has fewer."""
        return Splits(self.pool, self.index[:, _positions(indices, self.images_each)])


@dataclass(frozen=True, eq=False)
class DataSplits:
    """A data set in three disjoint parts.

    From :func:`load_dataset` each part is a :class:`Split`; from :func:`load_replicas` ``train`` and ``test`` are
    :class:`Splits` (``test`` a ``Split`` where the data set has a fixed one). ``mean`` and ``std``, a number a channel,
    are of pixels in [0, 1], of the training part, or, where each replica has its own, of the validation part:
    ``images * std + mean`` gives such pixels back; for a channel that never changes ``std`` is 1.
    """

    train: Split | Splits
    val: Split
    test: Split | Splits
    name: str
    class_names: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """The shape (C, H, W) of one image."""
        return tuple(self.val.images.shape[1:])

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

    DataError: files missing, damaged or not readable, no network, space or permission; it says what to do.

    >>> data = load_dataset("digits")
    >>> len(data.train), len(data.val), len(data.test), data.input_shape, data.num_classes
    (1257, 270, 270, (1, 8, 8), 10)
    """
    seed = whole_number(seed, "seed", 0, 2**32 - 1)
    raw = _raw(name, root, download)
    images, labels, fixed = raw.train_images, raw.train_labels, len(raw.test_labels) > 0
    rest = np.arange(len(labels))
    if not fixed:
        rest, test = _stratified(labels, rest, DIGITS_HELD_OUT, seed)
    train, val = _stratified(labels, rest, _validation_size(raw), seed)
    mean, std = _channel_statistics(images[train], raw.scale)
    last = (raw.test_images, raw.test_labels) if fixed else (images[test], labels[test])
    pairs = [(images[train], labels[train]), (images[val], labels[val]), last]
    parts = [_split(*pair, raw.scale, mean, std) for pair in pairs]
    return DataSplits(*parts, name, raw.class_names, mean, std)


def load_replicas(
    name: str = "digits", replicas: int = 24, *, seed: int = 0, root: str | os.PathLike | None = None,
    download: bool = True, most: int | None = QUICK_TRAINING_IMAGES,
) -> DataSplits:  # fmt: skip
    """A data set in which every replica draws its own split, so that ± over replicas covers that luck too.

    The validation images are one set for all: never trained on, never tested by any replica, so that a choice made on
    it looks at nobody's test images. Of the digits each replica draws its own 1,257 training and 270 test images from
    the rest. Where a data set has a fixed test set, each draws four fifths of the other training images (at most
    ``most``); all are tested on that set. ``seed`` decides all draws.

    >>> data = load_replicas(replicas=3)
    >>> len(data.train), data.train.images_each, data.test.images_each, len(data.val)
    (3, 1257, 270, 270)
    """
    seed, replicas = whole_number(seed, "seed", 0, 2**32 - 1), whole_number(replicas, "replicas")
    raw = _raw(name, root, download)
    # One validation set for every seed, too: what is common to all replicas cannot be covered by their interval.
    rest, val = _stratified(raw.train_labels, np.arange(len(raw.train_labels)), _validation_size(raw), 0)
    mean, std = _channel_statistics(raw.train_images[val], raw.scale)
    pool = _split(raw.train_images, raw.train_labels, raw.scale, mean, std)
    fixed = len(raw.test_labels) > 0
    out = len(rest) - min(len(rest) * 4 // 5, most or len(rest)) if fixed else DIGITS_HELD_OUT
    # A replica's draw depends on (seed, replica) alone, so that more replicas repeat the first ones.
    draws = [_stratified(raw.train_labels, rest, out, np.random.default_rng([seed, r])) for r in range(replicas)]
    train, test = (Splits(pool, torch.as_tensor(np.stack(index))) for index in zip(*draws, strict=True))
    if fixed:
        test = _split(raw.test_images, raw.test_labels, raw.scale, mean, std)
    return DataSplits(train, pool.subset(torch.as_tensor(val)), test, name, raw.class_names, mean, std)


def _positions(indices, count: int) -> Tensor:
    """Positions [M] that ``indices`` choose, as numpy does; a range ends with the images, as a slice does."""
    if isinstance(indices, range):
        indices = [i for i in indices if i < count]
    chosen = np.asarray(indices)
    return torch.from_numpy(np.arange(count)[chosen if chosen.size else []])


def _raw(name: str, root, download: bool) -> RawData:
    if name not in DATASETS:
        close = difflib.get_close_matches(str(name).lower().replace("-", "_"), DATASETS, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"unknown data set {name!r}: choose one of {', '.join(DATASETS)}{hint}")
    return _digits() if name == "digits" else obtain(name, _data_root(root), download=download)


def _data_root(root) -> Path:
    root = root or os.environ.get("COURSE_DATA") or cache_folder("data")
    try:
        return Path(root).expanduser().absolute()
    except (RuntimeError, TypeError) as error:  # a ~ without a home folder behind it
        raise ValueError(f"root must be the path of a folder or None, got {root!r} ({error})") from None


@functools.cache
def _digits() -> RawData:
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images, labels = bunch.images.astype(np.uint8)[:, None], bunch.target.astype(np.int64)
    return RawData(images, labels, images[:0], labels[:0], tuple("0123456789"), scale=16)


def _validation_size(raw: RawData) -> int:
    if not len(raw.test_labels):
        return DIGITS_HELD_OUT
    return max(round(len(raw.train_labels) / 10), len(np.unique(raw.train_labels)))


def _stratified(labels: np.ndarray, among: np.ndarray, held_out: int, seed) -> tuple[np.ndarray, np.ndarray]:
    """Positions of the larger and of the held-out part, each shuffled, with the classes in equal shares."""
    from sklearn.model_selection import train_test_split

    state = seed if isinstance(seed, int) else np.random.RandomState(seed.bit_generator)
    try:
        return train_test_split(among, test_size=held_out, stratify=labels[among], random_state=state)
    except ValueError as error:
        what = f"{len(among)} images cannot be split so that every class is in both parts"
        raise DataError(f"{what}: {error} Use a subset with more images a class.") from None


def _channel_statistics(images: np.ndarray, scale: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel of uint8 images [N, C, H, W] over ``scale``, exact from counts."""
    levels = np.arange(256) / scale
    found = []
    for pixels in images.swapaxes(0, 1):
        share = np.bincount(pixels.ravel(), minlength=256) / pixels.size
        mean = float(share @ levels)
        std = float(np.sqrt(share @ (levels - mean) ** 2))
        # Rounding leaves a trace of spread in a constant channel; one grey level in all of MNIST is far above it.
        found.append((mean, std if std > 1e-9 else 1.0))
    return tuple(zip(*found, strict=True))


def _split(images: np.ndarray, labels: np.ndarray, scale: int, mean, std) -> Split:
    tensor = torch.tensor(images, dtype=torch.float32).div_(scale)
    tensor.sub_(torch.tensor(mean).view(-1, 1, 1)).div_(torch.tensor(std).view(-1, 1, 1))
    return Split(tensor, torch.tensor(labels, dtype=torch.int64))

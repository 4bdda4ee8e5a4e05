import numpy as np
import pytest
import torch
from data_files import IDX_NAMES, cifar_files, idx_arrays, idx_bytes, idx_files, write

from course_lib.lab.data import DataError, Split, Splits, load_dataset, load_replicas


@pytest.fixture
def mnist(tmp_path):
    write(tmp_path / "MNIST/raw", idx_files(train=200, test=30))
    return tmp_path


def pixels(splits, part):
    """The original pixels of a part, in [0, 1]."""
    shape = (1, -1, 1, 1)
    return part.images * torch.tensor(splits.std).view(shape) + torch.tensor(splits.mean).view(shape)


def rows(part, splits, scale=255):
    return [tuple(row) for row in pixels(splits, part).mul(scale).round().long().flatten(1).tolist()]


def test_digits_are_the_embedded_ones():
    from sklearn.datasets import load_digits

    load_dataset().train.images.zero_()  # nothing is shared between calls
    data = load_dataset()
    parts = (data.train, data.val, data.test)
    assert [len(part) for part in parts] == [1257, 270, 270]
    assert (data.name, data.input_shape, data.num_classes) == ("digits", (1, 8, 8), 10)
    assert data.class_names == tuple("0123456789")
    for part in parts:
        assert (part.images.dtype, part.labels.dtype) == (torch.float32, torch.int64)
        shares = torch.bincount(part.labels, minlength=10) / len(part)
        torch.testing.assert_close(shares, torch.full((10,), 0.1), atol=0.006, rtol=0)
    bunch = load_digits()
    expected = sorted((*map(int, row), int(label)) for row, label in zip(bunch.data, bunch.target, strict=True))
    found = [pair for part in parts for pair in zip(rows(part, data, 16), part.labels.tolist(), strict=True)]
    assert sorted((*row, label) for row, label in found) == expected


def test_a_seed_decides_the_split():
    one, same, other = load_dataset(seed=3), load_dataset(seed=np.int64(3)), load_dataset(seed=4)
    for part in ("train", "val", "test"):
        assert torch.equal(getattr(one, part).images, getattr(same, part).images)
        assert not torch.equal(getattr(one, part).images, getattr(other, part).images)


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        ({"name": "Fashion-MNIST"}, ValueError, "unknown data set 'Fashion-MNIST': .*did you mean 'fashion_mn"),
        ({"name": 3}, ValueError, "unknown data set 3: choose one of .*cifar10$"),
        ({"seed": -1}, ValueError, "seed must be"),
        ({"seed": 1.0}, TypeError, "seed must be"),
        ({"name": "mnist", "root": 3}, ValueError, "root must be the path"),
        ({"name": "mnist", "root": "~no-such-person-here/data"}, ValueError, "root must be the path"),
    ],
)
def test_bad_arguments_are_named(arguments, error, says):
    with pytest.raises(error, match=says):
        load_dataset(**arguments)


def test_normalisation_is_fitted_on_train_only(tmp_path):
    arrays = idx_arrays(train=200, test=50)
    write(tmp_path / "MNIST/raw", {name: idx_bytes(array) for name, array in arrays.items()})
    data = load_dataset("mnist", root=tmp_path)
    torch.testing.assert_close(data.train.images.mean(), torch.tensor(0.0), atol=1e-5, rtol=0)
    torch.testing.assert_close(data.train.images.std(unbiased=False), torch.tensor(1.0), atol=1e-5, rtol=0)

    # Change every image that is not in train: mean and std must stay as they are, to the last bit.
    chosen = set(rows(data.train, data))
    train = arrays["train-images-idx3-ubyte"]
    outside = [row for row, image in enumerate(train) if tuple(image.ravel().tolist()) not in chosen]
    assert len(outside) == len(data.val) == 20
    train[outside] = 255
    arrays["t10k-images-idx3-ubyte"][:] = 0
    write(tmp_path / "MNIST/raw", {name: idx_bytes(array) for name, array in arrays.items()})
    changed = load_dataset("mnist", root=tmp_path)
    assert (changed.mean, changed.std) == (data.mean, data.std)
    assert torch.equal(changed.train.images, data.train.images)
    assert not torch.equal(changed.val.images, data.val.images)


def test_official_test_set_stays_test_and_a_tenth_of_train_is_validation(mnist):
    data = load_dataset("mnist", root=mnist)
    assert [len(part) for part in (data.train, data.val, data.test)] == [180, 20, 30]
    assert data.input_shape == (1, 28, 28)
    assert torch.bincount(data.val.labels).tolist() == [2] * 10
    images, labels, test_images, test_labels = idx_arrays(train=200, test=30).values()
    np.testing.assert_array_equal(np.array(rows(data.test, data)), test_images.reshape(30, -1))
    assert data.test.labels.tolist() == test_labels.tolist()
    source = dict(zip(map(tuple, images.reshape(200, -1).tolist()), labels.tolist(), strict=True))
    train, val = rows(data.train, data), rows(data.val, data)
    assert set(train).isdisjoint(val)
    assert set(train) | set(val) == set(source)
    assert [source[row] for row in train + val] == [*data.train.labels.tolist(), *data.val.labels.tolist()]


def test_channels_are_normalised_one_by_one(tmp_path):
    write(tmp_path / "cifar-10-batches-py", cifar_files(batch=20))
    data = load_dataset("cifar10", root=tmp_path)
    assert [len(part) for part in (data.train, data.val, data.test)] == [90, 10, 20]
    assert data.input_shape == (3, 32, 32)
    assert data.class_names[6] == "frog"
    scaled = pixels(data, data.train)
    torch.testing.assert_close(torch.tensor(data.mean), scaled.mean(dim=(0, 2, 3)))
    torch.testing.assert_close(torch.tensor(data.std), scaled.std(dim=(0, 2, 3), unbiased=False))
    torch.testing.assert_close(data.train.images.mean(dim=(0, 2, 3)), torch.zeros(3), atol=1e-5, rtol=0)


def test_a_channel_that_never_changes_is_only_shifted(tmp_path):
    arrays = idx_arrays(train=40, test=10)
    arrays["train-images-idx3-ubyte"][:] = 77
    write(tmp_path / "KMNIST/raw", {name: idx_bytes(array) for name, array in arrays.items()})
    data = load_dataset("kmnist", root=tmp_path)
    assert data.std == (1.0,)
    assert data.train.images.abs().max() < 1e-6
    assert data.test.images.isfinite().all()
    np.testing.assert_array_equal(np.array(rows(data.test, data)), arrays["t10k-images-idx3-ubyte"].reshape(10, -1))


def test_few_images_a_class(tmp_path):
    arrays = idx_arrays(train=20, test=1)  # two of each: a tenth would leave classes out
    labels = arrays["train-labels-idx1-ubyte"]
    folder = write(tmp_path / "MNIST/raw", {name: idx_bytes(array) for name, array in arrays.items()})
    data = load_dataset("mnist", root=tmp_path)
    assert sorted(data.val.labels.tolist()) == sorted(data.train.labels.tolist()) == list(range(10))
    with pytest.raises(DataError, match="10 images cannot be split"):  # nothing is left for replicas to choose from
        load_replicas("mnist", 2, root=tmp_path)
    labels[:] = np.arange(20) % 3  # seven classes have none at all
    write(folder, {IDX_NAMES[1]: idx_bytes(labels)})
    assert load_dataset("mnist", root=tmp_path).num_classes == 10
    labels[0] = 8
    write(folder, {IDX_NAMES[1]: idx_bytes(labels)})
    with pytest.raises(DataError, match=r"20 images cannot be split .*Use a subset with more images a class"):
        load_dataset("mnist", root=tmp_path)


def test_where_the_root_comes_from(mnist, tmp_path_factory, monkeypatch):
    elsewhere = tmp_path_factory.mktemp("with space")
    monkeypatch.setenv("COURSE_DATA", str(mnist))
    assert load_dataset("mnist", download=False).name == "mnist"
    with pytest.raises(DataError, match="with space"):  # an explicit root wins
        load_dataset("mnist", root=elsewhere, download=False)
    write(elsewhere / "MNIST/raw", idx_files(train=40, test=10))
    monkeypatch.setenv("HOME", str(elsewhere.parent))
    monkeypatch.setenv("USERPROFILE", str(elsewhere.parent))
    monkeypatch.setenv("COURSE_DATA", f"~/{elsewhere.name}")
    assert len(load_dataset("mnist", download=False).test) == 10
    monkeypatch.chdir(elsewhere.parent)
    assert len(load_dataset("mnist", root=elsewhere.name, download=False).test) == 10
    monkeypatch.setenv("COURSE_DATA", "")
    monkeypatch.setenv("COURSE_CACHE", str(elsewhere / "cache"))
    with pytest.raises(DataError, match=r"with space.*cache.data"):
        load_dataset("mnist", download=False)


def test_subset():
    split = Split(torch.arange(4.0).view(4, 1, 1, 1), torch.tensor([5, 6, 7, 8]))
    for indices in ([3, 0], range(3, -1, -3), np.array([3, 0], dtype=np.uint8), torch.tensor([-1, 0]), (3, 0)):
        chosen = split.subset(indices)
        assert chosen.labels.tolist() == [8, 5]
        assert chosen.images.flatten().tolist() == [3.0, 0.0]
    assert split.subset([True, False, False, True]).labels.tolist() == [5, 8]
    assert len(split.subset([])) == 0
    split.subset([0, 1, 2, 3]).images.zero_()
    assert split.images.sum() == 6


@pytest.mark.parametrize(
    ("indices", "error", "says"),
    [
        ([4], IndexError, "index 4 is out of bounds .* size 4"),
        ([-5], IndexError, "-5"),
        ([0.0], IndexError, "integer"),
        ([[0]], ValueError, r"images \[N, C, H, W\]"),
        ([True], IndexError, "size of corresponding boolean axis is 1"),
    ],
)
def test_bad_subsets(indices, error, says):
    split = Split(torch.zeros(4, 1, 1, 1), torch.zeros(4, dtype=torch.int64))
    with pytest.raises(error, match=says):
        split.subset(indices)


def test_a_split_checks_what_it_holds():
    images, labels = torch.zeros(2, 1, 4, 4), torch.zeros(2, dtype=torch.int64)
    with pytest.raises(TypeError, match=r"images must be a torch\.float32 tensor, got torch\.uint8"):
        Split(images.byte(), labels)
    with pytest.raises(TypeError, match=r"labels must be a torch\.int64 tensor, got list"):
        Split(images, [0, 1])
    with pytest.raises(ValueError, match=r"got \(2, 1, 4, 4\) and \(1,\)"):
        Split(images, labels[:1])
    with pytest.raises(ValueError, match=r"images .N, C, H, W."):
        Split(images[0], labels)


def test_every_replica_draws_its_own_split_of_the_digits():
    data = load_replicas(replicas=4, seed=7)
    assert (len(data.train), data.train.images_each, data.test.images_each, len(data.val)) == (4, 1257, 270, 270)
    everything = sorted(rows(data.train.pool, data, 16))
    for train, test in zip(data.train, data.test, strict=True):
        assert sorted(rows(train, data, 16) + rows(test, data, 16) + rows(data.val, data, 16)) == everything
        assert torch.bincount(test.labels).min() >= 26
    assert not torch.equal(data.train.index[0], data.train.index[1])
    assert set(data.test.index[0].tolist()) != set(data.test.index[1].tolist())
    # More replicas repeat the first; another seed draws others, from the same images without the validation set.
    assert torch.equal(load_replicas(replicas=2, seed=7).train.index, data.train.index[:2])
    other = load_replicas(replicas=4, seed=8)
    assert not torch.equal(other.train.index, data.train.index)
    assert torch.equal(other.val.images, data.val.images)
    # The scale of the pixels is that of the validation images, which no replica trains on or is tested on.
    torch.testing.assert_close(data.val.images.mean(), torch.tensor(0.0), atol=1e-5, rtol=0)
    torch.testing.assert_close(data.val.images.std(unbiased=False), torch.tensor(1.0), atol=1e-5, rtol=0)


def test_with_a_fixed_test_set_each_replica_draws_training_images(mnist):
    data = load_replicas("mnist", 3, root=mnist)
    assert (data.train.images_each, len(data.val), len(data.test)) == (144, 20, 30)  # four fifths of 180
    val = set(rows(data.val, data))
    for train in data.train:
        assert len(set(rows(train, data))) == 144
        assert val.isdisjoint(rows(train, data))
    assert load_replicas("mnist", 1, root=mnist, most=50).train.images_each == 50
    assert load_replicas("mnist", 1, root=mnist, most=None).train.images_each == 144
    with pytest.raises(ValueError, match="replicas must be an integer of at least 1, got 0"):
        load_replicas(replicas=0)


def test_splits_are_a_sequence():
    pool = Split(torch.arange(6.0).view(6, 1, 1, 1), torch.arange(6))
    splits = Splits(pool, torch.tensor([[5, 0, 2], [1, 3, 4]]))
    assert [s.labels.tolist() for s in splits] == splits.labels.tolist() == [[5, 0, 2], [1, 3, 4]]
    assert (len(splits[:1]), splits[-1].images.flatten().tolist()) == (1, [1.0, 3.0, 4.0])
    assert splits.subset([True, False, True]).labels.tolist() == [[5, 2], [1, 4]]
    assert splits.subset(range(1, 99)).labels.tolist() == [[0, 2], [3, 4]]  # lessons ask small sets for more, too
    with pytest.raises(IndexError, match="out of bounds"):
        splits.subset([3])
    with pytest.raises(ValueError, match=r"int64 \[replicas, images\]"):
        Splits(pool, torch.tensor([0]))

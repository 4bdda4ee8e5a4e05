import pickle

import torchvision.datasets as tv
from data_files import BATCHES, CIFAR, load, refused, write

from course_lib.lab.data import DATASETS
from course_lib.lab.sources import SOURCES


def test_class_names_come_from_the_meta_file_where_there_is_one(tmp_path):
    write(tmp_path / CIFAR, BATCHES)
    (tmp_path / CIFAR / "batches.meta").unlink()
    assert load(tmp_path, "cifar10", download=False).class_names[0] == "airplane"
    names = [f"kind {number}" for number in range(10)]
    write(tmp_path / CIFAR, {"batches.meta": pickle.dumps({"label_names": names})})
    assert load(tmp_path, "cifar10").class_names == tuple(names)
    write(tmp_path / CIFAR, {"batches.meta": pickle.dumps({"label_names": names[:4]})})
    refused(tmp_path, "names 4 classes, and the batches have label 9", name="cifar10")


def test_names_agree_with_torchvision():
    assert DATASETS == ("digits", "mnist", "fashion_mnist", "kmnist", "cifar10")
    for source in SOURCES.values():
        dataset = getattr(tv, source.torchvision_name)
        published = getattr(dataset, "classes", source.class_names)
        assert [name.split(" - ")[0] for name in published] == list(source.class_names)
        if source.name != "cifar10":
            assert [file for file, _ in dataset.resources] == [f"{name}.gz" for name in source.required]
        else:
            files = [file for file, _ in dataset.train_list + dataset.test_list]
            assert (files, dataset.base_folder) == (list(source.required), source.folder)
            assert source.archives == (dataset.filename,)

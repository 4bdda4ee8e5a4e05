"""The demo: one HTML file, without a network connection, on which a drawn digit meets several networks of the course.

Each is an :class:`~course_lib.methods.integer.IntegerNetwork`, written as C, compiled to a WebAssembly module, gzipped
and put into the page as base64; the page holds ten test images with Python's scores and compares its own with them.
"""

import base64
import gzip
import json
import sys
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from course_lib.files import write_file
from course_lib.lab.compile import CompilerError
from course_lib.lab.compression import Recipe, prune_gradually
from course_lib.lab.data import DataSplits, load_dataset
from course_lib.lab.replicas import train
from course_lib.lab.training import TrainConfig
from course_lib.lab.wasm import compile_wasm
from course_lib.methods.c_source import c_source, pixel_table, raw_pixels
from course_lib.methods.distillation import kd_loss, teacher_table
from course_lib.methods.integer import IntegerNetwork, integer_network

__all__ = ["Entry", "demo_networks", "demo_page", "make_demo"]

TEMPLATE = Path(__file__).with_name("demo_template.html")
MARK = "/*DATA*/null"
LEVELS = 17  # a pixel of the digits counts the dots of a block of 4 × 4


@dataclass(frozen=True, eq=False)
class Entry:
    """A network of the demo: its name, how it came to be in a few words, and itself in integers."""

    name: str
    how: str
    network: IntegerNetwork


def teacher_network() -> nn.Sequential:
    """A convolutional teacher, half as wide as the course's, so that the page stays small."""
    layers = OrderedDict()
    for i, (inside, outside) in enumerate([(1, 16), (16, 32), (32, 32)], start=1):
        layers[f"conv{i}"] = nn.Conv2d(inside, outside, 3, padding=1, bias=False)
        layers |= {f"bn{i}": nn.BatchNorm2d(outside), f"relu{i}": nn.ReLU()}
        layers |= {f"pool{i}": nn.MaxPool2d(2)} if i > 1 else {}
    layers |= {"flatten": nn.Flatten(), "fc1": nn.Linear(128, 64), "relu4": nn.ReLU(), "logits": nn.Linear(64, 10)}
    return nn.Sequential(layers)


def demo_networks(data: DataSplits, *, seed: int = 0, effort: float = 1.0) -> list[Entry]:
    """Train and quantize the networks of the page, the teacher first; ``effort`` scales every number of epochs."""

    def epochs(count: int) -> int:
        return max(1, round(effort * count))

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        teacher = train(teacher_network(), data, seed, epochs=epochs(12), lr=5e-3)
    lenet = train("lenet300", data, seed, epochs=epochs(15))
    cut, settle = (TrainConfig(epochs=epochs(15), batch_size=32, schedule=way) for way in ("constant", "cosine"))
    (pruned,) = prune_gradually([lenet], data.train, [seed], Recipe(prune=cut, settle=settle))
    table = teacher_table(teacher, data.train)

    def follow(logits: Tensor, labels: Tensor, index: Tensor) -> Tensor:
        return kd_loss(logits, table[index], labels, temperature=2.0, alpha=0.5)

    small = train("cnn_student", data, seed, epochs=epochs(30), lr=1e-2, loss_fn=follow)
    plain = train("mlp32", data, seed, epochs=epochs(30), lr=1e-2)
    least = train("mlp8", data, seed, epochs=epochs(30), lr=1e-2, loss_fn=follow)
    made = {
        "Teacher": ("CNN of 16, 32, 32 channels", teacher),
        "LeNet-300-100": ("two hidden layers", lenet),
        "LeNet, pruned": ("92 % of its weights are zero", pruned),
        "Small CNN": ("8 and 16 channels, distilled", small),
        "MLP 32": ("one hidden layer", plain),
        "MLP 8": ("eight hidden units, distilled", least),
    }
    return [Entry(name, how, integer_network(model, data.train.images)) for name, (how, model) in made.items()]


def demo_page(entries: list[Entry], data: DataSplits) -> bytes:
    """The page for networks of the digits. CompilerError: no compiler for wasm, see :func:`compile_wasm`."""
    labels = data.test.labels
    chosen = torch.stack([(labels == digit).nonzero()[0, 0] for digit in range(10)])
    levels = raw_pixels(data.test.images, data.mean, data.std, LEVELS).flatten(1)
    ink = raw_pixels(data.train.images, data.mean, data.std, LEVELS).double().mean() * 64
    networks = []
    for entry in entries:
        table = pixel_table(entry.network.x_q, data.mean, data.std, LEVELS)
        module = compile_wasm(c_source(entry.network, data.input_shape, table))
        scores = entry.network.scores(data.test.images).numpy()
        about = {"name": entry.name, "how": entry.how, "zero": int(entry.network.y_q.zero_point)}
        about |= {"scale": entry.network.y_q.scale.item(), "expected": scores[chosen].tolist()}
        about |= {"accuracy": 100 * float((scores.argmax(axis=1) == labels.numpy()).mean())}
        networks.append(about | {"wasm": base64.b64encode(gzip.compress(module, 9, mtime=0)).decode()})
    examples = [{"label": int(labels[i]), "pixels": levels[i].tolist()} for i in chosen]
    content = {"networks": networks, "examples": examples, "ink": round(ink.item()), "tests": len(labels)}
    page = TEMPLATE.read_text(encoding="utf-8")
    return page.replace(MARK, json.dumps(content, separators=(",", ":")), 1).encode()


def make_demo(path: str | Path = "docs/demo.html") -> Path:
    """Train, compile and write the page; whole or not at all."""
    data = load_dataset("digits")
    return write_file(path, demo_page(demo_networks(data), data))


if __name__ == "__main__":
    try:
        print(f"written: {make_demo(*sys.argv[1:2])}")
    except (CompilerError, OSError) as error:
        sys.exit(f"error: {error}")

"""The course's families of compression as work for a study: one trial is one method, one level, one seed.

A :class:`Family` says how a network of that family is made; everything else (training once, writing the file, reading
it back, scoring, counting) is the same for all and stands in :func:`measure_trial`. A new family is a new entry of
:data:`FAMILIES`, nothing more.
"""

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType

import torch
from torch import Tensor, nn

from course_lib.evidence.measure import count_macs, count_parameters
from course_lib.lab.deep_compression import Lesson, Recipe, prune_gradually, share_values, store, train_copies
from course_lib.lab.study_grid import Trial
from course_lib.lab.training import TrainConfig, evaluate
from course_lib.lab.workbench import BLENDS, Workbench, narrow_lenet
from course_lib.methods.pruning import prune_, remove_neurons
from course_lib.methods.qat import FakeQuantConv2d, FakeQuantLinear, fake_quantized

__all__ = ["FAMILIES", "Family", "bench_of", "measure_trial", "network_of", "working_memory"]


@dataclass(frozen=True)
class Family:
    """How networks of one family are made.

    Attributes:
        title: for a reader.
        section: where the article treats it, or "" where it does not.
        combination: whether it joins two methods or more.
        blank: ``blank(bench, level)`` -> an untrained network of the architecture that results.
        make: ``make(bench, level)`` -> the trained, compressed network; ``None`` where the bench keeps it already.
    """

    title: str
    section: str
    combination: bool
    blank: Callable[[Workbench, object], nn.Module]
    make: Callable[[Workbench, object], nn.Module]


def bench_of(trial: Trial) -> Workbench:
    """The bench that a trial's options ask for: ``dataset``, ``split_seed``, ``profile``, ``width``."""
    return Workbench(seed=trial.seed, **dict(trial.options))


def network_of(trial: Trial) -> nn.Module:
    """The trial's network, trained once and kept; its weights are what its file will hold.

    Raises:
        ValueError: an unknown method; the text lists those that there are.
    """
    if trial.method not in FAMILIES:
        raise ValueError(f"unknown method {trial.method!r} (there are: {', '.join(FAMILIES)})")
    family, bench = FAMILIES[trial.method], bench_of(trial)
    return bench.keep(
        "cell",
        lambda: family.blank(bench, trial.level),
        lambda _: family.make(bench, trial.level),
        method=trial.method,
        level=trial.level,
    )


def measure_trial(trial: Trial) -> dict[str, float | int]:
    """Make the trial's network, write it to its shortest file, read that back, and measure what came back.

    Returns:
        ``accuracy`` on test and ``val_accuracy`` in [0, 1]; ``bytes`` of the file; ``macs`` of one image; ``memory``,
        the bytes of RAM at batch 1 (:func:`working_memory`); ``parameters``, and those that are not zero.
    """
    network, data = network_of(trial), bench_of(trial).data
    with tempfile.TemporaryDirectory() as folder:
        stage = store([network], folder, "cell", form="dense" if trial.method in PLAIN_FILES else "huffman")
    (again,), (size,) = stage.networks, stage.sizes
    return {
        "accuracy": evaluate(again, data.test).accuracy,
        "val_accuracy": evaluate(again, data.val).accuracy,
        "bytes": size,
        "macs": count_macs(again, data.input_shape),
        "memory": working_memory(again, data.input_shape),
        "parameters": count_parameters(again),
        "nonzero": count_parameters(again, nonzero=True),
    }


@torch.no_grad()
def working_memory(network: nn.Module, input_shape: tuple[int, ...]) -> int:
    """Bytes of RAM to answer one image: all weights as the arithmetic needs them, and one layer's input and output.

    A network whose layers all compute with 8-bit inputs needs one byte a weight and an activation, whatever the file
    took, and four a bias; any other four for each. Zeros and shared values have to be unpacked first and save nothing.

    >>> working_memory(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), (1, 8, 8))
    2896
    """
    layers = [m for m in network.modules() if isinstance(m, (nn.Linear, nn.Conv2d, nn.MaxPool2d))]
    quantized = [isinstance(m, (FakeQuantLinear, FakeQuantConv2d)) for m in layers if not isinstance(m, nn.MaxPool2d)]
    width = 1 if quantized and all(quantized) else 4
    sizes: list[int] = []

    def note(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        sizes.append(inputs[0].numel() + output.numel())

    hooks = [layer.register_forward_hook(note) for layer in layers]
    try:
        network(torch.zeros(1, *input_shape))
    finally:
        for hook in hooks:
            hook.remove()
    weights = sum(width * p.numel() if p.dim() > 1 else 4 * p.numel() for p in network.parameters())
    return weights + width * max(sizes)


def _lenet(bench: Workbench, level: object) -> nn.Module:
    return bench.build()


def _named(bench: Workbench, level: str) -> nn.Module:
    return bench.build(level)


def _recipe(bench: Workbench, sparsity: float = 0.92, bits: int = 4, copies: int = 0) -> Recipe:
    """Small batches: what is left after pruning needs many steps to find its place."""
    config = partial(bench.config, batch_size=32, copies=copies)
    return Recipe(sparsity, bits, prune=config(15, schedule="constant"), settle=config(15), share=config(6, lr=1e-3))


def _magnitude(bench: Workbench, level: float) -> nn.Module:
    return prune_gradually([bench.trained()], [bench.seed], bench.labels(), _recipe(bench, level))[0]


def _codebook(bench: Workbench, level: int) -> nn.Module:
    return share_values([bench.trained()], [bench.seed], bench.labels(), _recipe(bench, bits=level))[0]


def _pair(level: str) -> tuple[float, int]:
    """``"0.92/4"``: a sparsity, and bits."""
    sparsity, _, bits = str(level).partition("/")
    return float(sparsity), int(bits)


def _deep(bench: Workbench, level: str) -> nn.Module:
    sparsity, bits = _pair(level)
    pruned = _kept(bench, "magnitude", sparsity)
    return share_values([pruned], [bench.seed], bench.labels(), _recipe(bench, sparsity, bits))[0]


def _deep_taught_last(bench: Workbench, level: str) -> nn.Module:
    """As :func:`_deep`, but the shared values are trained with a teacher."""
    sparsity, bits = _pair(level)
    pruned = _kept(bench, "magnitude", sparsity)
    return share_values([pruned], [bench.seed], bench.answers(), _recipe(bench, sparsity, bits, BLENDS))[0]


def _deep_reversed(bench: Workbench, level: str) -> nn.Module:
    """Share first, then prune: the weights that stay cannot move each on its own any more."""
    sparsity, bits = _pair(level)
    shared = _codebook(bench, bits)
    prune_(shared, sparsity)
    return share_values([shared], [bench.seed], bench.labels(), _recipe(bench, sparsity, bits))[0]


def _deep_distilled(bench: Workbench, level: str) -> nn.Module:
    recipe, lesson = _recipe(bench, *_pair(level), copies=BLENDS), bench.answers()
    pruned = prune_gradually([bench.distilled()], [bench.seed], lesson, recipe)
    return share_values(pruned, [bench.seed], lesson, recipe)[0]


def _kept(bench: Workbench, method: str, level: object) -> nn.Module:
    """Another family's network of the same bench."""
    options = {"dataset": bench.dataset, "split_seed": bench.split_seed, "profile": bench.profile, "width": bench.width}
    return network_of(Trial(method, level, bench.seed, options))


def _widths(bench: Workbench, share: float) -> tuple[int, int]:
    return tuple(max(1, round(share * width)) for width in bench.hidden)


def _narrow(bench: Workbench, level: float) -> nn.Module:
    return narrow_lenet(bench.data.input_shape, bench.data.num_classes, _widths(bench, level), seed=bench.seed)


def _neurons(bench: Workbench, level: float) -> nn.Module:
    """Remove whole neurons: the least product of incoming and outgoing weights' lengths goes first."""
    network = bench.trained()
    for (name, after), width in zip((("fc1", "fc2"), ("fc2", "logits")), _widths(bench, level), strict=True):
        layer, reader = network.get_submodule(name), network.get_submodule(after)
        score = layer.weight.detach().norm(dim=1) * reader.weight.detach().norm(dim=0)
        network = remove_neurons(network, name, score.topk(width).indices)
    return train_copies([network], [bench.seed], bench.labels(), bench.config(15))[0]


def _on_grid(network: nn.Module) -> nn.Module:
    """Quantized layers hold the weights that they compute with, so that these are what a file stores."""
    with torch.no_grad():
        for layer in network.modules():
            if isinstance(layer, (FakeQuantLinear, FakeQuantConv2d)):
                layer.weight.copy_(layer.made_weight())
    return network


def _quantized(bench: Workbench, network: nn.Module, bits: int = 8) -> nn.Module:
    """Weights of ``bits`` bits, a scale for each output; inputs of every layer in 8 bits."""
    images = bench.data.train.images[:512]
    return fake_quantized(network, weight_bits=bits, activation_bits=8, calibration=images)


def _trained_on_grid(bench: Workbench, network: nn.Module, bits: int, lesson: Lesson, config: TrainConfig) -> nn.Module:
    return _on_grid(train_copies([_quantized(bench, network, bits)], [bench.seed], lesson, config)[0])


def _qat(bench: Workbench, level: int) -> nn.Module:
    return _trained_on_grid(bench, bench.trained(), level, bench.labels(), bench.config(8, lr=1e-3))


def _distilled_qat(bench: Workbench, level: str) -> nn.Module:
    """``"cnn_student/4"``: a student taught in float, then taught further on a grid of so many bits."""
    name, _, bits = level.partition("/")
    config = bench.config(12, copies=BLENDS, lr=1e-3)
    return _trained_on_grid(bench, _student(bench, name, True), int(bits), bench.answers(), config)


def _student(bench: Workbench, name: str, taught: bool) -> nn.Module:
    # A rate that suits 8×8 pixels kills units that sum over hundreds of them.
    lr = 1e-2 * min(1.0, 8 / bench.data.input_shape[1])
    return bench.distilled(name, lr=lr) if taught else bench.trained(name, epochs=24, lr=lr)


def _grid_of(blank: Callable[[Workbench, object], nn.Module]) -> Callable[[Workbench, object], nn.Module]:
    return lambda bench, level: _quantized(bench, blank(bench, level))


def _first(level: str) -> str:
    return level.partition("/")[0]


FAMILIES: Mapping[str, Family] = MappingProxyType(
    {
        "dense": Family("dense LeNet-300-100", "", False, _lenet, lambda b, _: b.trained()),
        "dense, longer": Family("dense, trained on", "", False, _lenet, lambda b, _: b.trained(epochs=45)),
        "magnitude": Family("magnitude pruning", "3.1", False, _lenet, _magnitude),
        "neurons": Family("neurons removed", "3.1", False, _narrow, _neurons),
        "int8": Family(
            "int8", "3.2", False, _grid_of(_lenet), lambda b, _: _on_grid(_quantized(b, b.trained()))
        ),
        "qat": Family("low-bit QAT", "3.2", False, _grid_of(_lenet), _qat),
        "codebook": Family("codebook", "", False, _lenet, _codebook),
        "student": Family("student alone", "", False, _named, lambda b, n: _student(b, n, False)),
        "distilled": Family("student, distilled", "3.3, 3.4", False, _named, lambda b, n: _student(b, n, True)),
        "prune+codebook": Family("pruned + codebook", "", True, _lenet, _deep),
        "codebook+prune": Family("codebook, then pruned", "", True, _lenet, _deep_reversed),
        "prune+distil+codebook": Family("pruned, codebook distilled", "", True, _lenet, _deep_taught_last),
        "distil+prune+codebook": Family("distilled + pruned + codebook", "", True, _lenet, _deep_distilled),
        "neurons+int8": Family(
            "neurons removed + int8", "", True, _grid_of(_narrow),
            lambda b, level: _on_grid(_quantized(b, _kept(b, "neurons", level))),
        ),
        "distil+int8": Family(
            "distilled + int8", "", True, _grid_of(_named),
            lambda b, name: _on_grid(_quantized(b, _student(b, name, True))),
        ),
        "distil+qat": Family(
            "distilled + low-bit QAT", "", True, lambda b, level: _quantized(b, b.build(_first(level))), _distilled_qat
        ),
    }
)  # fmt: skip
"""Every method that a trial may name."""

PLAIN_FILES = ("dense", "dense, longer", "neurons", "student", "distilled")
"""Families whose weights are ordinary float32 numbers: their file is safetensors, as everybody would write it."""

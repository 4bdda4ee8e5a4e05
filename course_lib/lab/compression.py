"""Compression on lists of replicas: Deep Compression's stages (Han, Mao, Dally 2016), and every family side by side.

The stages are functions from networks to networks, so that they can be run in another order, or with a teacher:
``options`` are those of :func:`~course_lib.lab.replicas.train_many` (``best_on``, ``loss_fn``, ``settings``). Files are
written and read back into networks that forgot everything; what is scored is what came back.
"""

import copy
import itertools
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

import course_lib
from course_lib.evidence.measure import count_macs
from course_lib.files import source_hash
from course_lib.gate import weight_layers
from course_lib.lab.checkpoints import train_or_load
from course_lib.lab.data import DataSplits, Split, Splits
from course_lib.lab.lesson import Lesson
from course_lib.lab.models import build_model
from course_lib.lab.replicas import train_many
from course_lib.lab.training import TrainConfig, accuracy
from course_lib.methods.codebook import kmeans_codebook, share_weights
from course_lib.methods.coding import StoredTensor, load_compressed, read_contents, save_compressed
from course_lib.methods.distillation import kd_loss, teacher_table
from course_lib.methods.integer import integer_network
from course_lib.methods.low_rank import factorize
from course_lib.methods.onnx_files import write_float_onnx, write_int8_onnx
from course_lib.methods.pruning import GradualPruning, keep_masks, prunable_weights
from course_lib.methods.quantized_layers import FakeQuant, fake_quantized, plain
from course_lib.methods.surgery import remove_neurons

if TYPE_CHECKING:
    import pandas

__all__ = ["FAMILIES", "Bench", "Recipe", "Stage", "device_memory", "layer_table", "measure_families"]
__all__ += ["prune_gradually", "share_values", "store", "train_as_long", "write_engine_files"]

Models = list[nn.Module]


@dataclass(frozen=True)
class Recipe:
    """How far each stage of Deep Compression goes, and how long the network may recover.

    ``sparsity``, in [0, 1), is the share of all weights that are pruned; the paper leaves 8 %. ``bits``, 1 to 8, is the
    width of a weight's index into its layer's shared values, ``bias_bits`` the same for biases, which the paper leaves
    out: here they would be half of the file. ``prune``, ``settle`` and ``share`` are the trainings while the sparsity
    rises, under the finished masks, and of the shared values.
    """

    sparsity: float = 0.92
    bits: int = 4
    bias_bits: int = 4
    scope: str = "global"
    prune: TrainConfig = field(default=TrainConfig(epochs=15, batch_size=32, schedule="constant"))
    settle: TrainConfig = field(default=TrainConfig(epochs=15, batch_size=32))
    share: TrainConfig = field(default=TrainConfig(epochs=6, batch_size=32, lr=1e-3))


def prune_gradually(models: Models, data, seeds: Sequence[int], recipe: Recipe, **options) -> Models:
    """P: remove the smallest weights while training, then train what is left. Zeros are exact, networks stay dense."""
    steps = recipe.prune.steps(_images_each(data))
    often = {"every": max(1, steps // 20), "scope": recipe.scope}
    cut = GradualPruning(models[0], recipe.sparsity, steps, **often)
    first = {**options, "best_on": None}  # an epoch before the last has too many weights
    first |= {"config": recipe.prune, "after_step": cut}
    pruned = train_many(models, data, seeds, **first)
    options |= {"config": recipe.settle, "after_step": keep_masks(cut.masks)}
    return train_many(pruned, data, seeds, **options)


def share_values(models: Models, data, seeds: Sequence[int], recipe: Recipe, **options) -> Models:
    """Q: each layer's weights share 2^bits values, which are trained; its biases 2^bias_bits values, which are not.

    At the end every shared value is rounded to float16. Returns ordinary networks; zeros stay zeros.
    """
    shared = [share_weights(model, recipe.bits) for model in models]
    for layer in (layer for model in shared for layer in weight_layers(model).values() if layer.bias is not None):
        layer.bias.data = kmeans_codebook(layer.bias.detach(), recipe.bias_bits).values()
        layer.bias.requires_grad_(False)
    trained = [plain(model) for model in train_many(shared, data, seeds, config=recipe.share, **options)]
    with torch.no_grad():
        for parameter in (p for model in trained for p in model.parameters()):
            parameter.copy_(parameter.half()).requires_grad_(True)
    return trained


def train_as_long(models: Models, data, seeds: Sequence[int], recipe: Recipe, **options) -> Models:
    """The fair control: the same steps, rates and batches as pruning and sharing take, with all weights free."""
    for config in (recipe.prune, recipe.settle, recipe.share):
        models = train_many(models, data, seeds, config=config, **options)
    return models


def _images_each(data) -> int:
    split = data.train if isinstance(data, DataSplits) else data
    return split.images_each if isinstance(split, Splits) else len(split)


@dataclass(frozen=True, eq=False)
class Stage:
    """Networks as they came back from their files, the files' ``sizes`` in bytes [R], and what each file holds."""

    networks: Models
    sizes: np.ndarray
    contents: list[list[StoredTensor]]


def store(models: Models, *, huffman: bool = True, safetensors: bool = False) -> Stage:
    """Write each network to a file, and read it back into a network that forgot everything.

    Without ``huffman`` indices keep a fixed width, as before the paper's third stage. ``safetensors`` is the plain
    dense file that everybody would write, instead.
    """
    from safetensors.torch import load_model, save_model

    networks, sizes, contents = [], [], []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "network"
        for model in models:
            back = copy.deepcopy(model)
            with torch.no_grad():
                for tensor in back.state_dict().values():
                    tensor.zero_()
            if safetensors:
                save_model(model, str(path))
                load_model(back, path)
            else:
                save_compressed(model, path, huffman=huffman)
                load_compressed(path, back)
            networks.append(back)
            sizes.append(path.stat().st_size)
            contents.append([] if safetensors else read_contents(path))
    return Stage(networks, np.array(sizes), contents)


def layer_table(stages: Mapping[str, Stage]) -> "pandas.DataFrame":
    """The paper's table, a row a weight and one for the whole file, means over the networks.

    Columns: ``weights``; ``kept``, a share; ``values``, the shared ones, zero not counted; for each stage but the dense
    one ``bits <stage>``: bits of the file for each *kept* weight, position included; and ``× <stage>``: how many times
    smaller than 32 bits for each weight there was. The last row's ``×`` is whole file over whole file.
    """
    import pandas

    networks, coded = list(stages.values())[-1].networks, [name for name in stages if name != "dense"]
    rows = {}
    for name in prunable_weights(networks[0]):
        weights = [network.get_parameter(name).detach() for network in networks]
        row = {"weights": weights[0].numel(), "kept": np.mean([int(w.count_nonzero()) for w in weights])}
        row["values"] = np.mean([len(w[w != 0].unique()) for w in weights])
        for stage in coded:
            row[stage] = np.mean([e.stored_bytes for held in stages[stage].contents for e in held if e.name == name])
        rows[name.removesuffix(".weight")] = row
    table = pandas.DataFrame.from_dict(rows, orient="index")
    table.loc["whole file"] = table.sum()
    before = 4 * table.weights
    before["whole file"] = stages["dense"].sizes.mean()
    for stage in coded:
        size = table.pop(stage)
        size["whole file"] = stages[stage].sizes.mean()
        table[f"bits {stage}"], table[f"× {stage}"] = 8 * size / table.kept.clip(lower=1), before / size
    table["kept"] /= table.weights
    return table


@dataclass(frozen=True, eq=False)
class Bench:
    """What every family starts from: the same data, seeds and dense networks; each list of networks is trained once.

    ``net`` is the dense network, a name of ``MODELS`` or ``make_model(seed)``, ``teacher`` what students learn from.
    The ``recipe`` also says how long other families train after they were cut or rounded. Trained networks are kept in
    ``folder``, by default in the user's cache.
    """

    data: DataSplits
    seeds: Sequence[int]
    net: str | Callable[[int], nn.Module] = "lenet300"
    teacher: str = "cnn_teacher"
    recipe: Recipe = field(default=Recipe())
    folder: Path | None = None
    dry: bool = False  # makes the architectures without training: what a checkpoint is loaded into

    @classmethod
    def of(cls, lesson: Lesson) -> "Bench":
        """The bench that the lessons of chapter 06 share: what one of them has trained, the others find."""
        small = lesson.dataset == "digits"
        prune, share, batch, teacher = (8, 4, 32, "cnn_teacher") if small else (6, 3, 64, "lenet5")
        recipe = Recipe(
            prune=TrainConfig(epochs=prune, batch_size=batch, schedule="constant"),
            settle=TrainConfig(epochs=prune, batch_size=batch),
            share=TrainConfig(epochs=share, batch_size=batch, lr=1e-3),
        )
        return cls(lesson.data, lesson.seeds, teacher=teacher, recipe=recipe)

    def networks(self, family: str, level: object = None) -> Models:
        """The networks of one family, one a seed, from the cache if they were trained before."""
        if family not in FAMILIES:
            raise ValueError(f"unknown family {family!r} (there are: {', '.join(FAMILIES)})")
        if self.dry:
            return FAMILIES[family](self, level)
        dry, key = replace(self, dry=True), {"family": family, "level": level, "recipe": self.recipe}
        key |= {"seeds": list(self.seeds), "train": self.data.train, "val": self.data.val, "teacher": self.teacher}
        key |= {"start": self.build(), "code": source_hash(Path(course_lib.__file__).parent / "methods", __file__)}
        make, train = lambda: FAMILIES[family](dry, level), lambda _: FAMILIES[family](self, level)
        kept = train_or_load("family", make, train, key=key, folder=self.folder)
        return [model.eval() for model in kept]

    def build(self, name: str = "") -> Models:
        """Untrained networks, one a seed."""
        net, shape, classes = name or self.net, self.data.input_shape, self.data.num_classes
        if not isinstance(net, str):
            return [net(int(seed)) for seed in self.seeds]
        return [build_model(net, shape, classes, seed=int(seed)) for seed in self.seeds]

    def train(self, models: Models, *, taught: bool = False, **options) -> Models:
        """``models`` trained further, the best epoch on validation kept; ``taught``: by a teacher's answers as well."""
        if self.dry:
            return models
        if taught:
            table = teacher_table(self.networks("teacher"), self._each())
            options |= {"loss_fn": _follow, "settings": {"teacher": table}}
        return train_many(models, self.data, self.seeds, best_on=self.data.val, **options)

    def stage(self, function: Callable, models: Models, **changes) -> Models:
        """``models`` after :func:`prune_gradually`, :func:`share_values` or :func:`train_as_long`."""
        recipe = replace(self.recipe, **changes)
        if self.dry:
            return models
        return function(models, self.data, self.seeds, recipe, best_on=self.data.val)

    def quantized(self, models: Models, bits: int | Sequence[int]) -> Models:
        """Weights of so many bits, one number or one a layer, a scale an output; inputs of every layer in 8 bits."""
        options = {"activation_bits": 8, "method": "percentile"}
        widths = bits if isinstance(bits, int) else dict(zip(weight_layers(models[0]), bits, strict=True))
        seen = zip(models, self._each(), strict=True)
        return [fake_quantized(m, weight_bits=widths, calibration=s.images[:512], **options) for m, s in seen]

    def _each(self) -> list[Split]:
        train = self.data.train
        return [train] * len(self.seeds) if isinstance(train, Split) else list(train[: len(self.seeds)])


def _follow(logits: Tensor, labels: Tensor, index: Tensor, teacher: Tensor) -> Tensor:
    # A low temperature suits small students (Hinton et al. 2015 found 2.5 to 4 best for 30 units).
    return kd_loss(logits, teacher[index], labels, temperature=2.0, alpha=0.5)


def _narrow(model: nn.Module, share: float) -> nn.Module:
    """Remove whole neurons: the least product of incoming and outgoing weights' lengths goes first."""
    names = list(weight_layers(model))
    for name, after in itertools.pairwise(names):
        layer, reader = model.get_submodule(name), model.get_submodule(after)
        score = layer.weight.detach().norm(dim=1) * reader.weight.detach().norm(dim=0)
        model = remove_neurons(model, name, score.topk(max(1, round(share * len(score)))).indices)
    return model


def _in_groups(model: nn.Module, bits: int) -> nn.Module:
    """A scale for as many weights, up to 32, as divide what one output sums up; activations stay float."""
    for name, layer in weight_layers(model).items():
        columns = layer.weight[0].numel()
        group = max(group for group in range(1, 33) if columns % group == 0)
        model = fake_quantized(model, weight_bits={name: bits}, group=group)
    return model


def _on_grid(models: Models) -> Models:
    """Quantized layers hold the weights that they compute with, so that these are what a file stores."""
    with torch.no_grad():
        for layer in (m for model in models for m in model.modules() if isinstance(m, FakeQuant)):
            layer.weight.copy_(layer.made_weight())
    return models


def _recover(bench: Bench, models: Models, **options) -> Models:
    """Trained on for as many epochs as pruning and settling take together, so that no family is trained less."""
    lr = options.pop("lr", bench.recipe.settle.lr)
    config = replace(bench.recipe.settle, epochs=bench.recipe.prune.epochs + bench.recipe.settle.epochs, lr=lr)
    return bench.train(models, config=config, **options)


def _qat(bench: Bench, models: Models, bits: int | Sequence[int], **options) -> Models:
    return _on_grid(_recover(bench, bench.quantized(models, bits), lr=1e-3, **options))


def _student(bench: Bench, name: str, taught: bool) -> Models:
    # A rate that suits 8×8 pixels kills units that sum over hundreds of them.
    lr = 1e-2 * min(1.0, 8 / bench.data.input_shape[1])
    settle = bench.recipe.settle  # a network that starts from nothing needs longer than one that recovers
    config = replace(settle, epochs=2 * settle.epochs, batch_size=64, lr=lr)
    return bench.train(bench.build(name), taught=taught, config=config)


FAMILIES: dict[str, Callable[[Bench, object], Models]] = {
    "dense": lambda b, _: b.train(b.build(), epochs=15),
    "dense, as long": lambda b, _: b.stage(train_as_long, b.networks("dense")),
    "teacher": lambda b, _: b.train(b.build(b.teacher), epochs=4),
    "pruned": lambda b, sparsity: b.stage(prune_gradually, b.networks("dense"), sparsity=sparsity),
    "neurons removed": lambda b, share: _recover(b, [_narrow(m, share) for m in b.networks("dense")]),
    "low rank": lambda b, rank: _recover(b, [factorize(m, rank) for m in b.networks("dense")]),
    "int8": lambda b, _: _on_grid(b.quantized(b.networks("dense"), 8)),
    "bits in groups": lambda b, bits: _on_grid([_in_groups(m, bits) for m in b.networks("dense")]),
    "low-bit training": lambda b, bits: _qat(b, b.networks("dense"), bits),
    "mixed precision": lambda b, bits: _qat(b, b.networks("dense"), bits),
    "codebook": lambda b, bits: b.stage(share_values, b.networks("dense"), bits=bits),
    "student": lambda b, name: _student(b, name, False),
    "distilled": lambda b, name: _student(b, name, True),
    "pruned + codebook": lambda b, level: b.stage(share_values, b.networks("pruned", level[0]), bits=level[1]),
    "neurons removed + int8": lambda b, share: _on_grid(b.quantized(b.networks("neurons removed", share), 8)),
    "student + low bits": lambda b, level: _qat(b, b.networks("student", level[0]), level[1]),
    "distilled + low bits": lambda b, level: _qat(b, b.networks("distilled", level[0]), level[1], taught=True),
}
"""``make(bench, level)`` → trained networks, one a seed; of these "student + low bits" is the control of the last."""


def measure_families(bench: Bench, levels: Mapping[str, Sequence]) -> "pandas.DataFrame":
    """Every family at each of its levels: written to a file, read back, scored and counted.

    ``levels``: family -> its levels; ``[None]`` where it has none. A sparsity, a share of neurons, a rank, bits (a
    tuple of them: one a layer), a student's name, or a pair: ``{"pruned + codebook": [(0.92, 4)]}``. Returns one row a
    family and level: ``family``, ``level``, ``label``; ``score`` and ``val``, accuracy in percent [R] on test and
    validation; means over the networks of ``bytes``, the file; ``macs``; ``flash`` and ``ram``, see
    :func:`device_memory`.
    """
    import pandas

    rows, shape = [], bench.data.input_shape
    for family, level in ((family, level) for family, given in levels.items() for level in given):
        stage = store(bench.networks(family, level))
        flash, ram = zip(*(device_memory(network, shape) for network in stage.networks), strict=True)
        parts = [] if level is None else level if isinstance(level, tuple) else [level]
        row = {"family": family, "level": level, "label": "/".join(str(part) for part in parts)}
        row |= {"score": accuracy(stage.networks, bench.data.test), "val": accuracy(stage.networks, bench.data.val)}
        row |= {"bytes": stage.sizes.mean(), "macs": count_macs(stage.networks[0], shape)}
        rows.append(row | {"flash": np.mean(flash), "ram": np.mean(ram)})
    return pandas.DataFrame(rows)


def device_memory(network: nn.Module, input_shape: tuple[int, ...]) -> tuple[int, int]:
    """Bytes that a microcontroller needs for one answer: (flash for the weights, RAM for the activations).

    Weights stay in flash and are read there as the kernels take them: packed to 4 bits where they have no more, a byte
    up to 8 bits, else four (zeros and shared values have to be unpacked first and save nothing), and four a bias or a
    scale of an output. RAM holds the largest input and output of a layer at once, a byte a number where every layer
    has 8-bit inputs, else four.

    >>> device_memory(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), (1, 8, 8))
    (2600, 296)
    """
    layers = [m for m in network.modules() if isinstance(m, (nn.Linear, nn.Conv2d, nn.MaxPool2d))]
    weighted = [layer for layer in layers if not isinstance(layer, nn.MaxPool2d)]
    flash, sizes = 0, [0]
    for layer in weighted:
        count, scales, bits = layer.weight.numel(), 0, 32
        if isinstance(layer, FakeQuant):
            bits, scales = (4 if layer.weight_bits <= 4 else 8), len(layer.weight)
            scales = count // layer.group if layer.group else scales
        flash += -(-count * bits // 8) + 4 * scales + (0 if layer.bias is None else 4 * len(layer.weight))

    def note(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        sizes.append(inputs[0].numel() + output.numel())

    hooks = [layer.register_forward_hook(note) for layer in layers]
    try:
        with torch.no_grad():
            network(torch.zeros(1, *input_shape))
    finally:
        for hook in hooks:
            hook.remove()
    integers = weighted and all(getattr(layer, "activation_bits", None) for layer in weighted)
    return flash, (1 if integers else 4) * max(sizes)


def write_engine_files(networks: Mapping[str, nn.Module], images: Tensor, folder: str | Path) -> dict[str, Path]:
    """ONNX files to be timed, by name: quantized networks on int8 kernels, all others in float32, zeros included.

    Networks of equal layers and kind are one graph with other numbers, so they get one file, which is timed once:
    their latencies are equal by construction. On ``images`` the int8 graphs' activations are calibrated.
    """
    files, paths = {}, {}
    for name, network in networks.items():
        integers, dense = any(getattr(m, "activation_bits", None) for m in network.modules()), plain(network).eval()
        kind = integers, str(dense)
        if kind not in files:
            files[kind] = Path(folder) / f"{len(files)}.onnx"
            write, graph = (write_int8_onnx, integer_network(dense, images)) if integers else (write_float_onnx, dense)
            write(graph, files[kind], tuple(images.shape[1:]))
        paths[name] = files[kind]
    return paths

"""Deep Compression (Han, Mao, Dally 2016) as a bench: prune, share values, code; each stage a file that is read back.

The stages are functions from networks to networks, so that they can be run in another order, or with a teacher. They
take a list, one network a seed, and train all of it at once.
"""

import copy
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from course_lib.lab.data import Split
from course_lib.lab.replicas import fit_replicas
from course_lib.lab.training import TrainConfig, fit
from course_lib.methods.codebook import kmeans_codebook, plain, share_weights
from course_lib.methods.container import StoredTensor, load_compressed, read_contents, save_compressed
from course_lib.methods.pruning import GradualPruning, keep_masks, prunable_weights
from course_lib.methods.pruning_masks import check_share

__all__ = [
    "Lesson",
    "Recipe",
    "Stage",
    "deep_compress",
    "layer_figures",
    "prune_gradually",
    "share_values",
    "store",
    "train_copies",
]

FORMS = ("dense", "fixed", "huffman")


@dataclass(frozen=True)
class Recipe:
    """How far each stage goes, and how long the network may recover.

    Attributes:
        sparsity: share of all weights that are pruned, in [0, 1); the paper leaves 8 %.
        bits: width of a weight's index into its layer's shared values, 1 to 8.
        bias_bits: the same for biases, which the paper leaves out: here they would be half of the file.
        scope: ``"global"`` or ``"layer"``, as in :func:`~course_lib.methods.pruning.prune_`.
        prune: training while the sparsity rises along the cubic schedule.
        settle: training under the finished masks; the best epoch on validation stays.
        share: training of the shared values; the best epoch on validation stays.
    """

    sparsity: float = 0.92
    bits: int = 4
    bias_bits: int = 4
    scope: str = "global"
    prune: TrainConfig = field(default=TrainConfig(epochs=15, batch_size=32, schedule="constant"))
    settle: TrainConfig = field(default=TrainConfig(epochs=15, batch_size=32))
    share: TrainConfig = field(default=TrainConfig(epochs=6, batch_size=32, lr=1e-3))

    def __post_init__(self):
        check_share(self.sparsity, "sparsity")
        for name in ("bits", "bias_bits"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= 8:
                raise ValueError(f"{name} must be a whole number from 1 to 8, got {value!r}")


@dataclass(frozen=True, eq=False)
class Lesson:
    """What networks are trained on: ``split``, and ``val`` to choose the epoch with.

    ``loss_fn`` and ``settings`` [R, ...] are those of :func:`~course_lib.lab.replicas.fit_replicas`; labels by default.
    """

    split: Split
    val: Split
    loss_fn: Callable | None = None
    settings: Mapping[str, Tensor] | None = None


@dataclass(frozen=True, eq=False)
class Stage:
    """Networks as they came back from their files, the files' ``sizes`` in bytes, and what each file holds."""

    networks: list[nn.Module]
    sizes: list[int]
    contents: list[list[StoredTensor]]

    @property
    def mean_size(self) -> float:
        """Mean length of the files, in bytes."""
        return sum(self.sizes) / len(self.sizes)


def train_copies(
    models: Sequence[nn.Module],
    seeds: Sequence[int],
    lesson: Lesson,
    config: TrainConfig,
    *,
    choose: bool = True,
    after_step: Callable | None = None,
) -> list[nn.Module]:
    """Train copies of ``models``, one a seed, further; the models themselves stay as they are.

    One model goes through :func:`~course_lib.lab.training.fit`, which costs half of a batched pass of one; then
    ``after_step`` gets parameters without a replica dimension. ``choose=False`` keeps the last epoch.
    """
    if len(models) != len(seeds) or not models:
        raise ValueError(f"{len(models)} models for {len(seeds)} seeds: give one seed a model, and at least one")
    val, settings = (lesson.val if choose else None), dict(lesson.settings or {})
    if len(models) > 1:
        order = iter(models)
        return fit_replicas(
            lambda seed: copy.deepcopy(next(order)), seeds, lesson.split, config,
            val=val, loss_fn=lesson.loss_fn, settings=settings, after_step=after_step,
        )  # fmt: skip
    (model,), (seed,) = [copy.deepcopy(m) for m in models], seeds
    loss_fn = lesson.loss_fn
    if settings:
        loss_fn = partial(loss_fn, **{name: value[0] for name, value in settings.items()})
    fit(model, lesson.split, config, loss_fn=loss_fn, val=val, seed=seed, after_step=after_step)
    return [model]


def prune_gradually(
    models: Sequence[nn.Module], seeds: Sequence[int], lesson: Lesson, recipe: Recipe
) -> list[nn.Module]:
    """P: remove the smallest weights while training, then train what is left. Zeros are exact, networks stay dense."""
    steps = recipe.prune.steps(len(lesson.split))
    many = len(models) > 1
    every = max(1, steps // 20)
    gradual = GradualPruning(models[0], recipe.sparsity, steps, every=every, scope=recipe.scope, replicas=many)
    pruned = train_copies(models, seeds, lesson, recipe.prune, choose=False, after_step=gradual)
    return train_copies(pruned, seeds, lesson, recipe.settle, after_step=keep_masks(gradual.masks))


def share_values(models: Sequence[nn.Module], seeds: Sequence[int], lesson: Lesson, recipe: Recipe) -> list[nn.Module]:
    """Q: each layer's weights share 2^bits values, which are trained; its biases 2^bias_bits values, which are not.

    At the end every shared value is rounded to float16. Returns ordinary networks; zeros stay zeros.
    """
    shared = [share_weights(model, recipe.bits) for model in models]
    for model in shared:
        for layer in model.modules():
            bias = getattr(layer, "bias", None)
            if isinstance(layer, (nn.Linear, nn.Conv2d)) and bias is not None:
                layer.bias.data = kmeans_codebook(bias.detach(), recipe.bias_bits).values()
                layer.bias.requires_grad_(False)
    trained = [plain(model) for model in train_copies(shared, seeds, lesson, recipe.share)]
    with torch.no_grad():
        for model in trained:
            for parameter in model.parameters():
                parameter.copy_(parameter.half()).requires_grad_(True)
    return trained


def store(models: Sequence[nn.Module], folder: str | os.PathLike, name: str, *, form: str = "huffman") -> Stage:
    """Write each network to a file in ``folder``, and read it back into a network that forgot everything.

    Args:
        models: one a seed.
        folder: where the files ``<name>-<i>`` go; it must exist.
        name: letters for the file name.
        form: ``"dense"``, plain safetensors; ``"fixed"``, :func:`~course_lib.methods.container.save_compressed` with
            indices of a fixed width; ``"huffman"``, the same with Huffman's code.
    """
    if form not in FORMS:
        raise ValueError(f"form must be one of {', '.join(map(repr, FORMS))}, got {form!r}")
    networks, sizes, contents = [], [], []
    for i, model in enumerate(models):
        path, back = Path(folder) / f"{name}-{i}", blank(model)
        if form == "dense":
            from safetensors.torch import load_model, save_model

            save_model(model, str(path))
            load_model(back, path)
        else:
            save_compressed(model, path, huffman=form == "huffman")
            load_compressed(path, back)
        networks.append(back)
        sizes.append(path.stat().st_size)
        contents.append([] if form == "dense" else read_contents(path))
    return Stage(networks, sizes, contents)


def blank(model: nn.Module) -> nn.Module:
    """A copy of ``model`` that forgot every number, so that what it computes later must come from a file."""
    empty = copy.deepcopy(model)
    with torch.no_grad():
        for tensor in empty.state_dict().values():
            tensor.zero_()
    return empty


def deep_compress(
    models: Sequence[nn.Module], seeds: Sequence[int], lesson: Lesson, recipe: Recipe, folder: str | os.PathLike
) -> dict[str, Stage]:
    """All stages of the paper: ``"dense"``, ``"P"``, ``"P+Q"``, ``"P+Q+H"`` → :class:`Stage`.

    Huffman's code changes the file alone: the networks of the last two stages are equal.
    """
    pruned = prune_gradually(models, seeds, lesson, recipe)
    shared = share_values(pruned, seeds, lesson, recipe)
    return {
        "dense": store(models, folder, "dense", form="dense"),
        "P": store(pruned, folder, "pruned", form="fixed"),
        "P+Q": store(shared, folder, "shared", form="fixed"),
        "P+Q+H": store(shared, folder, "coded", form="huffman"),
    }


def layer_figures(stages: Mapping[str, Stage]) -> list[dict[str, object]]:
    """The paper's table, a row a weight and one for the whole network, means over the networks.

    Columns: ``layer``; ``weights``; ``kept``, a share; ``values``, the shared ones, zero not counted; for each stage
    but the dense one ``bits <stage>``: bits of the file for each *kept* weight, position included; and ``x <stage>``:
    how many times smaller than 32 bits for each weight there was. The last row's ``x`` is whole file over whole file.
    """
    last = list(stages.values())[-1]
    coded = [name for name in stages if name != "dense"]
    rows, networks = [], last.networks
    for name in prunable_weights(networks[0]):
        weights = [dict(network.named_parameters())[name].detach() for network in networks]
        kept = sum(int(w.count_nonzero()) for w in weights) / len(weights)
        values = sum(len(w[w != 0].unique()) for w in weights) / len(weights)
        row = {"layer": name.removesuffix(".weight"), "weights": weights[0].numel()}
        row |= {"kept": kept / weights[0].numel(), "values": values}
        for stage in coded:
            found = [entry.stored_bytes for held in stages[stage].contents for entry in held if entry.name == name]
            size = sum(found) / len(found)
            row |= {f"bits {stage}": 8 * size / max(kept, 1), f"x {stage}": 4 * weights[0].numel() / size}
        rows.append(row)
    total, kept = sum(r["weights"] for r in rows), sum(r["weights"] * r["kept"] for r in rows)
    whole = {"layer": "whole file", "weights": total, "kept": kept / total, "values": sum(r["values"] for r in rows)}
    for stage in coded:
        size = stages[stage].mean_size
        whole |= {f"bits {stage}": 8 * size / max(kept, 1), f"x {stage}": stages["dense"].mean_size / size}
    return [*rows, whole]

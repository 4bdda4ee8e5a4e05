"""GPTQ: round a layer's weights column by column, and let the columns still to come make up for each error.

Frantar et al. 2023, after Optimal Brain Surgeon (Hassibi & Stork 1993). What is kept small is not the change of the
weights but of the layer's outputs, on inputs as the layer really gets them.
"""

from collections import Counter
from collections.abc import Callable

import torch
from torch import Tensor, nn

from course_lib.gate import UnsupportedModel, copy_model, eval_mode, input_hooks, real_tensor
from course_lib.methods.quantization import QuantParams, naming, straight_through

__all__ = ["gptq", "gptq_layers", "input_hessian"]


def gptq(
    weight: Tensor, hessian: Tensor, q: QuantParams, *, damping: float = 0.01
) -> Tensor:  # fmt: skip
    """The weights of a linear layer, float32 [O, I], on the grid ``q``: each column rounded, its error passed on.

    Args:
        weight: [O, I], finite.
        hessian: [I, I], the mean of x xᵀ over inputs x of the layer, as from :func:`input_hessian`; how large does not
            matter, only relations do.
        q: the grid, with one scale in all, a row (``axis=0``) or a group of columns.
        damping: this share of the mean of the diagonal is added to it, so that inputs that are always 0 do no harm.

    Raises:
        ValueError: shapes that do not fit; a matrix that is no such mean.

    >>> w, twins = torch.tensor([[0.4, 0.4]]), torch.ones(2, 2)  # both inputs are always equal
    >>> gptq(w, twins, QuantParams(1.0, 0, -3, 3))  # so 0 + 1 is closer to 0.8 than 0 + 0
    tensor([[0., 1.]])
    """
    w = real_tensor(weight, "weight").double().clone()
    u = correction(weight, hessian, damping)
    scale, zero = (t.expand_as(w) for t in q.shaped_for(w))
    for j in range(w.shape[1]):
        rounded = straight_through(w[:, j], scale[:, j], zero[:, j], q.qmin, q.qmax)
        error = (w[:, j] - rounded) / u[j, j]
        w[:, j] = rounded
        w[:, j + 1 :] -= error[:, None] * u[j, j + 1 :]
    return w.float()


def correction(weight: Tensor, hessian: Tensor, damping: float) -> Tensor:
    """The upper Cholesky factor of the inverse of the damped Hessian: row j says how column j's error is passed on."""
    h = real_tensor(hessian, "hessian").double()
    if weight.dim() != 2 or h.shape != (weight.shape[1],) * 2:
        raise ValueError(f"a hessian [I, I] for weights [O, I] is needed, got {tuple(h.shape)}, {tuple(weight.shape)}")
    h = h + damping * h.diagonal().mean() * torch.eye(len(h), dtype=h.dtype)
    try:
        return torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(h)), upper=True)
    except torch.linalg.LinAlgError as error:
        raise ValueError(f"hessian is no mean of x xᵀ, or damping={damping} is too small for it: {error}") from error


@torch.no_grad()
def input_hessian(model: nn.Module, layer: nn.Linear, inputs: Tensor, *, batch_size: int = 64) -> Tensor:
    """The mean of x xᵀ, float64 [I, I], over all inputs x that ``layer`` gets while the model reads ``inputs`` [N, …].

    >>> layer = nn.Linear(2, 1)
    >>> input_hessian(nn.Sequential(layer), layer, torch.tensor([[1.0, 0.0], [1.0, 2.0]])).tolist()
    [[1.0, 1.0], [1.0, 2.0]]
    """
    total, count = torch.zeros(layer.in_features, layer.in_features, dtype=torch.float64), 0

    def record(name: str, x: Tensor) -> None:
        nonlocal total, count
        x = x.flatten(0, -2)
        x = x if x.dtype is torch.float64 else x.float()  # a sum of squares leaves half precision
        total, count = total + x.T @ x, count + len(x)

    with input_hooks({"": layer}, record):
        for part in inputs.split(batch_size):
            model(part)
    if count == 0:
        raise ValueError("the model never called this layer: is it one of its own?")
    return total / count


def gptq_layers(
    model: nn.Module, inputs: Tensor, choose_grid: Callable[[Tensor], QuantParams], *, damping: float = 0.01
) -> nn.Module:
    """A copy of the model whose linear layers went through :func:`gptq`, in the order in which the model lists them.

    Each layer's inputs are those that the layers before it, already rounded, give on ``inputs`` (calibration data, from
    the training part). ``choose_grid(weight)`` gives a layer's grid; no bias is changed. UnsupportedModel: two modules
    share a layer's weight, so that one grid would have to serve two kinds of inputs.

    >>> from course_lib.methods.quantization import choose_qparams
    >>> model, x = nn.Sequential(nn.Linear(4, 3)), torch.randn(50, 4)
    >>> len(gptq_layers(model, x, lambda w: choose_qparams(w, 2))[0].weight.unique()) <= 3
    True
    """
    model = copy_model(model)
    users = Counter(id(weight) for module in model.modules() for weight in module.parameters(recurse=False))
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear):
            if users[id(layer.weight)] > 1:
                raise UnsupportedModel(f"{name} shares its weight with another module: give each a weight of its own")
            with naming(name), torch.no_grad(), eval_mode(model):
                q = choose_grid(layer.weight)
                layer.weight.copy_(gptq(layer.weight, input_hessian(model, layer, inputs), q, damping=damping))
    return model

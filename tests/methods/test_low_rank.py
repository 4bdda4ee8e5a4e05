"""Two thin layers against torch.linalg.svd and against the layer with the truncated weight."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import prune as torch_prune

from course_lib.gate import UnsupportedModel
from course_lib.methods.low_rank import factorize, rank_for_bytes
from course_lib.methods.quantized_layers import fake_quantized

LAYERS = {
    "linear": (lambda: nn.Linear(12, 8), (3, 5, 12)), "no bias": (lambda: nn.Linear(4, 20, bias=False), (3, 4)),
    "conv": (lambda: nn.Conv2d(3, 8, 3, 2, 1, dilation=2), (2, 3, 9, 9)),
    "padded": (lambda: nn.Conv2d(2, 6, (3, 1), padding="same", padding_mode="reflect", bias=False), (2, 2, 6, 6)),
}  # fmt: skip


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("rank", [1, 3, "full"])
def test_the_layers_compute_with_the_truncated_weight(kind, rank):
    make, shape = LAYERS[kind]
    layer, x = make().double(), torch.randn(shape).double()
    u, s, v = torch.linalg.svd(layer.weight.detach().flatten(1), full_matrices=False)
    r = len(s) if rank == "full" else rank
    thin = factorize(layer, np.int64(r))
    assert thin[0].weight.shape[0] == thin[1].weight.shape[1] == r
    product = thin[1].weight.flatten(1) @ thin[0].weight.flatten(1)
    torch.testing.assert_close(product, u[:, :r] @ s[:r].diag() @ v[:r])
    norms = [thin[0].weight.flatten(1).norm(dim=1), thin[1].weight.flatten(1).norm(dim=0)]
    torch.testing.assert_close(norms[0], s[:r].sqrt())  # the singular values are shared out evenly
    torch.testing.assert_close(norms[1], s[:r].sqrt())
    layer.weight.data.copy_(product.view_as(layer.weight))
    torch.testing.assert_close(thin(x), layer(x))


def test_a_model_by_one_rank_or_by_name():
    model = nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 3)).eval()
    small = factorize(model, 3)  # 3 · (30 + 3) weights are more than 30 · 3
    assert [type(m).__name__ for m in small] == ["Sequential", "ReLU", "Linear"]
    assert factorize(nn.Sequential(nn.Linear(4, 4)), 2)[0].weight.shape == (4, 4)  # as many are not fewer
    assert not any(m.training for m in small.modules())
    named = factorize(model, {"2": 2})
    assert torch.equal(named[0].weight, model[0].weight)
    assert named[2][0].weight.shape == (2, 30)
    x = torch.randn(5, 20)
    torch.testing.assert_close(factorize(model, {"0": 20, "2": 3})(x), model(x))


def test_precision_and_gradients_stay():
    layer = nn.Linear(6, 6).to(torch.bfloat16).requires_grad_(False)
    thin = factorize(layer, 6)
    assert {p.dtype for p in thin.parameters()} == {torch.bfloat16}
    assert not any(p.requires_grad for p in thin.parameters())
    torch.testing.assert_close((thin[1].weight @ thin[0].weight).float(), layer.weight.float(), atol=0.01, rtol=0.02)


def test_rank_for_bytes_is_the_largest_that_fits():
    linear, conv = nn.Linear(100, 50), nn.Conv2d(4, 8, 3).half()
    assert [rank_for_bytes(linear, b) for b in (600, 1199, 1200, 10**6)] == [1, 1, 2, 50]
    assert [rank_for_bytes(conv, b) for b in (88, 176, 175)] == [1, 2, 1]
    with pytest.raises(ValueError, match="rank 1 takes 600 bytes, the budget is 599"):
        rank_for_bytes(linear, 599)


class Masked(nn.Linear):
    def forward(self, x):
        return super().forward(x) * 2


def tied():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    model[1].weight = model[0].weight
    return model


@pytest.mark.parametrize(("make", "rank", "error", "text"), [
    (lambda: nn.Linear(4, 3), 4, ValueError, r"rank of a weight \(3, 4\) must be an integer from 1 to 3, got 4"),
    (lambda: nn.Linear(4, 3), 1.5, TypeError, "must be an integer"),
    (lambda: nn.Conv2d(4, 4, 1, groups=2), 1, UnsupportedModel, "without groups"),
    (lambda: Masked(4, 4), 1, UnsupportedModel, "forward of its own"),
    (tied, 1, UnsupportedModel, "its weight is shared"),
    (lambda: nn.Sequential(nn.Linear(4, 3)), {"1": 1}, ValueError, r"no linear or convolution layer .*\['1'\]"),
    (lambda: torch_prune.identity(nn.Linear(4, 3), "weight"), 1, UnsupportedModel, "no plain parameter"),
    (lambda: nn.Linear(4, 3).apply(lambda m: m.weight.data.fill_(float("nan"))), 1, ValueError, "12 NaN"),
])  # fmt: skip
def test_refused(make, rank, error, text):
    with pytest.raises(error, match=text):
        factorize(make(), rank)


class Mine(nn.Linear):
    pass


def test_a_subclass_is_split_and_a_rounded_layer_is_not():
    layer = Mine(12, 8)
    thin = factorize(nn.Sequential(layer), 2)
    torch.testing.assert_close(thin(torch.eye(12)), factorize(layer, 2)(torch.eye(12)))
    with pytest.raises(UnsupportedModel, match="whose weight is a parameter"):
        factorize(fake_quantized(nn.Linear(12, 8)), 2)


def test_what_the_ranks_do_not_name_stays():
    net = nn.Sequential(nn.Embedding(9, 12), nn.Linear(12, 12))
    thin = factorize(net, {"1": 2})
    assert torch.equal(thin[0].weight, net[0].weight)
    assert len(thin[1]) == 2

"""k-means codebooks against scikit-learn, and the gradient of shared weights."""

import copy
import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.func import functional_call, stack_module_state, vmap

from course_lib.gate import UnsupportedModel
from course_lib.methods.codebook import kmeans_codebook, lloyd, plain, share_weights
from course_lib.methods.quantized_layers import fake_quantized


def test_centroids_equal_those_of_scikit_learn():
    from sklearn.cluster import KMeans

    weight = torch.randn(2000, generator=torch.Generator().manual_seed(0)).double()
    start = np.linspace(weight.min().item(), weight.max().item(), 8)[:, None]
    reference = KMeans(8, init=start, n_init=1, tol=0, max_iter=500, algorithm="lloyd").fit(weight[:, None].numpy())
    book = kmeans_codebook(weight, 3, iterations=500)
    np.testing.assert_allclose(book.centroids.numpy(), np.sort(reference.cluster_centers_[:, 0]), rtol=1e-8)
    np.testing.assert_allclose(book.values().numpy(), reference.cluster_centers_[reference.labels_, 0], rtol=1e-8)


def test_one_round_by_hand():
    values = torch.tensor([0.0, 1.0, 4.0, 10.0]).double()
    assert lloyd(values, 3, 1).tolist() == [0.5, 4, 10]  # starts at 0, 5, 10
    assert lloyd(values, 1, 1).tolist() == [3.75]
    one_is_empty = torch.tensor([0.0, 0.1, 0.2, 10.0]).double()
    assert lloyd(one_is_empty, 3, 1).tolist() == pytest.approx([0.1, 10])
    assert lloyd(values, 4, 1).tolist() == values.tolist()


@pytest.mark.parametrize("bits", [1, 2, 5, 8])
def test_sizes_ranges_and_error(bits):
    weight = torch.randn(40, 30, generator=torch.Generator().manual_seed(bits))
    book = kmeans_codebook(weight, np.int64(bits))
    assert 2 ** (bits - 1) < len(book.centroids) <= 2**bits
    assert book.values().shape == book.index.shape == weight.shape
    assert book.values().dtype == weight.dtype
    assert (book.centroids.diff() > 0).all()
    distance = (weight.unsqueeze(-1) - book.centroids).abs()
    torch.testing.assert_close((book.values() - weight).abs(), distance.min(-1).values, rtol=1e-4, atol=1e-5)


def test_zeros_stay_zero_and_nothing_else_becomes_zero():
    weight = torch.randn(50, 50, generator=torch.Generator().manual_seed(0))
    weight[weight.abs() < 1] = 0
    weight[0, 0] = 1e-3  # nearest to zero, but a weight
    for bits in (1, 2, 5):
        values = kmeans_codebook(weight, bits).values()
        assert torch.equal(values == 0, weight == 0)
        assert values.unique().numel() <= 2**bits
    assert not torch.equal(kmeans_codebook(weight, 2, keep_zeros=False).values() == 0, weight == 0)


@pytest.mark.parametrize("values", [[5.0], [-0.0, 0.0], [-1.0, 0.0, 2.0], [1e-45, 1e-38, 0.0]])
@pytest.mark.parametrize("keep_zeros", [True, False])
def test_few_distinct_values_are_kept_as_they_are(values, keep_zeros):
    weight = torch.tensor(values)
    assert torch.equal(kmeans_codebook(weight, 4, keep_zeros=keep_zeros).values(), weight)


def test_other_precisions():
    weight = torch.randn(500, generator=torch.Generator().manual_seed(0))
    half = kmeans_codebook(weight.half(), 4)
    assert half.centroids.dtype == torch.float16
    torch.testing.assert_close(half.centroids.float(), kmeans_codebook(weight, 4).centroids, rtol=0.02, atol=0.02)


@pytest.mark.parametrize(("weight", "options", "error", "text"), [
    (torch.ones(3), {"bits": 0}, ValueError, "bits must be an integer from 1 to 8"),
    (torch.ones(3), {"bits": 9}, ValueError, "bits must be an integer from 1 to 8"),
    (torch.ones(3), {"bits": 4.0}, TypeError, "bits must be an integer"),
    (torch.ones(3), {"iterations": 0}, ValueError, "iterations must be an integer of at least 1"),
    (torch.ones(0), {}, ValueError, "is empty"), (torch.tensor([math.nan]), {}, ValueError, "NaN"),
])  # fmt: skip
def test_bad_input(weight, options, error, text):
    with pytest.raises(error, match=text):
        kmeans_codebook(weight, **options)


def shared_net(seed=0, bits=2):
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(12, 4))
    net[3].weight.data[:, ::2] = 0
    return net, share_weights(net, bits)


def test_a_centroids_gradient_is_the_sum_over_its_weights():
    net, shared = shared_net()
    x = torch.randn(6, 1, 4, 4)
    ordinary = plain(shared)
    torch.testing.assert_close(shared(x), ordinary(x))
    shared(x).square().sum().backward()
    ordinary(x).square().sum().backward()
    for i in (0, 3):
        assert shared[i].centroids.grad.any()
        for k, gradient in enumerate(shared[i].centroids.grad):
            members = shared[i].index == k
            expected = ordinary[i].weight.grad[members].sum() * (shared[i].centroids[k] != 0)
            torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-5)
    assert net[0].weight.grad is None


def test_replicas_with_codebooks_of_different_lengths_stack():
    models = [shared_net(s, bits=3)[1] for s in range(2)]
    models[1] = share_weights(plain(share_weights(shared_net(1)[0], 1)), 3)
    x = torch.randn(5, 1, 4, 4)
    params, buffers = stack_module_state(models)
    batched = vmap(lambda p, b: functional_call(models[0], (p, b), (x,)))(params, buffers)
    torch.testing.assert_close(batched, torch.stack([m(x) for m in models]))


def test_tied_layers_stay_tied():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(9, 9), nn.ReLU(), nn.Linear(9, 9))
    net[2].weight = net[0].weight
    shared = share_weights(net, 2)
    assert shared[0].centroids is shared[2].centroids
    assert shared[0].index is shared[2].index
    shared[0].centroids.data[0] = -7
    ordinary = plain(shared)
    assert ordinary[0].weight is ordinary[2].weight
    assert ordinary[2].weight.min() == -7
    with pytest.raises(UnsupportedModel, match="'2'"):
        share_weights(net, {"0": 1, "2": 3})


def test_bits_by_layer_and_refusals():
    net, _ = shared_net()
    state = copy.deepcopy(net.state_dict())
    partly = share_weights(net, {"3": 1})
    assert type(partly[0]) is nn.Conv2d
    assert partly[3].made_weight().unique().numel() == 2
    assert type(share_weights(net, 2, skip=["3"])[3]) is nn.Linear
    for bits, text in (({"nope": 4}, r"bits names no linear or convolution layer: \['nope'\]"), (9, "bits must be")):
        with pytest.raises(ValueError, match=text):
            share_weights(net, bits)
    with pytest.raises(UnsupportedModel, match="'0' is FakeQuantConv2d already"):
        share_weights(fake_quantized(net), 4)
    assert all(torch.equal(state[name], t) for name, t in net.state_dict().items())
    net[3].weight.data[0, 0] = math.inf
    with pytest.raises(ValueError, match="layer '3': weight has 1 NaN or infinite"):
        share_weights(net)


def test_what_was_frozen_stays_frozen():
    net = nn.Sequential(nn.Linear(20, 10).requires_grad_(False), nn.Linear(10, 2))
    for model in (shared := share_weights(net, 2), plain(shared), plain(fake_quantized(net))):
        assert {name for name, p in model.named_parameters() if p.requires_grad and name.startswith("0")} == set()
        assert any(p.requires_grad for p in model.parameters())

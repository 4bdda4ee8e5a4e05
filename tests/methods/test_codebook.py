"""k-means codebooks against scikit-learn, and the gradient of shared weights."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.func import functional_call, stack_module_state, vmap

from course_lib.methods.codebook import kmeans_codebook, plain, share_weights
from course_lib.methods.qat import fake_quantized


def test_centroids_equal_those_of_scikit_learn():
    from sklearn.cluster import KMeans

    weight = torch.randn(2000, generator=torch.Generator().manual_seed(0)).double()
    start = np.linspace(weight.min().item(), weight.max().item(), 8)[:, None]
    reference = KMeans(8, init=start, n_init=1, tol=0, max_iter=500, algorithm="lloyd").fit(weight[:, None].numpy())
    book = kmeans_codebook(weight, 3, iterations=500)
    np.testing.assert_allclose(book.centroids.numpy(), np.sort(reference.cluster_centers_[:, 0]), rtol=1e-8)
    np.testing.assert_allclose(book.values().numpy(), reference.cluster_centers_[reference.labels_, 0], rtol=1e-8)


@pytest.mark.parametrize("bits", range(1, 9))
def test_sizes_ranges_and_error(bits):
    weight = torch.randn(40, 30, generator=torch.Generator().manual_seed(bits))
    book = kmeans_codebook(weight, bits)
    assert len(book.centroids) <= 2**bits
    assert book.values().shape == weight.shape
    assert book.values().dtype == weight.dtype
    assert (book.centroids.diff() > 0).all()
    distance = (weight.reshape(-1, 1) - book.centroids).abs()
    torch.testing.assert_close(
        (book.values() - weight).abs().flatten(), distance.min(dim=1).values, rtol=1e-4, atol=1e-5
    )


def test_zeros_stay_zero_and_nothing_else_becomes_zero():
    weight = torch.randn(50, 50, generator=torch.Generator().manual_seed(0))
    weight[weight.abs() < 1] = 0
    values = kmeans_codebook(weight, 2).values()
    assert torch.equal(values == 0, weight == 0)
    assert values.unique().numel() <= 4
    one_bit = kmeans_codebook(weight, 1).values()
    assert torch.equal(one_bit == 0, weight == 0)
    assert (kmeans_codebook(weight, 2, keep_zeros=False).values() != 0).any()


def test_few_distinct_values_are_kept_as_they_are():
    for values in ([5.0], [0.0], [0.0, 0.0, 1.0], [-1.0, 0.0, 2.0]):
        weight = torch.tensor(values)
        assert torch.equal(kmeans_codebook(weight, 4).values(), weight)


def test_centroids_rounded_to_half_precision():
    weight = torch.randn(500)
    book = kmeans_codebook(weight, 4, dtype=torch.float16)
    assert torch.equal(book.centroids, book.centroids.half().float())
    with pytest.raises(ValueError, match=r"do not fit into torch\.float16"):
        kmeans_codebook(torch.tensor([1e9, 1.0]), 2, dtype=torch.float16)


def test_bad_input():
    for bits, error in ((0, ValueError), (9, ValueError), (4.0, TypeError), (True, TypeError)):
        with pytest.raises(error, match="bits must be"):
            kmeans_codebook(torch.ones(3), bits)
    for iterations in (0, -1, 1.5, True):
        with pytest.raises(ValueError, match="iterations must be"):
            kmeans_codebook(torch.randn(20), 2, iterations=iterations)
    with pytest.raises(ValueError, match="is empty"):
        kmeans_codebook(torch.ones(0), 4)
    with pytest.raises(ValueError, match="NaN"):
        kmeans_codebook(torch.tensor([float("nan")]), 4)


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
        for k, gradient in enumerate(shared[i].centroids.grad):
            members = shared[i].index == k
            expected = ordinary[i].weight.grad[members].sum() * (shared[i].centroids[k] != 0)
            torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-5)
    assert net[0].weight.grad is None


def test_training_keeps_pruned_weights_at_zero_and_the_values_few():
    _, shared = shared_net()
    optimizer = torch.optim.AdamW(shared.parameters(), lr=0.1, weight_decay=0.1)
    x = torch.randn(6, 1, 4, 4)
    for _ in range(5):
        optimizer.zero_grad()
        shared(x).square().sum().backward()
        optimizer.step()
    trained = plain(shared)[3].weight
    assert (trained[:, ::2] == 0).all()
    assert trained.unique().numel() <= 4


def test_replicas_with_codebooks_of_different_lengths_stack():
    models = [shared_net(s, bits=3)[1] for s in range(2)]
    models[1][3].centroids.data[1] = 0.3
    x = torch.randn(5, 1, 4, 4)
    params, buffers = stack_module_state(models)
    batched = vmap(lambda p, b: functional_call(models[0], (p, b), (x,)))(params, buffers)
    torch.testing.assert_close(batched, torch.stack([m(x) for m in models]))


def test_bits_by_layer_and_refusals():
    net, _ = shared_net()
    partly = share_weights(net, {"3": 1})
    assert type(partly[0]) is nn.Conv2d
    assert partly[3].made_weight().unique().numel() <= 2
    with pytest.raises(ValueError, match=r"no linear or convolution layer: \['nope'\]"):
        share_weights(net, {"nope": 4})
    with pytest.raises(ValueError, match="already"):
        share_weights(fake_quantized(net), 4)

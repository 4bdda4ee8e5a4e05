import numpy as np
import pytest
import torch
from scipy import ndimage
from torch import nn

from course_lib.evidence.corruption import CORRUPTIONS, corrupt, robustness_curve

SEVERITY = {"noise": 0.5, "salt_and_pepper": 0.2, "blur": 0.8, "shift": 2, "contrast": 0.6}


def draw(n=20, channels=2, height=9, width=7, seed=0):
    return torch.randn(n, channels, height, width, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("kind", CORRUPTIONS)
def test_severity_nothing_is_the_identity_and_a_copy(kind):
    images = draw()
    same = corrupt(images, kind, 0)
    assert torch.equal(same, images)
    same.zero_()
    assert images.abs().sum() > 0
    assert corrupt(images[:0], kind, SEVERITY[kind]).shape == (0, 2, 9, 7)


@pytest.mark.parametrize("kind", CORRUPTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_same_seed_same_images_and_nothing_else_is_touched(kind, dtype):
    images = draw().to(dtype).requires_grad_()
    before, state = images.detach().clone(), torch.get_rng_state()
    one, other = (corrupt(images, kind, SEVERITY[kind], seed=3) for _ in range(2))
    assert torch.equal(one, other)
    assert torch.equal(images, before)
    assert torch.equal(torch.get_rng_state(), state)
    assert (one.shape, one.dtype, one.requires_grad) == (images.shape, dtype, False)
    assert not torch.equal(one, before)
    if kind in ("noise", "salt_and_pepper", "shift"):
        assert not torch.equal(one, corrupt(images, kind, SEVERITY[kind], seed=4))


def test_noise_has_the_standard_deviation_and_is_one_draw_amplified():
    images = draw(200)
    one, two = (corrupt(images, "noise", s) - images for s in (0.5, 1.0))
    assert one.std().item() == pytest.approx(0.5, rel=0.02)
    assert one.mean().abs() < 0.01
    torch.testing.assert_close(2 * one, two, atol=1e-5, rtol=1e-5)


def test_salt_and_pepper_hits_the_share_in_all_channels_and_is_nested():
    images = draw(200)
    low, high = images.amin(dim=(0, 2, 3)), images.amax(dim=(0, 2, 3))
    hit = {}
    for share in (0.1, 0.3, 1.0):
        damaged = corrupt(images, "salt_and_pepper", share)
        changed = damaged != images
        extreme = (damaged == low[:, None, None]) | (damaged == high[:, None, None])
        assert (extreme | ~changed).all()
        hit[share] = extreme.all(dim=1)
        assert hit[share].double().mean().item() == pytest.approx(share, abs=0.01)
    assert (hit[0.3] | ~hit[0.1]).all()
    salted = (corrupt(images, "salt_and_pepper", 1.0)[:, 0] == high[0]).double().mean().item()
    assert salted == pytest.approx(0.5, abs=0.02)
    custom = corrupt(images, "salt_and_pepper", 1.0, low=-9.0, high=9.0)
    assert set(custom.unique().tolist()) == {-9.0, 9.0}


@pytest.mark.parametrize("sigma", [0.3, 0.8, 2.5])
def test_blur_equals_scipys(sigma):
    images = draw(3).double()
    reach = max(1, int(np.ceil(3 * sigma)))
    theirs = ndimage.gaussian_filter(images.numpy(), sigma, mode="nearest", axes=(2, 3), radius=reach)
    np.testing.assert_allclose(corrupt(images, "blur", sigma).numpy(), theirs, atol=1e-12)


@pytest.mark.parametrize("step", [1, 3, 7, 8, 50])
def test_shift_equals_scipys_in_one_of_four_directions(step):
    images = draw(40)
    moved = corrupt(images, "shift", step, low=-5.0)
    seen = set()
    for before, after in zip(images.numpy(), moved.numpy(), strict=True):
        fits = [
            (dy, dx)
            for dy, dx in ((step, 0), (-step, 0), (0, step), (0, -step))
            if np.array_equal(after, ndimage.shift(before, (0, dy, dx), order=0, mode="constant", cval=-5.0))
        ]
        assert fits
        seen.update(fits[:1])
    assert len(seen) == (4 if step < 7 else 3 if step < 9 else 1)
    assert torch.equal(corrupt(images, "shift", 1)[:, 0].amin(), images[:, 0].amin())


def test_contrast_keeps_means_and_scales_spread():
    images = draw()
    flat = corrupt(images, "contrast", 1)
    torch.testing.assert_close(flat, images.mean(dim=(2, 3), keepdim=True).expand_as(images))
    some = corrupt(images, "contrast", 0.25)
    torch.testing.assert_close(some.std(dim=(2, 3)), 0.75 * images.std(dim=(2, 3)))
    torch.testing.assert_close(some.mean(dim=(2, 3)), images.mean(dim=(2, 3)))


def test_a_registered_kind_is_used(monkeypatch):
    kind = type(CORRUPTIONS["noise"])("upside down", "switch", 1, True, lambda x, *rest: x.flip(2))
    monkeypatch.setitem(CORRUPTIONS, "flip", kind)
    images = draw()
    assert torch.equal(corrupt(images, "flip", 1), images.flip(2))


def test_a_curve_is_each_replicas_accuracy_at_each_severity():
    torch.manual_seed(0)
    models = [nn.Sequential(nn.Flatten(), nn.Linear(126, 4)) for _ in range(3)]
    images, labels = draw(50), torch.arange(50) % 4
    curve = robustness_curve(models, images, labels, "noise", [0, 0.5, 2.0], seed=1)
    assert curve.shape == (3, 3)
    for r, model in enumerate(models):
        for s, severity in enumerate((0, 0.5, 2.0)):
            right = model(corrupt(images, "noise", severity, seed=1)).argmax(1) == labels
            assert curve[r, s].item() == right.double().mean().item()


X = torch.zeros(2, 1, 3, 3)


@pytest.mark.parametrize(
    ("images", "kind", "severity", "error", "text"),
    [
        ([[1.0]], "noise", 1, TypeError, "got list"),
        (X.long(), "noise", 1, TypeError, "dtype torch.int64"),
        (X[0], "noise", 1, ValueError, r"\[N, C, H, W\], got \(1, 3, 3\)"),
        (X[..., :0], "noise", 1, ValueError, r"got \(2, 1, 3, 0\)"),
        (X / 0, "noise", 0, ValueError, "must be finite, got 18 NaN"),
        (X, "rain", 1, ValueError, "one of noise, .*contrast; got 'rain'"),
        (X, "noise", -0.1, ValueError, "standard deviation, from 0 to inf; got -0.1"),
        (X, "noise", float("nan"), ValueError, "got nan"),
        (X, "noise", float("inf"), ValueError, "got inf"),
        (X, "noise", "much", ValueError, "got 'much'"),
        (X, "noise", True, ValueError, "got True"),
        (X, "salt_and_pepper", 1.1, ValueError, "share of pixels, from 0 to 1; got 1.1"),
        (X, "contrast", 2, ValueError, "share of contrast, from 0 to 1; got 2"),
        (X, "shift", 0.5, ValueError, "whole number of pixels, from 0 to inf; got 0.5"),
        (X, "blur", 101, ValueError, "from 0 to 100; got 101"),
    ],
)
def test_bad_input_is_refused_in_words(images, kind, severity, error, text):
    with pytest.raises(error, match=text):
        corrupt(images, kind, severity)


def test_a_curve_needs_severities_and_labels_that_fit():
    with pytest.raises(ValueError, match="got none"):
        robustness_curve(nn.Flatten(), X, torch.tensor([0, 1]), "noise", [])
    with pytest.raises(ValueError, match=r"labels must have shape \(2,\) to fit the images, got \(3,\)"):
        robustness_curve(nn.Flatten(), X, torch.tensor([0, 1, 2]), "noise", [0])

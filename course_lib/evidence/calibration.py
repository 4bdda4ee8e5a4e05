"""Does a probability mean what it says? Calibration error, reliability diagrams, and the one number that repairs most.

What is fitted (a temperature, a bias) is fitted on *validation* data and applied to test data unchanged.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from course_lib.gate import whole_number

__all__ = ["Reliability", "calibration_floor", "expected_calibration_error", "fit_class_bias", "fit_temperature"]
__all__ += ["reliability"]


@dataclass(frozen=True, eq=False)
class Reliability:
    """A reliability diagram as numbers: one entry a bin of confidence.

    ``edges`` [bins + 1] run from 0 to 1, and bin m holds the confidences in (edges[m], edges[m + 1]]. ``confidence``
    and ``accuracy`` [bins] are the bins' means, NaN where a bin is empty; ``count`` [bins] its images.
    """

    edges: Tensor
    confidence: Tensor
    accuracy: Tensor
    count: Tensor

    @property
    def error(self) -> float:
        """Expected calibration error in [0, 1]: |accuracy − confidence|, weighted by the bins' counts."""
        gap = (self.accuracy - self.confidence).abs().nan_to_num()
        return float((gap * self.count).sum() / self.count.sum())


def reliability(probabilities: Tensor, labels: Tensor, *, bins: int = 15) -> Reliability:
    """Sort images into bins by confidence (their largest probability), and look how often each bin is right.

    ``probabilities`` are floating point [N, K], N ≥ 1, each row adding up to 1, and ``labels`` int64 [N], from 0 to
    K − 1; otherwise TypeError or ValueError. ``bins`` ≥ 1, of equal width, are closed on the right (Guo et al. 2017).

    >>> diagram = reliability(torch.tensor([[0.9, 0.1], [0.8, 0.2]]), torch.tensor([0, 1]), bins=2)
    >>> diagram.count.tolist(), diagram.accuracy.tolist()
    ([0, 2], [nan, 0.5])
    """
    bins = whole_number(bins, "bins")
    rows = _distributions(probabilities, labels)
    confidence, predicted = rows.max(dim=1)
    edges = torch.arange(bins + 1, dtype=torch.float64, device=rows.device) / bins
    # Compared as the probabilities were rounded: a float32 0.6 lies on the edge 0.6, not above it.
    own = probabilities.dtype
    where = (torch.bucketize(confidence.to(own), edges.to(own)) - 1).clamp(0, bins - 1)
    count = torch.bincount(where, minlength=bins)
    sums = torch.zeros(2, bins, dtype=torch.float64, device=rows.device)
    sums[0].index_add_(0, where, confidence)
    sums[1].index_add_(0, where, (predicted == labels).double())
    mean_confidence, accuracy = sums / count
    return Reliability(edges, mean_confidence, accuracy, count)


def expected_calibration_error(probabilities: Tensor, labels: Tensor, *, bins: int = 15) -> float:
    """Mean gap between confidence and accuracy over bins of confidence, weighted by their images: in [0, 1].

    At 0, of the answers given with 80 % confidence 80 % are right, and so on. It depends on ``bins``, and with few
    images it is above 0 even for a perfectly calibrated model. Arguments as for :func:`reliability` (Naeini et al.
    2015; with 15 bins Guo et al. 2017, equation 3).

    >>> expected_calibration_error(torch.tensor([[0.75, 0.25], [0.75, 0.25]]), torch.tensor([0, 1]))
    0.25
    """
    return reliability(probabilities, labels, bins=bins).error


def calibration_floor(probabilities: Tensor, *, bins: int = 15, draws: int = 100, seed: int = 0) -> float:
    """The mean expected calibration error that chance alone gives to these probabilities if they are exactly right.

    Labels are drawn from the stated probabilities (Bröcker & Smith 2007), by ``draws`` simulations. An error near this
    floor, which falls about like 1/√N, is no evidence of miscalibration. Torch's global generator is left alone.

    >>> calibration_floor(torch.full((100, 2), 0.5)) > calibration_floor(torch.full((10_000, 2), 0.5))
    True
    """
    draws, generator = whole_number(draws, "draws"), torch.Generator().manual_seed(seed)
    images = probabilities.shape[:1] if isinstance(probabilities, Tensor) else 1
    rows = _distributions(probabilities, torch.zeros(images, dtype=torch.int64)).cpu()
    labels = torch.multinomial(rows, draws, replacement=True, generator=generator)
    own = probabilities.detach().cpu()
    return sum(expected_calibration_error(own, drawn, bins=bins) for drawn in labels.T) / draws


def fit_temperature(logits: Tensor, labels: Tensor) -> float:
    """The temperature T at which softmax(z / T) gives ``labels`` the highest likelihood.

    The mean negative log-likelihood is convex in 1/T, so its slope has one zero, which is found by bisection in
    float64: no starting point, no learning rate, the same answer every time (Guo et al. 2017, section 4.2).

    ``logits`` are a *validation* set's, floating point [N, K], N ≥ 1, finite; ``labels`` int64 [N]. Above T = 1 the
    model was overconfident. The search spans a factor of 10,000 either side of the usual gap between the largest
    logit and the next; where the likelihood has no maximum an edge comes back: the lower one if every label has the
    largest logit, the upper one if the logits are worse than a guess. Logits that are all equal give 1.

    >>> z = torch.tensor([[4.0, 0.0]]).expand(4, 2)
    >>> round(fit_temperature(z, torch.tensor([0, 0, 0, 1])), 4)  # 3 of 4 right: softmax(z / T) must say 0.75
    3.641
    """
    z = _rows("logits", logits, labels)
    z = z - z.max(dim=1, keepdim=True).values
    gaps = z.where(z < 0, -torch.inf).max(dim=1).values  # a masked class does not widen them
    if not (gaps := gaps[gaps.isfinite()]).numel():
        return 1.0
    spread = -gaps.median()
    z = z / spread
    right = z.gather(1, labels[:, None]).squeeze(1)

    def slope(log_scale: float) -> float:
        """Of the negative log-likelihood by 1/T, at spread/T = exp(log_scale)."""
        expected = (torch.softmax(z * math.exp(log_scale), dim=1) * z).sum(dim=1)
        return float((expected - right).mean())

    return float(spread / math.exp(_bisect(slope, -math.log(1e4), math.log(1e4))))


def fit_class_bias(logits: Tensor, labels: Tensor, class_index: int) -> float:
    """The bias b that, added to the logit of one class, gives ``labels`` the highest likelihood.

    For a class that a student never saw: its bias has sunk, the features that tell it apart need not have. At the
    optimum the class's mean probability equals its share among the labels (after Hinton, Vinyals & Dean 2015, section
    3, who chose the bias by errors on the test set; this does not). ``logits`` [N, K] and ``labels`` int64 [N] are a
    *validation* set's; both the class ``class_index`` and others must occur, or it is a ValueError.

    >>> z = torch.tensor([[0.0, 0.0]]).expand(4, 2)
    >>> round(fit_class_bias(z, torch.tensor([0, 0, 0, 1]), 0), 4)  # log(3/4 : 1/4)
    1.0986
    """
    z = _rows("logits", logits, labels)
    index = whole_number(class_index, "class_index", 0, z.shape[1] - 1)
    share = (labels == index).double().mean().item()
    if share in (0.0, 1.0):
        raise ValueError(f"labels must hold class {index} and others, got a share of {share:g}: no bias fits them best")
    others = z.clone()
    others[:, index] = -torch.inf
    log_odds = z[:, index] - others.logsumexp(dim=1)
    reach = float(log_odds.abs().max()) + 50.0  # beyond this, every image's probability is on one side of the share
    return _bisect(lambda bias: float(torch.sigmoid(log_odds + bias).mean()) - share, -reach, reach)


def _bisect(rising: Callable[[float], float], low: float, high: float) -> float:
    """Where a rising function crosses 0, or the end that is nearer to it."""
    if rising(low) >= 0:
        return low
    if rising(high) <= 0:
        return high
    while high - low > 1e-13 * max(1.0, abs(low)):
        middle = (low + high) / 2
        low, high = (middle, high) if rising(middle) < 0 else (low, middle)
    return (low + high) / 2


def _distributions(probabilities: Tensor, labels: Tensor) -> Tensor:
    rows = _rows("probabilities", probabilities, labels)
    off = (rows.sum(dim=1) - 1).abs().max().item()
    if rows.min() < 0 or off > 1e-5 + 4 * rows.shape[1] * torch.finfo(probabilities.dtype).eps:
        found = f"a minimum of {rows.min().item():g} and a sum off by {off:g}; are these logits?"
        raise ValueError(f"probabilities must be at least 0 and add up to 1 in each row, got {found}")
    return rows


def _rows(name: str, rows: Tensor, labels: Tensor) -> Tensor:
    """Finite rows ``[N, K]`` in float64, if there is one class index in range for each."""
    if not isinstance(rows, Tensor) or not rows.is_floating_point() or getattr(labels, "dtype", 0) != torch.int64:
        kinds = " and ".join(str(getattr(given, "dtype", type(given).__name__)) for given in (rows, labels))
        raise TypeError(f"{name} must be a floating-point tensor [N, K] and labels an int64 tensor [N], got {kinds}")
    if rows.dim() != 2 or not rows.numel() or labels.shape != rows.shape[:1]:
        shapes = f"{tuple(rows.shape)} and {tuple(labels.shape)}"
        raise ValueError(f"{name} must be [N, K] with N >= 1 images and labels [N], got shapes {shapes}")
    if not rows.isfinite().all():
        raise ValueError(f"{name} must be finite, got {int((~rows.isfinite()).sum())} NaN or infinite values")
    if labels.min() < 0 or labels.max() >= rows.shape[1]:
        low, high, last = labels.min().item(), labels.max().item(), rows.shape[1] - 1
        raise ValueError(f"labels must run from 0 to {last} for {last + 1} classes, got {low} to {high}")
    return rows.detach().double()

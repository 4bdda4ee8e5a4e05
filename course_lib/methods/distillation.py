"""Knowledge distillation from logits: the loss of Hinton et al. (2015), its decoupled form, and the teacher's side.

Each loss is a pure function that goes down, runs under ``torch.func.vmap``, and computes in float32 at least. The
teacher's logits never carry a gradient. A class that both rule out (both logits −inf) costs nothing.
"""

from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from course_lib.gate import copy_model, eval_mode
from course_lib.methods.distillation_features import tap_features
from course_lib.methods.temperature import check_float, check_number, readable_truth, widen

__all__ = ["decoupled_kd_loss", "frozen", "kd_loss", "kd_terms", "soft_target_loss", "teacher_table"]

# torch would ignore the label -100 in silence; this one cannot stand in a list of classes by accident.
NO_LABEL = -(2**63)


def soft_target_loss(student_logits: Tensor, teacher_logits: Tensor, *, temperature: float | Tensor) -> Tensor:
    """T² · KL(softmax(z_t / T) ‖ softmax(z_s / T)), summed over classes and averaged over images ("batchmean").

    The gradient of the KL term by a student logit is (q_i − p_i) / T, and q − p itself shrinks like 1/T. T² takes both
    back, so that one learning rate and one alpha serve every temperature (Hinton, Vinyals & Dean 2015, section 2).

    The logits are floating point ``[..., K]``, of one shape, at least one row; the teacher's must not require a
    gradient. ``temperature`` is above 0 (a tensor without dimensions serves a grid under ``vmap``). The scalar is in
    nats and in float32 at least. TypeError, ValueError: what does not fit, with its shape or value. (NaN gives NaN.)

    >>> z = torch.tensor([[2.0, 0.0, -1.0]])
    >>> soft_target_loss(z, z, temperature=4.0)
    tensor(0.)
    """
    student, teacher, T = checked(student_logits, teacher_logits, temperature)
    log_p = torch.log_softmax(teacher / T, dim=-1)
    log_q = torch.log_softmax(student / T, dim=-1)
    return T**2 / count_rows(student) * kl_divergence(log_p, log_q)


def kd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    *,
    temperature: float | Tensor,
    alpha: float | Tensor,
    labelled: Tensor | None = None,
) -> Tensor:
    """(1 − α) · CE(y, softmax(z_s)) + α · T² · KL(softmax(z_t / T) ‖ softmax(z_s / T)), a scalar in nats.

    ``alpha`` weighs the soft term: 0 is exactly cross-entropy, 1 is exactly :func:`soft_target_loss`. (Beware when
    comparing code: some projects let alpha weigh the hard term.) Cross-entropy always uses T = 1 (Hinton et al. 2015).

    Args:
        student_logits, teacher_logits, temperature: as in :func:`soft_target_loss`, and the same errors.
        labels: int64 ``[...]``, from 0 to K − 1.
        alpha: in [0, 1] (a tensor without dimensions serves a grid under ``vmap``).
        labelled: bool ``[...]``, for a transfer set whose labels are only partly known: cross-entropy is the mean over
            the images marked here (0 in a batch without any), the soft term still the mean over all. What ``labels``
            holds elsewhere is never read. ``None``: every label counts.

    >>> student, teacher = torch.tensor([[1.0, 0.0]]), torch.tensor([[3.0, 0.0]])
    >>> kd_loss(student, teacher, torch.tensor([0]), temperature=2.0, alpha=0.5)
    tensor(0.3371)
    """
    soft = soft_target_loss(student_logits, teacher_logits, temperature=temperature)
    hard = cross_entropy(student_logits, labels, labelled)
    return mix(hard, soft, alpha)  # (1 - alpha) * hard + alpha * soft


def kd_terms(
    student_logits: Tensor, teacher_logits: Tensor, labels: Tensor, *, temperature: float | Tensor,
    alpha: float | Tensor, labelled: Tensor | None = None,
) -> dict[str, Tensor]:  # fmt: skip
    """:func:`kd_loss` by name: ``"loss"``, and, whatever alpha is, unweighted ``"ce"`` and ``"soft"`` (with its T²).

    >>> z = torch.tensor([[0.0, 0.0]])
    >>> kd_terms(z, z, torch.tensor([0]), temperature=2.0, alpha=0.5)
    {'loss': tensor(0.3466), 'ce': tensor(0.6931), 'soft': tensor(0.)}
    """
    soft = soft_target_loss(student_logits, teacher_logits, temperature=temperature)
    hard = cross_entropy(student_logits, labels, labelled)
    return {"loss": mix(hard, soft, alpha), "ce": hard, "soft": soft}


def decoupled_kd_loss(
    student_logits: Tensor, teacher_logits: Tensor, labels: Tensor, *, temperature: float | Tensor,
    alpha: float | Tensor, beta: float | Tensor,
) -> Tensor:  # fmt: skip
    """T² · (α · TCKD + β · NCKD): the soft term taken apart into "the right class or not" and "which wrong class".

    With p_y the teacher's probability of the right class, KL(p ‖ q) = TCKD + (1 − p_y) · NCKD for each image. A sure
    teacher thus silences the second term, which carries its knowledge about similar classes; here ``beta`` sets its
    weight for good. Cross-entropy is not part of it: add it with the weight you want. ``alpha`` weighs the target-class
    term (1 in the paper), ``beta`` the other (2, 6 or 8 by pair of networks in the official code), both at least 0;
    the rest is as in :func:`kd_loss` (Zhao et al. 2022, equation 7).

    >>> student, teacher = torch.tensor([[1.0, 0.0, 0.0]]), torch.tensor([[3.0, 1.0, 0.0]])
    >>> decoupled_kd_loss(student, teacher, torch.tensor([0]), temperature=1.0, alpha=1.0, beta=0.0)
    tensor(0.1661)
    """
    student, teacher, T = checked(student_logits, teacher_logits, temperature)
    check_labels(labels, student, in_range=True)
    right_p, wrong_p = decouple(torch.log_softmax(teacher / T, dim=-1), labels)
    right_q, wrong_q = decouple(torch.log_softmax(student / T, dim=-1), labels)
    target, nontarget = kl_divergence(right_p, right_q), kl_divergence(wrong_p, wrong_q)
    weighted = check_number("alpha", alpha) * target + check_number("beta", beta) * nontarget
    return T**2 / count_rows(student) * weighted


def kl_divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p ‖ q) of log-probabilities ``[..., K]``, summed over all rows."""
    p = log_p.exp()
    difference = (log_p - log_q).masked_fill(p == 0, 0.0)  # 0 · (∞ − ∞) of a class that is ruled out is 0
    return (p * difference).sum()


def count_rows(logits: Tensor) -> int:
    """Images in ``[..., K]``: the N of "batchmean"."""
    return logits.shape[:-1].numel()


def cross_entropy(logits: Tensor, labels: Tensor, labelled: Tensor | None = None) -> Tensor:
    """Mean cross-entropy over all rows of ``[..., K]``, or over those that are marked (0 if none is)."""
    labels, z = check_labels(labels, logits, labelled), widen(logits)
    z, labels = (z, labels) if z.dim() <= 2 else (z.flatten(0, -2), labels.flatten())
    try:
        each = F.cross_entropy(z, labels, reduction="mean" if labelled is None else "none", ignore_index=NO_LABEL)
    except IndexError:  # torch looks anyway, and more quickly
        check_labels(labels, z, in_range=True)
        raise
    if labelled is None:
        return each
    return each.masked_fill(~labelled.view(labels.shape), 0.0).sum() / labelled.sum().clamp_min(1)


def mix(hard: Tensor, soft: Tensor, alpha: float | Tensor) -> Tensor:
    """(1 − α) · hard + α · soft; at the ends exactly one of the two, even if the other is infinite."""
    alpha = check_number("alpha", alpha, most=1.0)
    if isinstance(alpha, float) and alpha in (0.0, 1.0):
        return soft if alpha else hard
    return (1 - alpha) * hard + alpha * soft


def decouple(log_p: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities ``[..., 2]`` of right class and rest, and ``[..., K]`` within the rest (−inf at the right)."""
    right = log_p.gather(-1, labels[..., None])
    others = log_p.scatter(-1, labels[..., None], -torch.inf)
    alone = (others == -torch.inf).all(dim=-1, keepdim=True)  # nothing but the right class: no −∞ − (−∞) below
    # 1 − p_y would round to 0 for a sure teacher; the sum over the others in log space does not.
    rest = others.masked_fill(alone, 0.0).logsumexp(dim=-1, keepdim=True)
    return torch.cat([right, rest.masked_fill(alone, -torch.inf)], dim=-1), others - rest


def frozen(teacher: nn.Module) -> nn.Module:
    """A copy of ``teacher`` that only answers: always in eval mode, never with gradients.

    The teacher stays as it was, and the copy shares no memory with it. The copy has the same names and ``state_dict``
    and a class derived from the teacher's: ``train()`` leaves it in eval mode, also when it is called through a module
    that contains it; a part that was put into train mode by itself is put back before the next answer; and answers are
    computed without gradients, whatever ``requires_grad_`` said. A compiled teacher gives a frozen, compiled copy.
    UnsupportedModel: what :func:`course_lib.gate.copy_model` refuses.

    >>> teacher = nn.Sequential(nn.Linear(4, 3), nn.Dropout(0.5))
    >>> expert = frozen(teacher).train()
    >>> expert.training, expert(torch.ones(2, 4)).requires_grad, teacher.training
    (False, False, True)
    """
    if isinstance(teacher, nn.Module) and hasattr(teacher, "_orig_mod"):  # made by torch.compile
        return type(teacher)(frozen(teacher._orig_mod), teacher.dynamo_ctx)
    still = copy_model(teacher, "freeze").requires_grad_(False)
    if not isinstance(still, _Frozen):
        still.__class__ = _frozen_class(type(still))
    return still.train()


class _Frozen:
    """Mixed in front of a module's own class by :func:`frozen`."""

    def train(self, mode: bool = True):
        return super().train(False)

    def requires_grad_(self, requires_grad: bool = True):
        return super().requires_grad_(False)

    def forward(self, *args, **kwargs):
        super().train(False)  # a part may have been put into train mode on its own
        with torch.no_grad():
            return super().forward(*args, **kwargs)

    def __reduce_ex__(self, protocol):
        return _empty_frozen, (type(self).__bases__[1],), self.__dict__


@cache
def _frozen_class(module_class: type[nn.Module]) -> type[nn.Module]:
    return type(f"Frozen{module_class.__name__}", (_Frozen, module_class), {"__doc__": module_class.__doc__})


def _empty_frozen(module_class: type[nn.Module]) -> nn.Module:
    return object.__new__(_frozen_class(module_class))


def teacher_table(
    teacher: nn.Module | Sequence[nn.Module], images: Tensor | Sequence, *, layer: str | None = None
) -> Tensor:
    """A teacher's answers to a fixed transfer set, computed once, in eval mode: the student's epochs look them up.

    Right only where image i never changes: with random augmentation the teacher must see the same view as the student
    (Beyer et al. 2022). ``images`` are ``[N, ...]``, or a split, for every teacher; or one such a teacher. The table is
    ``[N, K]`` (``[N, ...]`` of the ``layer`` of that name) for one teacher, ``[R, N, K]`` for R, without gradient.
    ValueError: no images, another number of image sets than of teachers, no such layer.

    >>> teacher_table(nn.Linear(4, 3), torch.ones(5, 4)).shape
    torch.Size([5, 3])
    """
    teachers = [teacher] if isinstance(teacher, nn.Module) else list(teacher)
    for_all = isinstance(images, Tensor) or hasattr(images, "images")
    each = [getattr(part, "images", part) for part in ([images] * len(teachers) if for_all else images)]
    if len(each) != len(teachers) or not each or not all(map(len, each)):
        shapes = [tuple(part.shape) for part in each]
        raise ValueError(f"need images for each of {len(teachers)} teachers, got images of the shapes {shapes}")
    tables = [_answers(model, part.split(1024), layer) for model, part in zip(teachers, each, strict=True)]
    return tables[0] if isinstance(teacher, nn.Module) else torch.stack(tables)


def _answers(model: nn.Module, batches: Sequence[Tensor], layer: str | None) -> Tensor:
    seen: dict[str, Tensor] = {}
    with eval_mode(model), torch.no_grad():
        if layer is None:
            return torch.cat([model(batch) for batch in batches])
        with tap_features(model, layer, seen):
            return torch.cat([(model(batch), seen[layer])[1] for batch in batches])


def checked(student: Tensor, teacher: Tensor, temperature: float | Tensor) -> tuple[Tensor, Tensor, float | Tensor]:
    """Logits of one shape, in float32 at least, the teacher's without a gradient; and a temperature above 0."""
    check_float("student_logits", student)
    check_float("teacher_logits", teacher)
    if student.shape != teacher.shape or student.numel() == 0:
        need = "student_logits and teacher_logits must have the same shape [..., K] and not be an empty batch"
        raise ValueError(f"{need}, got {tuple(student.shape)} and {tuple(teacher.shape)}")
    if teacher.requires_grad:
        raise ValueError(
            "teacher_logits require a gradient, so this loss would train the teacher: compute them with "
            "frozen(teacher), or pass teacher_logits.detach(); or are student and teacher swapped?"
        )
    T = check_number("temperature", temperature, above_zero=True)
    student = widen(student)
    return student, widen(teacher), T.to(student.dtype) if isinstance(T, Tensor) else T


def check_labels(labels: Tensor, logits: Tensor, labelled: Tensor | None = None, *, in_range: bool = False) -> Tensor:
    """Class indices, one a row of logits; 0 where the bool ``labelled`` says that there is none."""
    marks = [] if labelled is None else [("labelled", labelled, torch.bool)]
    for name, given, dtype in (("labels", labels, torch.int64), *marks):
        if not isinstance(given, Tensor) or given.dtype != dtype:
            kind = f"dtype {given.dtype}" if isinstance(given, Tensor) else type(given).__name__
            raise TypeError(f"{name} must be a {dtype} tensor, one entry a row of logits, got {kind}")
        if given.shape != logits.shape[:-1]:
            shape, fit = tuple(given.shape), tuple(logits.shape[:-1])
            raise ValueError(f"{name} must have shape {fit} to fit logits {tuple(logits.shape)}, got {shape}")
    last = logits.shape[-1] - 1
    if in_range and not readable_truth((labels.clamp(0, last) == labels).all()):
        low, high = labels.min().item(), labels.max().item()
        raise ValueError(f"labels must run from 0 to {last} for {last + 1} classes, got {low} to {high}")
    return labels if labelled is None else labels.masked_fill(~labelled, 0)  # a placeholder such as -1 is no class

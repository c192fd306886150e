"""What can be said of the pooled features of a layer: tensors in, numbers out."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import normalize, one_hot

# Strengths of the ridge probe that leave-one-out chooses among, relative to the features' variance.
_RIDGES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
# Directions with less than this part of the largest variance are rounding.
_ROUNDING = 1e-10
# So is a deviation below this part of the mean: features come in float32 or less.
_CONSTANT = 1e-6


def knn_accuracy(train: Tensor, labels: Tensor, test: Tensor, test_labels: Tensor, k: int) -> float:
    """How often the majority of the k training rows (n, D) nearest to a test row (m, D) has its label.

    Nearest by the cosine between features less the training rows' mean, which is most of what pooled features share.
    Labels are whole numbers from 0; of equally frequent ones the smallest wins.
    """
    mean = train.mean(0)
    similarity = normalize(test - mean) @ normalize(train - mean).T  # (m, n)
    nearest = labels[similarity.topk(k, dim=1).indices]  # (m, k)
    votes = one_hot(nearest, int(labels.max()) + 1).sum(1)
    return (votes.argmax(1) == test_labels).double().mean().item()


def probe_accuracy(train: Tensor, labels: Tensor, test: Tensor, test_labels: Tensor) -> float:
    """How often a linear probe, fitted on the training rows (n, D), gives a test row's (m, D) label.

    Ridge regression onto one-hot labels, on features standardised by the training rows, constant ones left out; of
    five strengths the one with the least squared error of the training rows when each is left out in turn.
    """
    mean, deviation = train.mean(0), train.std(0, correction=0)
    deviation = torch.where(deviation > _CONSTANT * mean.abs(), deviation, torch.inf)
    x, x_test = (train - mean) / deviation, (test - mean) / deviation
    targets = one_hot(labels, int(max(labels.max(), test_labels.max())) + 1).to(x.dtype)
    centre = targets.mean(0)
    y = targets - centre
    variances, directions = _principal(x)
    scores = x @ directions  # (n, r)
    products = scores.T @ y  # (r, classes)
    best, best_error = products, torch.inf
    for ridge in _RIDGES:
        shrunk = 1 / (variances + ridge * len(x))
        weights = shrunk[:, None] * products
        leverage = (scores.square() @ shrunk)[:, None] + 1 / len(x)  # the mean is fitted too
        error = ((y - scores @ weights) / (1 - leverage)).square().mean().item()
        if error < best_error:
            best, best_error = weights, error
    found = (x_test @ directions @ best + centre).argmax(1)
    return (found == test_labels).double().mean().item()


def effective_rank(features: Tensor) -> float:
    """Exp of the entropy of the singular values of the features (n, D) less their mean, as shares of their sum.

    From 1, all rows on a line, to the smaller of n and D; 0 if all rows are equal.

    Reference: Roy and Vetterli, 2007, "The effective rank: a measure of effective dimensionality".
    """
    singular = torch.linalg.eigvalsh(_gram(features - features.mean(0))).clamp_min(0).sqrt()
    if not singular.sum() > 0:
        return 0.0
    return float(torch.special.entr(singular / singular.sum()).sum().exp())


def similarities(features: Tensor) -> Tensor:
    """Inner products of the rows (n, D), centred without bias: (n * n,), of length 1 or 0; their cosine is linear CKA.

    Rows and columns lose their means as in the unbiased estimate of the Hilbert-Schmidt criterion. The usual, biased
    CKA is near 1 for any two layers that are wider than there are samples; this one is near 0 for unrelated ones.

    Reference: Song et al., 2012, "Feature selection via dependence maximization", eq. 5; Kornblith et al., 2019,
        "Similarity of neural network representations revisited", for CKA.
    """
    features = features - features.mean(0)  # changes nothing but rounding
    n = len(features)
    gram = (features @ features.T).fill_diagonal_(0)
    rows = gram.sum(0) / (n - 2)
    gram = gram - rows[:, None] - rows + gram.sum() / ((n - 1) * (n - 2))
    flat = gram.fill_diagonal_(0).flatten()
    norm = flat.norm()
    return torch.zeros_like(flat) if norm == 0 else flat / norm


def standard_error(accuracy: float, count: int) -> float:
    """That of an accuracy over so many samples, above 0 even if all or none are right (Agresti-Coull)."""
    share = (accuracy * count + 2) / (count + 4)
    return math.sqrt(share * (1 - share) / (count + 4))


def _gram(x: Tensor) -> Tensor:
    """The smaller of the two Gram matrices of x (n, D)."""
    return x @ x.T if len(x) < x.shape[1] else x.T @ x


def _principal(x: Tensor) -> tuple[Tensor, Tensor]:
    """Squared singular values (r,) and right singular vectors (D, r) of x (n, D)."""
    squares, vectors = torch.linalg.eigh(_gram(x))
    kept = squares > _ROUNDING * squares.max()
    squares, vectors = squares[kept], vectors[:, kept]
    return squares, x.T @ vectors / squares.sqrt() if len(x) < x.shape[1] else vectors

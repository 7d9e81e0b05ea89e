"""How well representations tell classes apart: by their nearest neighbours, and by a linear map."""

import torch
from torch import Tensor
from torch.nn import functional as F

NEIGHBOURS, WARMTH = 20, 0.07
RIDGE = 1.0


def knn_accuracy(features: Tensor, labels: Tensor) -> float:
    """Share of examples whose class their nearest neighbours among the others give, weighted by exp(cosine / 0.07)
    (arXiv:1805.01978, section 3.4).

    Args:
        features: [N, D]. labels: [N] int64.
    """
    if len(features) < 2:
        return 0.0
    near = F.normalize(features) @ F.normalize(features).T
    near.fill_diagonal_(-torch.inf)
    cosine, who = near.topk(min(NEIGHBOURS, len(features) - 1))
    votes = torch.zeros(len(features), int(labels.max()) + 1, dtype=features.dtype)
    votes.scatter_add_(1, labels[who], (cosine / WARMTH).exp())
    return float((votes.argmax(1) == labels).double().mean())


def linear_accuracy(features: Tensor, labels: Tensor) -> float:
    """Share of examples whose class a linear map finds that was fitted to the other half, by ridge regression of
    one-hot labels on standardised features. The halves are the examples of even and of odd number.

    Args:
        features: [N, D] float64. labels: [N] int64.
    """
    if len(features) < 4:
        return 0.0
    x = (features - features.mean(0)) / features.std(0).clamp(min=1e-6)
    x = torch.cat([x, torch.ones_like(x[:, :1])], 1)
    wanted, right = F.one_hot(labels).to(x), 0
    for fitted, tried in ((slice(0, None, 2), slice(1, None, 2)), (slice(1, None, 2), slice(0, None, 2))):
        own = x[fitted]
        weights = torch.linalg.solve(own.T @ own + RIDGE * torch.eye(x.shape[1], dtype=x.dtype), own.T @ wanted[fitted])
        right += int(((x[tried] @ weights).argmax(1) == labels[tried]).sum())
    return right / len(labels)

"""A baseline without a network: logistic regression on the pixels of an image."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from torchweld.training.images import Images

MOST = 32  # pixels across; larger images are averaged
PENALTY = 1e-4
STEPS = 100


def features(pixels: Tensor) -> Tensor:
    """(N, C, H, W) of uint8 -> (N, features), numbers in [0, 1] and a one for the bias."""
    x = pixels.float() / 255
    if max(x.shape[-2:]) > MOST:
        x = F.adaptive_avg_pool2d(x, (min(MOST, x.shape[-2]), min(MOST, x.shape[-1])))
    return F.pad(x.flatten(1), (0, 1), value=1.0)


def objective(w: Tensor, x: Tensor, labels: Tensor, penalty: float) -> Tensor:
    """The mean cross-entropy in nats, and penalty / 2 * |w|^2: w (features, classes)."""
    return F.cross_entropy(x @ w, labels) + 0.5 * penalty * w.square().sum()


def fit(x: Tensor, labels: Tensor, classes: int, penalty: float = PENALTY) -> Tensor:
    """The weights at the minimum, by L-BFGS: (features, classes)."""
    w = torch.zeros(x.shape[1], classes, requires_grad=True)
    search = torch.optim.LBFGS([w], max_iter=STEPS, history_size=20, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        search.zero_grad()
        loss = objective(w, x, labels, penalty)
        loss.backward()
        return loss

    search.step(closure)
    return w.detach()


def predict(training: Images, classes: int, asked: Tensor) -> Tensor:
    """The logits of other images: pixels (N, C, H, W) -> (N, classes)."""
    w = fit(features(training.pixels), training.labels, classes)
    return torch.cat([features(part) @ w for part in asked.split(1000)])

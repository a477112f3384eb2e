"""NE, AUC and GAUC of binary predictions, MSE and R² of regressions, as parts that merge exactly across ranks.

AUC compares all pairs of predictions, so no sums of fixed size give it exactly: parts keep their predictions, ranks
gather them, and AUC is counted in integers from the sorted whole.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class BinaryPredictions:
    """Predictions beside what happened. Adding two of them merges batches or ranks.

    Attributes:
        logits: [n] floating.
        labels: [n] bool.
        groups: [n] int64, whose prediction it is, for GAUC.
    """

    logits: Tensor
    labels: Tensor
    groups: Tensor

    @classmethod
    def empty(cls, device: torch.device) -> BinaryPredictions:
        """No prediction."""
        nothing = torch.empty(0, device=device)
        return cls(nothing, nothing.to(torch.bool), nothing.to(torch.int64))

    def __add__(self, other: BinaryPredictions) -> BinaryPredictions:
        return BinaryPredictions(
            torch.cat([self.logits, other.logits]),
            torch.cat([self.labels, other.labels]),
            torch.cat([self.groups, other.groups]),
        )

    def values(self) -> dict[str, float]:
        """Metrics of all predictions.

        Returns:
            ne: mean log loss over the entropy of the share of positives (normalised entropy; 1 says as much as that
            share); log_loss; auc, ties count half; gauc, the AUC of each group with both classes, weighted by its
            predictions, which is left out if there is no such group.

        Raises:
            ValueError: a logit is no number, or the labels are all of one class, so that entropy and AUC do not exist.
        """
        n, positive = self.labels.numel(), int(self.labels.sum())
        if not bool(self.logits.isfinite().all()):
            raise ValueError(f"predictions: got {int((~self.logits.isfinite()).sum())} of {n} that are no numbers")
        if positive in (0, n):
            raise ValueError(f"labels: got {positive} positives of {n}, expected both classes: NE is undefined")
        logits, labels = self.logits.to(torch.float64), self.labels.to(torch.float64)
        log_loss = float(F.binary_cross_entropy_with_logits(logits, labels))
        share = labels.mean()
        entropy = float(F.binary_cross_entropy(share, share))
        area, _ = areas(self.logits, self.labels, torch.zeros_like(self.groups))
        found = {"ne": log_loss / entropy, "auc": float(area[0]), "log_loss": log_loss}
        _, dense = self.groups.unique(return_inverse=True)
        area, sizes = areas(self.logits, self.labels, dense)
        both = ~area.isnan()
        if bool(both.any()):
            found["gauc"] = float((area[both] * sizes[both]).sum() / sizes[both].sum())
        return found


def areas(scores: Tensor, labels: Tensor, groups: Tensor) -> tuple[Tensor, Tensor]:
    """Area under the ROC curve of each group: the share of (positive, negative) pairs in order, ties count half.

    Args:
        scores: [n] finite.
        labels: [n] bool.
        groups: [n] int64 in [0, G), every one of which occurs.

    Returns:
        [G] float64, NaN where a class is missing; [G] int64, members of each group.
    """
    order = scores.argsort(stable=True)
    order = order[groups[order].argsort(stable=True)]
    score, label, group = scores[order], labels[order], groups[order]
    sizes = torch.bincount(group)
    start = sizes.cumsum(0) - sizes
    new = torch.ones_like(label)
    new[1:] = (score[1:] != score[:-1]) | (group[1:] != group[:-1])
    block = new.cumsum(0) - 1
    length = torch.bincount(block)
    first = length.cumsum(0) - length
    # twice the mean rank, from 1, that the members of a block share within their group: whole numbers
    doubled = 2 * (first[block] - start[group]) + length[block] + 1
    positives = torch.zeros_like(sizes).index_add_(0, group, label.to(torch.int64))
    ranked = torch.zeros_like(sizes).index_add_(0, group, doubled * label)
    wins = ranked - positives * (positives + 1)
    pairs = 2 * positives * (sizes - positives)
    return torch.where(pairs > 0, wins.to(torch.float64) / pairs, torch.nan), sizes


@dataclass(frozen=True)
class RegressionSums:
    """Sums over predictions; `values` divides. Adding two of them merges batches or ranks.

    Attributes:
        sums: [5] float64: predictions, squared errors, absolute errors, labels, squared labels.
    """

    sums: Tensor

    @classmethod
    def of(cls, predicted: Tensor, labels: Tensor) -> RegressionSums:
        """Sums of predictions [n] and labels [n]."""
        exact, error = labels.to(torch.float64), predicted.to(torch.float64) - labels
        count = exact.new_tensor(float(exact.numel()))
        return cls(torch.stack([count, (error**2).sum(), error.abs().sum(), exact.sum(), (exact**2).sum()]))

    @classmethod
    def empty(cls, device: torch.device) -> RegressionSums:
        """Sums over no prediction."""
        return cls(torch.zeros(5, dtype=torch.float64, device=device))

    def __add__(self, other: RegressionSums) -> RegressionSums:
        return RegressionSums(self.sums + other.sums)

    def values(self) -> dict[str, float]:
        """mse, mae, and r2: 1 - mse over the variance of the labels.

        Raises:
            ValueError: there is no prediction, one is no number, or all labels are equal, so that R² does not exist.
        """
        n, squared, absolute, total, squares = self.sums.tolist()
        if n == 0 or squared != squared or squared == float("inf"):
            raise ValueError("regression: got no prediction, or one that is no number")
        variance = squares / n - (total / n) ** 2
        if variance <= 1e-12 * squares / n:
            raise ValueError(f"labels: got {n:.0f} equal ones, expected different ones: R² is undefined")
        return {"mse": squared / n, "mae": absolute / n, "r2": 1 - squared / n / variance}

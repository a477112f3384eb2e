"""Splits of whole sequences, in the order of the data set: the last ones are tested, those before them validate.

Every event but the first of a sequence is a target. It suits streams of records that have no user in common: nothing
of a held-out record is ever trained on.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from hstu_dist.data.split import Split

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class RecordSplit:
    """Where a data set is cut.

    Attributes:
        validation_share: of all sequences.
        test_share: of all sequences.
        train: most recent sequences that are trained on; None: all that are not held out.
        evaluated: sequences of a held-out part that are evaluated, evenly spread over it; None: all.
    """

    validation_share: float
    test_share: float
    train: int | None = None
    evaluated: int | None = None

    def sequences(self, count: int, split: Split) -> Ints:
        """Ascending indices of a split's sequences.

        Args:
            count: sequences of the data set.
            split: which part.
        """
        start, end = self.bounds(count, split)
        training = split in (Split.TRAIN, Split.TRAIN_VALIDATION)
        if training or self.evaluated is None or self.evaluated >= end - start:
            return np.arange(start, end)
        return start + np.arange(self.evaluated) * (end - start) // self.evaluated

    def bounds(self, count: int, split: Split) -> tuple[int, int]:
        """First sequence of a split and the one after its last; of held-out parts before they are thinned out."""
        test = count - round(count * self.test_share)
        validation = test - round(count * self.validation_share)
        match split:
            case Split.TRAIN | Split.TRAIN_VALIDATION:
                end = validation if split is Split.TRAIN else test
                return 0 if self.train is None else max(0, end - self.train), end
            case Split.VALIDATION:
                return validation, test
            case Split.TEST:
                return test, count

    def parts(self, lengths: Ints, split: Split) -> Ints:
        """[S] int64, how many of each sequence's first events belong to a split: all or none.

        Args:
            lengths: [S] int64, events of every sequence.
            split: which part.
        """
        chosen = self.sequences(len(lengths), split)
        found = np.zeros_like(lengths)
        found[chosen] = lengths[chosen]
        return found

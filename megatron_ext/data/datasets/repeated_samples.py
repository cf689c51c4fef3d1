"""Repeats the same samples in every epoch, in another order, for what is stored by sample (the activation cache).

mcore's dataset packs documents differently when it repeats them, so no sequence comes twice. Here the first n samples
are an epoch, and the epochs follow one another. Blocks of samples are shuffled, not single samples: if a block is the
micro-batches of all data-parallel ranks, a micro-batch always holds the same samples, on the same rank.
"""

from typing import Any

import numpy as np
import numpy.typing as npt
import torch

Sample = dict[str, torch.Tensor]


class RepeatedDataset(torch.utils.data.Dataset[Sample]):
    """Epochs of the same samples; every sample gets the field `epoch`."""

    def __init__(self, dataset: Any, *, epoch_samples: int, block: int, num_samples: int, seed: int) -> None:
        """Args:
        dataset: samples as dictionaries of tensors.
        epoch_samples: number of samples in an epoch, rounded down to whole blocks; at most the dataset's.
        block: number of samples that stay together.
        num_samples: length over all epochs.
        seed: determines the order; the first epoch has the dataset's order.

        Raises:
            ValueError: an epoch is shorter than one block.
        """
        self.dataset, self.block, self.num_samples, self.seed = dataset, block, num_samples, seed
        self.blocks = min(epoch_samples, len(dataset)) // block
        if self.blocks == 0:
            raise ValueError(
                f"--epoch-samples {epoch_samples}: of {len(dataset)} samples, is less than the {block} that all "
                "processes read at a time"
            )
        self._order: tuple[int, npt.NDArray[np.int64]] = (0, np.arange(self.blocks))

    def __len__(self) -> int:
        return self.num_samples

    def __getitem__(self, number: int) -> Sample:
        epoch, place = divmod(number, self.blocks * self.block)
        block, offset = divmod(place, self.block)
        if self._order[0] != epoch:
            order = np.arange(self.blocks)
            if epoch:
                order = np.random.default_rng((self.seed, epoch)).permutation(self.blocks)
            self._order = epoch, order
        sample = self.dataset[int(self._order[1][block]) * self.block + offset]
        return {**sample, "epoch": torch.tensor(epoch)}

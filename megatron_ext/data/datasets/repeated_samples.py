"""The same samples in every epoch, in another order: for what is kept by sample, as the activation cache does.

mcore's dataset packs documents anew when it repeats them, so that no sequence comes twice. Here the first n samples
are an epoch, and the epochs follow one another. Blocks of samples are shuffled, not samples: with blocks of a step's
micro-batches on all data-parallel ranks, a micro-batch always holds the same samples, on the same rank.
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
        epoch_samples: the first so many are an epoch, down to whole blocks; all of them if there are fewer.
        block: samples that stay together.
        num_samples: over all epochs.
        seed: of the order; the first epoch has the dataset's.

        Raises:
            ValueError: an epoch has less than one block.
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

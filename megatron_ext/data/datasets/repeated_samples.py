"""Repeats the same samples in every epoch, each time in a new order, so that their cached activations are reused.

mcore's dataset packs documents differently when it repeats them, so the same sequence never occurs twice. Here an
epoch consists of the first n samples; after `repeats` epochs, the next n samples replace them. Blocks of samples are
shuffled instead of single samples. If a block holds the micro-batches of all data-parallel ranks, every micro-batch
always has the same samples and is read by the same rank.
"""

from typing import Any

import numpy as np
import numpy.typing as npt
import torch

Sample = dict[str, torch.Tensor]


class RepeatedDataset(torch.utils.data.Dataset[Sample]):
    """A dataset whose epochs repeat the same samples; adds the field `epoch` to each sample."""

    def __init__(
        self,
        dataset: Any,
        *,
        epoch_samples: int,
        block: int,
        num_samples: int,
        seed: int,
        repeats: int | None = None,
    ) -> None:
        """Args:
        dataset: the samples to repeat, as dictionaries of tensors.
        epoch_samples: number of samples in an epoch, rounded down to whole blocks; at most the dataset's size.
        block: number of consecutive samples that stay together when the order changes.
        num_samples: number of samples in all epochs together.
        seed: decides the order of samples in every epoch, except in epochs with new samples, which keep the dataset's
            order.
        repeats: number of epochs before new samples replace the old ones; None repeats the same samples in all
            epochs.

        Raises:
            ValueError: an epoch is shorter than one block.
        """
        self.dataset, self.block, self.num_samples, self.seed = dataset, block, num_samples, seed
        self.repeats = repeats
        self.blocks = min(epoch_samples, len(dataset)) // block
        if self.blocks == 0:
            raise ValueError(
                f"--epoch-samples {epoch_samples}: an epoch must hold at least the {block} samples "
                f"that all processes together read in one micro-batch (the dataset has {len(dataset)})"
            )
        self._order: tuple[int, npt.NDArray[np.int64]] = (0, np.arange(self.blocks))

    def __len__(self) -> int:
        return self.num_samples

    def __getitem__(self, number: int) -> Sample:
        epoch, place = divmod(number, self.blocks * self.block)
        block, offset = divmod(place, self.block)
        new, repeat = divmod(epoch, self.repeats) if self.repeats is not None else (0, epoch)
        if self._order[0] != epoch:
            order = np.arange(self.blocks)
            if repeat:
                order = np.random.default_rng((self.seed, epoch)).permutation(self.blocks)
            self._order = epoch, order
        block = new * self.blocks + int(self._order[1][block])
        sample = self.dataset[block * self.block + offset]
        return {**sample, "epoch": torch.tensor(epoch)}

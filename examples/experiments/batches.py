"""Batches of a run: in an order and with an augmentation that seed and epoch decide alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torch.utils.data.distributed import DistributedSampler

from .data import Data
from .folders import Drawn
from .images import Images
from .options import Options
from .place import Place

TEST_BATCH = 500


class BatchError(RuntimeError):
    """The training images do not make batches of the size that was asked for."""


def _seed(seed: int, epoch: int, rank: int) -> int:
    return seed * 1_000_003 + epoch * 1_009 + rank


@dataclass(eq=False)
class MemoryBatches:
    """Training batches of images in memory."""

    images: Images
    size: int
    augmented: bool
    seed: int
    at: Place
    epoch: int = 0

    def __len__(self) -> int:
        return len(self.images) // self.at.world // self.size

    def order(self) -> Tensor:
        """Return the indices of this process in this epoch."""
        generator = torch.Generator().manual_seed(_seed(self.seed, self.epoch, -1))
        return torch.randperm(len(self.images), generator=generator)[self.at.rank :: self.at.world]

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        draws = torch.Generator().manual_seed(_seed(self.seed, self.epoch, self.at.rank))
        for indices in self.order().split(self.size)[: len(self)]:
            yield self.images.batch(indices, draws if self.augmented else None)


@dataclass(eq=False)
class LoadedBatches:
    """Training batches of a data set that reads its images from files."""

    dataset: Dataset[Any]
    size: int
    options: Options
    at: Place
    epoch: int = 0

    def __post_init__(self) -> None:
        # The sampler adds the epoch to its seed: seeds must lie further apart than epochs.
        self.sampler: DistributedSampler[Any] = DistributedSampler(
            self.dataset, self.at.world, self.at.rank, shuffle=True, seed=_seed(self.options.seed, 0, 0), drop_last=True
        )
        self.drawn = Drawn(self.dataset, self.options.seed)
        self.loader = _loader(self.drawn, self.size, self.options, self.at, sampler=self.sampler, drop_last=True)

    def __len__(self) -> int:
        return len(self.sampler) // self.size

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        self.sampler.set_epoch(self.epoch)
        self.drawn.epoch = self.epoch  # before the loader's processes start, which they do anew each time
        for images, labels in self.loader:
            yield images.to(self.at.device), labels.to(self.at.device)


def _loader(dataset: Dataset[Any], size: int, options: Options, at: Place, **more: Any) -> DataLoader[Any]:
    return DataLoader(dataset, size, num_workers=options.workers, pin_memory=at.device.type == "cuda", **more)


def training(data: Data, options: Options, at: Place) -> MemoryBatches | LoadedBatches:
    """Return the training batches of this process; the recipe's batch is that of all processes.

    Raises:
        BatchError: it cannot be divided among the processes, or there are too few images for one.
    """
    batch = options.plan().batch
    if batch % at.world:
        raise BatchError(f"a batch of {batch} does not divide into {at.world} processes; give another --batch")
    size, images = batch // at.world, len(data.train)  # type: ignore[arg-type]
    if images // at.world < size:
        raise BatchError(f"{images} training images make no batch of {batch}; give a smaller --batch")
    if isinstance(data.train, Images):
        return MemoryBatches(data.train.to(at.device), size, data.augmented, options.seed, at)
    return LoadedBatches(data.train, size, options, at)


def testing(data: Data, options: Options, at: Place) -> list[tuple[Tensor, Tensor]] | DataLoader[Any]:
    """Return the test batches, as they are wanted after every epoch."""
    if not isinstance(data.test, Images):
        return _loader(data.test, min(TEST_BATCH, options.plan().batch), options, at)
    images = data.test.to(at.device)
    return [images.batch(indices) for indices in torch.arange(len(images)).split(TEST_BATCH)]

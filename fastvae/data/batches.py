"""Batches of images: their order, their loading, and their labels."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset

from .dataset import ArrayImages


def epoch_order(n_images: int, batch_size: int, *, seed: int, epoch: int) -> list[list[int]]:
    """Which images make up each batch of an epoch: a permutation that follows from (seed, epoch) alone.

    A resumed run therefore finds its place in the epoch from the step. Every batch is full; the remainder is left out.
    """
    order = np.random.default_rng([seed, epoch]).permutation(n_images)
    n_batches = n_images // batch_size
    return order[: n_batches * batch_size].reshape(n_batches, batch_size).tolist()


def load_batches(
    dataset: Dataset[Any], order: Sequence[Sequence[int]], *, workers: int = 0, device: torch.device | None = None
) -> Iterable[Tensor]:
    """Image tensors [batch, C, H, W], uint8 or float in [0, 1], one for each list of `order`.

    Draws nothing from torch's default generator, so that loading does not move the noise of the training.
    """
    pinned = device is not None and device.type == "cuda"
    if not pinned and not workers and (found := _in_memory(dataset)) is not None:
        images, rows = found
        return batches_of(images, order, rows)
    return DataLoader(
        dataset,
        batch_sampler=order,  # type: ignore[arg-type]
        num_workers=workers,
        collate_fn=stack_images,
        pin_memory=pinned,
        generator=torch.Generator(),
    )


def _in_memory(dataset: Any) -> tuple[Tensor, Tensor] | None:
    """Images that one array holds, and which of them make up the data set; None of others.

    To copy the rows of a batch at once takes a fifth of the time of fetching and stacking them one by one.
    """
    rows = torch.arange(len(dataset), device="cpu")
    while type(dataset) is Subset:
        rows, dataset = torch.tensor(dataset.indices, device="cpu")[rows], dataset.dataset
    return (dataset.images, rows) if type(dataset) is ArrayImages else None


def resident_images(dataset: Dataset[Any], device: torch.device, cache: str, *, workers: int = 0) -> Tensor | None:
    """All images as one tensor on the device, where they are to stay; None where each epoch loads them.

    Args:
        dataset: Images [C, H, W] of one size.
        device: Where the training is.
        cache: "device": always; "none": never; "auto": on an accelerator with room for four times as much.
        workers: Processes that load images.
    """
    n_images = len(dataset)  # type: ignore[arg-type]
    first = stack_images([dataset[0]])
    if cache == "none" or (cache == "auto" and 4 * n_images * first.nbytes > free_bytes(device)):
        return None
    images = torch.empty((n_images, *first.shape[1:]), dtype=first.dtype, device=device)
    place = 0
    for batch in all_batches(dataset, 512, workers=workers, device=device):
        images[place : place + len(batch)].copy_(batch, non_blocking=True)
        place += len(batch)
    return images


def free_bytes(device: torch.device) -> int:
    """Memory of an accelerator that nobody has taken; 0 of others, and where it is not known."""
    tell = None if device.type == "cpu" else getattr(torch.get_device_module(device), "mem_get_info", None)
    return 0 if tell is None else int(tell(device)[0])


def batches_of(images: Tensor, order: Sequence[Sequence[int]], rows: Tensor | None = None) -> Iterator[Tensor]:
    """As `load_batches`, of images that one tensor holds, on its device; `rows`: those of the data set, all if None."""
    indices = torch.tensor([i for batch in order for i in batch], dtype=torch.int64, device=images.device)
    indices = indices if rows is None else rows[indices]
    for batch in torch.split(indices, [len(batch) for batch in order]):
        yield images.index_select(0, batch)


def mirrored(images: Tensor, *, seed: int, step: int, first: int) -> Tensor:
    """A batch of a training step, half of whose images are mirrored left to right.

    Args:
        images: [b, C, H, W].
        seed: With the step and an image's place in the whole batch it decides which.
        step: Updates done.
        first: Place of the first image in the whole batch, which several processes may share.
    """
    drawn = np.random.default_rng([seed, step, 1]).random(first + len(images))[first:] < 0.5
    return torch.where(torch.from_numpy(drawn).to(images.device)[:, None, None, None], images.flip(3), images)


def all_batches(
    dataset: Dataset[Any], batch_size: int, *, workers: int = 0, device: torch.device | None = None
) -> Iterable[Tensor]:
    """All images in their own order; the last batch may be smaller."""
    n_images = len(dataset)  # type: ignore[arg-type]
    order = [list(range(i, min(i + batch_size, n_images))) for i in range(0, n_images, batch_size)]
    return load_batches(dataset, order, workers=workers, device=device)


def stack_images(samples: Sequence[Any]) -> Tensor:
    """One tensor [batch, C, H, W] of the images of a batch; of (image, label, ...) samples, the image.

    Raises:
        ValueError: an image is not [C, H, W].
        TypeError: a sample is neither a tensor nor a tuple that starts with one.
    """
    images = [sample[0] if isinstance(sample, tuple | list) else sample for sample in samples]
    first = images[0]
    if not isinstance(first, Tensor):
        raise TypeError(
            f"a dataset must give tensors, or tuples that start with one; got {type(first).__name__}. "
            "Convert the images in its __getitem__."
        )
    if first.ndim != 3:
        raise ValueError(
            f"a dataset must give images [channels, height, width]; got {tuple(first.shape)}. "
            "Use unsqueeze(0) on gray images."
        )
    return torch.stack(images)


def spread_images(dataset: Dataset[Any], n: int) -> Tensor:
    """`n` images (all, if there are fewer) at even distances, as one tensor."""
    images: Tensor = next(iter(load_batches(dataset, [spread(len(dataset), n)])))  # type: ignore[arg-type]
    return images


def spread(total: int, n: int) -> list[int]:
    """`n` indices (all, if there are fewer) at even distances below `total`."""
    return [i * total // min(n, total) for i in range(min(n, total))]


def labels_of(dataset: Any) -> Tensor | None:
    """Labels of the images, if the dataset (or the one that it is a subset of) has an attribute `labels`."""
    if hasattr(dataset, "indices") and hasattr(dataset, "dataset"):
        labels = labels_of(dataset.dataset)
        return None if labels is None else labels[torch.as_tensor(dataset.indices)]
    labels = getattr(dataset, "labels", None)
    return None if labels is None else torch.as_tensor(labels)


def class_names_of(dataset: Any) -> Sequence[str] | None:
    """Names of the labels 0, 1, ..., if the dataset (or the one that it is a subset of) has `class_names`."""
    while hasattr(dataset, "indices") and hasattr(dataset, "dataset"):
        dataset = dataset.dataset
    return getattr(dataset, "class_names", None)

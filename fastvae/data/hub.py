"""Images of a Hugging Face data set, decoded as they are asked for."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .dataset import DataError
from .images import GREY_MODES, EncodedImages


class HubImages(EncodedImages):
    """A column of images of `datasets.load_dataset(name, split=split)`, or of a folder that `save_to_disk` made.

    Args:
        name: Of the data set, or a folder.
        split: One of the data set's; of a folder of a single split, without a meaning.
        column: The first column of images if None.
        image_size: (height, width) to crop and resize to, antialiased bicubic; None: sizes must agree.
        strict: Whether a row without an image, or with one that cannot be read, is an error; if not, every image is
            decoded once here, and those that cannot be are left out. All images are looked at in either case.

    Attributes:
        labels: The column `label` or `labels`, if there is one of whole numbers; else None.
        skipped: Why each image was left out, by its row.

    Raises:
        ImportError: the package datasets is not installed.
        DataError: no such data set or split, no column of images, or an image that a folder would refuse.
    """

    labels: Tensor | None

    def __init__(
        self,
        name: str,
        split: str = "train",
        column: str | None = None,
        image_size: tuple[int, int] | None = None,
        *,
        strict: bool = True,
    ) -> None:
        try:
            import datasets
        except ImportError as error:
            raise ImportError('data of Hugging Face needs datasets: pip install "fastvae-triton[train,hf]"') from error
        self.name = name
        rows = _rows(datasets, name, split)
        images = [key for key, feature in rows.features.items() if isinstance(feature, datasets.Image)]
        if column is None and not images:
            raise DataError(f"{name} has no column of images; its columns are {', '.join(rows.features)}.")
        if column is not None and column not in images:
            raise DataError(
                f"{column!r} is no column of images of {name}; those are {', '.join(images) or 'none'}. "
                "Pass hf:NAME:SPLIT:COLUMN."
            )
        if len(rows) == 0:
            raise DataError(f"{name} has no rows. Choose another split.")
        self._column = column or images[0]
        mode = rows.features[self._column].mode  # to convert to, if the data set names one
        self._images = rows.select_columns([self._column]).cast_column(self._column, datasets.Image(decode=False))
        self.skipped = {}
        self._rows: Sequence[int] = range(len(rows))
        self._rows = self._check_all(name, image_size, strict=strict)
        if mode is not None:
            self.shape = (1 if mode in GREY_MODES else 3, *self.shape[1:])
        label = next((key for key in ("labels", "label") if _is_integer(rows.features.get(key))), None)
        self.labels = None if label is None else torch.tensor(rows[label][:], device="cpu")[self._rows]
        self.class_names = getattr(rows.features.get(label), "names", None)

    def __len__(self) -> int:
        return len(self._rows)

    def _encoded(self, index: int) -> tuple[str, Path | bytes | None]:
        row = self._rows[index]
        found = self._images[row][self._column] or {}
        path = found.get("path")
        return f"image {row} of {self.name}", found.get("bytes") or (Path(path) if path else None)


def _rows(datasets: Any, name: str, split: str) -> Any:
    folder = Path(name).expanduser()
    try:
        found = datasets.load_from_disk(str(folder)) if folder.is_dir() else datasets.load_dataset(name, split=split)
    except Exception as error:  # errors of its own, of the network, of Arrow for damaged files, ValueError for a split
        raise DataError(f"{name} cannot be loaded as a Hugging Face data set: {error}") from error
    if not isinstance(found, datasets.DatasetDict):
        return found
    if split not in found:
        raise DataError(f"{name} has no split {split!r}; it has {', '.join(found)}. Pass hf:NAME:SPLIT.")
    return found[split]


def _is_integer(feature: Any) -> bool:
    return str(getattr(feature, "dtype", "")).startswith("int")

"""Images of a Hugging Face data set, decoded as they are asked for."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .dataset import DataError, ImageDataset
from .folder import GREY_MODES, pixels_of


class HubImages(ImageDataset):
    """A column of images of `datasets.load_dataset(name, split=split)`, or of a folder that `save_to_disk` made.

    Args:
        name: Of the data set, or a folder.
        split: One of the data set's; of a folder of a single split, without a meaning.
        column: The first column of images if None.
        image_size: (height, width) to resize to, antialiased bicubic; None: sizes must agree.

    Attributes:
        labels: The column `label` or `labels`, if there is one of whole numbers.

    Raises:
        ImportError: the package datasets is not installed.
        DataError: no such split, no column of images, or an image of another size.
    """

    def __init__(
        self,
        name: str,
        split: str = "train",
        column: str | None = None,
        image_size: tuple[int, int] | None = None,
    ) -> None:
        try:
            import datasets
        except ImportError as error:
            raise ImportError('data of Hugging Face needs datasets: pip install "fastvae-triton[train,hf]"') from error
        self.name = name
        rows: Any
        if Path(name).expanduser().is_dir():
            rows = datasets.load_from_disk(str(Path(name).expanduser()))
            if isinstance(rows, datasets.DatasetDict):
                if split not in rows:
                    raise DataError(f"{name} has no split {split!r}; it has {', '.join(rows)}. Pass hf:NAME:SPLIT.")
                rows = rows[split]
        else:
            rows = datasets.load_dataset(name, split=split)
        images = [key for key, feature in rows.features.items() if isinstance(feature, datasets.Image)]
        if column is None and not images:
            raise DataError(f"{name} has no column of images; its columns are {', '.join(rows.features)}.")
        if column is not None and column not in images:
            raise DataError(
                f"{column!r} is no column of images of {name}; those are {', '.join(images) or 'none'}. "
                "Pass hf:NAME:SPLIT:COLUMN."
            )
        self._images = rows.select_columns([column or images[0]])
        self._column = column or images[0]
        if len(rows) == 0:
            raise DataError(f"{name} has no rows. Choose another split.")
        first = self._image(0)
        self._resized = image_size is not None
        self.shape = (1 if first.mode in GREY_MODES else 3, *(image_size or (first.height, first.width)))
        for key in ("label", "labels"):
            if str(getattr(rows.features.get(key), "dtype", "")).startswith("int"):
                self.labels = torch.tensor(rows[key][:])

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> Tensor:
        image = self._image(index)
        if not self._resized and (image.height, image.width) != self.shape[1:]:
            raise DataError(
                f"images of one size are needed; image {index} of {self.name} is {image.height} x {image.width}, the "
                f"first {self.shape[1]} x {self.shape[2]} (height x width). Pass --image-size H W to resize."
            )
        return pixels_of(image, self.shape)

    def _image(self, index: int) -> Any:
        return self._images[index][self._column]

"""The split of a run's data: which images it trains on and which it holds out, kept in the run folder."""

import io
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from torch.utils.data import Dataset, Subset

from fastvae import data
from fastvae.data import Identity

from .._files import require_regular, write_bytes
from .config import TrainConfig

SPLIT_FILE = "split.npz"


@dataclass(frozen=True)
class Split:
    """Training and validation images of a run, by index and by content.

    Attributes:
        source: Where the images are from, with an absolute path; empty for a data set made in Python.
        identity: Content of the whole data set.
        train: [n_train] int64 indices of the training images.
        validation: [n_validation] int64 indices of the validation images.
    """

    source: str
    identity: Identity
    train: npt.NDArray[np.int64]
    validation: npt.NDArray[np.int64]

    @classmethod
    def of(cls, dataset: Dataset[Any], source: str, *, validation: float) -> "Split":
        """A new split that holds out the share `validation`; see `fastvae.data.split`."""
        train, held_out = (np.array(part.indices) for part in data.split(dataset, validation=validation))
        return cls(source, data.identify(dataset), train, held_out)

    @classmethod
    def load(cls, run: Path) -> "Split | None":
        """The split of a run folder; None for a run of a version that kept none.

        Raises:
            ValueError: the file is damaged.
        """
        path = run / SPLIT_FILE
        if not path.exists():
            return None
        require_regular(path)
        content = path.read_bytes()
        try:
            with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
                train, validation, keys = arrays["train"], arrays["validation"], arrays["keys"]
                images = len(train) + len(validation)
                identity = Identity(images, str(arrays["digest"]), keys if len(keys) else None)
                return cls(str(arrays["source"]), identity, train, validation)
        except Exception as error:  # NumPy raises almost anything for damaged bytes
            raise ValueError(
                f"{path} is damaged, so that the run's validation images are not known: copy it again, or start a new "
                "run."
            ) from error

    def save(self, run: Path) -> None:
        """Write the split to a run folder."""
        buffer = io.BytesIO()
        keys = np.empty(0, np.uint64) if self.identity.keys is None else self.identity.keys
        arrays: dict[str, Any] = {"train": self.train, "validation": self.validation, "keys": keys}
        np.savez(buffer, source=self.source, digest=self.identity.digest, **arrays)
        write_bytes(run / SPLIT_FILE, buffer.getvalue())

    def subsets(self, dataset: Dataset[Any]) -> tuple[Subset[Any], Subset[Any]]:
        """(train, validation) of the same data set."""
        return Subset(dataset, self.train.tolist()), Subset(dataset, self.validation.tolist())

    def require_same(self, found: Identity, run: Path) -> None:
        """Check that a run would continue with the images it began with.

        Raises:
            ValueError: the images are others.
        """
        if found.digest != self.identity.digest:
            raise ValueError(
                f"the run {run} was trained on other images: {self.changes(found)}. Restore the data of "
                f"{self.source!r}, or start a new run."
            )

    def changes(self, found: Identity) -> str:
        """How other images differ from those of the run, in words."""
        then, now = self.identity, found
        words = f"it had {then.images}, now there are {now.images}"
        if then.keys is None or now.keys is None:
            return f"{words} with other content" if then.images == now.images else words
        missing, new = (~np.isin(then.keys, now.keys)).sum(), (~np.isin(now.keys, then.keys)).sum()
        if not missing and not new and then.images == now.images:
            return f"{words}, in another order"
        return f"{words}; {missing} are missing, {new} are new"

    def unseen(self, dataset: Dataset[Any], source: str, *, is_own: bool) -> tuple[Subset[Any], Subset[Any], str]:
        """Images that the run was not trained on, those that it was, and words for the first.

        Of the run's own data, recognised by its content, the first are the validation images; if images were added,
        removed or moved since, those validation images that are still there. Of other data they are all images that the
        run was not trained on, or simply all, if it or they have no hashes of single images (`fastvae.data.identify`).
        If the run was trained on none, the second are the same as the first.

        Args:
            dataset: Images.
            source: Where they are from.
            is_own: Whether this is where the run's own images came from.

        Raises:
            ValueError: there is no such image, or the run's data has changed and images have no hashes of their own.
        """
        found = data.identify(dataset)
        if found.digest == self.identity.digest:
            train, validation = self.subsets(dataset)
            return validation, train, f"the {len(validation)} validation images of {source}"
        then, now = self.identity.keys, found.keys
        if then is not None and now is not None:
            trained = np.isin(now, then[self.train])
            chosen = np.isin(now, then[self.validation]) & ~trained if is_own else ~trained
        elif is_own:
            raise ValueError(
                f"{source} does not hold the images that the run was trained on ({self.changes(found)}), so its "
                "validation images are not known. Restore it, or pass other images with --data."
            )
        else:
            trained = np.zeros(found.images, bool)
            chosen = ~trained
        if not chosen.any():
            raise ValueError(
                f"{source} holds no image to use: {self.changes(found)}, and the run was trained on {trained.sum()} of "
                "them. Restore it, or pass other images with --data."
            )
        words = f"all {found.images} images of {source}"
        if is_own:
            words = f"{chosen.sum()} validation images of {source}, which has changed: {self.changes(found)}"
        elif trained.any():
            words = f"the {chosen.sum()} images of {source} that the run was not trained on"
        images, learned = (Subset(dataset, np.flatnonzero(mask).tolist()) for mask in (chosen, trained))
        return images, learned if len(learned) else images, words


def split_of_run(run: Path, config: TrainConfig, dataset: Dataset[Any], source: str) -> Split:
    """The split of a run that is about to train: the one kept in its folder if it is resumed, else a new one.

    Args:
        run: Its folder.
        config: Its options.
        dataset: Its images.
        source: Where they are from; empty for a data set made in Python.

    Raises:
        ValueError: the run was trained on other images, or there are too few of them.
    """
    kept = Split.load(run) if config.resume else None
    if kept is None:
        return Split.of(dataset, source, validation=config.validation)
    kept.require_same(data.identify(dataset), run)
    return replace(kept, source=source)

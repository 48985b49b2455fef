"""Photographs that packages carry, Hugging Face data sets, and folders with damaged files in them."""

import io
import json
import shutil
import sys

import numpy as np
import pytest
import torch

from fastvae import data
from fastvae.cli import main
from fastvae.data import DataError, identify

Image = pytest.importorskip("PIL.Image", reason="images need pillow, of the extra [train]")


@pytest.fixture(scope="module")
def photos():
    for package in ("skimage", "sklearn"):
        pytest.importorskip(package, reason="the photographs come with the extra [photos]")
    return data.load("photos")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    datasets = pytest.importorskip("datasets", reason="Hugging Face data sets need the extra [hf]")
    path = tmp_path_factory.mktemp("hub") / "set"
    images = [Image.fromarray(np.full((6, 5, 3), 10 * i, np.uint8)) for i in range(4)]
    rows = datasets.Dataset.from_dict(
        {"name": list("abcd"), "img": images, "mask": images[::-1], "label": [3, 1, 2, 0]},
        features=datasets.Features(
            {
                "name": datasets.Value("string"),
                "img": datasets.Image(),
                "mask": datasets.Image(),
                "label": datasets.Value("int64"),
            }
        ),
    )
    datasets.DatasetDict({"train": rows, "test": rows.select([3])}).save_to_disk(path)
    return path


class TestPhotos:
    def test_crops_are_in_colour_and_the_same_every_time(self, photos):
        assert photos.shape == (3, 64, 64)
        again = data.load("photos")
        for i in (0, 700, len(photos) - 1):
            assert photos[i].shape == photos.shape
            assert photos[i].dtype == torch.uint8
            assert torch.equal(photos[i], again[i])
        assert not torch.equal(photos[0], photos[1])
        colourful = [(photos[i].float().std(dim=0) > 4).float().mean() for i in range(0, len(photos), 97)]
        assert np.mean(colourful) > 0.5
        assert data.load("photos", image_size=(32, 48)).shape == (3, 32, 48)

    def test_whole_photographs_are_held_out(self, photos):
        train, validation = data.split(photos)
        groups = [set(photos.groups[part.indices].tolist()) for part in (train, validation)]
        assert not groups[0] & groups[1]
        assert groups[0] | groups[1] == set(range(9))
        assert len(groups[1]) == 1
        assert len(train) + len(validation) == len(photos)
        assert photos.groups.bincount().unique().numel() == 1  # as many of each

    def test_the_extra_is_named(self, monkeypatch):
        monkeypatch.setattr("fastvae.data.photos.find_spec", lambda name: None)
        with pytest.raises(ImportError, match=r'pip install "fastvae-triton\[train,photos\]"'):
            data.load("photos")


class TestHub:
    def test_columns_and_splits(self, folder):
        images = data.load(f"hf:{folder}")
        assert (images.shape, len(images)) == ((3, 6, 5), 4)
        assert images[2].unique().tolist() == [20]
        assert images.labels.tolist() == [3, 1, 2, 0]
        assert data.load(f"hf:{folder}:train:mask")[0].unique().tolist() == [30]
        small = data.load(f"hf:{folder}:test", image_size=(3, 4))
        assert (len(small), small[0].shape) == (1, (3, 3, 4))

    def test_mistakes_are_named(self, folder, monkeypatch):
        with pytest.raises(DataError, match="has no split 'dev'; it has train, test"):
            data.load(f"hf:{folder}:dev")
        with pytest.raises(DataError, match=r"'name' is no column of images of .*; those are img, mask"):
            data.load(f"hf:{folder}:train:name")
        monkeypatch.setitem(sys.modules, "datasets", None)
        with pytest.raises(ImportError, match=r'pip install "fastvae-triton\[train,hf\]"'):
            data.load(f"hf:{folder}")

    def test_a_name_is_asked_of_the_hub(self, folder, monkeypatch):
        datasets = pytest.importorskip("datasets", reason="Hugging Face data sets need the extra [hf]")
        asked = []

        def load_dataset(name, split):
            asked.append((name, split))
            return datasets.load_from_disk(str(folder))["test"]

        monkeypatch.setattr(datasets, "load_dataset", load_dataset)
        assert len(data.load("hf:someone/pictures:validation")) == 1
        assert asked == [("someone/pictures", "validation")]

    def test_a_data_set_that_cannot_be_loaded_is_named(self, folder, tmp_path, monkeypatch):
        datasets = pytest.importorskip("datasets", reason="Hugging Face data sets need the extra [hf]")

        def load_dataset(name, split):
            raise ValueError(f'Unknown split "{split}".')

        monkeypatch.setattr(datasets, "load_dataset", load_dataset)
        with pytest.raises(DataError, match=r'someone/pictures cannot be loaded .*: Unknown split "dev"'):
            data.load("hf:someone/pictures:dev")
        with pytest.raises(DataError, match=r"cannot be loaded as a Hugging Face data set"):
            data.load(f"hf:{tmp_path}")
        damaged = shutil.copytree(folder, tmp_path / "damaged")
        for file in damaged.rglob("*.arrow"):
            file.write_bytes(file.read_bytes()[:100])
        with pytest.raises(DataError, match=r"cannot be loaded as a Hugging Face data set"):
            data.load(f"hf:{damaged}")

    @pytest.fixture
    def saved(self, tmp_path):
        """Saves images, or encoded ones as bytes, as a data set, and gives its name."""
        datasets = pytest.importorskip("datasets", reason="Hugging Face data sets need the extra [hf]")

        def save(images, **feature):
            features = datasets.Features({"image": datasets.Image(**feature), "label": datasets.Value("int64")})
            rows = {"image": images, "label": list(range(len(images)))}
            datasets.Dataset.from_dict(rows, features=features).save_to_disk(tmp_path / "set")
            return f"hf:{tmp_path / 'set'}"

        return save

    def test_deep_images_are_refused_as_in_folders(self, saved):
        name = saved([Image.fromarray(np.full((4, 4), level, np.uint16)) for level in (40, 40000)])
        with pytest.raises(DataError, match=r"image 0 of .* has more than 8 bits per value"):
            data.load(name)

    def test_colour_is_that_of_all_images(self, saved):
        grey = Image.fromarray(np.full((4, 4), 7, np.uint8))
        red = Image.fromarray(np.full((4, 4, 3), (200, 0, 0), np.uint8))
        images = data.load(saved([grey, red]))
        assert images.shape == (3, 4, 4)
        assert images[1][:, 0, 0].tolist() == [200, 0, 0]

    def test_a_mode_of_the_data_set_decides_its_colour(self, saved):
        assert data.load(saved([Image.fromarray(np.zeros((4, 4, 3), np.uint8))], mode="L")).shape == (1, 4, 4)

    def test_sizes_are_compared_on_loading(self, saved):
        name = saved([Image.fromarray(np.zeros((4, width), np.uint8)) for width in (4, 4, 5)])
        with pytest.raises(DataError, match=r"image 0 of .* is 4 x 4 .*, image 2 of .* is 4 x 5"):
            data.load(name)
        assert data.load(name, image_size=(3, 3)).shape == (1, 3, 3)

    @pytest.mark.parametrize("suffix", ["jpeg", "png", "webp"])
    def test_images_are_turned_upright(self, saved, suffix):
        exif = Image.Exif()
        exif[0x0112] = 6
        content = io.BytesIO()
        Image.fromarray(np.zeros((4, 6), np.uint8)).save(content, suffix, exif=exif)
        images = data.load(saved([{"bytes": content.getvalue(), "path": None}]))
        assert images.shape[1:] == images[0].shape[1:] == (6, 4)

    def test_damaged_and_missing_images_are_left_out_and_listed(self, saved):
        good = Image.fromarray(np.zeros((4, 4), np.uint8))
        name = saved([None, good, {"bytes": b"no image", "path": None}, good])
        images = data.load(name, strict=False)
        assert (len(images), images.labels.tolist()) == (2, [1, 3])
        assert [key.partition(" of ")[0] for key in images.skipped] == ["image 0", "image 2"]
        assert images[1].shape == (1, 4, 4)
        assert identify(images).keys[0] == identify(images).keys[1]
        with pytest.raises(DataError, match=r"image 0 of .* is missing"):
            data.load(name)


@pytest.fixture
def damaged(tmp_path):
    """A folder of two classes with eight good images, one cut off in its pixels and one that is no image."""
    random = np.random.default_rng(0)
    for i in range(8):
        path = tmp_path / "images" / ("cats" if i % 2 else "dogs") / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 256, (8, 8), dtype=np.uint8)).save(path)
    whole = (tmp_path / "images" / "cats" / "1.png").read_bytes()
    (tmp_path / "images" / "cats" / "cut.png").write_bytes(whole[: len(whole) - 30])
    (tmp_path / "images" / "dogs" / "text.jpg").write_text("no image")
    return tmp_path / "images"


def test_damaged_files_are_left_out_and_listed(damaged):
    images = data.load(damaged, strict=False)
    assert len(images) == 8
    assert sorted(name.rpartition("/")[2] for name in images.skipped) == ["cut.png", "text.jpg"]
    assert "damaged" in next(reason for name, reason in images.skipped.items() if name.endswith("cut.png"))
    assert images.labels.tolist() == [0, 0, 0, 0, 1, 1, 1, 1]
    assert all(image.shape == (1, 8, 8) for image in images)
    with pytest.raises(DataError, match=r"text\.jpg is not an image"):
        data.load(damaged)


def test_a_folder_of_nothing_but_damage_is_refused(tmp_path):
    (tmp_path / "a.png").write_text("no image")
    with pytest.raises(DataError, match=r"none of the 1 images in .* can be read; .*a\.png is not an image"):
        data.load(tmp_path, strict=False)


def test_training_says_what_it_left_out(damaged, tmp_path, capsys):
    small = ["--backbone", "mlp", "--hidden", "8", "--latent-dim", "3", "--batch-size", "4", "--device", "cpu"]
    run = tmp_path / "run"
    arguments = ["train", "--data", str(damaged), "--epochs", "1", *small]
    assert main([*arguments, "--out", str(run)]) == 0
    said = capsys.readouterr().out
    assert f"2 files or folders left out, listed in {run / 'skipped.json'}: {damaged}/" in said
    assert len(json.loads((run / "skipped.json").read_text())) == 2
    assert main([*arguments, "--out", str(tmp_path / "strict"), "--strict"]) == 2
    assert "text.jpg is not an image" in capsys.readouterr().err
    assert not (tmp_path / "strict").exists()

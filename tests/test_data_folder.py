import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from fastvae.data import DataError, FolderImages, load

Image = pytest.importorskip("PIL.Image", reason="folders of images are read with Pillow")


def save(path, mode="L", size=(7, 5), **options) -> np.ndarray:
    """An image of random pixels; `size` is PIL's (width, height)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(len(path.name)).integers(0, 256, (size[1], size[0], 4), dtype=np.uint8)
    image = Image.fromarray(noise[..., 0] if mode in ("L", "1", "P", "LA") else noise[..., :3]).convert(mode)
    image.save(path, **options)
    return np.array(image)


def test_folder_is_read_recursively_in_order_without_hidden_files(tmp_path):
    b = save(tmp_path / "b.PNG")
    c = save(tmp_path / "a" / "c.bmp")
    save(tmp_path / ".hidden.png")
    save(tmp_path / ".thumbs" / "d.png")
    (tmp_path / "labels.csv").write_text("b,1")
    dataset = load(str(tmp_path))
    assert isinstance(dataset, FolderImages)
    assert dataset.shape == (1, 5, 7)
    assert dataset[0].dtype == torch.uint8
    assert [path.name for path in dataset.paths] == ["c.bmp", "b.PNG"]
    batch = next(iter(DataLoader(dataset, batch_size=2)))
    assert np.array_equal(batch[:, 0], np.stack([c, b]))


def pillow(path, mode=None) -> np.ndarray:
    with Image.open(path) as image:
        return np.array(image.convert(mode))


@pytest.mark.parametrize("suffix", ["png", "jpg", "jpeg", "bmp", "webp", "gif", "tif", "tiff"])
def test_every_format_decodes_to_the_pixels_of_pillow(tmp_path, suffix):
    mode = "P" if suffix == "gif" else "RGB"
    save(tmp_path / f"x.{suffix}", mode)
    expected = pillow(tmp_path / f"x.{suffix}", "RGB").transpose(2, 0, 1)
    assert np.array_equal(load(str(tmp_path))[0], expected)


@pytest.mark.parametrize(
    ("modes", "channels"),
    [(["L", "L"], 1), (["1", "LA"], 1), (["L", "RGB"], 3), (["P"], 3), (["RGBA"], 3), (["L", "RGBA"], 3)],
    ids=str,
)
def test_images_stay_grey_only_if_all_are(tmp_path, modes, channels):
    for i, mode in enumerate(modes):
        save(tmp_path / f"{i}.png", mode)
    dataset = load(str(tmp_path))
    assert dataset.shape == (channels, 5, 7)
    assert all(image.shape == (channels, 5, 7) for image in dataset)


def test_transparent_palette_does_not_warn(tmp_path):
    save(tmp_path / "x.png", "P", transparency=bytes(range(256)))
    expected = pillow(tmp_path / "x.png", "RGBA")[..., :3].transpose(2, 0, 1)
    assert np.array_equal(load(str(tmp_path))[0], expected)


def test_photographs_stand_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held on its side
    save(tmp_path / "x.jpg", "RGB", exif=exif)
    lying = pillow(tmp_path / "x.jpg")
    dataset = load(str(tmp_path))
    assert dataset.shape == (3, 7, 5)
    assert np.array_equal(dataset[0], np.rot90(lying, -1).transpose(2, 0, 1))


def test_mixed_sizes_need_image_size(tmp_path):
    save(tmp_path / "a.png", size=(7, 5))
    save(tmp_path / "b.png", size=(8, 5))
    with pytest.raises(DataError, match=r"a\.png is 5 x 7 .*b\.png is 5 x 8 .*--image-size H W"):
        load(str(tmp_path))
    dataset = load(str(tmp_path), image_size=(4, 3))
    assert dataset.shape == (1, 4, 3)
    expected = Image.fromarray(pillow(tmp_path / "b.png")).resize((3, 4), Image.Resampling.BICUBIC)
    assert np.array_equal(dataset[1][0], np.array(expected))


def test_file_that_is_no_image_is_named_on_loading(tmp_path):
    save(tmp_path / "a.png")
    (tmp_path / "b.png").write_text("not a picture")
    with pytest.raises(DataError, match=r"b\.png is not an image"):
        load(str(tmp_path))


@pytest.mark.parametrize("suffix", ["png", "jpg", "bmp", "webp", "tif"])
def test_truncated_image_is_named(tmp_path, suffix):
    path = tmp_path / f"x.{suffix}"
    save(path, "RGB", size=(64, 64))
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(DataError, match=rf"x\.{suffix} is "):
        load(str(tmp_path))[0]


def test_deep_images_are_refused_rather_than_cut_off(tmp_path):
    Image.fromarray(np.full((4, 4), 40000, np.uint16)).save(tmp_path / "x.png")
    with pytest.raises(DataError, match=r"x\.png has more than 8 bits"):
        load(str(tmp_path))


def test_image_that_vanishes_is_named(tmp_path):
    save(tmp_path / "a.png")
    dataset = load(str(tmp_path))
    (tmp_path / "a.png").unlink()
    with pytest.raises(DataError, match=r"a\.png"):
        dataset[0]


def test_too_large_image_is_named(tmp_path, monkeypatch):
    save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    with pytest.raises(DataError, match=r"a\.png is damaged or too large"):
        load(str(tmp_path))

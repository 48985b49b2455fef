"""The split of a run's data: kept with the run, and found again by the content of the images."""

import json
import shutil
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import TensorDataset

from fastvae import data
from tests.helpers.command import error_of

EXTRA = "training needs the extra [train]"
Image = pytest.importorskip("PIL.Image", reason=EXTRA)
for package in ("matplotlib", "safetensors", "rich"):
    pytest.importorskip(package, reason=EXTRA)
inputs = pytest.importorskip("fastvae.cli.inputs", reason=EXTRA)

from fastvae.cli import main  # noqa: E402
from fastvae.training import TrainConfig, train  # noqa: E402
from fastvae.training.split import SPLIT_FILE, Split  # noqa: E402

TINY = ["--backbone", "mlp", "--hidden", "4", "--latent-dim", "2", "--batch-size", "4", "--device", "cpu"]
N_IMAGES, N_VALIDATION = 24, 8


def pictures(n, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (n, 6, 6), dtype=np.uint8)


def save_folder(folder, images, start=0):
    folder.mkdir(exist_ok=True)
    for i, image in enumerate(images, start):
        Image.fromarray(image).save(folder / f"{i:03}.png")


@pytest.fixture(autouse=True)
def in_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture(params=["npy", "folder"])
def source(request):
    """The name, relative to the current folder, of images."""
    if request.param == "npy":
        np.save("d.npy", pictures(N_IMAGES))
        return "d.npy"
    save_folder(Path("d"), pictures(N_IMAGES))
    return "d"


def fastvae_train(source, out="run", *more):
    arguments = ["--data", source, "--out", out, "--epochs", "1", "--validation", str(N_VALIDATION / N_IMAGES), *TINY]
    assert main(["train", *arguments, *more]) == 0
    return Path(out).resolve()


def add_image(source, image):
    """Put one image more into the data, before the others."""
    if source.endswith("npy"):
        np.save(source, np.concatenate([image[None], np.load(source)]))
    else:
        Image.fromarray(image).save(Path(source) / "000-new.png")


def images_for(run, source=None):
    """The images that the commands use, and words for them."""
    model = inputs.load_model(run, "cpu")
    images, _, words = inputs.load_images(run, model, source)
    return torch.stack(list(images))[:, 0].numpy(), words


def parts(run):
    """The training and the validation images of a run on `pictures(N_IMAGES)`."""
    split, images = Split.load(run), pictures(N_IMAGES)
    return images[split.train], images[split.validation]


def shared(some, others):
    """How many of some images are among others."""
    return sum(any(np.array_equal(image, other) for other in others) for image in some)


def test_the_runs_data_is_recognised_under_every_name(source, tmp_path, monkeypatch):
    run = fastvae_train(source)
    _, validation = parts(run)
    (shutil.copytree if Path(source).is_dir() else shutil.copy)(source, f"copy-of-{source}")
    for name in (None, source, f"./{source}", str(tmp_path / source), f"copy-of-{source}"):
        images, words = images_for(run, name)
        assert np.array_equal(images, validation)
        assert f"the {N_VALIDATION} validation images" in words


def test_evaluate_measures_no_image_that_was_trained_on_after_one_was_added(source):
    run = fastvae_train(source)
    trained, validation = parts(run)
    add_image(source, pictures(1, seed=9)[0])
    for name in (None, source):
        images, words = images_for(run, name)
        assert shared(images, trained) == 0
        assert (len(images), shared(images, validation)) == (N_VALIDATION, N_VALIDATION)
        assert "it had 24, now there are 25; 0 are missing, 1 are new" in words
    assert main(["evaluate", "--model", str(run), "--samples", "1", "--outliers", "0"]) == 0
    assert json.loads(Path("evaluation.json").read_text())["images"] == N_VALIDATION


def test_other_data_is_measured_without_what_was_trained_on(source, capsys):
    run = fastvae_train(source)
    trained, validation = parts(run)
    new = pictures(5, seed=1)
    np.save("other.npy", new)
    images, words = images_for(run, "other.npy")
    assert np.array_equal(images, new)
    assert words == "all 5 images of other.npy"
    if source.endswith("npy"):
        np.save("mixed.npy", np.concatenate([new, trained[:3], validation[:2]]))
        np.save("trained.npy", trained)
    else:
        save_folder(Path("mixed.npy"), new)
        save_folder(Path("trained.npy"), trained)
        save_folder(Path("mixed.npy"), np.concatenate([trained[:3], validation[:2]]), start=50)
    images, words = images_for(run, "mixed.npy")
    assert np.array_equal(images, np.concatenate([new, validation[:2]]))
    assert words == "the 7 images of mixed.npy that the run was not trained on"
    error = error_of(capsys, "evaluate", "--model", str(run), "--data", "trained.npy")
    assert "trained.npy holds no image to use" in error
    assert "trained on 16 of them" in error


def test_a_huge_array_that_changed_is_refused(monkeypatch, capsys):
    monkeypatch.setattr("fastvae.data.dataset.HASHED_BYTES", 100)
    np.save("d.npy", pictures(N_IMAGES))
    run = fastvae_train("d.npy")
    _, validation = parts(run)
    assert np.array_equal(images_for(run)[0], validation)
    add_image("d.npy", pictures(1, seed=9)[0])
    error = error_of(capsys, "evaluate", "--model", str(run))
    assert "does not hold the images that the run was trained on (it had 24, now there are 25)" in error
    np.save("other.npy", pictures(5, seed=1))
    assert images_for(run, "other.npy")[1] == "all 5 images of other.npy"


def test_resume_refuses_other_images_of_the_same_count(source, capsys):
    run = fastvae_train(source)
    before = (run / "checkpoint.pt").read_bytes()
    images = pictures(N_IMAGES)
    images[7] = 255 - images[7]
    np.save(source, images) if source.endswith("npy") else save_folder(Path(source), images)
    error = error_of(capsys, "train", "--resume", str(run))
    assert "was trained on other images: it had 24, now there are 24; 1 are missing, 1 are new." in error
    assert (run / "checkpoint.pt").read_bytes() == before


def test_resume_refuses_images_in_another_order(source):
    run = fastvae_train(source)
    reverse = pictures(N_IMAGES)[::-1]
    np.save(source, reverse) if source.endswith("npy") else save_folder(Path(source), reverse)
    with pytest.raises(ValueError, match="now there are 24, in another order"):
        train(TrainConfig.from_run(run))


def test_resume_refuses_another_data_set_of_the_same_size_in_python(tmp_path):
    config = TrainConfig(out=tmp_path / "run", epochs=1, batch_size=4, backbone="mlp", hidden=4, device="cpu")
    images = torch.from_numpy(pictures(N_IMAGES)[:, None])
    train(config, dataset=TensorDataset(images))
    again = replace(config, out=None, resume=config.out)
    train(again, dataset=TensorDataset(images.clone()))
    with pytest.raises(ValueError, match="other images: it had 24, now there are 24 with other content"):
        train(again, dataset=TensorDataset(images.flip(0)))


def test_a_run_is_used_from_another_folder(source, tmp_path, monkeypatch):
    run = fastvae_train(source)
    _, validation = parts(run)
    assert json.loads((run / "config.json").read_text())["data"] == str(tmp_path / source)
    assert json.loads((run / "config.json").read_text())["out"] == str(run)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    others = pictures(N_IMAGES, seed=5)  # of the same name and number, but other images
    np.save(source, others) if source.endswith("npy") else save_folder(Path(source), others)
    assert np.array_equal(images_for(run)[0], validation)
    assert main(["train", "--resume", str(run)]) == 0
    assert len(images_for(run, source)[0]) == N_IMAGES


def test_a_run_goes_on_where_its_data_was_moved(source):
    run = fastvae_train(source)
    Path(source).rename(f"moved-{source}")
    assert main(["train", "--resume", str(run), "--data", f"moved-{source}"]) == 0
    assert images_for(run)[1].startswith(f"the {N_VALIDATION} validation images of {Path(f'moved-{source}').resolve()}")


def test_a_run_that_kept_no_split_is_used_as_before(source):
    run = fastvae_train(source)
    _, validation = parts(run)
    (run / SPLIT_FILE).unlink()
    for name in (None, source, f"./{source}"):
        assert np.array_equal(images_for(run, name)[0], validation)
    assert main(["train", "--resume", str(run)]) == 0
    assert (run / SPLIT_FILE).exists()


@pytest.mark.parametrize("damage", [lambda b: b[: len(b) // 2], lambda b: b"", lambda b: b"text"])
def test_a_damaged_split_is_named(source, damage, capsys):
    run = fastvae_train(source)
    (run / SPLIT_FILE).write_bytes(damage((run / SPLIT_FILE).read_bytes()))
    for arguments in (["train", "--resume", str(run)], ["evaluate", "--model", str(run)]):
        assert "split.npz is damaged" in error_of(capsys, *arguments)


def test_a_flipped_bit_gives_no_other_split(tmp_path):
    keys = np.arange(6, dtype=np.uint64)
    Split("d", data.Identity(6, "abc", keys), np.arange(4), np.arange(4, 6)).save(tmp_path)
    content = (tmp_path / SPLIT_FILE).read_bytes()
    for place in range(len(content)):
        damaged = bytearray(content)
        damaged[place] ^= 1 << place % 8
        (tmp_path / SPLIT_FILE).write_bytes(damaged)
        with suppress(ValueError):
            split = Split.load(tmp_path)
            assert (split.source, split.identity.digest) == ("d", "abc")
            assert [*split.train, *split.validation, *split.identity.keys] == [*range(6), *range(6)]


def test_runs_inside_their_data_folder_do_not_become_data(capsys):
    save_folder(Path("d"), pictures(N_IMAGES))
    run = fastvae_train("d", "d/runs/first")
    _, validation = parts(run)
    assert (run / "samples.png").exists()
    second = fastvae_train("d", "d/second")
    assert "1 files or folders left out" in capsys.readouterr().out
    for each in (run, second):
        assert Split.load(each).identity.images == N_IMAGES
        assert np.array_equal(images_for(each)[0], validation)
        assert main(["report", "--model", str(each)]) == 0
        assert main(["train", "--resume", str(each)]) == 0
    assert len(data.load("d")) == N_IMAGES


@pytest.mark.parametrize("nothing", ["", "idx:", "hf:"])
def test_an_empty_name_of_data_is_no_folder(nothing, capsys):
    save_folder(Path(), pictures(N_IMAGES))
    assert "the data set has no name" in error_of(capsys, "train", "--data", nothing, "--out", "run", *TINY)
    run = fastvae_train(".", "run")
    assert "the data set has no name" in error_of(capsys, "evaluate", "--model", str(run), "--data", nothing)

"""The report of a run: opened in a headless browser, clicked through, and free of script errors."""

import base64
import io
import json
import re
import shutil
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from torch.utils.data import TensorDataset

from fastvae.cli import main
from fastvae.models import VAE, VAEConfig
from fastvae.training import TrainConfig, train

Image = pytest.importorskip("PIL.Image", reason="training draws with pillow, of the extra [train]")
pytest.importorskip("matplotlib", reason="training plots with matplotlib, of the extra [train]")
pytest.importorskip("safetensors", reason="training saves weights with safetensors, of the extra [train]")
from fastvae.evaluation import pictures  # noqa: E402  needs matplotlib
from fastvae.evaluation.report import _map  # noqa: E402

EPOCHS = 3


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (60, 1, 1, 3), np.uint8) * np.ones((1, 8, 6, 1), np.uint8)
    data = folder / "x</script><b>.npy"  # a name that the page must not take for its own
    data.parent.mkdir()
    np.save(data, images)
    options = {"backbone": "mlp", "hidden": 16, "latent_dim": 5, "device": "cpu", "log_every": 2}
    return train(TrainConfig(str(data), folder / "run", epochs=EPOCHS, batch_size=8, **options)).run


@pytest.fixture(scope="module")
def browser():
    api = pytest.importorskip("playwright.sync_api", reason="the report is opened with playwright, of the extra [test]")
    program = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if program is None:
        pytest.skip("no Chromium is installed")
    with api.sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield opened
        opened.close()


@contextmanager
def page_of(browser, run, **options):
    """The report, offline; at the end no script may have failed and nothing may have been asked of the network."""
    complaints, requests = [], []
    page = browser.new_page(**options)
    page.context.set_offline(True)
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("console", lambda message: complaints.append(message.text) if message.type in ("error", "warning") else 0)
    page.on("request", lambda request: requests.append(request.url))
    page.goto((run / "report.html").as_uri())
    yield page
    assert complaints == []
    assert all(url.startswith(("file:", "data:")) for url in requests)
    page.close()


def data_of(run):
    (content,) = re.findall(
        r'<script type="application/json" id="data">(.*?)</script>', (run / "report.html").read_text()
    )
    return json.loads(content)


def test_page_is_complete(run, browser):
    data = data_of(run)
    with page_of(browser, run) as page:
        for picture in page.query_selector_all("img"):
            assert picture.evaluate("image => image.complete && image.naturalWidth > 0")
        titles = page.locator("#curves > div > div:first-child").all_text_contents()
        assert titles == ["Loss", "Negative ELBO", "Reconstruction", "KL", "Active units"]
        assert page.locator("#traversal-rows li").count() == page.locator("#bars rect").count() == 5
        assert page.locator(".card b").first.text_content() == f"{data['records'][-1]['nats']:.2f}"
        page.get_by_text("Options of the run").click()
        cell = page.locator("#config td", has_text=".npy")
        assert cell.is_visible()
        assert cell.text_content().endswith("</script><b>.npy")


def test_slider_goes_through_the_epochs(run, browser):
    with page_of(browser, run) as page:
        frame, caption, slider = page.locator("#frame"), page.locator("#epoch-caption"), page.locator("#epoch")
        seen = []
        slider.focus()
        for epoch in range(EPOCHS, 0, -1):
            assert caption.text_content() == f"after epoch {epoch}"
            seen.append(frame.get_attribute("src"))
            page.keyboard.press("ArrowLeft")
        assert len(set(seen)) == EPOCHS
        assert page.locator("#originals").get_attribute("src") not in seen


def test_pointing_shows_values_and_images(run, browser):
    data = data_of(run)
    with page_of(browser, run) as page:
        tip = page.locator("#map-tip")
        assert not tip.is_visible()
        page.locator("#map").hover(position={"x": 30, "y": 30})
        assert tip.is_visible()
        first = page.locator("#map-text").text_content()
        background = page.locator("#thumbnail").evaluate("box => getComputedStyle(box).backgroundImage")
        assert background.startswith('url("data:image/png')
        box = page.locator("#map").bounding_box()
        page.locator("#map").hover(position={"x": box["width"] - 5, "y": box["height"] - 5})
        assert page.locator("#map-text").text_content() != first
        curve = page.locator("#curves > div", has_text="Negative ELBO")
        end = curve.locator("svg").bounding_box()["width"] - 8
        curve.locator("svg").hover(position={"x": end, "y": 100})
        words = curve.locator(".tip").text_content()
        last = data["records"][-1]
        assert f"step {last['step']}" in words
        shown = float(words.rpartition("validation ")[2])
        assert shown == pytest.approx(last["nats"], rel=1e-4)
        page.locator("#bars rect").first.hover()
        assert page.locator("#bars .tip").text_content().startswith(f"z[{data['kl'][0]['dim']}] ")
        page.mouse.move(1, 1)
        assert not curve.locator(".tip").is_visible()


def test_page_fits_a_phone(run, browser):
    with page_of(browser, run, viewport={"width": 390, "height": 800}, color_scheme="dark") as page:
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
        assert page.evaluate("getComputedStyle(document.body).backgroundColor") != "rgb(251, 251, 250)"


def test_thumbnails_and_points_are_of_the_same_images():
    mu = torch.randn(2500, 3)
    values = torch.arange(2500, dtype=torch.float32) / 2500
    dataset = TensorDataset(values.reshape(-1, 1, 1, 1).expand(-1, 1, 64, 48))
    latents = pictures.Latents(mu, torch.ones(3))
    found = _map(latents, dataset)
    assert len(found["points"]) == len(found["indices"]) == 1000
    assert found["tile"] == (32, 24)
    plane, share = pictures.principal_plane(mu)
    assert 0.5 < share == found["share"] < 1
    assert found["points"][7] == pytest.approx(plane[found["indices"][7]].tolist(), rel=1e-4)
    sheet = np.asarray(Image.open(io.BytesIO(base64.b64decode(found["sprites"].partition(",")[2]))))
    row, column = divmod(777, found["columns"])
    assert abs(sheet[row * 32 + 16, column * 24 + 12] - 255 * values[found["indices"][777]]) <= 1


def test_traversals_change_one_dimension():
    model = VAE(VAEConfig(image_size=(4, 4), channels=1, backbone="mlp", hidden=8, latent_dim=3))
    mu = torch.tensor([0.3, -0.2, 0.9])
    images = pictures.traversals(model, mu, [2, 0], steps=5, reach=2.0)
    with torch.no_grad():
        expected = [model.decode(torch.tensor([[0.3, -0.2, x]])) for x in (-2.0, -1.0, 0.0, 1.0, 2.0)]
        expected += [model.decode(torch.tensor([[x, -0.2, 0.9]])) for x in (-2.0, -1.0, 0.0, 1.0, 2.0)]
    torch.testing.assert_close(images, torch.cat(expected).clamp(0, 1))


@pytest.mark.parametrize(("epochs", "drawn"), [(1, 1), (40, 40), (41, 21), (1000, 40)])
def test_long_runs_draw_a_bounded_number_of_pictures(epochs, drawn):
    due = [epoch for epoch in range(1, epochs + 1) if pictures.is_in_progress(epoch, epochs)]
    assert len(due) == drawn
    assert due[-1] == epochs


def test_report_is_drawn_anew_from_the_run_folder(run, capsys):
    page = run / "report.html"
    before = data_of(run)
    page.unlink()
    assert main(["report", "--model", str(run), "--device", "cpu"]) == 0
    assert capsys.readouterr().out.strip() == str(page)
    assert data_of(run) == before


def test_report_of_no_run_says_so(tmp_path, capsys):
    assert main(["report", "--model", str(tmp_path)]) == 2
    assert "is not a run folder" in capsys.readouterr().err

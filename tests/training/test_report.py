"""The report of a run: opened in a headless browser, clicked through, and free of script errors."""

import base64
import io
import json
import math
import re
import shutil
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from torch.utils.data import TensorDataset

from fastvae.cli import main
from fastvae.data import load
from fastvae.data.batches import class_names_of
from fastvae.evaluation.elbo import Latents
from fastvae.models import VAE, VAEConfig
from fastvae.training import TrainConfig, train

Image = pytest.importorskip("PIL.Image", reason="training draws with pillow, of the extra [train]")
pytest.importorskip("matplotlib", reason="training plots with matplotlib, of the extra [train]")
pytest.importorskip("safetensors", reason="training saves weights with safetensors, of the extra [train]")
from fastvae.data import ArrayImages  # noqa: E402
from fastvae.evaluation import pictures, plots, report  # noqa: E402  need matplotlib

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
    options |= {"likelihood": "l2", "beta": 1.0}
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
        text = page.locator("#curves").text_content()
        for title in ("Negative ELBO", "Reconstruction", "KL", "Loss, as training weighs it", "Active units"):
            assert title in text
        assert page.locator("#rows li").count() == 5
        assert page.locator("#ruler li").all_text_contents()[::5] == ["-3", "0", "3"]
        assert page.locator(".card b").first.text_content() == report.three_digits(data["records"][-1]["nats"])
        header = page.locator("#facts").text_content()
        for words in ("images of 3 x 8 x 6", "Lossl2", "Beta1", f"{EPOCHS} epochs, 18 steps, 0 min 0 s"):
            assert words in header
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
        tip = page.locator("#map .tip")
        assert not tip.is_visible()
        box = page.locator("#map svg").bounding_box()
        page.locator("#map svg").hover(position={"x": 60, "y": 60})
        assert tip.is_visible()
        first = tip.text_content()
        background = page.locator(".thumbnail").evaluate("box => getComputedStyle(box).backgroundImage")
        assert background.startswith('url("data:image/webp')
        page.locator("#map svg").hover(position={"x": box["width"] - 10, "y": box["height"] - 60})
        assert tip.text_content() != first
        curve = page.locator("#curves > div", has_text="Negative ELBO")
        box = curve.locator("svg").bounding_box()
        curve.locator("svg").hover(position={"x": box["width"] - 8, "y": 100})
        words = curve.locator(".tip").text_content()
        last = data["records"][-1]
        assert f"step {last['step']}" in words
        assert float(words.rpartition("validation ")[2]) == pytest.approx(last["nats"], rel=6e-3)
        page.locator("#bars svg").hover(position={"x": 60, "y": 150})
        assert page.locator("#bars .tip").text_content().startswith(f"z[{data['bars']['dims'][0]}] ")
        page.mouse.move(1, 1)
        assert not curve.locator(".tip").is_visible()


def test_tip_is_at_the_point_that_matplotlib_drew(run, browser):
    with page_of(browser, run) as page:
        curve = page.locator("#curves > div", has_text="Reconstruction")
        curve.scroll_into_view_if_needed()
        marks = curve.locator("svg g[id^=line2d] use").evaluate_all("uses => uses.map(u => u.getBoundingClientRect())")
        drawn = [(mark["x"] + mark["width"] / 2, mark["y"] + mark["height"] / 2) for mark in marks]
        page.mouse.move(drawn[-2][0] + 3, drawn[-2][1] - 3)  # the last mark is that of the legend
        ring = curve.locator("svg > circle").evaluate("ring => ring.getBoundingClientRect()")
        x, y = ring["x"] + ring["width"] / 2, ring["y"] + ring["height"] / 2
        assert (x, y) == pytest.approx(drawn[-2], abs=1)


def test_page_fits_a_phone_and_answers_taps(run, browser):
    options = {"viewport": {"width": 390, "height": 800}, "color_scheme": "dark", "has_touch": True, "is_mobile": True}
    with page_of(browser, run, **options) as page:
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
        assert page.evaluate("getComputedStyle(document.body).backgroundColor") != "rgb(251, 251, 250)"
        tip = page.locator("#map .tip")
        page.locator("#map svg").tap(position={"x": 100, "y": 90})
        page.wait_for_timeout(200)
        assert tip.is_visible()
        assert page.locator(".thumbnail").is_visible()
        page.locator("h1").tap()
        assert not tip.is_visible()
        rows = page.locator("#rows").bounding_box()["height"]
        assert rows == pytest.approx(page.locator("#traversals").bounding_box()["height"], abs=1)


def test_traversals_scroll_below_their_ruler(run, browser):
    with page_of(browser, run, viewport={"width": 1440, "height": 900}) as page:
        page.add_style_tag(content=".traversal { max-height: 120px !important }")
        box = page.locator(".traversal")
        assert box.evaluate("box => getComputedStyle(box).overflowY") == "scroll"
        before = page.locator("#ruler").bounding_box()["y"]
        box.evaluate("box => box.scrollTo(0, 100)")
        assert box.evaluate("box => box.scrollTop") == 100
        assert page.locator("#ruler").bounding_box()["y"] == pytest.approx(before, abs=9)


def limits(records, key="nats", baseline=None):
    return plots.svg(plots.curve(records, key, baseline))["y"]


def test_curves_leave_the_first_values_out_and_hold_the_others():
    def records(values, split="train"):
        return [{"split": split, "step": step, "nats": value} for step, value in enumerate(values)]

    low, high = limits(records([1e6, *np.linspace(-100, -900, 99)]))
    assert -1000 < low < -900 < -100 < high < 0  # negative nats, and no outlier
    low, high = limits(records([1e6, *np.linspace(9, 5, 99)]) + records([30.0, 4.0], "validation"))
    assert low < 4 < 30 < high < 33  # but every value of the validation
    low, high = limits(records([9.0, 8.0, 7.0, 6.0]), baseline=20.0)
    assert low < 6 < 20 < high
    low, high = limits(records([3.0, math.nan]), baseline=math.inf)
    assert low < 3 < high


def test_curves_are_cut_at_the_axis_and_not_drawn_along_it():
    records = [{"split": "train", "step": step, "nats": 1e6 if step < 5 else 5.0 + step} for step in range(100)]
    drawn = plots.svg(plots.curve(records, "nats"))
    (points,) = re.findall(r'<path d="M ([-\d. L\n]+)" clip-path="url\(#\w+\)"[^>]*var\(--train\)', drawn["svg"])
    heights = [float(y) for _, y in re.findall(r"([-\d.]+) ([-\d.]+)", points)]
    (height,) = re.findall(r'viewBox="0 0 [\d.]+ ([\d.]+)"', drawn["svg"])
    edge = float(height) * drawn["box"][1]
    assert min(heights) < edge  # the clip path cuts it
    assert min(abs(y - edge) for y in heights) > 3  # no plateau


def test_legend_has_the_names_of_the_classes():
    labels = torch.tensor([0, 1, 2, 0])
    plane = torch.randn(4, 2)
    for names, words in ((["cat", "dog", "newt"], ["cat", "dog", "newt"]), (None, ["0", "1", "2"])):
        text = plots.svg(plots.latent_map(plane, 0.5, labels, names))["svg"]
        assert re.findall(r"<text[^>]*>([^<]*)</text>", text)[-3:] == words
    dataset = torch.utils.data.Subset(ArrayImages(torch.zeros(4, 1, 2, 2, dtype=torch.uint8)), [0, 1])
    assert class_names_of(dataset) is None
    dataset.dataset.class_names = ["cat"]
    assert class_names_of(dataset) == ["cat"]
    assert class_names_of(load("fashion-mnist"))[9] == "ankle boot"


@pytest.mark.parametrize(
    ("value", "words"),
    [(242.91, "243"), (-10432.5, "-10,400"), (0.06004, "0.0600"), (7.0, "7.00"), (1e-9, "1.00e-09"), (0.0, "0.0")],
)
def test_figures_have_three_digits(value, words):
    assert report.three_digits(value) == words


def test_pictures_of_the_report_are_small():
    noise = torch.rand(64, 3, 512, 384, generator=torch.Generator().manual_seed(0))
    content = pictures.grid_webp(noise, columns=8)
    with Image.open(io.BytesIO(content)) as picture:
        assert picture.size == (8 * (96 + 2) + 2, 8 * (128 + 2) + 2)
    smooth = torch.linspace(0, 1, 64).expand(64, 3, 64, 64)
    png = io.BytesIO()
    pictures.grid(smooth + 0.02 * noise[:, :, :64, :64], columns=8).save(png, "PNG")
    assert len(pictures.grid_webp(smooth + 0.02 * noise[:, :, :64, :64], columns=8)) < len(png.getvalue()) / 4


def test_thumbnails_and_points_are_of_the_same_images():
    mu = torch.randn(2500, 3)
    values = torch.arange(2500, dtype=torch.float32) / 2500
    dataset = TensorDataset(values.reshape(-1, 1, 1, 1).expand(-1, 1, 64, 48))
    latents = Latents(mu, torch.ones(3))
    plane, share = plots.principal_plane(latents.mu)
    assert 0.5 < share < 1
    shown = list(range(0, 2500, 3))[:800]
    found = report._map(plane, shown, torch.full((800,), 1), ["cat", "dog"], dataset)
    assert len(found["points"]) == len(found["words"]) == 800
    assert found["words"][7] == "image 21: dog"
    assert found["tile"] == [32, 24]
    assert found["points"][7] == pytest.approx(plane[21].tolist(), rel=1e-4)
    sheet = np.asarray(Image.open(io.BytesIO(base64.b64decode(found["sprites"].partition(",")[2]))))
    row, column = divmod(777, found["columns"])
    assert abs(int(sheet[row * 32 + 16, column * 24 + 12].flat[0]) - 255 * values[shown[777]]) <= 3


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

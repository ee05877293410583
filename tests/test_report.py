"""The page about a model: its content, missing parts, and how a browser shows it."""

from __future__ import annotations

import json
import re
import shutil
import time
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import iddpm_ext
from iddpm_ext import Diffusion, UNet, UNetConfig
from iddpm_ext.checkpoint import metadata_of
from iddpm_ext.cli import main
from iddpm_ext.training.checkpoints import write_checkpoint

pytest.importorskip("matplotlib")
pytest.importorskip("jinja2")
from iddpm_ext.report import parts, write_report
from iddpm_ext.report.elements import Missing, Table
from iddpm_ext.report.parts import advice, bits, drawing
from iddpm_ext.report.subject import Way

NAMES = ["bag", "<b>boot</b>", "coat"]
SECTIONS = ["samples", "chain", "nearest", "likelihood", "cost", "training", "configuration"]


def network(classes: int | None = 3) -> UNet:
    torch.manual_seed(0)
    model = UNet(
        UNetConfig(
            image_size=8, in_channels=1, out_channels=2, model_channels=32, num_res_blocks=1,
            channel_mult=(1,), attention_resolutions=(), num_classes=classes,
        )
    )  # fmt: skip
    torch.nn.init.normal_(model.out[2].weight, std=0.05)
    model.diffusion = Diffusion("cosine", 60, variance="learned_range")
    model.extra = {"class_names": NAMES} if classes else {}
    return model.eval()


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page about a complete run with data."""
    folder = tmp_path_factory.mktemp("report")
    patch = pytest.MonkeyPatch()
    patch.setattr(advice, "_extractor_name", lambda: "pixels")
    run = folder / "run"
    write_run(run)
    write_data(folder / "data.npz")
    path = write_report(
        run, folder / "report.html", data=folder / "data.npz", quick=True, progress=False
    )
    patch.undo()
    return path


def write_run(folder: Path) -> None:
    """What a run leaves, as far as the page reads it: a checkpoint and the records."""
    model = network()
    weights = {"model.safetensors": (model.state_dict(), metadata_of(model))}
    write_checkpoint(folder / "ckpt", 30, weights, {"config": {"ema": [0.999]}}, keep=1)
    records = [
        {
            "step": s,
            "loss": 1 / s,
            "images_per_second": 10.0,
            **{f"loss_q{q}": (q + 1) / s for q in range(4)},
        }
        for s in range(1, 31)
    ]
    lines = [json.dumps(record) for record in records]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + '\n{"step": 31, "lo')


def write_data(path: Path) -> None:
    levels = np.random.default_rng(0).integers(0, 256, (24, 8, 8, 1), np.uint8)
    np.savez(path, levels, np.arange(24) % 3)


class Seen(HTMLParser):
    """Elements with their attributes, and the text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_has_every_part_and_asks_nothing_of_anyone(page):
    text = page.read_text()
    seen = Seen(text)
    sections = [a["id"] for tag, a in seen.elements if tag == "section"]
    assert sections == SECTIONS and "Left out" not in seen.text
    for _, attributes in seen.elements:
        for name in ("src", "href", "action", "poster"):
            value = attributes.get(name)
            assert value is None or value.startswith(("data:", "#")), value
    assert "default-src 'none'" in text and not re.search(r"url\(\s*[\"']?http", text)
    assert len(text) < 5_000_000


def test_pictures_have_alternatives_and_what_files_say_is_no_markup(page):
    seen = Seen(page.read_text())
    shown = [a for tag, a in seen.elements if tag == "img" and "hidden" not in a]
    assert len(shown) > 9 and all(a["alt"] for a in shown)
    assert any("class <b>boot</b>" in (a["alt"] or "") for a in shown)
    drawings = [a for tag, a in seen.elements if a.get("role") == "img"]
    assert drawings and all(a["aria-label"] for a in drawings)
    assert "b" not in [tag for tag, _ in seen.elements]


def test_numbers_come_with_the_command_that_makes_them_again(page, monkeypatch, capsys, tmp_path):
    text = Seen(page.read_text()).text
    command = next(line for line in text.splitlines() if line.startswith("iddpm nll "))
    monkeypatch.chdir(tmp_path)
    assert main([*command.split()[1:-1], "--no-engine"]) == 0
    said = re.search(r"([\d.]+) bits/dim, 95 %", capsys.readouterr().out)
    shown = re.search(r"([\d.]+) bits/dim over \d+ ", text)
    assert said and shown and abs(float(said[1]) - float(shown[1])) < 2e-3


def test_what_is_missing_is_left_out_with_the_reason(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(advice, "_extractor_name", lambda: "pixels")
    a, b = network(), network(classes=None)
    b.diffusion = None
    iddpm_ext.save(a, tmp_path / "a.safetensors")
    iddpm_ext.save(b, tmp_path / "b.safetensors")
    out = tmp_path / "both.html"
    names = [str(tmp_path / f"{name}.safetensors") for name in "ab"]
    assert main(["report", *names, "--quick", "--out", str(out)]) == 0
    assert capsys.readouterr().out == f"{out}\n"
    seen = Seen(out.read_text())
    assert seen.text.count("give them with --data") == 3
    assert "holds no diffusion process" in seen.text and "without its run" in seen.text
    assert [a["id"] for tag, a in seen.elements if tag == "section"] == SECTIONS
    assert sum(tag == "h3" for tag, _ in seen.elements) == 2 * len(SECTIONS)


@pytest.mark.parametrize(
    "arguments, match",
    [
        (("nowhere.safetensors",), "name_or_path must be an existing file"),
        (("fashion-mnist", "--out", "x.txt"), "out must end in .html, got 'x.txt'"),
        (("fashion-mnist", "--out", "no/x.html"), "out must be in a folder that exists"),
        (("fashion-mnist", "--data", "no"), "data must exist, got 'no'"),
    ],
)
def test_a_wrong_call_is_one_line_before_any_work(arguments, match, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["report", *arguments]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and match in error
    assert not list(tmp_path.iterdir())


def test_a_copied_sample_is_seen(monkeypatch):
    """A model that draws its training images is detected."""
    subject = _subject()
    known = torch.rand(50, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    monkeypatch.setattr(type(subject), "open", lambda self, split: None)
    monkeypatch.setattr(drawing, "images_of", lambda data, count: known)
    monkeypatch.setattr(iddpm_ext, "sample", lambda *_, **__: known[:8] + 1e-3, raising=False)
    body = parts.nearest(subject)
    assert body.facts["samples like copies"] == "8 of 8"
    monkeypatch.setattr(iddpm_ext, "sample", lambda *_, **__: -known[8:16], raising=False)
    body = parts.nearest(subject)
    assert body.facts["samples like copies"] == "0 of 8"
    (table,) = [e for e in body.elements if isinstance(e, Table)]
    assert all(float(str(row[3])) > 0.5 for row in table.rows)


def test_the_advice_is_the_cheapest_that_is_not_told_apart_from_the_best():
    from iddpm_ext.metrics import Interval

    def cost(seconds: float, distance: float) -> advice.Cost:
        return advice.Cost(
            Way("ddim"), 1, seconds, distance, Interval(distance - 0.1, distance + 0.1)
        )

    found = [cost(1, 0.9), cost(2, 0.38), cost(4, 0.31), cost(9, 0.3)]
    assert advice.advised(found) is found[1]
    assert advice.advised([advice.Cost(Way("ddim"), 1, 1.0)]) is None


def test_ways_that_a_checkpoint_lacks_something_for_are_left_out():
    optimal, pictures = Way("ddpm", "optimal"), Way("unipc", schedule="pictures")
    assert optimal.name == "ddpm, optimal variance" and pictures.name == "unipc, steps for pictures"
    assert pictures.steps(10) == "pictures-10" and Way("ddim").steps(10) == 10
    assert optimal.flags == "--sampler ddpm --variance optimal"
    stored = {"weights": "w"}
    assert Way("ddim").goes({}, 10, "w") and not optimal.goes({"moments": stored}, 10, "w")
    assert optimal.goes({"covariance": stored}, 10, "w")
    assert Way("ddim", "analytic").goes({"moments": stored}, 5, "w")
    # The bundled model trained on and saved: what is stored is of the weights before.
    assert not optimal.goes({"covariance": stored}, 10, "other")
    assert pictures.goes({"picture_schedules": {"10": [1]}}, 10, "w")
    assert not pictures.goes({"picture_schedules": {"10": [1]}}, 5, "w")


def test_it_says_whether_to_train_on(page, tmp_path):
    text = Seen(page.read_text()).text
    assert "The loss still falls (first quarter of t, second, third, last): train on." in text
    run = tmp_path / "run"
    write_run(run)
    (run / "config.json").write_text("{}")
    subject = _subject(run=run)
    assert [e.text for e in parts.training(subject).elements if hasattr(e, "text")][-1] == (
        f"iddpm train --config-file {run}/config.json --steps 60"
    )
    flat = [{"step": s, "loss_q0": 1 + 0.01 * (s % 2), "loss": 1.0} for s in range(1, 31)]
    (run / "metrics.jsonl").write_text("\n".join(map(json.dumps, flat)))
    assert "levelled off" in parts.training(subject).facts["what next"]


def test_a_folder_without_splits_has_no_test_images(tmp_path):
    """Both splits read all of it: to call these test images would hide that they were trained on."""
    write_data(tmp_path / "data.npz")
    with np.load(tmp_path / "data.npz") as arrays:
        for i, image in enumerate(arrays["arr_0"]):
            (tmp_path / "images").mkdir(exist_ok=True)
            Image.fromarray(image[:, :, 0]).save(tmp_path / "images" / f"{i}.png")
    assert bits.held_out(_subject(str(tmp_path / "images")))[0] == "train"
    for split in ("train", "test"):
        for path in sorted((tmp_path / "images").glob("*.png"))[:: 1 + (split == "test")]:
            target = tmp_path / "split" / split / path.name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, target)
    assert bits.held_out(_subject(str(tmp_path / "split")))[0] == "test"


def test_images_of_another_shape_are_said_to_be(tmp_path):
    np.savez(tmp_path / "x.npz", np.zeros((4, 8, 8, 3), np.uint8))
    with pytest.raises(
        Missing, match="8x8 pixels with 3 channels, the network's 8x8 pixels with 1 "
    ):
        _subject(str(tmp_path / "x.npz")).open("train")


def _subject(data: str | None = None, run: Path | None = None) -> Any:
    from iddpm_ext.report.subject import QUICK, DataArguments, Subject

    cpu = torch.device("cpu")
    return Subject("m", network(), run, DataArguments(data), QUICK, 0, cpu)


@pytest.fixture(scope="module")
def browser() -> Any:
    webdriver = pytest.importorskip("selenium.webdriver")
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not (chromium and driver):
        pytest.skip("chromium and chromedriver (Debian: chromium-driver) are not installed")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for word in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(word)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    found = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield found
    found.quit()


def test_a_browser_shows_it_without_an_error_and_plays_the_film(page, browser):
    browser.set_window_size(1100, 900)
    browser.get(page.as_uri())
    assert [log for log in browser.get_log("browser") if log["level"] != "INFO"] == []
    find = browser.find_elements
    heights = {e.get_attribute("id"): e.size["height"] for e in find("css selector", "section")}
    assert list(heights) == SECTIONS and min(heights.values()) > 80
    broken = "return [...document.images].filter(i => !i.hidden && !i.naturalWidth).length"
    assert browser.execute_script(broken) == 0
    (film,) = find("css selector", ".film")
    assert film.size["height"] < 400, "a frame is shown, not the strip of all frames"
    picture = "return document.querySelector('canvas').toDataURL()"
    last = browser.execute_script(picture)
    (play,) = find("css selector", ".play")
    play.send_keys("\n")  # by keyboard
    seen, until = set(), time.monotonic() + 20
    while len(seen) < 3 and time.monotonic() < until:
        seen.add(browser.execute_script(picture))
    assert len(seen) >= 3 and play.text == "Pause"
    (slider,) = find("css selector", ".film input")
    browser.execute_script("arguments[0].value = arguments[0].max;"
                           "arguments[0].dispatchEvent(new Event('input'))", slider)  # fmt: skip
    assert browser.execute_script(picture) == last and play.text == "Play"


def test_both_themes_and_a_phone(page, browser):
    browser.get(page.as_uri())
    background = "return getComputedStyle(document.body).backgroundColor"
    colours = {browser.execute_script(background)}
    browser.find_element("id", "theme").click()
    colours.add(browser.execute_script(background))
    assert colours == {"rgb(255, 255, 255)", "rgb(20, 24, 29)"}
    browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": 375, "height": 700, "deviceScaleFactor": 2, "mobile": True},
    )
    wide = "return document.documentElement.scrollWidth"
    assert browser.execute_script(wide) == 375, "nothing but tables and commands scrolls sideways"
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})

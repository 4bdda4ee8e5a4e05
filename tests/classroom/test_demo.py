"""The demo in a real browser: the committed page, and one made anew, draw, answer and agree with Python."""

import base64
import gzip
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from course_lib.classroom import demo
from course_lib.gate import UnsupportedModel
from course_lib.lab.compile import CompilerError
from course_lib.methods.c_source import raw_pixels
from course_lib.methods.integer import IntegerNetwork, integer_network

ROOT = Path(__file__).parents[2]
COMMITTED = ROOT / "docs" / "demo.html"
SIZES = pytest.mark.parametrize(("width", "scheme"), [(390, "dark"), (1280, "light")])
ONE = [[(0.52, 0.15), (0.5, 0.85)]]
SEVEN = [[(0.3, 0.15), (0.7, 0.15), (0.45, 0.85)]]


def content(page):
    """The data inside a page."""
    return json.loads(re.search(r"^const DATA = (.*);$", page, re.M)[1])


@pytest.fixture(scope="module")
def made(digits, tmp_path_factory):
    """A page made anew from quickly trained networks, and these."""
    pytest.importorskip("ziglang", reason="ziglang is not installed")
    entries = demo.demo_networks(digits, effort=0.1)
    path = tmp_path_factory.mktemp("demo") / "demo.html"
    path.write_bytes(demo.demo_page(entries, digits))
    return path, entries


@pytest.fixture
def visit(browser):
    """Opens a file; afterwards nothing else was asked for and nothing was complained of."""
    contexts, asked, said = [], [], []

    def open_page(path, width=1280, scheme="light", **options):
        context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme, **options)
        contexts.append(context)
        page = context.new_page()
        page.on("request", lambda request: asked.append(request.url))
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.goto(path.as_uri())
        page.wait_for_selector("body[data-ready]", timeout=60_000)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert not said
    assert not [url for url in asked if not url.startswith("file://")]


def draw(page, strokes):
    box = page.locator("#pad").bounding_box()
    for stroke in strokes:
        places = [(box["x"] + x * box["width"], box["y"] + y * box["height"]) for x, y in stroke]
        page.mouse.move(*places[0])
        page.mouse.down()
        for place in places[1:]:
            page.mouse.move(*place, steps=5)
        page.mouse.up()


def answers(page):
    return [text.split()[0] for text in page.locator(".answer").all_inner_texts()]


def scores(page):
    return np.array([card.get_attribute("data-scores").split() for card in page.locator("#cards > li").all()], int)


def test_the_committed_page_is_today_s_template_and_small():
    text = COMMITTED.read_text(encoding="utf-8")
    data = json.dumps(content(text), separators=(",", ":"))
    assert text.replace(data, demo.MARK) == demo.TEMPLATE.read_text(encoding="utf-8"), "make demo brings it up to date"
    assert COMMITTED.stat().st_size < 200_000
    about = content(text)
    assert [n["name"] for n in about["networks"]][:2] == ["Teacher", "LeNet-300-100"]
    assert all(n["accuracy"] > 88 for n in about["networks"])
    packed = {n["name"]: base64.b64decode(n["wasm"]) for n in about["networks"]}
    size = {name: len(gzip.decompress(module)) for name, module in packed.items()}
    assert size["LeNet, pruned"] == pytest.approx(size["LeNet-300-100"], rel=0.01)
    assert len(packed["LeNet, pruned"]) < len(packed["LeNet-300-100"]) / 3


@SIZES
def test_drawn_digits_are_read(visit, width, scheme):
    page = visit(COMMITTED, width, scheme)
    assert page.inner_text("#status") == "Draw a digit."
    draw(page, ONE)
    assert answers(page)[:2] == ["1", "1"]
    page.click("#clear")
    assert set(answers(page)) == {"–"}
    draw(page, SEVEN)
    assert answers(page)[:3] == ["7", "7", "7"]
    assert re.match(r"Teacher: 7 \(\d+ %\)\. \d of the 5 others agree\.", page.inner_text("#status"))
    assert page.evaluate("document.documentElement.scrollWidth") <= width


@pytest.mark.parametrize("which", ["committed", "made"])
def test_ten_images_are_answered_as_in_python(visit, request, digits, which):
    path = COMMITTED if which == "committed" else request.getfixturevalue("made")[0]
    page = visit(path)
    assert "on 10 of 10 examples every score of every network equals" in page.inner_text("#proof")
    for i in range(10):
        page.click("#example")
        assert f"Example {i + 1} of 10, a {i}." in page.inner_text("#status")
        if which == "made":
            image = digits.test.images[digits.test.labels == i][:1]
            expected = np.concatenate([e.network.scores(image) for e in request.getfixturevalue("made")[1]])
            np.testing.assert_array_equal(scores(page), expected)


def test_temperature_changes_how_sure_and_not_what(visit):
    page = visit(COMMITTED)
    draw(page, SEVEN)
    sure, said = [], []
    for place in (-0.5, 0, 1):
        page.locator("#heat").fill(str(place))
        sure.append(float(page.locator("#cards > li").first.get_attribute("data-probability")))
        said.append(answers(page))
    assert sure[0] > sure[1] > sure[2] > 0.1
    assert said[0] == said[1] == said[2]
    card = content(COMMITTED.read_text(encoding="utf-8"))["networks"][0]
    logits = (torch.tensor(scores(page)[0]) - card["zero"]) * card["scale"]
    assert sure[2] == pytest.approx((logits / 10).softmax(0).max().item(), abs=1e-3)
    page.click("#one")
    assert page.inner_text("#told") == "1.0"


def test_the_keyboard_draws_too(visit):
    page = visit(COMMITTED)
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "pad"
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    for key in ["ArrowUp"] * 6 + [" "] + ["ArrowDown"] * 11 + [" "]:
        page.keyboard.press(key)
    assert answers(page)[:2] == ["1", "1"]
    page.keyboard.press("Delete")
    assert page.inner_text("#status") == "Draw a digit."


def test_a_finger_draws_too(visit):
    page = visit(COMMITTED, 390, has_touch=True, is_mobile=True)
    touch = page.context.new_cdp_session(page)
    box = page.locator("#pad").bounding_box()
    for kind, y in [("touchStart", 0.15), *(("touchMove", y / 10) for y in range(2, 9)), ("touchEnd", None)]:
        points = [] if y is None else [{"x": box["x"] + box["width"] / 2, "y": box["y"] + y * box["height"]}]
        touch.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": points})
    assert answers(page)[:2] == ["1", "1"]
    assert page.evaluate("scrollY") == 0


def test_everything_has_a_name_and_every_network_a_time(visit):
    page = visit(COMMITTED)
    for name in ("Clear", "Next example of the data set", "T = 1", "Measure the times again"):
        assert page.get_by_role("button", name=name, exact=True).count() == 1
    assert page.get_by_role("slider", name="Temperature").count() == 1
    assert page.get_by_role("status").get_attribute("aria-live") == "polite"
    assert page.get_by_role("img", name="What the networks see").count() == 1
    page.wait_for_function("[...document.querySelectorAll('.time')].every((cell) => /µs/.test(cell.textContent))")
    times = [float(text.split()[0]) for text in page.locator(".time").all_inner_texts()]
    assert times[0] > 5 * times[4] > 0, "the teacher's convolutions take longer than a hidden layer of 32"


def test_strokes_are_reduced_as_the_data_set_was(visit, digits):
    page = visit(COMMITTED)
    seen = np.array(page.evaluate("Array.from(pixels([[[0.3, 0.15], [0.7, 0.15], [0.45, 0.85]]]))")).reshape(8, 8)
    usual = raw_pixels(digits.train.images, digits.mean, digits.std, 17).double().mean().item()
    assert seen.max() == 16
    assert seen.mean() == pytest.approx(usual, rel=0.15)
    assert (seen[[0, 7]].max(axis=1) > 8).all(), "as tall as the box"
    assert abs((seen.sum(axis=0) > 0).sum() - 6) <= 1
    assert seen[0, 2:6].mean() > 3 * max(1, seen[5, :2].mean())
    assert page.evaluate("pixels([[[0.5, 0.5]]]).some((v) => v > 0)"), "a single dot is no error"


def test_a_network_that_cannot_be_written_is_named(digits):
    network = integer_network(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), digits.val.images)
    foreign = IntegerNetwork((*network.steps, ("soft", nn.Softmax(dim=1))), network.x_q, network.y_q)
    with pytest.raises(UnsupportedModel, match=r"'soft' .* cannot be written as C"):
        demo.demo_page([demo.Entry("Soft", "", foreign)], digits)


def test_without_a_compiler_no_page_is_left(monkeypatch, tmp_path):
    def refuse(entries, data):
        raise CompilerError("no")

    monkeypatch.setattr(demo, "demo_networks", lambda data: [])
    monkeypatch.setattr(demo, "demo_page", refuse)
    with pytest.raises(CompilerError):
        demo.make_demo(tmp_path / "demo.html")
    assert not list(tmp_path.iterdir())

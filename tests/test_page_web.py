"""The page of the server in a real browser, against the real server with a tiny trained model."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import uvicorn

import inference_api
import predictor
import synthetic
from config import ServingConfig
from preprocess import apply, decode
from serving_security import ApiKeys
from serving_service import Service

pytest.importorskip("playwright", reason="playwright is not installed")
from playwright.sync_api import Browser, FilePayload, Page, Route, expect, sync_playwright

WEB = inference_api.WEB
PATIENCE_MS = 30_000
"""A machine busy with other tests may take long over what takes milliseconds."""
expect.set_options(timeout=PATIENCE_MS)
CHROMIUM = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), ""
)
KEY = "a-key-of-the-ward-1234"
browser_needed = pytest.mark.skipif(not CHROMIUM, reason="no chromium on this machine")


# --- the files, read without a browser ------------------------------------------------------------------------------


def source(name: str) -> str:
    return (WEB / name).read_text(encoding="utf-8")


@pytest.mark.parametrize("name", sorted(path.name for path in WEB.iterdir()))
def test_no_file_of_the_page_names_another_host(name: str) -> None:
    named = set(re.findall(r"(?:https?:)?//[\w.-]+\.\w+[^\s\"']*", source(name)))
    assert named <= {"http://www.w3.org/2000/svg"}  # a namespace, never fetched


def test_the_page_holds_no_inline_script_or_style() -> None:
    page = source("index.html")
    assert not re.findall(r"<style|\sstyle=|\son\w+=|javascript:", page)
    assert re.findall(r"<script[^>]*>(.*?)</script>", page, flags=re.DOTALL) == [""]


def test_the_script_writes_text_only_as_text() -> None:
    assert not re.findall(
        r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b|localStorage", source("app.js")
    )


def test_every_element_the_script_asks_for_is_in_the_page() -> None:
    asked = set(re.findall(r'\$\("([\w-]+)"\)', source("app.js")))
    assert len(asked) > 20 and asked <= set(re.findall(r'\sid="([\w-]+)"', source("index.html")))


def test_the_page_says_that_it_is_no_medical_device() -> None:
    assert "For research use only." in source("index.html") and "Not a medical device" in source("index.html")


def luminance(colour: str) -> float:
    """Relative luminance of #rrggbb (WCAG 2.2)."""
    shares = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    linear = [share / 12.92 if share <= 0.04045 else ((share + 0.055) / 1.055) ** 2.4 for share in shares]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


PALETTES = [
    dict(re.findall(r"--([\w-]+): (#\w{6});", block))
    for block in re.findall(r":root \{(.*?)\}", source("style.css"), re.DOTALL)
]
TEXT_ON = [
    *[(ink, paper) for ink in ("ink", "soft", "accent", "bad-line", "warn-line") for paper in ("paper", "raised")],
    ("on-accent", "accent"), ("ink", "warn"), ("ink", "bad"), ("bad-line", "bad"),
]  # fmt: skip


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize(("ink", "paper"), TEXT_ON)
def test_text_stands_out_from_its_ground(scheme: str, ink: str, paper: str) -> None:
    palette = PALETTES[0] if scheme == "light" else PALETTES[0] | PALETTES[1]
    assert contrast(palette[ink], palette[paper]) >= 4.5  # WCAG 2.2 AA


# --- the page in a browser ------------------------------------------------------------------------------------------


@contextlib.contextmanager
def serving(trained: Path, **keys: str) -> Iterator[str]:
    """The address of a running server of the tiny model."""
    checkpoint = trained / "best_model.pth"
    service = Service(predictor.load(checkpoint, device="cpu"), ServingConfig(), source=checkpoint, keys=ApiKeys(keys))
    listener = inference_api.listen("127.0.0.1", 0)
    server = uvicorn.Server(uvicorn.Config(inference_api.create_app(service), log_config=None, ws="none"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    while not (server.started and service.queue.ready):
        time.sleep(0.02)
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()
        listener.close()


@pytest.fixture(scope="module")
def address(trained: Path) -> Iterator[str]:
    with serving(trained) as found:
        yield found


@pytest.fixture(scope="module")
def locked(trained: Path) -> Iterator[str]:
    with serving(trained, ward=KEY) as found:
        yield found


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as driver:
        started = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield started
        started.close()


class Watched:
    """A page with what it asked for and complained of."""

    def __init__(self, page: Page, address: str) -> None:
        self.page, self.address = page, address
        self.requests: list[str] = []
        self.complaints: list[str] = []
        page.set_default_timeout(PATIENCE_MS)
        page.on("request", lambda request: self.requests.append(request.url))
        page.on("pageerror", lambda error: self.complaints.append(str(error)))
        page.on("console", lambda line: self.complaints.append(line.text) if line.type == "error" else None)

    def open(self) -> Watched:
        self.page.goto(self.address)
        self.page.locator("#card dd").first.wait_for()
        return self

    def give(self, *films: FilePayload, answered: int | None = None) -> Watched:
        self.page.set_input_files("#files", list(films))
        count = len(films) if answered is None else answered
        expect(self.page.locator("#tally")).to_have_text(f"{count} of {count} answered")
        return self

    def row(self, number: int) -> Any:
        return self.page.locator(f"#list li:nth-child({number}) button")

    def text(self, selector: str) -> str:
        """What stands there, its spaces plain."""
        return self.page.locator(selector).inner_text().replace("\xa0", " ")


@pytest.fixture
def page(browser: Browser, address: str) -> Iterator[Watched]:
    context = browser.new_context(viewport={"width": 1440, "height": 900})
    yield Watched(context.new_page(), address)
    context.close()


def film(name: str, *, seed: int = 1, pneumonia: bool = True) -> FilePayload:
    drawn = synthetic.film(pneumonia=pneumonia, seed=seed, size=32)
    return png(name, drawn)


def png(name: str, pixels: Any) -> FilePayload:
    return {"name": name, "mimeType": "image/png", "buffer": cv2.imencode(".png", pixels)[1].tobytes()}


def dicom_film(name: str) -> FilePayload:
    """A MONOCHROME2 chest film as DICOM."""
    import io

    from pydicom.dataset import Dataset, FileMetaDataset
    from pydicom.uid import DigitalXRayImageStorageForPresentation, ExplicitVRLittleEndian, generate_uid

    pixels = synthetic.film(pneumonia=True, seed=3, size=64)
    data = Dataset()
    data.file_meta = FileMetaDataset()
    data.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    data.file_meta.MediaStorageSOPClassUID = data.SOPClassUID = DigitalXRayImageStorageForPresentation
    data.file_meta.MediaStorageSOPInstanceUID = data.SOPInstanceUID = generate_uid()
    data.Modality, data.BodyPartExamined, data.PhotometricInterpretation = "DX", "CHEST", "MONOCHROME2"
    data.Rows, data.Columns = pixels.shape
    data.SamplesPerPixel, data.BitsAllocated, data.BitsStored, data.HighBit, data.PixelRepresentation = 1, 8, 8, 7, 0
    data.PixelData = pixels.tobytes()
    stream = io.BytesIO()
    data.save_as(stream, enforce_file_format=True)
    return {"name": name, "mimeType": "application/dicom", "buffer": stream.getvalue()}


def refuse(status: int, detail: str, **headers: str) -> Any:
    """A route handler that answers as an overloaded or unwilling server would."""

    def answer(route: Route) -> None:
        body = json.dumps({"detail": detail})
        route.fulfill(status=status, content_type="application/json", body=body, headers=headers)

    return answer


@browser_needed
def test_a_film_gets_the_servers_answer_and_nothing_is_asked_of_another_host(page: Watched) -> None:
    page.open()
    with page.page.expect_response("**/predict") as reply:
        page.page.set_input_files("#files", [film("one.png")])
    expect(page.page.locator("#prediction")).to_be_visible()
    answer = reply.value.json()
    probability = answer["probabilities"]["PNEUMONIA"]
    assert page.text("#prediction") == answer["prediction"]
    assert page.text("#confidence") == f"{100 * answer['confidence']:.1f} %"
    assert page.text("#meter-title") == f"Probability of PNEUMONIA: {100 * probability:.1f} %"
    meter = page.page.locator("#meter")
    assert meter.get_attribute("aria-valuenow") == f"{100 * probability:.1f}"
    side = "at or above" if probability >= answer["threshold"] else "below"
    assert f"It is {side} the operating point of {100 * answer['threshold']:.1f} %" in page.text("#meter-words")
    assert all(url.startswith((page.address, "blob:")) for url in page.requests)
    assert not page.complaints


@browser_needed
def test_bar_and_mark_stand_where_the_numbers_say(page: Watched) -> None:
    answer = {
        "prediction": "B", "confidence": 0.75, "probabilities": {"A": 0.25, "B": 0.75}, "inference_time_ms": 1.0,
        "model_version": "v", "positive_class": "B", "threshold": 0.4, "in_distribution": True, "reason": None,
    }  # fmt: skip
    page.page.route("**/predict", lambda route: route.fulfill(json=answer))
    page.page.emulate_media(reduced_motion="reduce")
    page.open()
    page.page.set_input_files("#files", [film("one.png")])
    meter, fill, mark = (page.page.locator(f"#{name}").bounding_box() for name in ("meter", "meter-fill", "meter-mark"))
    assert meter and fill and mark
    # The border takes a pixel on each side.
    assert fill["width"] / (meter["width"] - 2) == pytest.approx(0.75, abs=0.01)
    assert (mark["x"] + mark["width"] / 2 - meter["x"] - 1) / (meter["width"] - 2) == pytest.approx(0.4, abs=0.01)


@browser_needed
def test_a_task_of_many_classes_shows_no_operating_point(page: Watched) -> None:
    answer = {
        "prediction": "B", "confidence": 0.5, "probabilities": {"A": 0.2, "B": 0.5, "C": 0.3}, "inference_time_ms": 1.0,
        "model_version": "v", "positive_class": None, "threshold": None, "in_distribution": None, "reason": None,
    }  # fmt: skip
    page.page.route("**/predict", lambda route: route.fulfill(json=answer))
    page.open()
    page.page.set_input_files("#files", [film("one.png")])
    expect(page.page.locator("#prediction")).to_have_text("B")
    expect(page.page.locator("#point")).to_be_hidden()
    assert page.page.locator("#probabilities tbody th").all_inner_texts() == ["B", "C", "A"]


@browser_needed
def test_the_whole_way_works_by_keyboard_alone(page: Watched) -> None:
    page.open()
    keyboard = page.page.keyboard
    keyboard.press("Tab")
    expect(page.page.locator(".skip")).to_be_focused()
    keyboard.press("Tab")
    expect(page.page.locator("#files")).to_be_focused()
    with page.page.expect_file_chooser() as chooser:
        keyboard.press("Space")
    chooser.value.set_files([film("one.png"), film("two.png", seed=2, pneumonia=False)])
    expect(page.page.locator("#tally")).to_have_text("2 of 2 answered")
    keyboard.press("Tab")
    expect(page.row(1)).to_be_focused()
    keyboard.press("Tab")
    keyboard.press("Enter")
    expect(page.row(2)).to_be_focused()
    expect(page.row(2)).to_have_attribute("aria-current", "true")
    expect(page.page.locator("#result-title")).to_have_text("two.png")
    keyboard.press("Tab")
    expect(page.page.locator("#clear")).to_be_focused()
    keyboard.press("Tab")
    expect(page.page.locator("#explain")).to_be_focused()
    keyboard.press("Enter")
    expect(page.page.locator("#overlay")).to_be_visible()
    page.page.locator("#clear").focus()
    keyboard.press("Tab")
    expect(page.page.locator("#opacity")).to_be_focused()
    keyboard.press("ArrowLeft")
    expect(page.page.locator("#opacity-value")).to_have_text("95 %")
    assert page.page.locator("#overlay").evaluate("item => item.style.opacity") == "0.95"


@browser_needed
def test_the_heat_map_covers_the_film_and_leaves_cold_places_clear(page: Watched) -> None:
    page.open()
    page.page.set_input_files("#files", [film("one.png")])
    page.page.locator("#explain").click()
    canvas = page.page.locator("#overlay")
    expect(canvas).to_be_visible()
    assert canvas.bounding_box() == pytest.approx(page.page.locator("#film").bounding_box())
    read = "item => [...item.getContext('2d').getImageData(0, 0, item.width, item.height).data]"
    alpha = np.array(canvas.evaluate(read)).reshape(-1, 4)[:, 3]
    assert alpha.min() < 30 and alpha.max() > 200


@browser_needed
def test_of_several_files_a_bad_one_gets_its_own_reason_and_the_others_their_answers(page: Watched) -> None:
    text: FilePayload = {"name": "notes.txt", "mimeType": "text/plain", "buffer": b"Not a film."}
    page.open().give(film("one.png"), text, film("two.png", seed=2))
    assert "probability of PNEUMONIA" in page.text("#list li:nth-child(1)")
    assert "not an image" in page.text("#list li:nth-child(2)")
    assert "probability of PNEUMONIA" in page.text("#list li:nth-child(3)")
    page.row(2).click()
    expect(page.page.locator("#trouble")).to_contain_text("not an image")
    expect(page.page.locator("#answer")).to_be_hidden()


@browser_needed
def test_many_films_are_sent_a_few_at_a_time(page: Watched) -> None:
    open_now, most = set[str](), 0

    def started(request: Any) -> None:
        nonlocal most
        if request.url.endswith("/predict"):
            open_now.add(str(id(request)))
            most = max(most, len(open_now))

    page.page.on("request", started)
    page.page.on("requestfinished", lambda request: open_now.discard(str(id(request))))
    page.open().give(*(film(f"{number}.png", seed=number) for number in range(12)))
    assert 1 <= most <= 3


@browser_needed
def test_a_film_unlike_the_training_films_carries_a_warning(page: Watched) -> None:
    colours = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    page.open().give(png("holiday.png", colours), film("chest.png"))
    page.row(1).click()
    expect(page.page.locator("#unlike")).to_be_visible()
    expect(page.page.locator("#unlike-reason")).to_contain_text("colour picture")
    assert "unlike" in page.text("#list li:nth-child(1) .tag")


@browser_needed
def test_a_dicom_film_is_shown_by_the_servers_picture(page: Watched) -> None:
    page.open()
    page.page.set_input_files("#files", [dicom_film("chest.dcm")])
    expect(page.page.locator("#overlay")).to_be_visible()
    shown = page.page.locator("#film")
    expect(shown).to_be_visible()
    assert shown.evaluate("item => item.naturalWidth") == 32  # the square that the model sees


@browser_needed
def test_a_busy_server_is_asked_again_when_it_said(page: Watched) -> None:
    page.page.route("**/predict", refuse(503, "busy", **{"Retry-After": "0"}), times=2)
    page.open()
    page.page.set_input_files("#files", [film("one.png")])
    expect(page.page.locator("#prediction")).to_be_visible()
    assert sum(url.endswith("/predict") for url in page.requests) == 3


REFUSALS = {
    400: ("broken form", "Not answered: broken form"),
    408: ("slow", "did not arrive in time"),
    413: ("more than 64 MiB", r"too large for this server\. \(more than 64 MiB\)"),
    415: ("not multipart", "cannot read this kind of file"),
    422: ("not an image", "Not answered: not an image"),
    500: ("Internal Server Error", "The server failed on this film"),
    503: ("busy", "The server is busy"),
}


@browser_needed
@pytest.mark.parametrize("status", REFUSALS)
def test_a_refusal_is_put_in_words(page: Watched, status: int) -> None:
    detail, words = REFUSALS[status]
    page.page.route("**/predict", refuse(status, detail, **{"Retry-After": "0"}))
    page.open()
    page.page.set_input_files("#files", [film("one.png")])
    expect(page.page.locator("#trouble")).to_contain_text(re.compile(words))
    expect(page.page.locator("#live")).to_contain_text(re.compile(words))


@browser_needed
def test_a_server_that_is_gone_is_said_to_be(page: Watched) -> None:
    page.open()
    page.page.route("**/predict", lambda route: route.abort())
    page.page.set_input_files("#files", [film("one.png")])
    expect(page.page.locator("#trouble")).to_contain_text("The server cannot be reached")


@browser_needed
def test_a_failed_explanation_leaves_the_answer_and_may_be_tried_again(page: Watched) -> None:
    page.page.route("**/explain*", refuse(500, "Internal Server Error"), times=1)
    page.open()
    page.page.set_input_files("#files", [film("one.png")])
    page.page.locator("#explain").click()
    expect(page.page.locator("#explain-state")).to_contain_text("The server failed")
    expect(page.page.locator("#prediction")).to_be_visible()
    page.page.locator("#explain").click()
    expect(page.page.locator("#overlay")).to_be_visible()


@browser_needed
def test_a_key_is_asked_for_refused_and_accepted_and_the_film_waits(browser: Browser, locked: str) -> None:
    context = browser.new_context()
    page = Watched(context.new_page(), locked)
    page.page.goto(locked)
    form = page.page.locator("#key-form")
    expect(form).to_be_visible()
    expect(page.page.locator("#key")).to_be_focused()
    page.page.set_input_files("#files", [film("one.png")])
    expect(page.row(1)).to_contain_text("waiting")
    page.page.fill("#key", "some-other-key-987654")
    page.page.keyboard.press("Enter")
    expect(page.page.locator("#key-error")).to_have_text("That key was not accepted.")
    page.page.fill("#key", KEY)
    page.page.keyboard.press("Enter")
    expect(page.page.locator("#prediction")).to_be_visible()
    expect(form).to_be_hidden()
    expect(page.page.locator("#card")).to_contain_text("NORMAL, PNEUMONIA")
    assert not any(KEY in url for url in page.requests)
    assert page.page.evaluate("() => [localStorage.length, sessionStorage.length, document.cookie]") == [0, 0, ""]
    context.close()


@browser_needed
def test_the_name_of_a_file_is_not_sent(page: Watched) -> None:
    page.page.add_init_script(
        "window.sent = []; const send = fetch; window.fetch = (path, options) => {"
        "  for (const [, file] of options.body || []) sent.push(file.name); return send(path, options); };"
    )
    page.open()
    page.page.set_input_files("#files", [film("Doe_Jane_1970.png")])
    page.page.locator("#explain").click()
    expect(page.page.locator("#overlay")).to_be_visible()
    assert page.page.evaluate("() => window.sent") == ["film", "film"]


@browser_needed
def test_a_file_name_that_is_markup_stays_text(page: Watched) -> None:
    name = "<img src=x onerror=alert(1)>.png"
    page.open()
    page.page.set_input_files("#files", [film(name)])
    expect(page.page.locator("#result-title")).to_have_text(name)
    assert page.page.locator("#list img, #result-title img").count() == 0


@browser_needed
def test_removing_all_films_empties_the_page(page: Watched) -> None:
    page.open().give(film("one.png"), film("two.png", seed=2))
    page.page.locator("#clear").click()
    expect(page.page.locator("#list li")).to_have_count(0)
    expect(page.page.locator("#result")).to_be_hidden()
    expect(page.page.locator("#files")).to_be_focused()


@browser_needed
def test_the_model_card_says_what_the_server_knows(page: Watched) -> None:
    page.open()
    card = page.text("#card")
    for words in ("test_efficientnet", "NORMAL, PNEUMONIA", "PNEUMONIA from ", "32 × 32 pixels", "torch"):
        assert words in card


@browser_needed
@pytest.mark.parametrize("width", [360, 768, 1440])
def test_nothing_is_wider_than_the_window(page: Watched, width: int) -> None:
    page.page.set_viewport_size({"width": width, "height": 800})
    page.open().give(film("a_very_long_name_without_any_place_to_break_it_" * 3 + ".png"), film("two.png"))
    page.page.locator("#explain").click()
    expect(page.page.locator("#overlay")).to_be_visible()
    assert page.page.evaluate("() => document.documentElement.scrollWidth") <= width
    boxes = [item.bounding_box() for item in page.page.locator("button:visible, input:visible, figure:visible").all()]
    assert all(box and box["x"] >= 0 and box["x"] + box["width"] <= width + 1 for box in boxes)


@browser_needed
def test_every_control_has_a_name_and_is_large_enough_to_touch(page: Watched) -> None:
    page.open().give(film("one.png"), film("two.png"))
    for control in page.page.locator("button:visible").all():
        box = control.bounding_box()
        assert control.inner_text().strip() and box and box["height"] >= 44
    for control in page.page.locator("input:not([type=password])").all():
        assert control.evaluate("item => item.labels.length") == 1


@browser_needed
def test_nothing_moves_for_those_who_ask_for_stillness(page: Watched) -> None:
    page.page.emulate_media(reduced_motion="reduce")
    page.open()
    seconds = page.page.evaluate(
        "() => [...document.querySelectorAll('*')].map(item => parseFloat(getComputedStyle(item).transitionDuration))"
    )
    assert max(seconds) == 0


# --- a model that reads notes ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def reading(trained_cases: Path) -> Iterator[str]:
    with serving(trained_cases) as found:
        yield found


@pytest.fixture
def case_page(browser: Browser, reading: str) -> Iterator[Watched]:
    context = browser.new_context(viewport={"width": 1440, "height": 900})
    yield Watched(context.new_page(), reading)
    context.close()


NOTE = "fever , dense lungs ."


@browser_needed
def test_a_film_with_note_and_values_gets_the_answer_to_all_of_them(case_page: Watched, trained_cases: Path) -> None:
    case_page.open()
    case_page.page.get_by_label("Clinical note of the films chosen next").fill(NOTE)
    case_page.page.get_by_label("age").fill("63")
    with case_page.page.expect_response("**/predict") as reply:
        case_page.page.set_input_files("#files", [film("one.png")])
    expect(case_page.page.locator("#prediction")).to_be_visible()
    answer = reply.value.json()
    stored = predictor.load(trained_cases / "best_model.pth", device="cpu")
    pixels = apply(stored.spec, decode(film("one.png")["buffer"], stored.spec))
    case = stored.case(pixels, {"text": NOTE, "age": "63"})
    expected = stored.exact_outputs(np.stack([case]))[0][0]
    assert list(answer["probabilities"].values()) == pytest.approx(expected.tolist(), abs=1e-6)
    assert case_page.text("#confidence") == f"{100 * answer['confidence']:.1f} %"
    assert case_page.text("#told") == f"Read beside the film: age 63; sex missing; note: {NOTE}"
    assert not case_page.complaints


@browser_needed
def test_a_note_goes_with_the_films_chosen_after_it_was_written(case_page: Watched) -> None:
    case_page.open()
    for number, note in enumerate(("dense lungs", "clear lungs", "")):
        case_page.page.fill("#note", note)
        case_page.page.set_input_files("#files", [film(f"{number}.png")])
    expect(case_page.page.locator("#tally")).to_have_text("3 of 3 answered")
    said = []
    for number in (1, 2, 3):
        case_page.row(number).click()
        said.append((case_page.text("#told").split("; ")[-1], case_page.text("#meter-title")))
    assert [note for note, _ in said] == ["note: dense lungs", "note: clear lungs", "no note"]
    assert len({title for _, title in said}) == 3


@browser_needed
@pytest.mark.parametrize("width", [360, 1440])
def test_the_words_of_the_note_are_shown_with_their_evidence(case_page: Watched, width: int) -> None:
    case_page.page.set_viewport_size({"width": width, "height": 900})
    case_page.open()
    case_page.page.fill("#note", NOTE + " " + "heart" * 40)
    case_page.page.set_input_files("#files", [film("one.png")])
    with case_page.page.expect_response("**/explain*") as reply:
        case_page.page.locator("#explain").click()
    expect(case_page.page.locator("#words")).to_be_visible()
    expect(case_page.page.locator("#overlay")).to_be_visible()
    found = {item["word"]: item["evidence"] for item in reply.value.json()["words"]}
    shown = case_page.page.locator("#words-line > span")
    assert shown.evaluate_all("items => items.map(item => item.firstChild.data)") == list(found)
    strongest = max(found, key=lambda word: abs(found[word]))
    shares = shown.evaluate_all("items => items.map(item => getComputedStyle(item).backgroundColor)")
    opacity = [float(colour.rstrip(")").split(",")[-1]) for colour in shares]
    assert opacity[list(found).index(strongest)] == max(opacity) == 0.5
    warm = shares[list(found).index(strongest)].startswith("rgba(230")
    assert warm == (found[strongest] > 0)
    assert ("raised it" if warm else "lowered it") in case_page.page.locator("#words-line").inner_text()
    assert case_page.page.evaluate("() => document.documentElement.scrollWidth") <= width
    assert not case_page.complaints


@browser_needed
def test_a_value_the_model_cannot_read_is_refused_in_words(case_page: Watched) -> None:
    case_page.open()
    case_page.page.get_by_label("age").fill("old")
    case_page.page.set_input_files("#files", [film("one.png")])
    expect(case_page.page.locator("#trouble")).to_contain_text(re.compile("Not answered: .*age 'old'"))


@browser_needed
def test_a_model_of_films_alone_shows_no_boxes(page: Watched) -> None:
    page.open().give(film("one.png"), film("two.png"))
    expect(page.page.locator("#note-box")).to_be_hidden()
    expect(page.page.locator("#values-box")).to_be_hidden()
    expect(page.page.locator("#told")).to_be_hidden()

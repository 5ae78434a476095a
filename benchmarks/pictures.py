"""The pictures of the README: the report and the server's page, made by the program on what its demo wrote.

    python main.py demo && python benchmarks/pictures.py demo_output

Reads DEMO/evaluation/report.html and DEMO/run/best_model.pth, starts the server on that checkpoint, gives its page
three synthetic films and asks for a heat map, all in a headless Chromium. Writes report.png and page.png into
--output-dir (docs/figures), a few dozen colours each. Never shows a film of a patient.
"""

from __future__ import annotations

import argparse
import io
import shutil
import sys
from pathlib import Path
from typing import Any

from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import synthetic
from benchmarks.serving_bench import ROOT, Server

COLOURS = 96
"""Enough for text, tables and a heat map; a file of a third of the size."""
CASES = ((True, 14), (False, 12), (True, 11))
"""(pneumonia, seed) of the films shown."""


def film(*, pneumonia: bool, seed: int) -> dict[str, Any]:
    """A synthetic film as a browser would upload it."""
    stream = io.BytesIO()
    Image.fromarray(synthetic.film(pneumonia=pneumonia, seed=seed, size=480)).save(stream, "PNG")
    return {"name": f"synthetic_{seed}.png", "mimeType": "image/png", "buffer": stream.getvalue()}


def store(picture: Image.Image, path: Path) -> None:
    """The picture with few colours, at most 200 kB."""
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.convert("RGB").quantize(COLOURS, method=Image.Quantize.MEDIANCUT).save(path, optimize=True)
    size = path.stat().st_size
    print(f"{path}: {picture.width}x{picture.height}, {size / 1000:.0f} kB")
    assert size < 200_000, "too large for a README"


def seen(page: Any) -> Image.Image:
    """What the window shows now."""
    return Image.open(io.BytesIO(page.screenshot()))


def page_of_server(browser: Any, address: str) -> Image.Image:
    """The page after three films, with a heat map over the first."""
    page = browser.new_page(viewport={"width": 1120, "height": 740})
    page.goto(address)
    page.locator("#card dd").first.wait_for()
    page.set_input_files("#files", [film(pneumonia=sick, seed=seed) for sick, seed in CASES])
    page.get_by_text(f"{len(CASES)} of {len(CASES)} answered").wait_for()
    page.locator("#explain").click()
    page.locator("#overlay").wait_for()
    page.locator("#opacity").fill("60")
    page.mouse.wheel(0, -10_000)
    return seen(page)


def two_screens_of_report(browser: Any, report: Path) -> Image.Image:
    """The top of report.html, and beside it its first figures."""
    page = browser.new_page(viewport={"width": 740, "height": 900})
    page.goto(report.resolve().as_uri())
    top = seen(page)
    page.locator("figure").first.evaluate("item => window.scrollTo(0, item.offsetTop - 12)")
    both = Image.new("RGB", (2 * top.width, top.height))
    both.paste(top, (0, 0))
    both.paste(seen(page), (top.width, 0))
    return both


def main() -> None:
    """Parse the command line and make both."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("demo", type=Path, help="the folder that `python main.py demo` wrote")
    parser.add_argument("--output-dir", type=Path, default=ROOT / "docs" / "figures")
    arguments = parser.parse_args()
    from playwright.sync_api import sync_playwright

    chromium = next((found for name in ("chromium", "google-chrome") if (found := shutil.which(name))), None)
    checkpoint = arguments.demo / "run" / "best_model.pth"
    with sync_playwright() as driver, Server(["--checkpoint", str(checkpoint)]) as server:
        browser = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        report = two_screens_of_report(browser, arguments.demo / "evaluation" / "report.html")
        store(report, arguments.output_dir / "report.png")
        store(page_of_server(browser, server.url), arguments.output_dir / "page.png")
        browser.close()


if __name__ == "__main__":
    main()

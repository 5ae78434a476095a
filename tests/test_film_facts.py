"""The facts of a film are what its file says, and a fault is named by its kind."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import ExifTags, Image

import film_facts as film_facts_module
import synthetic
from film_facts import (
    FACTS,
    border_shares,
    channel_spread,
    film_facts,
    jpeg_quality,
    kind_of_fault,
    marker_share,
    same_pixels,
    scan_films,
    shrink,
    thumbnail,
)
from preprocess import decode, has_colour


def facts_of(path: Path) -> dict[str, object]:
    data = path.read_bytes()
    row = film_facts(data, np.empty((64, 64), np.uint8))
    return dict(zip(FACTS.names or (), row))


@pytest.mark.parametrize("quality", [30, 75, 90, 95, 100])
def test_jpeg_quality_is_the_one_it_was_written_with(quality: int) -> None:
    buffer = io.BytesIO()
    Image.fromarray(synthetic.film(pneumonia=False, seed=1, size=64)).save(buffer, "JPEG", quality=quality)
    assert jpeg_quality(buffer.getvalue()) == quality


def test_a_png_has_no_jpeg_quality_and_a_cut_header_neither() -> None:
    assert (
        jpeg_quality(b"\x89PNG" + bytes(100)) == jpeg_quality(b"\xff\xd8") == jpeg_quality(b"\xff\xd8\xff\xdb\0") == 0
    )


def test_facts_are_those_of_the_file(tmp_path: Path) -> None:
    film = synthetic.film(pneumonia=True, seed=2, size=200)[:, :150]
    path = tmp_path / "a.png"
    Image.fromarray(np.ascontiguousarray(film)).save(path)
    facts = facts_of(path)
    assert (facts["width"], facts["height"], facts["bits"], facts["channels"]) == (150, 200, 8, 1)
    assert facts["bytes"] == path.stat().st_size and facts["quality"] == 0 and not facts["colour"]
    assert facts["mean"] == pytest.approx(film.mean() / 255, abs=1e-3)
    assert facts["contrast"] == pytest.approx(film.std() / 255, abs=1e-3)


def _jpeg(image: Image.Image, *, orientation: int = 1, **settings: object) -> bytes:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=90, exif=exif, **settings)
    return buffer.getvalue()


FILM = Image.fromarray(synthetic.film(pneumonia=True, seed=7, size=160)[:, :130])
COLOURED = Image.merge("RGB", [FILM, FILM.point(lambda level: level // 2), FILM.point(lambda level: 255 - level)])
ARROW = FILM.convert("RGB")
ARROW.paste((255, 0, 0), (40, 40, 60, 50))


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(_jpeg(FILM), id="grey"),
        pytest.param(_jpeg(FILM.convert("RGB")), id="grey as RGB"),
        pytest.param(_jpeg(FILM.convert("RGB"), progressive=True), id="progressive"),
        pytest.param(_jpeg(COLOURED), id="coloured"),
        pytest.param(_jpeg(ARROW, subsampling=0), id="a red arrow"),
        pytest.param(_jpeg(FILM, orientation=6), id="lying"),
        pytest.param(_jpeg(FILM.convert("CMYK")), id="CMYK"),
    ],
)
def test_a_jpeg_has_the_facts_of_its_pixels_in_another_format(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(data)
    Image.fromarray(decode(data)).save(tmp_path / "a.png")
    jpeg, png = facts_of(tmp_path / "a.jpg"), facts_of(tmp_path / "a.png")
    of_the_pixels = [name for name in jpeg if name not in ("bytes", "quality")]
    assert [jpeg[name] for name in of_the_pixels] == [png[name] for name in of_the_pixels]
    assert jpeg["colour"] == (data == _jpeg(COLOURED))


def test_colour_is_seen_as_preprocess_sees_it() -> None:
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 255, (40, 40, 3), dtype=np.uint8)
    spread = np.ptp(pixels.astype(np.int16), axis=2).mean()
    assert channel_spread(pixels) == pytest.approx(spread) and has_colour(pixels)


def test_deep_films_are_windowed_like_the_model_sees_them(tmp_path: Path) -> None:
    film = synthetic.film(pneumonia=False, seed=3, size=128).astype(np.uint16)
    Image.fromarray(film * 16).save(tmp_path / "deep.png")
    facts = facts_of(tmp_path / "deep.png")
    assert facts["bits"] == 16 and facts["mean"] == pytest.approx((film - film.min()).mean() / np.ptp(film), abs=0.01)


def test_shrinking_averages_and_keeps_small_films() -> None:
    film = np.kron(np.arange(256, dtype=np.uint8).reshape(16, 16), np.ones((20, 20), np.uint8))
    assert np.array_equal(shrink(film), np.kron(np.arange(256, dtype=np.uint8).reshape(16, 16), np.ones((10, 10))))
    assert shrink(film[:150]) is not None and shrink(film[:150]).shape == (150, 320)
    assert thumbnail(film).shape == (64, 64)


def test_a_border_of_one_level_is_measured_and_a_film_without_has_none() -> None:
    films = np.random.default_rng(0).integers(0, 255, (4, 120, 100), dtype=np.uint8)
    films[1, :10] = films[1, 110:] = 0
    films[2, :, :5] = 255
    films[3] = 7
    assert border_shares(films) == pytest.approx([0, 20 / 120, 0.05, 1])


def test_text_near_the_edge_is_seen_and_text_in_the_middle_is_not() -> None:
    import cv2

    film = np.full((224, 224), 40, np.uint8)
    corner, middle = film.copy(), film.copy()
    cv2.putText(corner, "R", (8, 30), cv2.FONT_HERSHEY_SIMPLEX, 0.8, 255, 2)
    cv2.putText(middle, "R", (100, 120), cv2.FONT_HERSHEY_SIMPLEX, 0.8, 255, 2)
    assert marker_share(corner) > 0.001 and marker_share(middle) == marker_share(film) == 0


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (b"", "empty"),
        (b"Dear colleague", "non_image"),
        (bytes(range(256)), "non_image"),
    ],
)
def test_a_fault_is_named_by_its_kind(data: bytes, kind: str, tmp_path: Path) -> None:
    path = tmp_path / "a.jpg"
    path.write_bytes(data)
    scan = scan_films([str(path)], np.empty((1, 64, 64), np.uint8))
    assert scan.faults[0].kind == kind and str(path) in scan.faults[0].line and not scan.facts["readable"][0]


def test_a_cut_file_is_truncated_and_an_absent_one_missing(tmp_path: Path) -> None:
    Image.fromarray(synthetic.film(pneumonia=False, seed=5, size=96)).save(tmp_path / "a.jpg")
    data = (tmp_path / "a.jpg").read_bytes()
    (tmp_path / "a.jpg").write_bytes(data[: len(data) // 2])
    scan = scan_films([str(tmp_path / "a.jpg"), str(tmp_path / "b.jpg")], np.empty((2, 64, 64), np.uint8))
    assert [fault.kind for fault in scan.faults.values()] == ["truncated", "missing"]


def test_what_the_decoder_refuses_is_no_damage() -> None:
    assert kind_of_fault("a.dcm: 12 frames; only single films are read: export the frame to be used") == "refused"
    assert kind_of_fault("a.dcm: a DICOM file that is no film (directory, document); remove it") == "non_image"
    assert kind_of_fault("a.png: damaged or truncated image (broken PNG file); fetch it again") == "damaged"


def test_rows_come_in_order_for_any_number_of_workers(tmp_path: Path) -> None:
    paths = []
    for number in range(70):
        paths.append(str(tmp_path / f"{number}.png"))
        Image.fromarray(np.full((40 + number, 50), number, np.uint8)).save(paths[-1])
    (tmp_path / "33.png").write_bytes(b"")
    thumbnails = np.zeros((70, 64, 64), np.uint8)
    scan = scan_films(paths, thumbnails, workers=3)
    assert list(scan.faults) == [33]
    assert [int(height) for height in scan.facts["height"]] == [0 if row == 33 else 40 + row for row in range(70)]
    levels = np.array([0 if row == 33 else row for row in range(70)])
    assert np.abs(thumbnails[:, 0, 0].astype(int) - levels).max() <= 1  # bilinear weights are rounded


def test_processes_read_what_threads_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = [str(tmp_path / f"{number}.png") for number in range(40)]
    for number, path in enumerate(paths[:-1]):
        Image.fromarray(synthetic.film(pneumonia=False, seed=number, size=40)).save(path)
    in_threads, in_processes = (np.zeros((40, 64, 64), np.uint8) for _ in range(2))
    expected = scan_films(paths, in_threads, workers=2)
    monkeypatch.setattr(film_facts_module, "PROCESSES_FROM", 1)
    scan = scan_films(paths, in_processes, workers=2)
    assert np.array_equal(scan.facts, expected.facts) and np.array_equal(in_processes, in_threads)
    assert scan.faults == expected.faults and list(scan.faults) == [39]


def test_a_film_of_other_colours_is_another_film(tmp_path: Path) -> None:
    film = synthetic.film(pneumonia=False, seed=6, size=48)
    Image.fromarray(film).save(tmp_path / "a.png")
    Image.fromarray(np.dstack([film // 2, film, film])).save(tmp_path / "b.png")
    assert not same_pixels(str(tmp_path / "a.png"), str(tmp_path / "b.png"))


def test_a_grey_film_stored_as_rgb_holds_the_same_pixels(tmp_path: Path) -> None:
    film = synthetic.film(pneumonia=False, seed=6, size=48)
    Image.fromarray(film).save(tmp_path / "a.png")
    Image.fromarray(film).convert("RGB").save(tmp_path / "b.png")
    Image.fromarray(film + 1).save(tmp_path / "c.png")
    (tmp_path / "d.png").write_bytes(b"")
    a, b, c, d = (str(tmp_path / f"{name}.png") for name in "abcd")
    assert same_pixels(a, b) and not same_pixels(a, c) and not same_pixels(a, d)

"""preprocess.py: every file type comes out as the pixels it holds, and every damaged one as a clear error."""

from __future__ import annotations

import io
import struct
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image, ImageOps

import dicom
import preprocess
import synthetic
from errors import CheckpointError, DataError
from preprocess import PreprocessSpec, apply, decode

FILM = synthetic.film(pneumonia=True, seed=1, size=48)
COLOUR = np.dstack([FILM, FILM[::-1], FILM[:, ::-1]])


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "BMP"])
def test_lossless_grey_comes_back_exactly(kind: str) -> None:
    assert np.array_equal(decode(encoded(Image.fromarray(FILM), kind)), FILM)


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "BMP"])
def test_lossless_rgb_comes_back_in_rgb_order(kind: str) -> None:
    assert np.array_equal(decode(encoded(Image.fromarray(COLOUR), kind)), COLOUR)


@pytest.mark.parametrize("kind", ["JPEG", "WEBP"])
def test_lossy_grey_comes_back_within_its_quality(kind: str) -> None:
    pixels = decode(encoded(Image.fromarray(FILM), kind, quality=95))
    grey = pixels if pixels.ndim == 2 else pixels[:, :, 0]
    assert np.abs(grey.astype(int) - FILM).mean() < 4


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bit_grey_keeps_its_depth(kind: str) -> None:
    deep = FILM.astype(np.uint16) * 200
    assert np.array_equal(decode(encoded(Image.fromarray(deep), kind)), deep)


def test_twelve_bits_stored_in_sixteen_use_the_whole_range() -> None:
    twelve = (FILM.astype(np.uint16) - FILM.min()) * 16
    assert twelve.max() < 4096
    out = apply(PreprocessSpec(image_size=48), decode(encoded(Image.fromarray(twelve), "PNG")))
    assert (out.min(), out.max()) == (0, 255)


def test_floating_point_tiff_is_scaled_to_its_range() -> None:
    values = FILM.astype(np.float32) / 7 - 3
    pixels = decode(encoded(Image.fromarray(values), "TIFF"))
    assert pixels.dtype == np.uint16 and pixels.min() == 0 and pixels.max() == 65535


def test_palette_becomes_the_colours_it_names() -> None:
    image = Image.fromarray(COLOUR).quantize(64)
    assert np.array_equal(decode(encoded(image, "PNG")), np.asarray(image.convert("RGB")))


def test_one_bit_image_becomes_black_and_white() -> None:
    assert set(np.unique(decode(encoded(Image.fromarray(FILM > 128), "PNG")))) == {0, 255}


def test_transparency_is_laid_over_black() -> None:
    alpha = np.zeros_like(FILM)
    alpha[:24] = 255
    pixels = decode(encoded(Image.fromarray(np.dstack([COLOUR, alpha])), "PNG"))
    assert np.array_equal(pixels[:24], COLOUR[:24]) and pixels[24:].max() == 0


def test_cmyk_jpeg_becomes_rgb_of_the_same_look() -> None:
    smooth = cv2.GaussianBlur(COLOUR, (0, 0), 3)
    pixels = decode(encoded(Image.fromarray(smooth).convert("CMYK"), "JPEG", quality=95))
    assert pixels.shape == smooth.shape
    assert np.abs(pixels.astype(int) - smooth).mean() < 6


@pytest.mark.parametrize(("orientation", "turned"), [(3, 2), (6, 3), (8, 1)])
def test_exif_orientation_is_applied(orientation: int, turned: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(Image.fromarray(FILM), "PNG", exif=exif)
    assert np.array_equal(decode(data), np.rot90(FILM, turned))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "empty"),
        (b"path,label\na,b\n" * 20, "not an image .it holds text"),
        (bytes(range(256)) * 8, "not an image .unknown content"),
        (b"\0" * 128 + b"DICM" + b"\0" * 50, "a DICOM file without pixels"),
    ],
)
def test_what_is_no_image_is_said_to_be_none(data: bytes, message: str) -> None:
    with pytest.raises(DataError, match=message):
        decode(data)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP", "BMP"])
@pytest.mark.parametrize("share", [0.3, 0.6, 0.9])
def test_a_truncated_image_is_an_error_and_never_half_a_film(kind: str, share: float) -> None:
    data = encoded(Image.fromarray(FILM), kind)
    with pytest.raises(DataError, match="truncated|damaged|not an image"):
        decode(data[: int(len(data) * share)])


@pytest.mark.parametrize("seed", range(40))
def test_damaged_bytes_give_an_image_or_a_data_error(seed: int) -> None:
    rng = np.random.default_rng(seed)
    data = bytearray(encoded(Image.fromarray(COLOUR), ["JPEG", "PNG", "TIFF", "BMP"][seed % 4]))
    for position in rng.integers(0, len(data), 12):
        data[position] = int(rng.integers(256))
    try:
        pixels = decode(bytes(data))
    except DataError as error:
        assert "\n" not in str(error)
    else:
        assert apply(PreprocessSpec(image_size=32), pixels).shape == (32, 32, 1)


def test_an_error_that_a_reader_does_not_declare_is_a_data_error() -> None:
    """An EXIF width that is text: Pillow turns the film, packs its tags again and fails with a struct.error."""
    tags = struct.pack("<HHI4s", 0x0100, 2, 3, b"ab") + struct.pack("<HHIHH", 0x0112, 3, 1, 6, 0)
    exif = b"Exif\0\0II*\0" + struct.pack("<IH", 8, 2) + tags + bytes(4)
    data = encoded(Image.fromarray(FILM), "JPEG", exif=exif)
    with pytest.raises(struct.error), Image.open(io.BytesIO(data)) as image:
        ImageOps.exif_transpose(image)
    with pytest.raises(DataError, match="damaged or truncated image .required argument"):
        decode(data)


def test_every_reader_is_loaded_before_the_first_film() -> None:
    """Loaded on demand, threads that decode at the same time met a list of readers half filled."""
    program = "import preprocess; from PIL import Image; assert set(preprocess.FORMATS) <= set(Image.OPEN), Image.OPEN"
    subprocess.run([sys.executable, "-c", program], check=True, cwd=Path(preprocess.__file__).parent)


def test_an_image_of_too_many_pixels_is_refused_before_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preprocess, "MAX_PIXELS", 1000)
    with pytest.raises(DataError, match="48x48 pixels is more than"):
        decode(encoded(Image.fromarray(FILM), "PNG"))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="none.png: no such file"):
        decode(tmp_path / "none.png")


@pytest.mark.parametrize("resize", ["squash", "pad", "crop"])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("shape", [(40, 90), (90, 40), (64, 64), (10, 7), (300, 200, 3)])
def test_apply_gives_a_uint8_square_and_is_deterministic(resize: str, channels: int, shape: tuple[int, ...]) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    spec = PreprocessSpec(image_size=64, resize=resize, channels=channels)
    out = apply(spec, pixels)
    assert out.shape == (64, 64, channels) and out.dtype == np.uint8
    assert np.array_equal(out, apply(spec, pixels.copy()))


def test_pixels_of_the_right_size_are_untouched() -> None:
    assert np.array_equal(apply(PreprocessSpec(image_size=48), FILM)[:, :, 0], FILM)


def test_squash_keeps_both_ends_of_a_wide_film_and_crop_loses_them() -> None:
    wide = np.zeros((40, 120), np.uint8)
    wide[:, :20] = wide[:, -20:] = 255
    squashed = apply(PreprocessSpec(image_size=40, resize="squash"), wide)
    cropped = apply(PreprocessSpec(image_size=40, resize="crop"), wide)
    assert squashed[:, 0].min() == 255 and squashed[:, -1].min() == 255
    assert cropped.max() == 0


def test_pad_keeps_the_aspect_and_blackens_the_rest() -> None:
    out = apply(PreprocessSpec(image_size=40, resize="pad"), np.full((20, 40), 200, np.uint8))[:, :, 0]
    assert (out[10:30] == 200).all() and out[:10].max() == 0 and out[30:].max() == 0


def test_shrinking_averages_instead_of_aliasing() -> None:
    stripes = np.tile(np.array([0, 255], np.uint8), (64, 32))
    out = apply(PreprocessSpec(image_size=16), stripes)
    assert np.abs(out.astype(int) - 127).max() <= 1


def test_a_grey_film_stored_as_rgb_has_no_colour_and_a_photograph_has() -> None:
    assert not preprocess.has_colour(np.dstack([FILM] * 3))
    assert not preprocess.has_colour(FILM)
    assert preprocess.has_colour(COLOUR)


def test_a_film_on_the_display_scale_is_divided_and_not_stretched() -> None:
    levels = np.arange(0, 65536, 31, dtype=np.uint16)[:2025].reshape(45, 45)
    out = apply(PreprocessSpec(image_size=45), levels.view(dicom.Shown))[:, :, 0]
    assert np.array_equal(out, np.rint(levels / 257)) and out.max() < 255
    exact = (np.arange(256, dtype=np.uint16) * 257).reshape(16, 16).view(dicom.Shown)
    assert np.array_equal(apply(PreprocessSpec(image_size=16), exact)[:, :, 0].ravel(), np.arange(256))


@pytest.mark.parametrize(
    ("name", "data", "taken"),
    [
        ("a.png", b"", True),
        ("A.DCM", b"", True),
        ("IM000001", bytes(128) + b"DICM", True),
        ("1.2.840.113619.2", bytes(128) + b"DICM", True),
        ("README", b"words " * 50, False),
        ("DICOMDIR", bytes(128) + b"DICM", False),
        ("notes.txt", bytes(128) + b"DICM", False),
    ],
)
def test_films_are_told_by_suffix_and_dicom_without_one_by_its_bytes(
    tmp_path: Path, name: str, data: bytes, taken: bool
) -> None:
    (tmp_path / name).write_bytes(data)
    assert preprocess.is_film(tmp_path / name) == taken
    assert not preprocess.is_film(tmp_path)


def test_a_spec_written_before_dicom_was_read_still_loads() -> None:
    old = {key: value for key, value in PreprocessSpec(96).to_dict().items() if not key.startswith("dicom")}
    assert preprocess.spec_from_dict(old) == PreprocessSpec(96)


def test_spec_survives_the_checkpoint() -> None:
    spec = PreprocessSpec(96, "pad", 3, (0.5, 0.5, 0.5), (0.2, 0.2, 0.2), "percentile", "hand")
    assert preprocess.spec_from_dict(spec.to_dict()) == spec


def test_a_spec_of_a_newer_program_is_refused() -> None:
    with pytest.raises(CheckpointError, match="unknown fields .'window'"):
        preprocess.spec_from_dict({**PreprocessSpec().to_dict(), "window": 3})

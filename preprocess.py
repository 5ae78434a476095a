"""From an image file to the uint8 array a model sees: one deterministic way, described by `PreprocessSpec`.

`decode` reads any supported file to grey or RGB pixels at their own depth; `apply` maps depth to 8 bits, colour to
the spec's channels and size to the spec's square. Training, evaluation, export parity and the server all call these
two functions; the spec travels in the checkpoint. Never augments, never normalises (that is the device's work).
"""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps, UnidentifiedImageError

import dicom
from errors import CheckpointError, DataError, first_line

IMAGE_SUFFIXES = dicom.SUFFIXES | {".jpg", ".jpeg", ".png", ".tif", ".tiff", ".bmp", ".webp"}
MAX_PIXELS = dicom.MAX_PIXELS
"""A film of more pixels is refused before it is decoded."""
NO_FILM = "no-film-"
"""Start of the file name that stands for the film of a row with a note only; there is no such file."""

FORMATS = ("JPEG", "JPEG2000", "PNG", "TIFF", "BMP", "DIB", "WEBP", "GIF", "PPM")
"""What Pillow may take a file for. Left to itself it would also start Ghostscript on a file that says it is EPS."""

Image.init()  # Pillow loads its readers at the first file that needs them; threads doing so at once meet half of them

Pixels = npt.NDArray[Any]


@dataclass(frozen=True)
class PreprocessSpec:
    """How any film becomes the array a model sees; stored in the checkpoint, never typed in again."""

    image_size: int = 224
    """Side of the square, in pixels."""
    resize: str = "squash"
    """squash: each side scaled on its own. pad: aspect kept, black bars. crop: aspect kept, centre square."""
    channels: int = 1
    """1 (grey; the device repeats it for the network) or 3 (RGB)."""
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    """Subtracted per network channel after scaling to [0, 1]; comes with the weights."""
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    """Divides per network channel; comes with the weights."""
    dicom_window: str = "first"
    """Which window of a DICOM film: first, a number from 1 among those it stores, or percentile."""
    dicom_body_part: str = "chest"
    """DICOM films whose tags say another body part are refused; any takes all."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for the checkpoint."""
        return {**dataclasses.asdict(self), "mean": list(self.mean), "std": list(self.std)}


def spec_from_dict(values: Mapping[str, Any]) -> PreprocessSpec:
    """The spec a checkpoint stored; CheckpointError when it has fields this program does not know."""
    known = {item.name for item in dataclasses.fields(PreprocessSpec)}
    if unknown := sorted(set(values) - known):
        raise CheckpointError(f"checkpoint: preprocess has unknown fields {unknown}; it needs a newer program")
    plain = dict(values)
    for name in ("mean", "std"):
        if name in plain:
            plain[name] = tuple(float(item) for item in plain[name])
    return PreprocessSpec(**plain)


def has_film(path: str) -> bool:
    """Whether a row's path is that of a film; else it stands for the film that the row lacks."""
    return not Path(path).name.startswith(NO_FILM)


def is_film(path: Path) -> bool:
    """Whether a file is taken for a film when a folder is searched: by its suffix, or as DICOM that has none."""
    suffix = path.suffix.lower()
    if suffix in IMAGE_SUFFIXES:
        return True
    # Scanners write IM000001 or the instance's number with its dots; both may be anything else.
    if suffix.strip(".0123456789") or path.name.upper() == "DICOMDIR" or not path.is_file():
        return False
    try:
        with path.open("rb") as stream:
            return dicom.is_dicom(stream.read(132))
    except OSError:
        return False


def decode(source: str | Path | bytes, spec: PreprocessSpec | None = None, *, max_pixels: int | None = None) -> Pixels:
    """Pixels of an image file or of its bytes: (H, W) grey or (H, W, 3) RGB, uint8 or, for deeper grey films, uint16.

    EXIF orientation is applied, palettes and CMYK become RGB, transparency is laid over black; DICOM goes through the
    window `spec` names and must show the body part `spec` names (None: the first window, any body part). DataError
    names the file and what is wrong with it: missing, empty, not an image, truncated, damaged, too large (more than
    `max_pixels`, or MAX_PIXELS).
    """
    max_pixels = max_pixels or MAX_PIXELS
    name = "uploaded image" if isinstance(source, bytes) else str(source)
    data = source if isinstance(source, bytes) else _read(Path(source))
    if not data:
        raise DataError(f"{name}: the file is empty (0 bytes); remove it or fetch it again")
    if dicom.is_dicom(data[:132]):
        spec = spec or PreprocessSpec(dicom_body_part="any")
        window, body_part = spec.dicom_window, spec.dicom_body_part
        return dicom.decode(data, name=name, window=window, body_part=body_part, max_pixels=max_pixels)
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            if image.width * image.height > max_pixels:
                raise DataError(f"{name}: {image.width}x{image.height} pixels is more than {max_pixels:,}; shrink it")
            image.load()
            ImageOps.exif_transpose(image, in_place=True)
            return _to_array(image)
    except UnidentifiedImageError:
        raise DataError(f"{name}: not an image ({_looks_like(data)}); remove it or convert it to PNG or JPEG") from None
    except Image.DecompressionBombError:
        raise DataError(f"{name}: more than {max_pixels:,} pixels; shrink it") from None
    except DataError:
        raise
    except Exception as error:  # a reader may raise anything over damaged bytes
        raise DataError(
            f"{name}: damaged or truncated image ({first_line(error)}); fetch it again or remove it"
        ) from None


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None


def _looks_like(data: bytes) -> str:
    head = data[:64]
    if all(32 <= byte < 127 or byte in b"\t\r\n" for byte in head):
        return "it holds text"
    return "unknown content"


def _to_array(image: Image.Image) -> Pixels:
    if image.mode.startswith("I;16") or image.mode in ("I", "F"):
        return _deep_grey(np.asarray(image))
    if image.mode in ("1", "L"):
        return np.asarray(image if image.mode == "L" else image.convert("L"))
    if image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        black = Image.new("RGBA", rgba.size, (0, 0, 0, 255))
        return np.asarray(Image.alpha_composite(black, rgba).convert("RGB"))
    return np.asarray(image if image.mode == "RGB" else image.convert("RGB"))


def _deep_grey(pixels: Pixels) -> Pixels:
    """uint16 of a 16-bit, 32-bit or floating-point film; wider ranges are scaled onto 0..65535."""
    if pixels.dtype == np.uint16:
        return pixels
    values = pixels.astype(np.float64)
    if not np.isfinite(values).all():
        raise ValueError("pixels that are not finite")
    if np.issubdtype(pixels.dtype, np.integer) and values.min() >= 0 and values.max() <= 65535:
        return values.astype(np.uint16)
    low, high = values.min(), values.max()
    return np.round((values - low) * (65535 / (high - low) if high > low else 0)).astype(np.uint16)


def has_colour(pixels: Pixels, *, tolerance: float = 8.0) -> bool:
    """Whether RGB pixels differ between channels by more than JPEG noise (mean spread above `tolerance` levels)."""
    if pixels.ndim == 2:
        return False
    return float(np.ptp(pixels.astype(np.int16), axis=2).mean()) > tolerance


def apply(spec: PreprocessSpec, pixels: Pixels) -> npt.NDArray[np.uint8]:
    """`pixels` (H, W) or (H, W, 3) of any depth as uint8 (S, S, channels), S = spec.image_size. Deterministic."""
    pixels = _to_channels(_to_eight_bits(pixels), spec.channels)
    if spec.resize == "crop":
        pixels = _centre_square(pixels)
    if spec.resize == "pad":
        resized = _resize_and_pad(pixels, spec.image_size)
    else:
        resized = _resize(pixels, width=spec.image_size, height=spec.image_size)
    return resized.reshape(spec.image_size, spec.image_size, spec.channels)


def _to_eight_bits(pixels: Pixels) -> Pixels:
    """Deep films are windowed from darkest to brightest pixel: 12 bits stored in 16 must not come out black.

    DICOM films went through a window of their own, which stands.
    """
    if pixels.dtype == np.uint8:
        return pixels
    if isinstance(pixels, dicom.Shown):
        return cv2.convertScaleAbs(np.asarray(pixels), alpha=1 / 257)
    low, high = int(pixels.min()), int(pixels.max())
    scale = 255.0 / (high - low) if high > low else 0.0
    return np.round((pixels.astype(np.float32) - low) * scale).astype(np.uint8)


def _to_channels(pixels: Pixels, channels: int) -> Pixels:
    if channels == 1 and pixels.ndim == 3:
        return cv2.cvtColor(np.ascontiguousarray(pixels), cv2.COLOR_RGB2GRAY)
    if channels == 3 and pixels.ndim == 2:
        return cv2.cvtColor(np.ascontiguousarray(pixels), cv2.COLOR_GRAY2RGB)
    return np.ascontiguousarray(pixels)


def _centre_square(pixels: Pixels) -> Pixels:
    height, width = pixels.shape[:2]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    return np.ascontiguousarray(pixels[top : top + side, left : left + side])


def _resize(pixels: Pixels, *, width: int, height: int) -> Pixels:
    """Area averaging when shrinking (no aliasing), bilinear when growing; untouched when already that size."""
    if pixels.shape[:2] == (height, width):
        return pixels
    shrinks = height * width < pixels.shape[0] * pixels.shape[1]
    return cv2.resize(pixels, (width, height), interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR)


def _resize_and_pad(pixels: Pixels, side: int) -> Pixels:
    height, width = pixels.shape[:2]
    scale = side / max(height, width)
    inner = _resize(pixels, width=max(1, round(width * scale)), height=max(1, round(height * scale)))
    canvas = np.zeros((side, side, *pixels.shape[2:]), dtype=np.uint8)
    top, left = (side - inner.shape[0]) // 2, (side - inner.shape[1]) // 2
    canvas[top : top + inner.shape[0], left : left + inner.shape[1]] = inner
    return canvas

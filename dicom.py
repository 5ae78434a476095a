"""DICOM files: their pixels as the file says they are to be shown, and the few tags that matter.

    film = dicom.decode(Path("film.dcm").read_bytes(), name="film.dcm")     # uint16 (H, W), larger is brighter
    tags = dicom.read_tags("film.dcm")                                       # patient and study as keyed hashes

Stored values → Modality LUT or rescale → VOI LUT, window or percentiles → 0..65535, black to white; MONOCHROME1 is
turned round, padding becomes black, oblong pixels become square. Overlays and collimation are left alone. What a tag
says never reaches a message: names and numbers of patients stand in all sorts of them.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import io
import logging
import os
import re
import secrets
import warnings
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any, BinaryIO

import cv2
import numpy as np
import numpy.typing as npt

from array_cache import default_folder
from errors import DataError, UserError

SUFFIXES = frozenset({".dcm", ".dicom", ".dic"})
MAX_PIXELS = 200_000_000
"""A film of more pixels is refused before it is decoded; the largest mammograms have about 30 million."""
MAX_INFLATED = 2**27
"""Bytes a deflated file may unpack to: 64 million pixels of 16 bits."""
MAX_ASPECT = 8.0
"""Pixels more oblong than this are a damaged tag, not a detector."""
PERCENTILES = (0.5, 99.5)
"""Share of the pixels, in %, left black and white where the window comes from the film itself."""

CHEST_WORDS = ("CHEST", "THORA", "TORAX", "TORAC", "LUNG", "RIB", "PULM")
RADIOGRAPHS = frozenset({"CR", "DX", "DR", "RG", "XR", "RF", "SC", "OT"})
"""Modalities a chest film may come under: radiography, fluoroscopy stills and, for public sets, captures."""
KNOWN_PARTS = frozenset(
    (
        *("ABDOMEN", "ANKLE", "ARM", "BREAST", "CLAVICLE", "CSPINE", "ELBOW", "EXTREMITY", "EYE", "FEMUR", "FINGER"),
        *("FOOT", "FOREARM", "HAND", "HEAD", "HIP", "HUMERUS", "JAW", "KNEE", "LEG", "LSPINE", "NECK", "PELVIS"),
        *("SHOULDER", "SKULL", "SPINE", "SSPINE", "TOE", "TOOTH", "TSPINE", "WHOLEBODY", "WRIST"),
    )
)
"""Body parts that a message may name; any other text stays unsaid."""
NOT_FILMS = ("1.2.840.10008.1.3.10", *(f"1.2.840.10008.5.1.4.1.1.{part}" for part in ("66", "481", "30", "104", "9.")))
"""SOP classes with pixels or bytes that are no picture of a patient: directory, segmentation, dose, map, document,
waveform."""

IMPLICIT, EXPLICIT = "1.2.840.10008.1.2", "1.2.840.10008.1.2.1"
DEFLATED, BIG_ENDIAN = "1.2.840.10008.1.2.1.99", "1.2.840.10008.1.2.2"
JPEG = "1.2.840.10008.1.2.4."
NATIVE = frozenset({IMPLICIT, EXPLICIT, BIG_ENDIAN, DEFLATED})
RLE = "1.2.840.10008.1.2.5"
JPEG_LOSSY = frozenset({f"{JPEG}50", f"{JPEG}51"})
JPEG_LOSSLESS = frozenset({f"{JPEG}57", f"{JPEG}70"})
JPEG_LS = frozenset({f"{JPEG}80", f"{JPEG}81"})
JPEG_2000 = frozenset({f"{JPEG}90", f"{JPEG}91", f"{JPEG}201", f"{JPEG}202", f"{JPEG}203"})
# pydicom would try every plug-in it finds, of any licence and care; these are the ones that were fuzzed.
PLUGINS = {RLE: "pydicom"} | dict.fromkeys(JPEG_LOSSY, "pillow") | dict.fromkeys(JPEG_LS, "pyjpegls")
PLUGINS |= dict.fromkeys(JPEG_2000, "pylibjpeg")

HEAD_BYTES = 2**16
LONG_FORM = frozenset({b"OB", b"OW", b"UN", b"SQ", b"UT", b"OF", b"OD", b"OL", b"UC", b"UR"})
PALETTE = tuple(f"{colour}PaletteColorLookupTable" for colour in ("Red", "Green", "Blue"))
PIXEL_TAGS = (
    *("SOPClassUID", "Modality", "BodyPartExamined", "NumberOfFrames", "SamplesPerPixel", "PhotometricInterpretation"),
    *("PlanarConfiguration", "Rows", "Columns", "PixelSpacing", "ImagerPixelSpacing", "PixelAspectRatio"),
    *("BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation", "PixelPaddingValue", "PixelPaddingRangeLimit"),
    *("WindowCenter", "WindowWidth", "VOILUTFunction", "VOILUTSequence"),
    *("RescaleSlope", "RescaleIntercept", "ModalityLUTSequence", "PixelData"),
    *(f"{name}{part}" for name in PALETTE for part in ("Descriptor", "Data")),
)
PATIENT_TAGS = (
    *("StudyInstanceUID", "StudyDate", "Modality", "PatientID", "IssuerOfPatientID", "PatientBirthDate", "PatientSex"),
    *("PatientAge", "BodyPartExamined", "ViewPosition", "ViewCodeSequence", "SeriesDescription", "Laterality"),
    *("ImageLaterality", "PhotometricInterpretation", "Rows", "Columns", "BitsStored"),
)

Pixels = npt.NDArray[Any]
FloatArray = npt.NDArray[np.float64]


class Shown(np.ndarray[Any, Any]):
    """uint16 pixels already on the display scale, 0 black and 65535 white: whoever needs 8 bits must not stretch them.

    A class of its own because the darkest pixel of a windowed film need not be black.
    """


# --- is it DICOM? ----------------------------------------------------------------------------------------------


def is_dicom(head: bytes) -> bool:
    """Whether bytes (at least the first 132) begin a DICOM file, with its preamble or, as old ones do, without."""
    if head[128:132] == b"DICM":
        return True
    if len(head) < 16 or head[:2] not in (b"\x02\0", b"\x08\0") or head[3] > 0x10:
        return False
    # A first element of group 2 or 8: two capitals as its type, or an implicit length that a short value may have.
    return _is_value_type(head[4:6]) or int.from_bytes(head[4:8], "little") <= 64


def _is_value_type(kind: bytes) -> bool:
    return kind.isalpha() and kind.isupper()


def _file_meta(head: bytes) -> tuple[str, int]:
    """Transfer syntax and where the data set begins, from the elements of group 2; guessed where there are none."""
    position, syntax = (132, "") if head[128:132] == b"DICM" else (0, "")
    while head[position : position + 2] == b"\x02\0" and position + 12 <= len(head):
        element, kind = head[position + 2 : position + 4], head[position + 4 : position + 6]
        if kind in LONG_FORM:
            value, length = position + 12, int.from_bytes(head[position + 8 : position + 12], "little")
        elif _is_value_type(kind):
            value, length = position + 8, int.from_bytes(head[position + 6 : position + 8], "little")
        else:
            value, length = position + 8, int.from_bytes(head[position + 4 : position + 8], "little")
        if element == b"\x10\0":
            syntax = head[value : value + length].decode("ascii", "replace").strip("\0 ")
        position = value + length
    kind = head[position + 4 : position + 6]
    return syntax or (EXPLICIT if _is_value_type(kind) else IMPLICIT), position


@functools.cache
def _quiet_pydicom() -> None:
    """Once a process: pydicom's remarks quote the values they complain of, and those may name a patient."""
    from pydicom import config as pydicom_config

    pydicom_config.settings.reading_validation_mode = pydicom_config.IGNORE
    for name in ("pydicom", "pylibjpeg", "openjpeg"):
        logging.getLogger(name).setLevel(logging.CRITICAL + 1)
    warnings.filterwarnings("ignore", module=r"pydicom\.")


@functools.cache
def _tag_numbers(keywords: tuple[str, ...]) -> tuple[Any, ...]:
    from pydicom.tag import Tag

    return tuple(Tag(keyword) for keyword in keywords)


@contextlib.contextmanager
def _damaged(name: str) -> Iterator[None]:
    """Whatever pydicom or a codec makes of damaged bytes, as one DataError without a word from the tags."""
    try:
        yield
    except (UserError, ImportError):
        raise
    except Exception as error:
        raise DataError(
            f"{name}: damaged or truncated DICOM file ({type(error).__name__}); fetch it again or remove it"
        ) from None


def _parse(stream: BinaryIO, keywords: tuple[str, ...], name: str) -> tuple[Any, str]:
    """The data set with only `keywords` in it, read no further than they need, and the transfer syntax."""
    from pydicom.filereader import read_dataset
    from pydicom.tag import BaseTag

    _quiet_pydicom()
    syntax, start = _file_meta(stream.read(HEAD_BYTES))
    stream.seek(start)
    if syntax == DEFLATED:
        stream = io.BytesIO(_inflated(stream.read(), name))
    tags = _tag_numbers(keywords)
    last = max(tags)

    def beyond(tag: BaseTag, kind: str | None, length: int) -> bool:
        return tag > last

    header = read_dataset(stream, syntax == IMPLICIT, syntax != BIG_ENDIAN, stop_when=beyond, specific_tags=list(tags))
    return header, syntax


def _inflated(data: bytes, name: str) -> bytes:
    unpacker = zlib.decompressobj(-zlib.MAX_WBITS)
    unpacked = unpacker.decompress(data, MAX_INFLATED)
    if unpacker.unconsumed_tail:
        raise DataError(f"{name}: deflated DICOM file that unpacks to more than {MAX_INFLATED:,} bytes; convert it")
    return unpacked


def _values(header: Any, keyword: str) -> list[Any]:
    value = header.get(keyword)
    if value is None or value == "":
        return []
    return list(value) if isinstance(value, (list, tuple)) or hasattr(value, "append") else [value]


def _numbers(header: Any, keyword: str) -> list[float]:
    return [float(value) for value in _values(header, keyword) if value not in (None, "")]


def _integer(header: Any, keyword: str, default: int) -> int:
    return int(next(iter(_numbers(header, keyword)), default))


def _text(header: Any, keyword: str) -> str:
    return str(next(iter(_values(header, keyword)), "")).strip("\0 ").upper()


# --- pixels ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _File:
    """What is known of a film while it is decoded."""

    header: Any
    syntax: str
    name: str

    @property
    def rows(self) -> int:
        return _integer(self.header, "Rows", 0)

    @property
    def columns(self) -> int:
        return _integer(self.header, "Columns", 0)

    @property
    def bits(self) -> int:
        return _integer(self.header, "BitsStored", _integer(self.header, "BitsAllocated", 8))

    @property
    def signed(self) -> bool:
        return _integer(self.header, "PixelRepresentation", 0) == 1

    @property
    def samples(self) -> int:
        return _integer(self.header, "SamplesPerPixel", 1)

    @property
    def photometric(self) -> str:
        return _text(self.header, "PhotometricInterpretation")


def decode(
    data: bytes, *, name: str, window: str = "first", body_part: str = "any", max_pixels: int = MAX_PIXELS
) -> Pixels:
    """Pixels of a DICOM file: `Shown` uint16 (H, W), larger is brighter, or uint8 (H, W, 3) RGB for colour.

    `window`: 'first', a number from 1 among those stored, or 'percentile'. A film without a window is shown whole when
    it has 8 bits, as the JPEG it is, else between percentiles. `body_part`: 'chest', another word, or 'any'. DataError
    says what is wrong: damaged, truncated, too large, several frames, no image, another body part.
    """
    with _damaged(name):
        header, syntax = _parse(io.BytesIO(data), PIXEL_TAGS, name)
        film = _File(header, syntax, name)
        _refuse_what_is_no_film(film, max_pixels)
        _refuse_other_parts(film, body_part)
        stored = _stored_values(film)
        if film.photometric == "PALETTE COLOR":
            return _square(_palette(film, stored), film)
        if film.samples == 3:
            return _square(_eight_bit_colour(film, stored), film)
        return _square(_shown(film, stored, window).view(Shown), film)


def _refuse_what_is_no_film(film: _File, max_pixels: int) -> None:
    name, header = film.name, film.header
    if _text(header, "SOPClassUID").startswith(NOT_FILMS):
        raise DataError(f"{name}: a DICOM file that is no film (directory, document, segmentation, dose); remove it")
    if "PixelData" not in header:
        raise DataError(f"{name}: a DICOM file without pixels, or cut off before them; remove it or fetch it again")
    if (frames := _integer(header, "NumberOfFrames", 1)) > 1:
        raise DataError(f"{name}: {frames} frames; only single films are read: export the frame to be used")
    if film.rows < 1 or film.columns < 1:
        raise DataError(f"{name}: damaged DICOM file (it names no rows and columns); fetch it again or remove it")
    if film.rows * film.columns > max_pixels:
        raise DataError(f"{name}: {film.columns}x{film.rows} pixels is more than {max_pixels:,}; shrink it")
    if film.syntax not in NATIVE | JPEG_LOSSLESS | set(PLUGINS):
        raise DataError(f"{name}: compressed in a way that is not read here; convert it, e.g. to JPEG 2000 lossless")
    monochrome = film.samples == 1 and film.photometric in ("MONOCHROME1", "MONOCHROME2", "PALETTE COLOR")
    colour = film.samples == 3 and film.photometric in ("RGB", "YBR_FULL", "YBR_FULL_422", "YBR_ICT", "YBR_RCT")
    if not (monochrome or colour):
        raise DataError(f"{name}: neither monochrome nor RGB, YBR or palette colour; convert it to one of them")
    if film.photometric == "PALETTE COLOR" and not all(f"{colour}Data" in header for colour in PALETTE):
        raise DataError(f"{name}: palette colour without plain tables (segmented ones are not read); convert it to RGB")


def _refuse_other_parts(film: _File, wanted: str) -> None:
    """DataError where the tags name another body part, or for the chest a modality that is no radiography."""
    if wanted == "any":
        return
    part, modality = _text(film.header, "BodyPartExamined"), _text(film.header, "Modality")
    remedy = "leave it out, or train with data.dicom_body_part=any"
    if part and not _is_part(part, wanted):
        found = part if part in KNOWN_PARTS else "another body part"
        raise DataError(f"{film.name}: its tags say {found}, not {wanted}; {remedy}")
    if wanted == "chest" and modality and modality not in RADIOGRAPHS:
        found = f"modality {modality}" if re.fullmatch("[A-Z]{2}", modality) else "another modality"
        raise DataError(f"{film.name}: its tags say {found}, not radiography; {remedy}")


def _is_part(part: str, wanted: str) -> bool:
    if wanted == "chest":
        return any(word in part for word in CHEST_WORDS) and "SPINE" not in part
    return wanted.upper() in part


def _stored_values(film: _File) -> Pixels:
    """The values in the file, (H, W) or (H, W, 3), integers of their own sign; colour already as RGB."""
    if film.syntax in NATIVE:
        return _native(film)
    if film.syntax == RLE:
        return _by_plugin(film)
    frame = _frame(film)
    _check_codestream(film, frame)
    if film.syntax in JPEG_LOSSLESS or (film.syntax in JPEG_LOSSY and film.samples == 1):
        return _by_libjpeg(film, frame)
    return _by_plugin(film)


def _native(film: _File) -> Pixels:
    allocated = _integer(film.header, "BitsAllocated", 8)
    expected = -(-film.rows * film.columns * film.samples * allocated // 8)
    if film.photometric == "YBR_FULL_422":
        expected = expected * 2 // 3
    if (found := len(film.header.PixelData)) < expected:
        raise DataError(f"{film.name}: truncated: {found:,} of {expected:,} bytes of pixels; fetch it again")
    pixels = _by_plugin(film, correct_unused_bits=False, view_only=True)
    high = _integer(film.header, "HighBit", film.bits - 1)
    above, below = allocated - 1 - high, allocated - film.bits
    # Bits above the high bit held overlays once; they are shifted out, and the sign back in.
    if film.samples == 1 and 0 <= above <= below and below:
        pixels = np.left_shift(pixels, above) if above else pixels
        pixels = np.right_shift(pixels, below)
    return pixels


def _by_plugin(film: _File, **options: Any) -> Pixels:
    from pydicom.pixels import get_decoder

    decoder, plugin = get_decoder(film.syntax), PLUGINS.get(film.syntax, "")
    if plugin and plugin not in decoder.available_plugins:
        raise DataError(f"{film.name}: this compression needs the package {plugin}; pip install -r requirements.txt")
    pixels, _ = decoder.as_array(film.header, index=0, decoding_plugin=plugin, **options)
    return pixels


def _frame(film: _File) -> bytes:
    from pydicom.encaps import generate_frames

    return next(generate_frames(film.header.PixelData, number_of_frames=1))


def _check_codestream(film: _File, frame: bytes) -> None:
    """DataError when the compressed picture is cut off or of another size than the tags say.

    Codecs fill in what is missing, allocate what the codestream claims, and CharLS searches an unended one for seconds.
    """
    if frame.find(b"\xff\xd9", max(0, len(frame) - 64)) < 0:
        raise DataError(f"{film.name}: truncated: the compressed picture has no end; fetch it again or remove it")
    size = _jpeg_2000_size(frame) if film.syntax in JPEG_2000 else _jpeg_size(frame)
    if size != (film.rows, film.columns, film.samples):
        raise DataError(
            f"{film.name}: damaged DICOM file (the compressed picture is of another size than the tags say); fetch it "
            "again or remove it"
        )


def _jpeg_size(frame: bytes) -> tuple[int, int, int] | None:
    """Rows, columns and samples in the frame header of a JPEG or JPEG-LS stream."""
    position = 2
    while position + 10 <= len(frame) and frame[position] == 0xFF:
        marker = frame[position + 1]
        if marker == 0xFF:
            position += 1
        elif marker == 0xF7 or (0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC)):
            rows, columns = frame[position + 5 : position + 7], frame[position + 7 : position + 9]
            return int.from_bytes(rows, "big"), int.from_bytes(columns, "big"), frame[position + 9]
        elif marker == 0xDA:
            return None
        else:
            position += 2 + int.from_bytes(frame[position + 2 : position + 4], "big")
    return None


def _jpeg_2000_size(frame: bytes) -> tuple[int, int, int] | None:
    """Rows, columns and samples in the SIZ marker of a JPEG 2000 codestream, bare or inside a JP2 file."""
    start = frame[:4096].find(b"\xff\x4f\xff\x51")
    if start < 0 or len(frame) < start + 42:
        return None
    width, height, left, top = (int.from_bytes(frame[start + at : start + at + 4], "big") for at in (8, 12, 16, 20))
    return height - top, width - left, int.from_bytes(frame[start + 40 : start + 42], "big")


def _by_libjpeg(film: _File, frame: bytes) -> Pixels:
    """Lossless JPEG, and lossy of 8 or 12 bits, which no plug-in of pydicom under a permissive licence decodes."""
    from imagecodecs import jpeg8_decode

    if film.samples == 1:
        pixels = np.asarray(jpeg8_decode(frame))
    else:
        pixels = np.asarray(jpeg8_decode(frame, colorspace="RGB", outcolorspace="RGB"))
        if film.photometric.startswith("YBR_FULL"):
            from pydicom.pixels import convert_color_space

            pixels = convert_color_space(pixels, "YBR_FULL", "RGB")
    if not film.signed:
        return pixels
    unused = 8 * pixels.itemsize - film.bits
    return np.right_shift(np.left_shift(pixels, unused).view(f"i{pixels.itemsize}"), unused)


# --- from stored values to brightness --------------------------------------------------------------------------


def _shown(film: _File, stored: Pixels, window: str) -> npt.NDArray[np.uint16]:
    """Brightness, 0..65535: worked out once for every value that may occur, then looked up."""
    low, high = min(int(stored.min()), 0), int(stored.max())
    if high - low < 2**16:
        domain, index = np.arange(low, high + 1), stored if low == 0 else stored.astype(np.int32) - low
    else:
        domain, index = np.unique(stored, return_inverse=True)
        index = index.reshape(stored.shape)
    padding = _padding(film, domain)
    values = _modality_values(film, domain.astype(np.float64))
    offset = None if window == "percentile" else _stored_window(film, values, window)
    if offset is None and film.bits <= 8 and window != "percentile":
        offset = _whole_range(film, values)
    if offset is None:
        counts = np.bincount(index.ravel(), minlength=len(domain))
        offset = _percentile_window(values, np.where(padding, 0, counts))
    sign = -1.0 if film.photometric == "MONOCHROME1" else 1.0
    # The same arithmetic for a film and its inverse: they come out equal to the last bit.
    table = np.clip(np.rint(32767.5 + sign * 65535.0 * offset), 0, 65535).astype(np.uint16)
    table[padding] = 0
    return table[index]


def _padding(film: _File, domain: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
    """Which stored values are no picture: Pixel Padding Value, up to its range limit where there is one."""
    ends = _numbers(film.header, "PixelPaddingValue")[:1]
    if not ends:
        return np.zeros(len(domain), dtype=bool)
    ends += _numbers(film.header, "PixelPaddingRangeLimit")[:1]
    return (domain >= min(ends)) & (domain <= max(ends))


def _modality_values(film: _File, values: FloatArray) -> FloatArray:
    header = film.header
    if header.get("ModalityLUTSequence"):
        first, entries, _ = _lookup_table(film, header.ModalityLUTSequence[0], "LUT")
        return _looked_up(values, first, entries)
    slope = next(iter(_numbers(header, "RescaleSlope")), 1.0)
    intercept = next(iter(_numbers(header, "RescaleIntercept")), 0.0)
    if not (np.isfinite([slope, intercept]).all() and slope):
        raise ValueError("rescale slope or intercept")
    return values * slope + intercept


def _stored_window(film: _File, values: FloatArray, window: str) -> FloatArray | None:
    """How far each value lies from the middle of the window chosen, in window widths; None where none is stored."""
    header, number = film.header, 1 if window == "first" else int(window)
    if tables := header.get("VOILUTSequence"):
        _require_window(film, number, len(tables))
        first, entries, bits = _lookup_table(film, tables[number - 1], "LUT")
        return _looked_up(values, first, entries) / (2**bits - 1) - 0.5
    pairs = list(zip(_numbers(header, "WindowCenter"), _numbers(header, "WindowWidth")))
    if not pairs:
        return None
    _require_window(film, number, len(pairs))
    centre, width = pairs[number - 1]
    function = _text(header, "VOILUTFunction") or "LINEAR"
    if not (np.isfinite([centre, width]).all() and width > 0) or (function == "LINEAR" and width < 1):
        return None
    return _window_offset(values, centre, width, function)


def _require_window(film: _File, number: int, stored: int) -> None:
    if not 1 <= number <= stored:
        raise DataError(f"{film.name}: it stores {stored} windows, not {number}; set data.dicom_window=first")


def _window_offset(values: FloatArray, centre: float, width: float, function: str) -> FloatArray:
    """DICOM PS3.3 C.11.2.1: linear over width - 1 about centre - 0.5, exactly linear, or a sigmoid."""
    if function == "SIGMOID":
        return 1 / (1 + np.exp(np.clip(-4 * (values - centre) / width, -700, 700))) - 0.5
    if function == "LINEAR_EXACT":
        return (values - centre) / width
    if function != "LINEAR":
        raise ValueError("VOI LUT function")
    distance = values - (centre - 0.5)
    return np.where(distance > 0, 0.5, -0.5) if width == 1 else distance / (width - 1)


def _whole_range(film: _File, values: FloatArray) -> FloatArray:
    low = -(2 ** (film.bits - 1)) if film.signed else 0
    ends = _modality_values(film, np.arange(low, low + 2**film.bits, dtype=np.float64))
    return _between(values, float(ends.min()), float(ends.max()))


def _percentile_window(values: FloatArray, counts: npt.NDArray[np.int64]) -> FloatArray:
    order = np.argsort(values, kind="stable")
    below = np.cumsum(counts[order])
    if below[-1] == 0:
        return np.full(len(values), -0.5)
    # The lower and the upper neighbour of the two percentiles: a film and its inverse then have mirrored windows.
    ranks = [PERCENTILES[0] / 100 * (below[-1] - 1), PERCENTILES[1] / 100 * (below[-1] - 1)]
    low = values[order[np.searchsorted(below, np.floor(ranks[0]), side="right")]]
    high = values[order[np.searchsorted(below, np.ceil(ranks[1]), side="right")]]
    return _between(values, float(low), float(high))


def _between(values: FloatArray, low: float, high: float) -> FloatArray:
    return (values - (low + high) / 2) / max(high - low, 1e-12)


def _lookup_table(film: _File, item: Any, stem: str) -> tuple[int, npt.NDArray[Any], int]:
    """First value mapped, entries and bits an entry, of `stem`Descriptor and `stem`Data."""
    count, first, bits = (int(value) for value in _numbers(item, f"{stem}Descriptor"))
    count = count % 2**16 or 2**16
    if film.signed and first >= 2**15:
        first -= 2**16
    data = item.get(f"{stem}Data")
    if isinstance(data, bytes):
        wide = len(data) >= 2 * count
        data = np.frombuffer(data, (">u2" if film.syntax == BIG_ENDIAN else "<u2") if wide else "u1")
    entries = np.asarray(data).ravel()[:count]
    if len(entries) < count or not 1 <= bits <= 16:
        raise ValueError("lookup table")
    return first, entries, bits


def _looked_up(values: FloatArray, first: int, entries: npt.NDArray[Any]) -> FloatArray:
    return entries[np.clip(np.rint(values) - first, 0, len(entries) - 1).astype(np.int64)].astype(np.float64)


# --- colour and shape ------------------------------------------------------------------------------------------


def _palette(film: _File, stored: Pixels) -> npt.NDArray[np.uint8]:
    channels = []
    for name in PALETTE:
        first, entries, bits = _lookup_table(film, film.header, name)
        colours = (entries.astype(np.int64) >> max(0, bits - 8)).astype(np.uint8)
        channels.append(colours[np.clip(stored.astype(np.int64) - first, 0, len(colours) - 1)])
    return np.dstack(channels)


def _eight_bit_colour(film: _File, pixels: Pixels) -> npt.NDArray[np.uint8]:
    return np.right_shift(pixels, max(0, film.bits - 8)).astype(np.uint8)


def _square(pixels: Pixels, film: _File) -> Pixels:
    """Pixels resampled to be as high as wide, by shrinking along the finer side."""
    ratio = _pixel_aspect(film)
    if abs(ratio - 1) < 0.01:
        return pixels
    height, width = pixels.shape[:2]
    if ratio > 1:
        size = (max(1, round(width / ratio)), height)
    else:
        size = (width, max(1, round(height * ratio)))
    return cv2.resize(np.asarray(pixels), size, interpolation=cv2.INTER_AREA).view(type(pixels))


def _pixel_aspect(film: _File) -> float:
    """Height of a pixel over its width; 1 where no tag says."""
    for keyword in ("PixelSpacing", "ImagerPixelSpacing", "PixelAspectRatio"):
        sides = _numbers(film.header, keyword)
        if len(sides) == 2 and np.isfinite(sides).all() and min(sides) > 0:
            ratio = sides[0] / sides[1]
            if not 1 / MAX_ASPECT <= ratio <= MAX_ASPECT:
                raise ValueError("pixel aspect")
            return ratio
    return 1.0


# --- tags ------------------------------------------------------------------------------------------------------

OLDEST_TOLD = 90
"""Ages from here on are told as this one: so old, a patient is known by the age."""
PLACEHOLDER = re.compile(r"(ANON.*|UNKNOWN|NONE|NA|N/A|NULL|TEST|X+|0+|-+|)", re.IGNORECASE)
VIEW_WORDS = (
    ("LATERAL", re.compile(r"\b(LATERAL|LAT|LL|RL|LLAT|RLAT)\b")),
    ("PA", re.compile(r"\bPA\b|POSTERO-?\s?ANTERIOR|\bP\.A\.")),
    ("AP", re.compile(r"\bAP\b|ANTERO-?\s?POSTERIOR|\bA\.P\.")),
)


@dataclass(frozen=True)
class DicomTags:
    """The tags that matter for a manifest; patient and study as keyed hashes, nothing that names anyone."""

    patient_id: str
    """Keyed hash of the patient's ID, else of the study; '' where the file has neither."""
    study_id: str
    """Keyed hash of the study; '' where the file has none."""
    view: str
    """PA, AP, LATERAL or ''."""
    age: float | None
    """Years, 90 for all from 90 on; None where unknown."""
    sex: str
    """F, M, O or ''."""
    modality: str
    body_part: str
    """As CHEST or one of KNOWN_PARTS, else ''."""
    laterality: str
    """L, R, B, U or ''."""
    photometric: str
    rows: int
    columns: int
    bits_stored: int


def read_tags(source: str | Path | bytes, *, key: bytes | None = None) -> DicomTags:
    """The tags of a DICOM file, its pixels unread; `key` (default `pseudonym_key()`) makes the hashes.

    DataError when the file is missing, no DICOM or damaged.
    """
    name = "uploaded image" if isinstance(source, bytes) else str(source)
    key = pseudonym_key() if key is None else key
    with _opened(source, name) as stream, _damaged(name):
        if not is_dicom(stream.read(132)):
            raise DataError(f"{name}: not a DICOM file; it has no tags to read")
        stream.seek(0)
        header, _ = _parse(stream, PATIENT_TAGS, name)
        return _tags(header, key)


def _opened(source: str | Path | bytes, name: str) -> BinaryIO:
    if isinstance(source, bytes):
        return io.BytesIO(source)
    try:
        return Path(source).open("rb")
    except OSError as error:
        raise DataError(f"{name}: cannot be read ({error.strerror})") from None


def _tags(header: Any, key: bytes) -> DicomTags:
    study = _pseudonym("study", _text(header, "StudyInstanceUID"), key)
    patient = _text(header, "PatientID")
    if not PLACEHOLDER.fullmatch(patient):
        patient = _pseudonym("patient", f"{_text(header, 'IssuerOfPatientID')}|{patient}", key)
    else:
        patient = study  # a study has one patient; all 'ANONYMOUS' together have many
    part, modality = _text(header, "BodyPartExamined"), _text(header, "Modality")
    sex, photometric = _text(header, "PatientSex"), _text(header, "PhotometricInterpretation")
    known = re.fullmatch(r"MONOCHROME[12]|RGB|YBR_[A-Z0-9_]+|PALETTE COLOR", photometric)
    laterality = _text(header, "ImageLaterality") or _text(header, "Laterality")
    return DicomTags(
        patient_id=patient,
        study_id=study,
        view=_view(header),
        age=_age(header),
        sex=sex if sex in ("F", "M", "O") else "",
        modality=modality if re.fullmatch("[A-Z]{2}", modality) else "",
        body_part="CHEST" if _is_part(part, "chest") else part if part in KNOWN_PARTS else "",
        laterality=laterality if laterality in ("L", "R", "B", "U") else "",
        photometric=photometric if known else "",
        rows=_integer(header, "Rows", 0),
        columns=_integer(header, "Columns", 0),
        bits_stored=_integer(header, "BitsStored", 0),
    )


def _view(header: Any) -> str:
    """From View Position, else the view's code, else the series' description; only the three words come out."""
    codes = [str(item.get("CodeMeaning", "")).upper() for item in header.get("ViewCodeSequence") or ()]
    for text in (_text(header, "ViewPosition"), *codes, _text(header, "SeriesDescription")):
        for view, pattern in VIEW_WORDS:
            if pattern.search(text):
                return view
    return ""


def _age(header: Any) -> float | None:
    """Patient's Age ('045Y', '010M', also a bare '62'), else from birth to study; None where neither makes sense."""
    found = re.fullmatch(r"(\d{1,3})([YMWD]?)", _text(header, "PatientAge"))
    if found:
        years = int(found.group(1)) / {"M": 12, "W": 52.18, "D": 365.25}.get(found.group(2), 1)
    else:
        born, seen = _date(header, "PatientBirthDate"), _date(header, "StudyDate")
        if born is None or seen is None:
            return None
        years = (seen - born).days / 365.25
    if not 0 <= years <= 115:
        return None
    return round(years, 2) if years < 2 else float(min(int(years), OLDEST_TOLD))


def _date(header: Any, keyword: str) -> date | None:
    digits = re.sub(r"\D", "", _text(header, keyword))[:8]
    try:
        return date(int(digits[:4]), int(digits[4:6]), int(digits[6:]))
    except ValueError:
        return None


def _pseudonym(kind: str, value: str, key: bytes) -> str:
    """A keyed hash: without the key nobody can try numbers until one fits."""
    if not value:
        return ""
    return kind[0] + hashlib.blake2b(f"{kind}|{value}".encode(), key=key, digest_size=8).hexdigest()


def pseudonym_key(folder: Path | None = None) -> bytes:
    """The key of the pseudonyms: $MEDIMG_PSEUDONYM_KEY, else pseudonym.key in `folder` (the cache), made on first use.

    The file is readable by its owner only. The same key gives the same pseudonyms on every machine.
    """
    if given := os.environ.get("MEDIMG_PSEUDONYM_KEY"):
        if len(given) < 16:
            raise DataError("MEDIMG_PSEUDONYM_KEY: a key of less than 16 characters can be guessed; use a longer one")
        return hashlib.blake2b(given.encode(), digest_size=32).digest()
    path = (folder or default_folder(None)) / "pseudonym.key"
    try:
        _make_key(path)
        key = bytes.fromhex(path.read_text(encoding="ascii"))
    except OSError as error:
        raise DataError(f"{path}: no key can be kept here ({error.strerror}); set MEDIMG_PSEUDONYM_KEY") from None
    except ValueError:
        key = b""
    if len(key) != 32:
        raise DataError(f"{path}: not a key; remove the file to have a new one made")
    return key


def _make_key(path: Path) -> None:
    """A new key at `path` unless one is there; under a lock, so that two processes see the same."""
    from filelock import FileLock

    if path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_suffix(".lock")):
        if not path.exists():
            with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="ascii") as stream:
                stream.write(secrets.token_hex(32))

"""dicom.py: films come out as their tags say they are to be shown, damaged ones as one line, and nobody is named."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from imagecodecs import jpeg8_encode
from PIL import Image
from pydicom import dcmwrite
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.pixels.processing import apply_modality_lut, apply_voi_lut
from pydicom.sequence import Sequence
from pydicom.uid import (
    JPEG2000,
    UID,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    JPEGExtended12Bit,
    JPEGLossless,
    JPEGLosslessSV1,
    JPEGLSLossless,
    JPEGLSNearLossless,
    RLELossless,
)

import dicom
import synthetic
from dicom import read_tags
from errors import DataError
from preprocess import PreprocessSpec, apply, decode

CR = "1.2.840.10008.5.1.4.1.1.1"
KEY = b"k" * 32
NAME, PATIENT, BORN = "Mustermann^Erika", "MRN-4711-0815", "19640812"
FILM = synthetic.film(pneumonia=True, seed=1, size=48)
RNG = np.random.default_rng(0)
DEEP = RNG.integers(0, 4096, (40, 36)).astype(np.uint16)


def dataset(
    pixels: np.ndarray, *, bits: int | None = None, syntax: str = ExplicitVRLittleEndian, **tags: Any
) -> Dataset:
    """A computed radiograph of `pixels`; tags are set, or left out where None."""
    item = Dataset()
    item.file_meta = FileMetaDataset()
    item.file_meta.TransferSyntaxUID = UID(syntax)
    item.file_meta.MediaStorageSOPClassUID = UID(CR)
    item.file_meta.MediaStorageSOPInstanceUID = UID("1.2.3.4.5")
    stored = bits or 8 * pixels.itemsize
    values: dict[str, Any] = {
        "SOPClassUID": CR,
        "SOPInstanceUID": "1.2.3.4.5",
        "StudyInstanceUID": "1.2.3.4",
        "StudyDate": "20240812",
        "Modality": "CR",
        "PatientName": NAME,
        "PatientID": PATIENT,
        "PatientBirthDate": BORN,
        "PatientSex": "F",
        "SamplesPerPixel": 1 if pixels.ndim == 2 else 3,
        "PhotometricInterpretation": "MONOCHROME2" if pixels.ndim == 2 else "RGB",
        "Rows": pixels.shape[0],
        "Columns": pixels.shape[1],
        "BitsAllocated": 8 * pixels.itemsize,
        "BitsStored": stored,
        "HighBit": stored - 1,
        "PixelRepresentation": int(pixels.dtype.kind == "i"),
    }
    if pixels.ndim == 3:
        values["PlanarConfiguration"] = 0
    order = ">" if syntax == ExplicitVRBigEndian else "<"
    values["PixelData"] = pixels.astype(pixels.dtype.newbyteorder(order)).tobytes()
    for keyword, value in {**values, **tags}.items():
        if value is not None:
            setattr(item, keyword, value)
    item["PixelData"].VR = "OB" if UID(syntax).is_compressed or pixels.itemsize == 1 else "OW"
    return item


def written(item: Dataset) -> bytes:
    stream = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcmwrite(stream, item, enforce_file_format=True)
    return stream.getvalue()


def film(pixels: np.ndarray, **tags: Any) -> bytes:
    return written(dataset(pixels, **tags))


def compressed(pixels: np.ndarray, syntax: str, frame: bytes, **tags: Any) -> bytes:
    return film(pixels, syntax=syntax, PixelData=encapsulate([frame]), **tags)


def eight_bit(data: bytes, **spec: Any) -> np.ndarray:
    """What a model sees of a square film, at its own size."""
    pixels = decode(data)
    return apply(PreprocessSpec(image_size=pixels.shape[0], **spec), pixels)[:, :, 0]


def share(data: bytes, **options: Any) -> np.ndarray:
    """Brightness in [0, 1]."""
    return np.asarray(dicom.decode(data, name="film", **options)).astype(np.float64) / 65535


def lut_item(first: int, entries: np.ndarray, bits: int) -> Dataset:
    item = Dataset()
    item.LUTDescriptor = [len(entries) % 65536, first, bits]
    item.LUTData = entries.astype("<u2").tobytes()
    item["LUTDescriptor"].VR, item["LUTData"].VR = "US", "OW"
    return item


# --- containers ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "syntax", [ImplicitVRLittleEndian, ExplicitVRLittleEndian, ExplicitVRBigEndian, DeflatedExplicitVRLittleEndian]
)
def test_every_uncompressed_syntax_gives_the_pixels_of_the_png(syntax: str) -> None:
    assert np.array_equal(eight_bit(film(FILM, syntax=syntax)), FILM)


@pytest.mark.parametrize("syntax", [ImplicitVRLittleEndian, ExplicitVRLittleEndian])
def test_a_file_without_preamble_and_header_is_read(syntax: str) -> None:
    item = dataset(FILM, syntax=syntax)
    del item.file_meta
    stream = io.BytesIO()
    dcmwrite(stream, item, implicit_vr=syntax == ImplicitVRLittleEndian, little_endian=True)
    data = stream.getvalue()
    assert data[128:132] != b"DICM" and data[:2] == b"\x08\0"
    assert np.array_equal(eight_bit(data), FILM)


def test_a_header_without_preamble_is_read() -> None:
    assert np.array_equal(eight_bit(film(FILM)[132:]), FILM)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF", "BMP", "WEBP"])
def test_other_images_are_not_taken_for_dicom(kind: str) -> None:
    stream = io.BytesIO()
    Image.fromarray(FILM).save(stream, kind)
    assert not dicom.is_dicom(stream.getvalue())


@pytest.mark.parametrize("data", [b"", b"\x08\0", b"path,label\n" * 20, bytes(200), b"\xff" * 200])
def test_other_bytes_are_not_taken_for_dicom(data: bytes) -> None:
    assert not dicom.is_dicom(data)


# --- compression -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("syntax", [RLELossless, JPEGLSLossless, JPEG2000Lossless])
@pytest.mark.parametrize("bits", [8, 12, 16])
def test_lossless_compression_by_pydicom_changes_no_pixel(syntax: str, bits: int) -> None:
    pixels = RNG.integers(0, 2**bits, (40, 36)).astype(np.uint8 if bits == 8 else np.uint16)
    tags = {"bits": bits, "WindowCenter": 2 ** (bits - 1), "WindowWidth": 2**bits}
    item = dataset(pixels, **tags)
    item.compress(UID(syntax), generate_instance_uid=False)
    assert np.array_equal(decode(written(item)), decode(film(pixels, **tags)))


@pytest.mark.parametrize("syntax", [JPEGLossless, JPEGLosslessSV1])
@pytest.mark.parametrize("bits", [8, 12, 16])
def test_lossless_jpeg_changes_no_pixel(syntax: str, bits: int) -> None:
    pixels = RNG.integers(0, 2**bits, (40, 36)).astype(np.uint8 if bits == 8 else np.uint16)
    frame = jpeg8_encode(pixels, lossless=True, bitspersample=bits)
    assert np.array_equal(decode(compressed(pixels, syntax, frame, bits=bits)), decode(film(pixels, bits=bits)))


@pytest.mark.parametrize("bits", [12, 16])
def test_signed_values_survive_lossless_jpeg(bits: int) -> None:
    signed = RNG.integers(-(2 ** (bits - 1)), 2 ** (bits - 1), (24, 20)).astype(np.int16)
    frame = jpeg8_encode((signed.view(np.uint16) & (2**bits - 1)).astype(np.uint16), lossless=True, bitspersample=bits)
    assert np.array_equal(
        decode(compressed(signed, JPEGLosslessSV1, frame, bits=bits)), decode(film(signed, bits=bits))
    )


def test_baseline_jpeg_gives_the_pixels_of_the_jpeg() -> None:
    stream = io.BytesIO()
    Image.fromarray(FILM).save(stream, "JPEG", quality=90)
    data = compressed(FILM, JPEGBaseline8Bit, stream.getvalue())
    assert np.array_equal(eight_bit(data), decode(stream.getvalue()))


def test_twelve_bit_lossy_jpeg_comes_back_within_its_quality() -> None:
    smooth = (np.add.outer(np.arange(48), np.arange(48)) * 40).astype(np.uint16)
    frame = jpeg8_encode(smooth, level=95, bitspersample=12)
    shown = share(compressed(smooth, JPEGExtended12Bit, frame, bits=12, WindowCenter=2048, WindowWidth=4096))
    assert np.abs(shown - smooth / 4095).max() < 0.01


@pytest.mark.parametrize(
    ("syntax", "options"), [(JPEGLSNearLossless, {"jls_error": 2}), (JPEG2000, {"j2k_psnr": [50]})]
)
def test_near_lossless_and_lossy_codecs_stay_close(syntax: str, options: dict[str, Any]) -> None:
    smooth = (np.add.outer(np.arange(48), np.arange(48)) * 40).astype(np.uint16)
    item = dataset(smooth, bits=12, WindowCenter=2048, WindowWidth=4096)
    item.compress(UID(syntax), generate_instance_uid=False, **options)
    assert np.abs(share(written(item)) - smooth / 4095).max() < 0.02


@pytest.mark.parametrize("syntax", [RLELossless, JPEGLSLossless, JPEG2000Lossless, JPEGLosslessSV1, JPEGBaseline8Bit])
@pytest.mark.parametrize("kept", [0.5, 0.8, 0.97])
def test_a_truncated_film_is_an_error_and_never_half_a_film(syntax: str, kept: float) -> None:
    if syntax in (JPEGLosslessSV1, JPEGBaseline8Bit):
        frame = jpeg8_encode(FILM, lossless=syntax == JPEGLosslessSV1)
        data = compressed(FILM, syntax, frame)
    else:
        item = dataset(FILM)
        item.compress(UID(syntax), generate_instance_uid=False)
        data, frame = written(item), b""
    with pytest.raises(DataError, match="truncated|cut off"):
        decode(data[: int(len(data) * kept)])
    if frame:
        with pytest.raises(DataError, match="truncated: the compressed picture has no end"):
            decode(compressed(FILM, syntax, frame[: int(len(frame) * kept)]))


def test_a_truncated_uncompressed_film_is_an_error_with_the_count() -> None:
    with pytest.raises(DataError, match="truncated: 2,204 of 2,304 bytes"):
        decode(film(FILM)[:-100])


def test_a_codestream_of_another_size_than_the_tags_is_refused() -> None:
    frame = jpeg8_encode(np.zeros((4000, 4000), np.uint8))
    with pytest.raises(DataError, match="another size than the tags say"):
        decode(compressed(FILM, JPEGBaseline8Bit, frame))


def test_an_unknown_compression_is_refused() -> None:
    with pytest.raises(DataError, match="compressed in a way that is not read here"):
        decode(compressed(FILM, "1.2.840.10008.1.2.4.100", b"\0" * 64))


# --- from stored values to brightness --------------------------------------------------------------------------


@pytest.mark.parametrize("function", [None, "LINEAR", "LINEAR_EXACT", "SIGMOID"])
@pytest.mark.parametrize(("centre", "width"), [(2048, 4096), (1500.5, 800), (40, 1), (3000, 2)])
def test_windows_are_those_of_pydicom(function: str | None, centre: float, width: float) -> None:
    item = dataset(DEEP, bits=12, WindowCenter=centre, WindowWidth=width, VOILUTFunction=function)
    with np.errstate(over="ignore"):
        expected = apply_voi_lut(DEEP, item) / 4095
    assert np.abs(share(written(item)) - expected).max() <= 0.5001 / 65535


@pytest.mark.parametrize(("slope", "intercept"), [(1, 0), (2.5, -1000), (0.25, 100)])
@pytest.mark.parametrize("kind", [np.uint16, np.int16])
def test_rescale_comes_before_the_window(slope: float, intercept: float, kind: type) -> None:
    pixels = (DEEP.astype(np.int32) - (2048 if kind is np.int16 else 0)).astype(kind)
    item = dataset(pixels, bits=12, RescaleSlope=slope, RescaleIntercept=intercept, WindowCenter=300, WindowWidth=900)
    values = apply_modality_lut(pixels, item)
    expected = np.clip((values - 299.5) / 899 + 0.5, 0, 1)
    assert np.abs(share(written(item)) - expected).max() <= 0.5001 / 65535


def test_a_modality_table_is_looked_up_and_holds_beyond_its_ends() -> None:
    entries = np.sqrt(np.arange(1000)) * 100
    item = dataset(DEEP, bits=12, ModalityLUTSequence=Sequence([lut_item(500, entries, 16)]))
    item.ModalityLUTSequence[0].ModalityLUTType = "OD"
    item.WindowCenter, item.WindowWidth = 1500, 3000
    values = apply_modality_lut(DEEP, item).astype(np.float64)
    assert values.min() == 0 and values.max() == int(entries[-1])
    expected = np.clip((values - 1499.5) / 2999 + 0.5, 0, 1)
    assert np.abs(share(written(item)) - expected).max() <= 0.5001 / 65535


def test_a_voi_table_is_looked_up_by_its_number() -> None:
    tables = [lut_item(0, (np.arange(4096) / 4095) ** power * 65535, 16) for power in (0.5, 2)]
    item = dataset(DEEP, bits=12, VOILUTSequence=Sequence(tables))
    for number, expected in ((1, apply_voi_lut(DEEP, item)), (2, apply_voi_lut(DEEP, item, index=1))):
        shown = share(written(item), window=str(number))
        assert np.abs(shown - expected / 65535).max() <= 0.5001 / 65535


def test_a_window_is_chosen_by_its_number_from_one() -> None:
    data = film(DEEP, bits=12, WindowCenter=[1000, 3000], WindowWidth=[500, 900])
    alone = film(DEEP, bits=12, WindowCenter=3000, WindowWidth=900)
    assert np.array_equal(dicom.decode(data, name="film", window="2"), decode(alone))
    assert np.array_equal(dicom.decode(data, name="film", window="1"), decode(data))
    with pytest.raises(DataError, match="stores 2 windows, not 3; set data.dicom_window=first"):
        dicom.decode(data, name="film", window="3")


def test_percentiles_leave_the_named_share_black_and_white() -> None:
    pixels = RNG.permutation(4000).astype(np.uint16).reshape(50, 80)
    shown = np.asarray(dicom.decode(film(pixels, WindowCenter=5, WindowWidth=10), name="film", window="percentile"))
    assert (shown == 0).mean() == pytest.approx(0.005, abs=0.001)
    assert (shown == 65535).mean() == pytest.approx(0.005, abs=0.001)
    low, high = np.percentile(pixels, dicom.PERCENTILES)
    expected = np.clip((pixels - low) / (high - low), 0, 1)
    assert np.abs(shown / 65535 - expected).max() < 0.001


def test_a_deep_film_without_a_window_is_shown_between_percentiles() -> None:
    data = film(DEEP, bits=12)
    assert np.array_equal(decode(data), dicom.decode(data, name="film", window="percentile"))


@pytest.mark.parametrize("width", [0, -5, "nan"])
def test_a_window_that_is_none_is_passed_over(width: Any) -> None:
    item = dataset(DEEP, bits=12)
    item.add_new("WindowCenter", "DS", "40")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        item.add_new("WindowWidth", "DS", str(width))
    assert np.array_equal(decode(written(item)), decode(film(DEEP, bits=12)))


def test_a_windowed_film_is_not_stretched_again() -> None:
    data = film(DEEP // 4 + 1000, bits=12, WindowCenter=2048, WindowWidth=4096)
    shown = apply(PreprocessSpec(image_size=40), decode(data))
    assert shown.min() > 50 and shown.max() < 140
    flat = film(np.full((24, 24), 1024, np.uint16), bits=12, WindowCenter=2048, WindowWidth=4096)
    assert set(np.unique(eight_bit(flat))) == {64}


def test_depth_is_kept_until_the_spec_maps_it() -> None:
    pixels = np.arange(4096, dtype=np.uint16).reshape(64, 64)
    shown = decode(film(pixels, bits=12, WindowCenter=2048, WindowWidth=4096))
    assert shown.dtype == np.uint16 and len(np.unique(shown)) == 4096


@pytest.mark.parametrize("window", ["first", "percentile"])
@pytest.mark.parametrize(
    "stored_window", [{}, {"function": "LINEAR"}, {"function": "LINEAR_EXACT"}, {"function": "SIGMOID"}]
)
@pytest.mark.parametrize(("kind", "bits"), [(np.uint8, 8), (np.uint16, 10), (np.uint16, 16), (np.int16, 12)])
def test_monochrome1_equals_its_inverted_twin(
    window: str, stored_window: dict[str, str], kind: type, bits: int
) -> None:
    low = -(2 ** (bits - 1)) if kind is np.int16 else 0
    high = low + 2**bits - 1
    pixels = RNG.integers(low, high + 1, (40, 40)).astype(kind)
    inverse = (low + high - pixels.astype(np.int64)).astype(kind)
    tags, twin_tags = {}, {}
    if stored_window:
        # LINEAR is symmetric about centre - 0.5, the two others about the centre itself.
        shift = 1 if stored_window["function"] == "LINEAR" else 0
        centre, width = low + 0.6 * 2**bits // 1, 0.3 * 2**bits // 1
        tags = {"WindowCenter": centre, "WindowWidth": width, "VOILUTFunction": stored_window["function"]}
        twin_tags = {**tags, "WindowCenter": low + high - centre + shift}
    one = film(pixels, bits=bits, PhotometricInterpretation="MONOCHROME1", **tags)
    two = film(inverse, bits=bits, **twin_tags)
    a, b = (dicom.decode(data, name="film", window=window) for data in (one, two))
    assert np.array_equal(a, b)
    brightest = pixels == pixels.min()
    assert (np.asarray(a)[brightest] == a.max()).all()


def test_the_same_pixels_under_the_other_tag_come_out_inverted() -> None:
    assert np.array_equal(eight_bit(film(FILM, PhotometricInterpretation="MONOCHROME1")), 255 - FILM)


@pytest.mark.parametrize("photometric", ["MONOCHROME1", "MONOCHROME2"])
@pytest.mark.parametrize(("limit", "hidden"), [(None, [4095]), (4000, [4000, 4050, 4095])])
def test_padding_is_black_and_does_not_move_the_percentiles(
    photometric: str, limit: int | None, hidden: list[int]
) -> None:
    inside = RNG.integers(500, 1500, (40, 40)).astype(np.uint16)
    bare = film(inside, bits=12, PhotometricInterpretation=photometric)
    framed = np.pad(inside, 10)
    border = np.ones_like(framed, dtype=bool)
    border[10:-10, 10:-10] = False
    framed[border] = RNG.choice(hidden, border.sum())
    shown = decode(
        film(
            framed,
            bits=12,
            PhotometricInterpretation=photometric,
            PixelPaddingValue=4095,
            PixelPaddingRangeLimit=limit,
        )
    )
    assert (np.asarray(shown)[border] == 0).all()
    assert np.array_equal(shown[10:-10, 10:-10], decode(bare))


def test_signed_padding_is_found() -> None:
    pixels = np.array([[-2000, 0], [500, 1000]], np.int16)
    shown = decode(film(pixels, PixelPaddingValue=-2000, PhotometricInterpretation="MONOCHROME1"))
    assert shown[0, 0] == 0 and shown[0, 1] == 65535 and shown[1, 1] == 0


def test_bits_above_the_high_bit_are_not_part_of_the_value() -> None:
    overlay = DEEP | 0x4000
    tags = {"WindowCenter": 2048, "WindowWidth": 4096}
    assert np.array_equal(decode(film(overlay, bits=12, **tags)), decode(film(DEEP, bits=12, **tags)))
    shifted = film(DEEP << 4, bits=12, HighBit=15, **tags)
    assert np.array_equal(decode(shifted), decode(film(DEEP, bits=12, **tags)))


def test_thirty_two_bits_are_shown_over_their_range() -> None:
    pixels = RNG.integers(0, 2**31, (20, 20)).astype(np.uint32)
    data = film(pixels, WindowCenter=2**30, WindowWidth=2**31)
    expected = np.clip((pixels - (2**30 - 0.5)) / (2**31 - 1) + 0.5, 0, 1)
    assert np.abs(share(data) - expected).max() <= 0.5001 / 65535


def test_a_film_of_padding_only_is_black() -> None:
    assert decode(film(np.full((8, 8), 7, np.uint16), bits=12, PixelPaddingValue=7)).max() == 0


# --- colour and shape ------------------------------------------------------------------------------------------

COLOUR = np.dstack([FILM, FILM[::-1], FILM[:, ::-1]])


def test_rgb_comes_out_as_it_is() -> None:
    assert np.array_equal(decode(film(COLOUR)), COLOUR)


def test_planes_stored_one_after_the_other_are_put_together() -> None:
    planes = np.ascontiguousarray(np.moveaxis(COLOUR, 2, 0)).tobytes()
    assert np.array_equal(decode(film(COLOUR, PlanarConfiguration=1, PixelData=planes)), COLOUR)


def test_ybr_becomes_rgb() -> None:
    ybr = np.asarray(Image.fromarray(COLOUR).convert("YCbCr"))
    shown = decode(film(ybr, PhotometricInterpretation="YBR_FULL")).astype(int)
    assert np.abs(shown - COLOUR).max() <= 3


def test_colour_jpeg_gives_the_colours_of_the_jpeg() -> None:
    stream = io.BytesIO()
    Image.fromarray(COLOUR).save(stream, "JPEG", quality=95, subsampling=0)
    data = compressed(COLOUR, JPEGBaseline8Bit, stream.getvalue(), PhotometricInterpretation="YBR_FULL")
    assert np.abs(decode(data).astype(int) - decode(stream.getvalue())).max() <= 2


@pytest.mark.parametrize("syntax", [RLELossless, JPEG2000Lossless, JPEGLosslessSV1])
def test_colour_survives_lossless_compression(syntax: str) -> None:
    if syntax == JPEGLosslessSV1:
        frame = jpeg8_encode(COLOUR, lossless=True, colorspace="RGB", outcolorspace="RGB")
        data = compressed(COLOUR, syntax, frame)
    else:
        item = dataset(COLOUR)
        item.compress(UID(syntax), generate_instance_uid=False)
        data = written(item)
    assert np.array_equal(decode(data), COLOUR)


def test_sixteen_bit_colour_is_brought_to_eight() -> None:
    assert np.array_equal(decode(film(COLOUR.astype(np.uint16) * 257)), COLOUR)


@pytest.mark.parametrize("bits", [8, 16])
def test_a_palette_becomes_the_colours_it_names(bits: int) -> None:
    colours = RNG.integers(0, 256, (3, 256))
    scale = 1 if bits == 8 else 257
    tags: dict[str, Any] = {"PhotometricInterpretation": "PALETTE COLOR"}
    for name, entries in zip(("Red", "Green", "Blue"), colours):
        tags[f"{name}PaletteColorLookupTableDescriptor"] = [256, 0, bits]
        tags[f"{name}PaletteColorLookupTableData"] = (entries * scale).astype("u1" if bits == 8 else "<u2").tobytes()
    assert np.array_equal(decode(film(FILM, **tags)), np.moveaxis(colours[:, FILM], 0, 2))


def test_a_segmented_palette_is_refused_by_name() -> None:
    tags: dict[str, Any] = {"PhotometricInterpretation": "PALETTE COLOR"}
    for name in ("Red", "Green", "Blue"):
        tags[f"{name}PaletteColorLookupTableDescriptor"] = [256, 0, 16]
        tags[f"Segmented{name}PaletteColorLookupTableData"] = np.array([0, 1, 0, 1, 255, 65535], "<u2").tobytes()
    with pytest.raises(DataError, match="segmented ones are not read.; convert it to RGB"):
        decode(film(FILM, **tags))


@pytest.mark.parametrize(
    ("tags", "shape"),
    [
        ({"PixelSpacing": [0.2, 0.1]}, (40, 30)),
        ({"ImagerPixelSpacing": [0.1, 0.2]}, (20, 60)),
        ({"PixelAspectRatio": [2, 1]}, (40, 30)),
        ({"PixelSpacing": [0.15, 0.15], "PixelAspectRatio": [2, 1]}, (40, 60)),
        ({"PixelSpacing": [0, 0]}, (40, 60)),
    ],
)
def test_oblong_pixels_become_square(tags: dict[str, Any], shape: tuple[int, int]) -> None:
    pixels = np.tile(np.linspace(0, 255, 60).astype(np.uint8), (40, 1))
    shown = decode(film(pixels, **tags))
    assert shown.shape == shape and isinstance(shown, dicom.Shown)
    assert np.abs(np.asarray(shown)[:, :].mean() / 257 - pixels.mean()) < 1


# --- what is refused -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tags", "message"),
    [
        ({"NumberOfFrames": 3}, "3 frames; only single films are read"),
        ({"PixelData": None}, "without pixels"),
        ({"SOPClassUID": "1.2.840.10008.5.1.4.1.1.66.4"}, "no film"),
        ({"SOPClassUID": "1.2.840.10008.5.1.4.1.1.104.1"}, "no film"),
        ({"Rows": None}, "no rows and columns"),
        ({"Rows": 60000, "Columns": 60000}, "60000x60000 pixels is more than"),
        ({"PhotometricInterpretation": "HSV"}, "neither monochrome nor RGB"),
        ({"SamplesPerPixel": 4}, "neither monochrome nor RGB"),
        ({"PixelSpacing": [1, 0.001]}, "damaged"),
        ({"RescaleSlope": 0}, "damaged"),
        ({"BitsStored": 40}, "damaged"),
        ({"VOILUTFunction": "CUBIC", "WindowCenter": 1, "WindowWidth": 9}, "damaged"),
    ],
)
def test_what_cannot_be_shown_is_refused_with_a_reason(tags: dict[str, Any], message: str) -> None:
    item = dataset(FILM)
    for keyword, value in tags.items():
        if value is None:
            delattr(item, keyword)
        else:
            setattr(item, keyword, value)
    with pytest.raises(DataError, match=message):
        decode(written(item))


@pytest.mark.parametrize("part", ["CHEST", "Chest ", "THORAX", "LUNG", "CHEST PA", "RIBS", None, ""])
def test_chest_films_and_films_that_do_not_say_are_taken(part: str | None) -> None:
    assert decode(film(FILM, BodyPartExamined=part), PreprocessSpec()).shape == FILM.shape


def test_another_body_part_is_refused_with_the_setting_that_allows_it() -> None:
    hand = film(FILM, BodyPartExamined="HAND")
    with pytest.raises(DataError, match="tags say HAND, not chest; .* data.dicom_body_part=any"):
        decode(hand, PreprocessSpec())
    with pytest.raises(DataError, match="another body part, not chest"):
        decode(film(FILM, BodyPartExamined="THORACIC SPINE"), PreprocessSpec())
    for wanted in ("any", "hand"):
        assert decode(hand, PreprocessSpec(dicom_body_part=wanted)).shape == FILM.shape
    with pytest.raises(DataError, match="not hand"):
        decode(film(FILM, BodyPartExamined="CHEST"), PreprocessSpec(dicom_body_part="hand"))
    assert decode(hand).shape == FILM.shape


def test_another_modality_is_refused_for_the_chest_only() -> None:
    data = film(FILM, Modality="MR", BodyPartExamined="CHEST")
    with pytest.raises(DataError, match="modality MR, not radiography"):
        decode(data, PreprocessSpec())
    assert decode(data, PreprocessSpec(dicom_body_part="any")).shape == FILM.shape


def test_a_deflated_bomb_is_refused_unpacked_no_further(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dicom, "MAX_INFLATED", 100_000)
    data = film(np.zeros((600, 600), np.uint8), syntax=DeflatedExplicitVRLittleEndian)
    assert len(data) < 2000
    with pytest.raises(DataError, match="unpacks to more than 100,000 bytes"):
        decode(data)


def test_sequences_nested_without_end_are_an_error() -> None:
    nested = b"\x40\0\x75\x02SQ\0\0\xff\xff\xff\xff\xfe\xff\0\xe0\xff\xff\xff\xff" * 5000
    head = film(FILM)
    with pytest.raises(DataError, match="damaged|without pixels"):
        decode(head[: head.index(b"\x28\0\x02\0US")] + nested)


# --- hostile bytes ---------------------------------------------------------------------------------------------


def small_films() -> list[bytes]:
    tiny, deep = FILM[:40, :36], DEEP
    films = [
        film(tiny),
        film(deep, bits=12, syntax=ImplicitVRLittleEndian, WindowCenter=[900, 2000], WindowWidth=[700, 4000]),
        film(
            deep.astype(np.int16), bits=12, syntax=DeflatedExplicitVRLittleEndian, RescaleSlope=2, PixelPaddingValue=3
        ),
        film(deep, bits=12, ModalityLUTSequence=Sequence([lut_item(0, np.arange(4096), 12)]), PixelSpacing=[0.2, 0.1]),
        film(COLOUR[:16, :12], PlanarConfiguration=1),
        compressed(tiny, JPEGBaseline8Bit, jpeg8_encode(tiny)),
        compressed(deep, JPEGLosslessSV1, jpeg8_encode(deep, lossless=True, bitspersample=16), bits=16),
        compressed(deep, JPEGExtended12Bit, jpeg8_encode(deep, bitspersample=12), bits=12),
    ]
    for syntax in (RLELossless, JPEGLSLossless, JPEG2000Lossless):
        item = dataset(deep, bits=12)
        item.compress(UID(syntax), generate_instance_uid=False)
        films.append(written(item))
    return films


def mutated(data: bytes, rng: np.random.Generator) -> bytes:
    """Bytes overwritten in the tags or anywhere, a piece cut out or put in, or the end cut off."""
    damaged = bytearray(data)
    for _ in range(int(rng.integers(1, 9))):
        start = 132 if rng.random() < 0.6 else max(132, len(damaged) - 400)
        position = int(rng.integers(start, len(damaged)))
        damaged[position] = int(rng.choice([0, 1, 127, 128, 255, int(rng.integers(256))]))
    position = int(rng.integers(132, len(damaged)))
    match int(rng.integers(4)):
        case 0:
            return bytes(damaged[:position])
        case 1:
            del damaged[position : position + int(rng.integers(1, 5))]
        case 2:
            damaged[position:position] = rng.integers(0, 256, int(rng.integers(1, 5)), dtype=np.uint8).tobytes()
    return bytes(damaged)


@pytest.mark.parametrize("part", range(10))
def test_a_thousand_mutated_files_give_a_film_or_one_line_without_a_name(
    part: int, capfd: pytest.CaptureFixture[str]
) -> None:
    films = small_films()
    spec = PreprocessSpec(image_size=16, dicom_body_part="any")
    for seed in range(100 * part, 100 * part + 100):
        data = mutated(films[seed % len(films)], np.random.default_rng(seed))
        try:
            assert apply(spec, decode(data, spec)).shape == (16, 16, 1)
        except DataError as error:
            assert "\n" not in str(error) and not any(word in str(error) for word in (NAME, PATIENT, BORN, "Erika"))
        with contextlib.suppress(DataError):
            read_tags(data, key=KEY)
    assert capfd.readouterr() == ("", "")


def test_pydicoms_remarks_on_names_reach_nobody(caplog: pytest.LogCaptureFixture) -> None:
    item = dataset(FILM)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        item.StudyInstanceUID = f"1.2.{NAME}"
        item.PatientAge = "Erika"
    data = written(item)
    with warnings.catch_warnings(record=True) as heard, caplog.at_level(logging.DEBUG):
        warnings.simplefilter("default")
        decode(data)
        read_tags(data, key=KEY)
    assert not [warning for warning in heard if "Erika" in str(warning.message)]
    assert "Erika" not in caplog.text


# --- real files ------------------------------------------------------------------------------------------------


@pytest.mark.realdata
def test_the_lossless_variants_of_a_real_film_hold_identical_pixels(assets: Path) -> None:
    films = [
        decode(assets / "data" / "dicom" / f"extremity_mono1_{kind}.dcm") for kind in ("rle", "jpll", "jlsl", "j2kr")
    ]
    assert films[0].shape == (1760, 1760)
    assert all(np.array_equal(films[0], other) for other in films[1:])


@pytest.mark.realdata
@pytest.mark.parametrize(("kind", "mean"), [("jlsn", 2), ("jply", 2.5)])
def test_the_lossy_variants_differ_by_a_few_stored_values(assets: Path, kind: str, mean: float) -> None:
    exact, lossy = (decode(assets / "data" / "dicom" / f"extremity_mono1_{name}.dcm") for name in ("rle", kind))
    assert np.abs(exact.astype(float) - lossy).mean() / 65535 * 1023 < mean


@pytest.mark.realdata
def test_a_real_twin_under_the_other_tag_is_inverted(assets: Path) -> None:
    one, two = (
        decode(assets / "data" / "dicom" / f"chest_{name}.dcm")
        for name in ("mono1_twin_tag_only", "mono2_jpeg_baseline")
    )
    assert np.array_equal(np.asarray(one), 65535 - np.asarray(two))


@pytest.mark.realdata
def test_real_chest_films_are_taken_and_have_dark_lungs(assets: Path) -> None:
    names = ("mono1_10bit_no_preamble", "mono2_jpeg_baseline", "pa_mono1_15bit_j2k")
    for name in names:
        path = assets / "data" / "dicom" / f"chest_{name}.dcm"
        image = apply(PreprocessSpec(), decode(path, PreprocessSpec()))[:, :, 0].astype(float)
        lung, spine = image[70:120, 55:85].mean(), image[70:120, 105:125].mean()
        assert spine - lung > 20, name
        assert (read_tags(path, key=KEY).view, read_tags(path, key=KEY).body_part) == ("PA", "CHEST")


@pytest.mark.realdata
def test_an_extremity_is_refused_for_a_chest_model(assets: Path) -> None:
    with pytest.raises(DataError, match="EXTREMITY, not chest"):
        decode(assets / "data" / "dicom" / "extremity_mono1_rle.dcm", PreprocessSpec())

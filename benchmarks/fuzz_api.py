"""Throw damaged films and forms at a server and see that it only ever refuses them.

    python benchmarks/fuzz_api.py --bodies 5000

Starts the server on a small untrained model, sends mutated JPEG, PNG, TIFF, DICOM and multipart bodies, and prints how
often each status came back, the slowest answer and the growth of the server's memory. Exits with 1 on any 5xx but an
honest 503, a dropped connection or an answer slower than --hang seconds. Films are synthetic.
"""

from __future__ import annotations

import argparse
import collections
import io
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import httpx
import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import synthetic
from benchmarks.serving_bench import Server, untrained_checkpoint


def dicom_film(seed: int) -> bytes:
    """A small uncompressed computed radiograph."""
    import pydicom
    from pydicom.dataset import Dataset, FileMetaDataset
    from pydicom.uid import ComputedRadiographyImageStorage, ExplicitVRLittleEndian

    pixels = synthetic.film(pneumonia=False, seed=seed, size=64).astype(np.uint16) * 16
    film = Dataset()
    film.file_meta = FileMetaDataset()
    film.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    film.file_meta.MediaStorageSOPClassUID = film.SOPClassUID = ComputedRadiographyImageStorage
    film.file_meta.MediaStorageSOPInstanceUID = film.SOPInstanceUID = f"1.2.3.{seed}"
    film.Modality, film.PhotometricInterpretation, film.BodyPartExamined = "CR", "MONOCHROME2", "CHEST"
    film.Rows, film.Columns, film.SamplesPerPixel = 64, 64, 1
    film.BitsAllocated, film.BitsStored, film.HighBit, film.PixelRepresentation = 16, 12, 11, 0
    film.PixelData = pixels.tobytes()
    stream = io.BytesIO()
    pydicom.dcmwrite(stream, film, enforce_file_format=True)
    return stream.getvalue()


def image_film(form: str, seed: int) -> bytes:
    """A film in a format Pillow writes."""
    stream = io.BytesIO()
    Image.fromarray(synthetic.film(pneumonia=True, seed=seed, size=64)).save(stream, form)
    return stream.getvalue()


def multipart(content: bytes) -> bytes:
    """A form with one file, boundary XX."""
    head = b'--XX\r\nContent-Disposition: form-data; name="file"; filename="f"\r\n\r\n'
    return head + content + b"\r\n--XX--\r\n"


def mutate(body: bytes, rng: np.random.Generator) -> bytes:
    """Flip, cut, insert, repeat or overwrite a few places, mostly near the start, where the headers are."""
    data = bytearray(body)
    for _ in range(int(rng.integers(1, 8))):
        place = int(min(len(data) * rng.random() ** 3, len(data) - 1)) if data else 0
        length = int(rng.integers(1, 40))
        kind = rng.integers(0, 5)
        if kind == 0 and data:
            data[place] ^= 1 << int(rng.integers(0, 8))
        elif kind == 1:
            del data[place : place + length]
        elif kind == 2:
            data[place:place] = rng.integers(0, 256, length, dtype=np.uint8).tobytes()
        elif kind == 3:
            data[place:place] = data[place : place + length]
        else:
            data[place : place + 4] = [b"\xff\xff\xff\xff", b"\x00\x00\x00\x00", b"\x7f\xff\xff\xff"][place % 3]
    return bytes(data[: int(rng.integers(0, len(data) + 1))] if rng.random() < 0.1 else data)


def bodies(count: int, seed: int) -> list[tuple[str, bytes]]:
    """(kind, request body) of `count` mutated requests."""
    rng = np.random.default_rng(seed)
    films = {form: [image_film(form, index) for index in range(3)] for form in ("JPEG", "PNG", "TIFF")}
    films["DICOM"] = [dicom_film(index) for index in range(3)]
    kinds = [*films, "multipart"]
    made = []
    for index in range(count):
        kind = kinds[index % len(kinds)]
        if kind == "multipart":
            made.append((kind, mutate(multipart(films["PNG"][0]), rng)))
        else:
            made.append((kind, multipart(mutate(films[kind][index % 3], rng))))
    return made


def fuzz(post: Callable[[bytes], int], requests: list[tuple[str, bytes]], *, hang_s: float) -> list[str]:
    """What went wrong; the statuses are printed by kind. `post` sends a body and gives the status."""
    statuses: dict[str, collections.Counter[int]] = collections.defaultdict(collections.Counter)
    wrong: list[str] = []
    slowest = 0.0
    for number, (kind, body) in enumerate(requests):
        started = time.perf_counter()
        status = post(body)
        slowest = max(slowest, time.perf_counter() - started)
        statuses[kind][status] += 1
        if status not in (200, 400, 413, 415, 422, 503) or slowest > hang_s:
            wrong.append(f"body {number} ({kind}): status {status}, slowest {slowest:.1f} s")
    for kind, counts in statuses.items():
        print(f"{kind:10} {dict(sorted(counts.items()))}")
    print(f"slowest answer {slowest * 1000:.0f} ms")
    return wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bodies", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--hang", type=float, default=5.0, help="seconds from which an answer counts as hung")
    arguments = parser.parse_args()
    requests = bodies(arguments.bodies, arguments.seed)
    with tempfile.TemporaryDirectory() as name:
        checkpoint = untrained_checkpoint(Path(name), model="test_efficientnet", image_size=32)
        with (
            Server(["--checkpoint", str(checkpoint)]) as server,
            httpx.Client(base_url=server.url, timeout=30) as client,
        ):
            headers = {"content-type": "multipart/form-data; boundary=XX"}

            def post(body: bytes) -> int:
                return client.post("/predict", content=body, headers=headers).status_code

            fuzz(post, requests[:200], hang_s=arguments.hang)  # what is loaded on first use is no growth
            before = server.memory_mb()
            wrong = fuzz(post, requests, hang_s=arguments.hang)
            after = server.memory_mb()
            print(f"memory {before:.0f} MiB, after {len(requests)} bodies {after:.0f} MiB ({after / before - 1:+.1%})")
            server.require_alive()
    print("\n".join(wrong[:20]) or "nothing but refusals and answers")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())

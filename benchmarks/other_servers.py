"""The servers a user would otherwise write, for benchmarks/serve.py to compare with.

    python benchmarks/other_servers.py fastapi  --checkpoint checkpoints/best_model.pth --port 8001
    python benchmarks/other_servers.py litserve --checkpoint checkpoints/best_model.pth --port 8001

fastapi: the handler most tutorials show, one torch pass a request in FastAPI's thread pool. litserve: LitServe with
this program's own decoder and engine, batched. Both take `file` at /predict; first
`pip install python-multipart litserve`.
"""

from __future__ import annotations

import argparse
import io
import os
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
import uvicorn
from fastapi import FastAPI, File, UploadFile
from PIL import Image

import predictor
from inference_api import one_thread_a_core
from preprocess import apply, decode


def serve_fastapi(source: str, port: int) -> None:
    """Image.open, resize, normalise, model(x), softmax: fp32, a batch of one."""
    loaded = predictor.load(source, device="cpu", precision="fp32")
    model, spec, classes = loaded.engine.model, loaded.spec, loaded.classes  # type: ignore[attr-defined]
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (spec.mean, spec.std))
    model = model.to(memory_format=torch.contiguous_format)
    app = FastAPI()

    @app.get("/health")
    def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.post("/predict")
    def predict(file: UploadFile = File(...)) -> dict[str, Any]:  # noqa: B008
        image = Image.open(io.BytesIO(file.file.read())).convert("RGB").resize((spec.image_size, spec.image_size))
        pixels = torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1).float() / 255
        with torch.no_grad():
            probabilities = model(((pixels - mean) / std)[None]).softmax(1)[0]
        return {"prediction": classes[int(probabilities.argmax())], "probabilities": probabilities.tolist()}

    print(f"fastapi at http://127.0.0.1:{port}", file=sys.stderr, flush=True)
    uvicorn.run(app, port=port, log_level="error", access_log=False)


try:
    from litserve import LitAPI
except ImportError:
    LitAPI = object  # type: ignore[assignment,misc]


class FilmAPI(LitAPI):  # type: ignore[misc,valid-type]
    """Our decoder and engine behind LitServe's queue and batcher. LitServe pickles it, hence here."""

    def __init__(self, source: str, **options: Any) -> None:
        super().__init__(**options)
        self.source = source

    def setup(self, device: str) -> None:
        one_thread_a_core(0)
        self.predictor = predictor.load(self.source)
        self.predictor.widen_calls(most=self.max_batch_size)

    # LitServe reads the annotation, and takes any but its own for a query parameter.
    def decode_request(self, request):  # type: ignore[no-untyped-def]
        return apply(self.predictor.spec, decode(request["file"].file.read(), self.predictor.spec))

    def batch(self, inputs: list[Any]) -> Any:
        return np.stack(inputs)

    def predict(self, x: Any) -> Any:
        return self.predictor.exact_outputs(x if x.ndim == 4 else x[None])[0]

    def unbatch(self, output: Any) -> Any:
        return list(output)

    def encode_response(self, output: Any) -> dict[str, Any]:
        index = int(self.predictor.decide(output[None])[0])
        return {"prediction": self.predictor.classes[index], "probabilities": output.tolist()}


def serve_litserve(source: str, port: int, *, max_batch: int) -> None:
    """LitServe as its documentation has it."""
    import litserve

    server = litserve.LitServer(
        FilmAPI(source, max_batch_size=max_batch, batch_timeout=0.005), accelerator="cpu", timeout=60
    )
    print(f"litserve at http://127.0.0.1:{port}", file=sys.stderr, flush=True)
    server.run(host="127.0.0.1", port=port, generate_client_file=False, log_level="error", access_log=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=("fastapi", "litserve"))
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--checkpoint")
    what.add_argument("--bundle")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--max-batch", type=int, default=8)
    arguments = parser.parse_args()
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    source = arguments.checkpoint or arguments.bundle
    if arguments.kind == "fastapi":
        serve_fastapi(source, arguments.port)
    else:
        serve_litserve(source, arguments.port, max_batch=arguments.max_batch)


if __name__ == "__main__":
    main()

"""The verb `optimize` for models that read notes: an ONNX file with all inputs, its INT8 twin, the fastest as a bundle.

    python main.py optimize --checkpoint checkpoints/best_model.pth --output-dir optimized_models

Batch and length of notes stay free in the file; its logits are compared with torch's on validation cases in batches of
several sizes. INT8 and engines are judged by the budget of `optimization`, timed in turns. Models of films alone go to
`optimization`. Never looks at the test split; never writes a model as chosen that fails its budget.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor, nn

import bundle
import checkpoint as checkpoints
import optimization
import optimization_report
import predictor
import quantization
from candidates import batches_of, measure
from case_engine import ONNX_NAMES, CaseOnnxEngine, CaseTorchEngine
from config import Config, Overrides, flatten, resolve
from engines import why_absent
from errors import ConfigError, DataError
from evaluate import evaluation_manifest, rows_of
from fold_ensemble import is_ensemble
from multimodal import CaseInputs, Everything, MultimodalClassifier, Rows
from onnx_export import export_to_onnx, parity
from optimization import (
    NOTHING_PASSED,
    PARITY_FILMS,
    QUICK_FILMS,
    TIGHT_AUC_DROP,
    Standing,
    ValidationFilms,
    choose,
    drawn,
    drops_of,
    judged,
    megabytes,
    over_budget,
    refusal,
    summary,
)
from predictor import Predictor, softmax
from runtime import environment, log, progress, require_writable, resolve_device

__all__ = ["NOTHING_PASSED", "optimize", "summary"]

FloatArray = npt.NDArray[np.floating[Any]]

KINDS = ("onnxruntime", "openvino")
LARGEST_DIFFERENCE = 1e-3
"""Of the logits of an exported file from torch's; beyond it the file computes something else."""


class Exported(nn.Module):
    """A multimodal model that takes its inputs one by one, as an ONNX file does."""

    def __init__(self, model: MultimodalClassifier, names: Sequence[str]) -> None:
        super().__init__()
        self.model, self.names = model, tuple(names)

    def features(self, *inputs: Tensor) -> Everything:
        """All that is said of the cases; `names` are the fields of `CaseInputs` in the order of `inputs`."""
        return self.model.everything(CaseInputs(**dict(zip(self.names, inputs))))

    def head(self, said: Everything) -> Tensor:
        """Fused logits (B, C)."""
        return said.logits_BC

    def pooled(self, said: Everything) -> Tensor:
        """Pooled features of the first modality (B, D)."""
        return said.features_BD


def export(engine: CaseTorchEngine, rows: Rows, path: Path, *, metadata: dict[str, Any]) -> Path:
    """Write the model of `engine` as ONNX; `rows` (at least one case) are the example it is traced on."""
    case = replace(engine.inputs(rows[:2]))
    named = {item.name: getattr(case, item.name) for item in fields(case)}
    given = {name: value.cpu() for name, value in named.items() if value is not None}
    return export_to_onnx(
        Exported(engine.model, list(given)),
        path,
        example_inputs={ONNX_NAMES[name]: value for name, value in given.items()},
        metadata=metadata,
        further_axes={"token_ids": "tokens", "token_mask": "tokens"},
    )


def optimize(
    checkpoint: Path,
    overrides: Sequence[Overrides] = (),
    *,
    output_dir: Path,
    model_type: str | None = None,
    triton_repository: Path | None = None,
) -> dict[str, Any]:
    """As of `optimization.optimize`, for every kind of checkpoint; the content of optimization_report.json."""
    if checkpoint.is_dir() or is_ensemble(checkpoint) or "multimodal" not in checkpoints.load(checkpoint):
        return optimization.optimize(
            checkpoint, overrides, output_dir=output_dir, model_type=model_type, triton_repository=triton_repository
        )
    started = time.perf_counter()
    stored = predictor.load(checkpoint, device="cpu", precision="fp32", model_type=model_type)
    config = resolve(flatten(stored.config.to_dict(), source=str(checkpoint)), *overrides)
    if config.optimization.prune or triton_repository is not None:
        raise ConfigError("--prune and --triton-repository are for models that read films alone; drop them")
    require_writable(output_dir)
    with tempfile.TemporaryDirectory(dir=output_dir, prefix=".optimize-") as folder:
        work = CaseOptimization(checkpoint, stored, config, Path(folder))
        report = work.run()
        report["seconds"] = time.perf_counter() - started
        work.write(output_dir, report)
    return report


class CaseOptimization:
    """One multimodal checkpoint, its validation cases and how its engines did."""

    def __init__(self, checkpoint: Path, stored: Predictor, config: Config, folder: Path) -> None:
        self.checkpoint, self.stored, self.config, self.folder = checkpoint, stored, config, folder
        self.settings, self.device = config.optimization, resolve_device("cpu")
        assert isinstance(stored.engine, CaseTorchEngine)
        self.torch = stored.engine
        self.films = self._validation_cases()
        self.standing = self._reference()
        self.skipped: list[dict[str, str]] = []

    def _validation_cases(self) -> ValidationFilms:
        manifest, own = evaluation_manifest(self.stored, self.config)
        if not own:
            raise DataError(
                "optimize calibrates and judges on the validation cases of training, and "
                f"{manifest.root} does not hold them; name their manifest with --manifest"
            )
        rows = rows_of(manifest, "val")
        rows = rows.iloc[
            drawn(rows["label"].to_numpy(), self.settings.validation_films, seed=self.config.training.seed)
        ]
        self.stored.attach(rows)
        images, kept = self.stored.readable(rows["path"].tolist())
        if not kept:
            raise DataError(f"none of the {len(rows)} validation cases can be read")
        rows = rows.iloc[kept]
        return ValidationFilms(images, rows["label"].to_numpy(np.int64), rows["patient_id"].to_numpy())

    def _reference(self) -> Standing:
        logits_NC = self._logits(self.torch)
        stored, probabilities = self.stored, softmax(logits_NC, self.stored.temperature)
        return Standing(self.films, stored.classes, stored.positive_class, stored.threshold, probabilities, logits_NC)

    def _logits(self, engine: Any) -> FloatArray:
        shown = progress(batches_of(self.films.images), total=len(self.films.images), label=engine.name, step=16)
        return np.concatenate([engine.logits(batch) for batch in shown])

    # -- the way through --

    def run(self) -> dict[str, Any]:
        """Export, quantise, judge, time, choose; the report."""
        reader = self.torch.reader
        path = self.folder / bundle.FLOAT_FILE
        about = {"classes": list(self.stored.classes), "preprocess": self.stored.spec.to_dict()}
        export(self.torch, self.films.images, path, metadata=about)
        kinds = self._kinds()
        agreement = parity(
            self.torch.logits,
            CaseOnnxEngine(path, reader, precision="fp32", kind=kinds[0]).logits,
            self.films.images[:PARITY_FILMS],
        )
        if not agreement.largest <= LARGEST_DIFFERENCE:
            raise ConfigError(
                f"the exported file's logits differ from torch's by {agreement.largest:.2g}: this text encoder cannot "
                "be exported; serve the checkpoint itself"
            )
        log.info("all inputs as ONNX: largest difference from torch %.2g", agreement.largest)
        facts: dict[str, Any] = {"parity": asdict(agreement), "float_mb": megabytes(path)}
        files = {"fp32": path}
        if self.settings.quantize:
            made = self._quantised(path, kinds[0])
            if made is not None:
                files["int8"] = made.path
                facts["quantisation"] = {name: value for name, value in asdict(made).items() if name != "path"}
                facts["quantisation"]["int8_mb"] = megabytes(made.path)
        self.files, self.facts = files, facts
        engines: dict[str, Any] = {"torch fp32": self.torch}
        for kind in kinds:
            for name, file in files.items():
                engines[f"{kind} {name}"] = CaseOnnxEngine(file, reader, precision=name, kind=kind)
        rows = [self._judged(name, engine) for name, engine in engines.items()]
        log.info("timing %d candidates in turns", len(rows))
        speeds = measure(engines, self.films.images[:16], rounds=self.settings.rounds)
        for row in rows:
            row["speed"] = asdict(speeds[row["name"]])
        self.chosen = choose(rows, baseline=rows[0], objective=self.settings.objective)
        return self._report(rows)

    def _kinds(self) -> list[str]:
        wanted = self.settings.engines or KINDS
        here = []
        for kind in KINDS:
            reason = why_absent(kind)
            if kind in wanted and reason is None:
                here.append(kind)
            elif reason is not None:
                self.skipped.append({"candidate": kind, "reason": reason})
        if not here:
            raise ConfigError(
                "optimize needs ONNX Runtime or OpenVINO for models that read notes; add one to --engines"
            )
        return here

    def _quantised(self, source: Path, kind: str) -> quantization.Quantised | None:
        """The INT8 twin, judged by engine `kind`; None where no tool takes the graph."""
        labels, seed, exact_NC = self.films.labels, self.config.training.seed, self.standing.logits_NC
        few, every = drawn(labels, QUICK_FILMS, seed=seed + 1), np.arange(len(labels))
        tight = replace(self.settings, max_auc_drop=min(TIGHT_AUC_DROP, self.settings.max_auc_drop))
        stored, reader = self.stored, self.torch.reader
        chosen = drawn(labels, self.settings.calibration_films, seed=seed)
        feeder = CaseOnnxEngine(source, reader, precision="fp32", kind=kind)
        calibration = [feeder.inputs(self.films.images[index : index + 1]) for index in chosen]

        def judge(path: Path, *, quick: bool) -> quantization.Judgement:
            engine, rows = CaseOnnxEngine(path, reader, precision="int8", kind=kind), few if quick else every
            logits_NC = np.concatenate([engine.logits(batch) for batch in batches_of(self.films.images[rows])])
            shift_C = (exact_NC[rows] - logits_NC).mean(axis=0)
            logits_NC = logits_NC + shift_C
            size = max(float(np.linalg.norm(exact_NC[rows])), 1e-30)
            reason = None
            if not quick:
                lost = drops_of(self.standing, softmax(logits_NC, stored.temperature), stored.threshold)
                reason = over_budget(lost, tight)
            error = float(np.linalg.norm(logits_NC - exact_NC[rows])) / size
            return quantization.Judgement(error, reason, tuple(shift_C.tolist()))

        log.info("INT8 from %d calibration cases", len(calibration))
        try:
            return quantization.quantise(source, self.folder / bundle.INT8_FILE, calibration, judge=judge)
        except ConfigError as reason:
            self.skipped.append({"candidate": "int8", "reason": str(reason)})
            return None

    def _judged(self, name: str, engine: Any) -> dict[str, Any]:
        kind, precision = name.split()
        logits_NC = self.standing.logits_NC if kind == "torch" else self._logits(engine)
        accuracy = judged(self.standing, softmax(logits_NC, self.stored.temperature), self.stored.threshold)
        reason = refusal(accuracy, self.settings)
        return {
            "name": name,
            "network": "full",
            "engine": kind,
            "precision": precision,
            "device": "cpu",
            "size_mb": megabytes(self.checkpoint if kind == "torch" else self.files[precision]),
            "accuracy": accuracy,
            "accepted": reason is None,
            "reason": reason,
            "cold_start": {"seconds": float("nan"), "memory_mb": float("nan")},
        }

    def _report(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "checkpoint": str(self.checkpoint),
            "model": f"{self.stored.config.model.model_type} with {' and '.join(self.torch.reader.modalities)}",
            "classes": list(self.stored.classes),
            "machine": environment(self.device, "fp32"),
            "films": {"split": "val", "n": len(self.films.labels), "patients": len(set(self.films.patients))},
            "settings": asdict(self.settings),
            "baseline": rows[0]["name"],
            "networks": {"full": self.facts},
            "candidates": rows,
            "skipped": self.skipped,
            "chosen": None if self.chosen is None else self.chosen["name"],
        }

    def write(self, folder: Path, report: dict[str, Any]) -> None:
        """The bundle of what was chosen (or of the float model in torch), and the report."""
        (folder / bundle.FACTS).unlink(missing_ok=True)  # whatever stood here is no bundle while its files change
        for precision, name in (("fp32", bundle.FLOAT_FILE), ("int8", bundle.INT8_FILE)):
            (folder / name).unlink(missing_ok=True)
            if precision in self.files:
                shutil.copyfile(self.files[precision], folder / name)
        row = self.chosen or {"engine": "torch", "precision": "fp32"}
        rounded = row["precision"] == "int8"
        content = checkpoints.load(self.checkpoint)
        facts = {
            "classes": list(self.stored.classes),
            "preprocess": self.stored.spec.to_dict(),
            "temperature": self.stored.temperature,
            "operating_point": self.stored.operating_point,
            "config": self.stored.config.to_dict(),
            "provenance": self.stored.provenance,
            "multimodal": content["multimodal"],
            "network": "full",
            "engine": row["engine"],
            "precision": row["precision"],
            "file": None if row["engine"] == "torch" else bundle.INT8_FILE if rounded else bundle.FLOAT_FILE,
            "quantisation": self.facts["quantisation"] if rounded else None,
            "passed": self.chosen is not None,
        }
        # The gate's thresholds are those of the float network: INT8 moves the features of a film by its rounding.
        gate_state = None if rounded else self.stored.input_gate
        bundle.write(
            folder, facts, checkpoint=self.checkpoint, seen_films=self.stored.seen_films, input_gate=gate_state
        )
        optimization_report.write(folder, report)

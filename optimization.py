"""Turn a checkpoint into what should be deployed on this machine, with the evidence.

    python main.py optimize --checkpoint checkpoints/best_model.pth --quantize --prune --prune-amount 0.3 \\
        --output-dir optimized_models

Exports to ONNX, makes INT8 and pruned variants, runs every engine that is installed at every precision, and measures
all of them side by side: speed in turns, accuracy on the validation films of training. What loses more accuracy than
the budget allows is refused; the fastest of the rest is written as a bundle that evaluate, predict and api accept.
Writes model.onnx, model_int8.onnx, bundle.json, records.pth and optimization_report.{json,md,png}; reads training and
validation films only. Never looks at the test split; never writes a model as chosen that fails its budget.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

import bundle
import gate
import optimization_report
import predictor
import quantization
from candidates import Candidate, batches_of, cold_start, measure, try_build
from config import ENGINES, Config, OptimizationConfig, Overrides, flatten, resolve
from engines import ONNX_ENGINES, Engine, HostScaling, TorchEngine, onnx_engine, precisions_here, why_absent
from errors import CheckpointError, ConfigError, DataError
from fold_ensemble import is_ensemble
from metrics import compare_predictions, evaluate_predictions, macro_auroc
from models import Classifier
from onnx_export import export_to_onnx, parity
from predictor import Predictor, decide, softmax
from preprocess import PreprocessSpec
from runtime import (
    StopRequest,
    environment,
    log,
    progress,
    require_writable,
    resolve_device,
    resolve_precision,
)
from train import Prepared, calibrated, prepare

__all__ = ["export_to_onnx", "optimize"]

FloatArray = npt.NDArray[np.floating[Any]]

NOTHING_PASSED = 3
"""Exit code when no candidate is both inside the budget and faster than the float model in torch."""
BUDGETED = {"auc_roc": "AUROC", "sensitivity": "sensitivity", "accuracy": "accuracy"}
"""What a candidate may lose only so much of, by its name in reports. Accuracy is among them because INT8 can shift all
logits one way: AUROC and sensitivity then stand and specificity falls."""
TIGHT_AUC_DROP = 0.002
"""INT8 is tuned until it loses no more AUROC than this, or the budget where that is less."""
NEAR_TIE = 0.03
"""Candidates within this share of the fastest are told apart by the other measure of speed."""
PARITY_FILMS = 24
QUICK_FILMS = 128
"""Films on which the layers that hurt are looked for."""
RESAMPLES = 500
"""Of the bootstrap behind the intervals of each candidate."""


@dataclass(frozen=True)
class ValidationFilms:
    """The films that candidates are judged on."""

    images: npt.NDArray[np.uint8]
    """(N, S, S, C), preprocessed."""
    labels: npt.NDArray[np.int64]
    patients: npt.NDArray[Any]


@dataclass(frozen=True)
class Standing:
    """What a candidate is compared with: the float model in torch, as it was trained."""

    films: ValidationFilms
    classes: tuple[str, ...]
    positive: str | None
    threshold: float
    probabilities_NC: FloatArray
    logits_NC: FloatArray


@dataclass(frozen=True)
class Network:
    """The trained network or its pruned twin, as ONNX files."""

    name: str
    """full or pruned."""
    float_file: Path
    int8_file: Path | None
    temperature: float
    operating_point: dict[str, Any]
    facts: dict[str, Any]
    """For the report: parity, quantisation, pruning."""

    @property
    def threshold(self) -> float:
        """Probability of the positive class from which a film is called positive."""
        return float(self.operating_point.get("threshold", 0.5))


def optimize(
    checkpoint: Path,
    overrides: Sequence[Overrides] = (),
    *,
    output_dir: Path,
    model_type: str | None = None,
    triton_repository: Path | None = None,
) -> dict[str, Any]:
    """Find the fastest way of running `checkpoint` here that keeps its accuracy; write the bundle and the report.

    Returns the content of optimization_report.json; its "chosen" is None when nothing passed and the float model was
    kept. UserError kinds for the user's mistakes.
    """
    if is_ensemble(checkpoint):
        raise ConfigError(
            f"--checkpoint {checkpoint}: is the mean of several models; optimize one, such as best_model.pth of a fold"
        )
    if checkpoint.is_dir():
        raise CheckpointError(f"{checkpoint}: is a folder; name the checkpoint file, for example best_model.pth")
    started = time.perf_counter()
    stored = predictor.load(checkpoint, device="cpu", precision="fp32", model_type=model_type)
    if stored.multilabel:
        raise ConfigError(
            f"--checkpoint {checkpoint}: has several findings a film (data.task=multilabel), whose accuracy no budget "
            "of optimize measures; serve the checkpoint itself, or export it with onnx_export.export_to_onnx"
        )
    config = resolve(flatten(stored.config.to_dict(), source=str(checkpoint)), *overrides)
    require_writable(output_dir)
    if triton_repository is not None:
        require_writable(triton_repository, flag="--triton-repository")
    with tempfile.TemporaryDirectory(dir=output_dir, prefix=".optimize-") as folder:
        work = Optimization(checkpoint, stored, config, Path(folder))
        report = work.run()
        report["seconds"] = time.perf_counter() - started
        work.write(output_dir, report, triton_repository)
    return report


class Optimization:
    """One checkpoint, its films, its networks and how they did."""

    def __init__(self, checkpoint: Path, stored: Predictor, config: Config, folder: Path) -> None:
        self.checkpoint, self.stored, self.config, self.folder = checkpoint, stored, config, folder
        self.settings: OptimizationConfig = config.optimization
        engine = stored.engine
        assert isinstance(engine, TorchEngine)
        self.model: Classifier = engine.model
        self.spec: PreprocessSpec = stored.spec
        self.device = resolve_device(config.runtime.device)
        self.prepared = training_films(stored, config)
        self.films = self._validation_films()
        self.skipped: list[dict[str, str]] = []
        self.networks: dict[str, Network] = {}
        self.engines: dict[str, Engine] = {}

    # -- the way through --

    def run(self) -> dict[str, Any]:
        """Make the networks, judge and time the candidates, choose; the report."""
        films = self.films
        log.info("judging on %d validation films, %d threads", len(films.labels), torch.get_num_threads())
        self.standing = self._reference()
        self.networks["full"] = self._network("full", self.model)
        if self.settings.prune:
            self.networks["pruned"] = self._pruned()
        candidates = self._buildable(self._candidates())
        rows = [self._judged(candidate) for candidate in candidates]
        log.info("timing %d candidates in turns", len(candidates))
        speeds = measure(self.engines, films.images[:16], rounds=self.settings.rounds)
        for candidate, row in zip(candidates, rows):
            row["speed"] = asdict(speeds[candidate.name])
            row["cold_start"] = asdict(cold_start(candidate, self.spec, threads=torch.get_num_threads()))
        chosen = choose(rows, baseline=rows[0], objective=self.settings.objective)
        self.chosen = candidates[rows.index(chosen)] if chosen is not None else candidates[0]
        return self._report(rows, chosen)

    def _validation_films(self) -> ValidationFilms:
        val = self.prepared.val_set
        chosen = drawn(val.labels, self.settings.validation_films, seed=self.config.training.seed)
        images = np.stack([val.pixels[int(row)] for row in val.store_rows[chosen]])
        patients = self.prepared.manifest.split("val")["patient_id"].to_numpy()[chosen]
        return ValidationFilms(images, val.labels[chosen], patients)

    def _reference(self) -> Standing:
        """The float model in torch on the validation films."""
        stored = self.stored
        baseline = TorchEngine(self.model, self.spec, device=self.device, precision="fp32")
        logits_NC = self._logits(baseline)
        probabilities = softmax(logits_NC, stored.temperature)
        positive, threshold = stored.positive_class, stored.threshold
        return Standing(self.films, stored.classes, positive, threshold, probabilities, logits_NC)

    def _logits(self, engine: Engine) -> FloatArray:
        images = self.films.images
        shown = progress(batches_of(images), total=len(images), label=engine.name, step=16)
        return np.concatenate([engine.logits(batch) for batch in shown])

    # -- networks --

    def _network(self, name: str, model: Classifier, *, refit: bool = False) -> Network:
        """Export `model`, quantise it, and say how near both are to torch."""
        side = self.spec.image_size
        path = self.folder / f"{name}.onnx"
        temperature, point = self.stored.temperature, self.stored.operating_point
        judged_by = onnx_kind()
        # The features of a pruned network, and so its scores, mean something else: what was fitted is fitted anew.
        plain = TorchEngine(model, self.spec, device=self.device, precision="fp32")
        exact_NC = self.standing.logits_NC
        if refit:
            exact_NC = self._logits(plain)
            fitted = calibrated(
                exact_NC, self.films.labels, self.stored.classes, self.stored.positive_class, self.config
            )
            temperature, point = fitted["temperature"], fitted["operating_point"]
        about = {
            "classes": list(self.stored.classes),
            "preprocess": self.spec.to_dict(),
            "temperature": temperature,
            "operating_point": point,
        }
        export_to_onnx(model, path, (1, 3, side, side), metadata=about)
        exported = onnx_engine(judged_by, path, self.spec, precision="fp32")
        agreement = parity(plain.logits, exported.logits, self.films.images[:PARITY_FILMS])
        log.info("%s network as ONNX: largest difference from torch %.2g", name, agreement.largest)
        facts: dict[str, Any] = {"parity": asdict(agreement), "float_mb": megabytes(path)}
        int8 = None
        if self.settings.quantize:
            made = self._quantise(path, exact_NC, temperature, point, judged_by)
            int8 = made.path
            facts["quantisation"] = {name: value for name, value in asdict(made).items() if name != "path"}
            facts["quantisation"]["int8_mb"] = megabytes(made.path)
        return Network(name, path, int8, temperature, point, facts)

    def _quantise(
        self, source: Path, exact_NC: FloatArray, temperature: float, point: dict[str, Any], kind: str
    ) -> quantization.Quantised:
        """The INT8 twin of `source`, judged by engine `kind` against the logits of `source` in torch, `exact_NC`."""
        to_input, labels, seed = HostScaling(self.spec), self.films.labels, self.config.training.seed
        chosen = drawn(labels, self.settings.calibration_films, seed=seed)
        calibration = [to_input(self.films.images[index : index + 1]) for index in chosen]
        few, every = drawn(labels, QUICK_FILMS, seed=seed + 1), np.arange(len(labels))
        threshold = float(point.get("threshold", 0.5))
        # What pruning has lost already, no block in float brings back.
        own = replace(
            self.standing, threshold=threshold, probabilities_NC=softmax(exact_NC, temperature), logits_NC=exact_NC
        )
        tight = replace(self.settings, max_auc_drop=min(TIGHT_AUC_DROP, self.settings.max_auc_drop))

        def judge(path: Path, *, quick: bool) -> quantization.Judgement:
            engine, rows = onnx_engine(kind, path, self.spec, precision="int8"), few if quick else every
            logits_NC = np.concatenate([engine.logits(batch) for batch in batches_of(self.films.images[rows])])
            shift_C = (exact_NC[rows] - logits_NC).mean(axis=0)
            logits_NC = logits_NC + shift_C
            size = max(float(np.linalg.norm(exact_NC[rows])), 1e-30)
            error = float(np.linalg.norm(logits_NC - exact_NC[rows])) / size
            reason = None
            if not quick:
                reason = over_budget(drops_of(own, softmax(logits_NC, temperature), threshold), tight)
            return quantization.Judgement(error, reason, tuple(shift_C.tolist()))

        log.info("INT8 from %d calibration films", len(calibration))
        target = source.with_name(f"{source.stem}_int8.onnx")
        return quantization.quantise(source, target, calibration, judge=judge)

    def _pruned(self) -> Network:
        import pruning

        precision = resolve_precision(self.config.runtime.precision, self.device)
        with StopRequest() as stop:
            made = pruning.prune_and_distil(
                self.prepared,
                self.config,
                amount=self.settings.pruning_amount,
                epochs=self.settings.pruning_epochs,
                device=self.device,
                precision=precision,
                stop=stop,
            )
        network = self._network("pruned", made.model.cpu(), refit=True)
        facts = {name: value for name, value in vars(made).items() if name != "model"}
        network.facts["pruning"] = {
            "amount": self.settings.pruning_amount,
            **{name: asdict(facts[name]) for name in ("before", "after")},
            "best": facts["best"],
            "stages": [asdict(stage) for stage in facts["stages"]],
        }
        return network

    # -- candidates --

    def _candidates(self) -> list[Candidate]:
        """Every way of running a network here, the float model in torch first."""
        wanted = self.settings.engines or [name for name in ENGINES if name != "compile"]
        on = self.device.type
        found = [Candidate("full", "torch", "fp32", self.checkpoint, on)]
        reduced = resolve_precision("auto", self.device)
        if "torch" in wanted and reduced != "fp32":
            found.append(Candidate("full", "torch", reduced, self.checkpoint, on))
        if "compile" not in wanted:
            self._skip("compile", "compiling takes minutes on a CPU; name it with --engines torch,compile,openvino")
        elif on == "cpu" and not any(shutil.which(name) for name in ("c++", "g++", "clang++")):
            self._skip("compile", "no C++ compiler here (apt install g++)")
        else:
            found += [
                Candidate("full", "compile", name, self.checkpoint, on) for name in dict.fromkeys(("fp32", reduced))
            ]
        for kind in (name for name in wanted if name in ONNX_ENGINES):
            if reason := why_absent(kind):
                self._skip(kind, reason)
                continue
            for network in self.networks.values():
                for precision in precisions_here(kind):
                    file = network.int8_file if "int8" in precision else network.float_file
                    if file is not None:
                        found.append(Candidate(network.name, kind, precision, file))
        return found

    def _skip(self, what: str, reason: str) -> None:
        log.info("%s is skipped: %s", what, reason)
        self.skipped.append({"candidate": what, "reason": reason})

    def _buildable(self, candidates: Sequence[Candidate]) -> list[Candidate]:
        """Those that run here; the others are named and skipped."""
        kept = []
        for candidate in candidates:
            built = try_build(candidate, self.spec, self.model, self.films.images[:1])
            if isinstance(built, str):
                self._skip(candidate.name, built)
            else:
                self.engines[candidate.name] = built
                kept.append(candidate)
        return kept

    def _judged(self, candidate: Candidate) -> dict[str, Any]:
        """A candidate's row of the report but for its speed: accuracy against the float model, and the verdict."""
        network = self.networks[candidate.network]
        is_reference = (candidate.network, candidate.engine, candidate.precision) == ("full", "torch", "fp32")
        logits = self.standing.logits_NC if is_reference else self._logits(self.engines[candidate.name])
        probabilities = softmax(logits, network.temperature)
        accuracy = judged(self.standing, probabilities, network.threshold)
        reason = refusal(accuracy, self.settings)
        said = f"refused: {reason}" if reason else "inside the budget"
        log.info("%s: AUROC %.4f, %s", candidate.name, accuracy["metrics"]["auc_roc"]["value"], said)
        return {
            "name": candidate.name,
            **{name: getattr(candidate, name) for name in ("network", "engine", "precision", "device")},
            "size_mb": megabytes(candidate.model),
            "accuracy": accuracy,
            "accepted": reason is None,
            "reason": reason,
        }

    # -- results --

    def _report(self, rows: list[dict[str, Any]], chosen: dict[str, Any] | None) -> dict[str, Any]:
        settings = asdict(self.settings)
        return {
            "checkpoint": str(self.checkpoint),
            "model": self.stored.config.model.model_type,
            "classes": list(self.stored.classes),
            "machine": environment(self.device, self.chosen.precision),
            "films": {"split": "val", "n": len(self.films.labels), "patients": len(set(self.films.patients))},
            "settings": settings,
            "baseline": rows[0]["name"],
            "networks": {name: network.facts for name, network in self.networks.items()},
            "candidates": rows,
            "skipped": self.skipped,
            "chosen": None if chosen is None else chosen["name"],
        }

    def write(self, folder: Path, report: dict[str, Any], triton_repository: Path | None) -> None:
        """The bundle of what was chosen (or of the float model), and the report."""
        network = self.networks[self.chosen.network]
        (folder / bundle.FACTS).unlink(missing_ok=True)  # whatever stood here is no bundle while its files change
        for source, name in ((network.float_file, bundle.FLOAT_FILE), (network.int8_file, bundle.INT8_FILE)):
            (folder / name).unlink(missing_ok=True)
            if source is not None:
                shutil.copyfile(source, folder / name)
        in_torch = self.chosen.engine in ("torch", "compile")
        rounded = "int8" in self.chosen.precision
        file = bundle.INT8_FILE if rounded else bundle.FLOAT_FILE
        facts = {
            "classes": list(self.stored.classes),
            "preprocess": self.spec.to_dict(),
            "temperature": network.temperature,
            "operating_point": network.operating_point,
            "config": self.stored.config.to_dict(),
            "provenance": self.stored.provenance,
            "network": network.name,
            "engine": "torch" if in_torch else self.chosen.engine,
            "precision": self.chosen.precision + (" compiled" if self.chosen.engine == "compile" else ""),
            "file": None if in_torch else file,
            "quantisation": network.facts["quantisation"] if rounded else None,
            "passed": report["chosen"] is not None,
        }
        bundle.write(
            folder,
            facts,
            checkpoint=self.checkpoint,
            seen_films=self.stored.seen_films,
            input_gate=self._input_gate(),
        )
        if triton_repository is not None:
            name = self.stored.config.model.model_type
            width = int(self.engines[self.chosen.name].outputs(self.films.images[:1])[1].shape[1])
            bundle.write_triton_repository(triton_repository, folder / file, name=name, facts=facts, features=width)
        optimization_report.write(folder, report)

    def _input_gate(self) -> dict[str, Any] | None:
        """The checkpoint's gate, its thresholds set for the chosen engine's rounding; fitted anew when pruned."""
        state, outputs = self.stored.input_gate, self.engines[self.chosen.name].outputs
        if state is None:
            return None
        val = gate.describe(outputs, batches_of(self.films.images))
        if self.chosen.network == "full":
            return gate.refit(state, val)
        films = self.prepared.train_set
        count = gate.reference_count(len(films), len(films))
        rows = films.store_rows[np.linspace(0, len(films) - 1, count).astype(int)]
        images = (np.stack([films.pixels[int(row)] for row in part]) for part in np.array_split(rows, -(-count // 16)))
        try:
            return gate.fit(gate.describe(outputs, images), val)
        except gate.CannotFit as reason:
            log.info("no input gate: %s", reason)
            return None


# --- films -----------------------------------------------------------------------------------------------------


def training_films(stored: Predictor, config: Config) -> Prepared:
    """The films of training, split as then, around the trained model; DataError when they are not to be had."""
    where = config.data.manifest or config.data.data_dir
    needs = "optimize calibrates and judges on the validation films of training"
    try:
        prepared = prepare(replace(config, model=replace(config.model, weights=None)), random_weights=True)
    except DataError as error:
        raise DataError(f"{needs}, and they cannot be read: {error} (--data-dir says where they are now)") from None
    if prepared.digest != stored.provenance.get("manifest_digest"):
        raise DataError(
            f"{needs}, and {where} does not hold the films this checkpoint was trained on; name their folder with "
            "--data-dir"
        )
    if prepared.spec != stored.spec:
        raise ConfigError(f"preprocessing is that of the checkpoint ({stored.spec}); drop the setting that changes it")
    if not len(prepared.val_set):
        raise DataError(f"{needs}, and {where} holds none; there are no calibration films")
    engine = stored.engine
    assert isinstance(engine, TorchEngine)
    return replace(prepared, model=engine.model)


def drawn(labels: npt.NDArray[np.int64], count: int, *, seed: int) -> npt.NDArray[np.int64]:
    """Positions of about `count` films in the proportions of their classes, at least one of each; all if fewer."""
    if len(labels) <= count:
        return np.arange(len(labels))
    rng = np.random.default_rng(seed)
    parts = []
    for label in np.unique(labels):
        own = np.flatnonzero(labels == label)
        parts.append(rng.permutation(own)[: max(1, round(count * len(own) / len(labels)))])
    return np.sort(np.concatenate(parts))


def onnx_kind() -> str:
    """The engine that INT8 is judged and parity is checked with; ConfigError when none is installed."""
    for kind in ("openvino", "onnxruntime"):
        if why_absent(kind) is None:
            return kind
    raise ConfigError(f"optimize needs OpenVINO or ONNX Runtime: {why_absent('openvino')}")


def megabytes(path: Path) -> float:
    """Size of a file in MB (10^6 bytes)."""
    return path.stat().st_size / 1e6


# --- the verdict -----------------------------------------------------------------------------------------------


def drops_of(standing: Standing, probabilities_NC: FloatArray, threshold: float) -> dict[str, float]:
    """AUROC, sensitivity and accuracy lost against the float model; for several classes the first two are averages."""
    films = standing.films
    areas, rates, shares = [], [], []
    for p, cut in ((standing.probabilities_NC, standing.threshold), (probabilities_NC, threshold)):
        areas.append(macro_auroc(films.labels, p).value)
        called = decide(p, standing.classes, standing.positive, cut)
        right = called == films.labels
        groups = np.unique(films.labels) if standing.positive is None else [standing.classes.index(standing.positive)]
        rates.append(float(np.mean([right[films.labels == label].mean() for label in groups])))
        shares.append(float(right.mean()))
    return {name: pair[0] - pair[1] for name, pair in zip(BUDGETED, (areas, rates, shares))}


def over_budget(drops: Mapping[str, float], settings: OptimizationConfig) -> str | None:
    """Why these losses are too much; None when they are inside the budget."""
    most = (settings.max_auc_drop, settings.max_sensitivity_drop, settings.max_accuracy_drop)
    for (name, what), allowed in zip(BUDGETED.items(), most):
        if np.isnan(drops[name]):
            return f"{what} cannot be measured on these films"
        if drops[name] > allowed + 1e-9:
            return f"{what} falls by {drops[name]:.4f}, more than {allowed:g}"
    return None


def judged(standing: Standing, probabilities_NC: FloatArray, threshold: float) -> dict[str, Any]:
    """A candidate's metrics with intervals, its differences from the float model, and how many calls it changes."""
    films, binary = standing.films, standing.positive is not None
    if not np.isfinite(probabilities_NC).all():
        nowhere = dict.fromkeys(BUDGETED, float("nan"))
        return {"metrics": {"auc_roc": {"value": float("nan")}}, "drop": nowhere, "flips": None}
    settings: dict[str, Any] = {"groups": films.patients, "n_boot": RESAMPLES}
    own = evaluate_predictions(
        films.labels,
        probabilities_NC,
        classes=standing.classes,
        positive_class=standing.positive,
        threshold=threshold,
        **settings,
    )["metrics"]
    labels, before, after = films.labels, standing.probabilities_NC, probabilities_NC
    if binary:
        index = standing.classes.index(str(standing.positive))
        labels, before, after = (labels == index).astype(np.int64), before[:, index], after[:, index]
    paired = compare_predictions(
        labels, before, after, threshold_a=standing.threshold, threshold_b=threshold, **settings
    )
    called = [
        decide(p, standing.classes, standing.positive, cut)
        for p, cut in ((standing.probabilities_NC, standing.threshold), (probabilities_NC, threshold))
    ]
    shown = ("auc_roc", "sensitivity", "specificity", "accuracy", "brier", "ece")
    return {
        "metrics": {name: own[name] for name in shown},
        "drop": drops_of(standing, probabilities_NC, threshold),
        "differences": {
            "auc_roc": paired["auc_roc"],
            **{name: paired["metrics"][name] for name in shown[1:] if name in paired["metrics"]},
        },
        "flips": int((called[0] != called[1]).sum()),
    }


def refusal(accuracy: dict[str, Any], settings: OptimizationConfig) -> str | None:
    """Why a candidate is not inside the budget, with the interval of what it loses; None when it is."""
    reason = over_budget(accuracy["drop"], settings)
    if reason is None or "differences" not in accuracy:
        return reason
    name = next(name for name, what in BUDGETED.items() if reason.startswith(what))
    paired = accuracy["differences"].get(name, {})
    low, high = paired.get("ci_low"), paired.get("ci_high")
    return f"{reason} (95 % interval {low:.4f} to {high:.4f})" if low is not None and high is not None else reason


def choose(rows: Sequence[dict[str, Any]], *, baseline: dict[str, Any], objective: str) -> dict[str, Any] | None:
    """The fastest accepted row that beats the baseline; None when there is none.

    By films/s in batches or by the time of one film, as `objective` says; within `NEAR_TIE` of the best the other
    measure decides.
    """

    def merits(row: dict[str, Any]) -> tuple[float, float]:
        rates = row["speed"]["throughput"], 1000 / row["speed"]["p50_ms"]
        return rates if objective == "throughput" else rates[::-1]

    able = [row for row in rows if row is not baseline and row["accepted"] and merits(row)[0] > merits(baseline)[0]]
    if not able:
        return None
    best = max(merits(row)[0] for row in able)
    return max((row for row in able if merits(row)[0] >= (1 - NEAR_TIE) * best), key=lambda row: merits(row)[1])


def summary(report: dict[str, Any]) -> str:
    """The table for the terminal, and what was chosen."""
    return optimization_report.text(report)

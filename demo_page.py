"""index.html of the tour: pictures, figures, and every file made with a line on each.

    demo_page.write(Path("demo_output"), result, examples=rows, report=metrics)

Links lead to files beside the page and nowhere else. Knows nothing of how they were made.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from page import card, figure, interval, number, page, section, span, table, text
from runtime import write_text

FILES = {
    "synthetic_films/manifest.csv": "the films: path, label, split, patient, age, sex and note",
    "synthetic_films/examples.csv": "the test films predicted and explained below",
    "text_encoder/*": "a small BERT of random weights and the vocabulary of the notes: where training began",
    "run/best_model.pth": "the model: all that predicting needs",
    "run/checkpoint_epoch_*.pth": "an epoch to resume from",
    "run/config.yaml": "every setting of the run",
    "run/split.csv": "which film was in which split",
    "run/history.csv": "losses, metrics and rates of each epoch",
    "run/training_curves.png": "the same as a figure",
    "run/environment.json": "machine, libraries and version of the code",
    "evaluation/report.html": "the report: every metric with its interval, subgroups, calibration, errors",
    "evaluation/metrics.json": "the same for programs",
    "evaluation/predictions.csv": "the probability of each test film",
    "evaluation/model_card.md": "what the model is for, and what it is not for",
    "evaluation/modalities.csv": "each test case as film, note and values alone see it, and all together",
    "evaluation/leaking_terms.txt": "words of the notes that name the class, for --mask-terms",
    "evaluation/*.png": "a figure of the report",
    "predictions/predictions.csv": "the class and probability of each example, as predict writes them",
    "explanations/explanation_report.html": "where the model looks, with checks of the maps",
    "explanations/explanation.json": "the same for programs",
    "explanations/*_overlay.png": "a film under its heat map",
    "explanations/*_attribution.npz": "the numbers of a heat map",
    "explanations/*_words.json": "the evidence of each word of a note",
    "optimized_models/optimization_report.md": "every candidate with its speed and what it loses",
    "optimized_models/optimization_report.json": "the same for programs",
    "optimized_models/optimization_report.png": "the same as a figure",
    "optimized_models/bundle.json": "what serving the bundle needs: classes, threshold, engine, hashes",
    "optimized_models/records.pth": "hashes of the films of training, and the input gate",
    "optimized_models/model.onnx": "the network for any ONNX runtime",
    "optimized_models/model_int8.onnx": "the network in 8-bit integers",
}
"""What lies under the folder of the tour, as patterns; a file is told of by the first that fits."""
HEADS = {"fused": "All together", "image": "Film alone", "text": "Note alone", "table": "Age and sex alone"}
HEADLINES = {"auc_roc": "AUROC", "sensitivity": "Sensitivity", "specificity": "Specificity", "accuracy": "Accuracy"}


def write(
    folder: Path,
    result: Mapping[str, Any],
    *,
    examples: Sequence[Mapping[str, str]],
    report: Mapping[str, Any],
    since: float = 0.0,
) -> Path:
    """Write folder/index.html; its path.

    `result` is what `demo.demo` returns, `report` the content of metrics.json and `examples` are rows of the manifest.
    Files older than the time `since` are those of an earlier tour, and are not listed.
    """
    go_on = "\n".join(result["commands"])
    parts = [
        "<h1>The tour</h1>",
        f"<p class='subtitle'>{result['films']:,} synthetic chest films of no person, a network trained on them from "
        f"random weights, measured on {result['n']:,} films of {result['n_patients']:,} patients it never saw · "
        f"{result['seconds']:.0f} s · not a medical device</p>",
        _cards(report),
        section("The films", _films(examples), _films_note(multimodal=result["multimodal"])),
        section("Training", _pictures(folder, TRAINED)),
        section("Test", _pictures(folder, TESTED, columns=2)),
        _modalities(report.get("modalities")),
        section("Where the model looks", _overlays(folder, examples), _link("explanations/explanation_report.html")),
        section(
            "Smaller and faster",
            f"<p>{text(result['optimized'])}.</p>",
            _pictures(folder, {"optimized_models/optimization_report.png": "Speed against what is lost"}),
        ),
        section("Everything made", _listing(folder, since)),
        section("Go on with", f"<pre style='white-space:pre-wrap'>{text(go_on)}</pre>"),
    ]
    path = folder / "index.html"
    write_text(path, page("The tour", *parts))
    return path


TRAINED = {
    "run/training_curves.png": "Losses, validation metrics and learning rates, epoch by epoch",
}
TESTED = {
    "evaluation/roc_curve.png": "Every threshold, and the one chosen on validation",
    "evaluation/reliability_diagram.png": "Whether probabilities mean what they say",
    "evaluation/confusion_matrix.png": "Counts at the threshold chosen on validation",
    "evaluation/score_histogram.png": "Probabilities of the two classes",
}


def listed(folder: Path, *, since: float = 0.0) -> dict[str, list[Path]]:
    """Pattern of FILES → the files under `folder` written from the time `since` on that it tells of, each once."""
    told: set[Path] = set()
    found: dict[str, list[Path]] = {}
    for pattern in FILES:
        files = [
            path for path in sorted(folder.glob(pattern)) if path not in told and path.stat().st_mtime >= int(since)
        ]
        told.update(files)
        if files:
            found[pattern] = files
    return found


def _cards(report: Mapping[str, Any]) -> str:
    level = f"{100 * report.get('level', 0.95):g} % interval"
    cells = [
        card(words, number(report["metrics"][name]["value"]), f"{span(report['metrics'][name])}, {level}")
        for name, words in HEADLINES.items()
    ]
    return f"<div class='cards'>{''.join(cells)}</div>\n"


def _modalities(found: Mapping[str, Any] | None) -> str:
    """What film, note and values say alone and together; nothing where films are all that is read."""
    if not found:
        return ""
    rows = [[text(HEADS[name]), interval(item["auc_roc"])] for name, item in found["heads"].items()]
    remarks = "".join(f"<p>{text(remark[:1].upper() + remark[1:])}.</p>" for remark in found["remarks"])
    return section(
        "What the notes add",
        table(["Read", "AUROC on the test films"], rows, numbers=(1,)),
        remarks,
        _link("evaluation/report.html", "more in the report"),
    )


def _image(path: str, words: str) -> str:
    return f"<img src='{quote(path)}' alt='{text(words)}'>"


def _films(examples: Sequence[Mapping[str, str]]) -> str:
    cells = []
    for row in examples:
        said = f"{text(row['label'])} · {text(row['sex'])}, {text(row['age'])}<br>{text(row['text'] or 'no note')}"
        cells.append(figure(_image(f"synthetic_films/{row['path']}", row["label"]), said))
    return f"<div class='films'>{''.join(cells)}</div>\n"


def _films_note(*, multimodal: bool) -> str:
    use = "The model reads film, note, age and sex." if multimodal else "This model reads the films alone."
    return (
        "<p class='note'>Drawn by the program. Pneumonia is one to three soft opacities of varying size, density and "
        "place. Some notes speak of an infection, some do not, a few name the diagnosis, some are missing; age and sex "
        f"say nothing of the class, and serve to compare groups. {use}</p>"
    )


def _pictures(folder: Path, pictures: Mapping[str, str], *, columns: int = 1) -> str:
    drawn = [figure(_image(path, words), text(words)) for path, words in pictures.items() if (folder / path).is_file()]
    return f"<div style='display:grid;grid-template-columns:repeat({columns},1fr);gap:4mm'>{''.join(drawn)}</div>\n"


def _overlays(folder: Path, examples: Sequence[Mapping[str, str]]) -> str:
    cells = []
    for row in examples:
        path = f"explanations/{Path(row['path']).stem}_overlay.png"
        if (folder / path).is_file():
            cells.append(figure(_image(path, f"{row['label']}, heat map"), text(row["label"])))
    return f"<div class='films'>{''.join(cells)}</div>\n"


def _link(path: str, words: str | None = None) -> str:
    return f"<a href='{quote(path)}'>{text(words or path)}</a>"


def _listing(folder: Path, since: float) -> str:
    rows: list[list[str]] = []
    marks: dict[int, str] = {}
    part = ""
    for pattern, files in listed(folder, since=since).items():
        names = [path.relative_to(folder).as_posix() for path in files]
        if (above := names[0].split("/")[0]) != part:
            part = above
            marks[len(rows)] = "group"
            rows.append([f"{text(part)}/"])
        links = ", ".join(_link(name, Path(name).name) for name in names)
        rows.append([links, text(FILES[pattern])])
    return table(["File", "Is"], rows, marks=marks)

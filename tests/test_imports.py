"""The import table: a module imports only from lower floors."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

FLOORS = [
    {"errors"},
    {
        "config",
        "estimates",
        "runtime",
        "page",
        "checklist",
        "completion",
        "csv_table",
        "serving_docs",
        "tabular",
        "findings",
    },
    {
        "proportions",
        "array_cache",
        "command_line",
        "compilation",
        "depthwise",
        "demo_page",
        "launcher",
        "process_group",
        "duplicates",
        "serving_connection",
        "serving_form",
        "serving_metrics",
        "serving_queue",
        "serving_security",
    },
    {"auroc", "agreement", "calibration", "paired_tests", "dicom", "whole_batch"},
    {"resampling", "score_shift", "shortcuts"},
    {"model_comparison", "preprocess", "checkpoint", "models", "plots", "synthetic"},
    {
        "fusion",
        "metrics",
        "onnx_export",
        "optimization_report",
        "film_facts",
        "device_augmentation",
        "gate",
        "narrowing",
        "reader_table",
        "sample_size",
        "text_encoder",
        "tracking",
    },
    {"clinical", "data_preprocessing", "multimodal", "quantization", "audit_report", "reader_study"},
    {"bundle", "engines", "text_leak", "film_list", "prediction_table", "study_plan", "reader_study_report"},
    {"case_engine", "fold_ensemble"},
    {"predictor", "assessment", "audit_findings", "feature_cache"},
    {
        "figures",
        "candidates",
        "machine_speed",
        "finding_evaluation",
        "finding_objective",
        "objective",
        "audit",
        "attribution",
        "attribution_checks",
        "explain_report",
        "modality_report",
        "shift_report",
    },
    {"report", "explain", "head_search", "word_attribution"},
    {"train", "evaluate", "predict", "doctor", "serving_service"},
    {"case_explain", "case_training", "compare", "crossval", "review", "pruning", "inference_api", "dry_run", "tune"},
    {"optimization"},
    {"case_optimization"},
    {"demo"},
    {"main"},
    {"distributed_train"},
]
FLOOR_OF = {name: floor for floor, names in enumerate(FLOORS) for name in names}
MODULES = sorted(path.stem for path in ROOT.glob("*.py"))


def imported(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module.split(".")[0])
    return names


def test_every_module_has_a_floor() -> None:
    assert set(MODULES) == set(FLOOR_OF)


@pytest.mark.parametrize("module", MODULES)
def test_a_module_imports_only_from_lower_floors(module: str) -> None:
    wrong = {name for name in imported(ROOT / f"{module}.py") & set(FLOOR_OF) if FLOOR_OF[name] >= FLOOR_OF[module]}
    assert not wrong, f"{module} imports {wrong}"


@pytest.mark.parametrize("module", ["errors", "config", "command_line", "main", "runtime"])
def test_a_light_module_imports_no_torch_at_the_top(module: str) -> None:
    tree = ast.parse((ROOT / f"{module}.py").read_text(encoding="utf-8"))
    top = {alias.name.split(".")[0] for node in tree.body if isinstance(node, ast.Import) for alias in node.names} | {
        node.module.split(".")[0] for node in tree.body if isinstance(node, ast.ImportFrom) and node.module
    }
    assert not top & {"torch", "timm", "pandas", "numpy", "cv2"}

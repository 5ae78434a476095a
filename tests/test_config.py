"""config.py: precedence, types, ranges, and the names that published commands rely on."""

from __future__ import annotations

from pathlib import Path

import pytest

import config
from errors import ConfigError

PUBLISHED_FIELDS = [
    "data.batch_size",
    "data.image_size",
    "data.augmentation_prob",
    "model.model_type",
    "model.pretrained",
    "model.freeze_backbone",
    "model.dropout_rate",
    "training.learning_rate",
    "training.backbone_lr",
    "training.num_epochs",
    "training.early_stopping_patience",
    "training.use_amp",
    "optimization.quantize",
    "optimization.prune",
    "optimization.pruning_amount",
]


@pytest.mark.parametrize("name", PUBLISHED_FIELDS)
def test_published_field_keeps_its_name(name: str) -> None:
    assert name in config.field_types()


def test_a_flag_wins_over_yaml_and_yaml_over_the_default(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("training:\n  num_epochs: 7\n  seed: 3\n")
    resolved = config.resolve(config.read_yaml(path), {"training.num_epochs": 9})
    assert (resolved.training.num_epochs, resolved.training.seed) == (9, 3)
    assert resolved.training.learning_rate == config.Config().training.learning_rate


def test_yaml_of_a_resolved_configuration_reads_back_as_the_same(tmp_path: Path) -> None:
    wanted = config.resolve(
        {"training.unfreeze_schedule": {2: 1}, "model.freeze_backbone": True, "data.classes": "a,b"}
    )
    path = tmp_path / "c.yaml"
    path.write_text(config.to_yaml(wanted))
    assert config.load_config_from_yaml(path) == wanted


def test_scientific_notation_that_yaml_reads_as_text_is_a_number(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("training:\n  learning_rate: 1e-4\n")
    assert config.load_config_from_yaml(path).training.learning_rate == 1e-4


@pytest.mark.parametrize(
    ("text", "value"), [("training.num_epochs=5", 5), ("model.weights=null", None), ("data.classes=[A, B]", ["A", "B"])]
)
def test_set_reads_its_value_as_yaml(text: str, value: object) -> None:
    assert config.parse_assignment(text)[1] == value


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("training.learnin_rate", 1, "did you mean 'training.learning_rate'"),
        ("train.num_epochs", 1, "did you mean 'training.num_epochs'"),
        ("model.batch_size", 1, "did you mean 'data.batch_size'"),
        ("training.num_epochs", 0, "training.num_epochs: 0 is out of range"),
        ("training.num_epochs", 2.5, "training.num_epochs: 2.5 is not of type int"),
        ("training.num_epochs", True, "training.num_epochs: True is not of type int"),
        ("training.num_epochs", "many", "not of type int"),
        ("training.learning_rate", -1, "training.learning_rate: -1.0 is out of range"),
        ("training.learning_rate", "fast", "training.learning_rate: 'fast' is not of type float"),
        ("training.learning_rate", float("nan"), "training.learning_rate: nan is out of range"),
        ("training.use_amp", "yes please", "training.use_amp: 'yes please' is not of type bool"),
        ("training.use_amp", 1, "not of type bool"),
        ("training.loss", "focall", "did you mean 'focal'"),
        ("training.monitor", "auc", "did you mean 'auc_roc'"),
        ("training.monitor_mode", "min", "wrong way round"),
        ("training.unfreeze_schedule", {0: 1}, "not an epoch from 1"),
        ("training.unfreeze_schedule", {1: 1}, "nothing to unfreeze"),
        ("training.ema_decay", 1.0, "below 1"),
        ("training.label_smoothing", 1.0, "training.label_smoothing"),
        ("training.operating_point", "yuden", "did you mean 'youden'"),
        (
            "data.augmentation_prob",
            1.5,
            "data.augmentation_prob: 1.5 is out of range; it must be at least 0 and at most 1",
        ),
        ("data.image_size", 8, "data.image_size: 8"),
        ("data.batch_size", 0, "data.batch_size: 0"),
        ("data.val_fraction", 0.9, "data.val_fraction"),
        ("data.resize", "stretch", "data.resize: 'stretch' is not one of squash, pad, crop"),
        ("data.colour", "gray", "did you mean 'grey'"),
        ("data.balance", "both", "data.balance: 'both' is not one of none, sampler, loss, sampler_and_loss"),
        ("model.dropout_rate", 1.0, "model.dropout_rate: 1.0 is out of range"),
        ("optimization.pruning_amount", 0.95, "optimization.pruning_amount"),
        ("evaluation.split", "tests", "did you mean 'test'"),
        ("evaluation.proportion_interval", "wald", "is not one of wilson"),
        ("runtime.precision", "int8", "runtime.precision: 'int8' is not one of"),
        ("runtime.workers", -2, "runtime.workers"),
    ],
)
def test_a_wrong_setting_is_named_with_what_would_be_right(name: str, value: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config.resolve({name: value})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("training:\n  epochs: 3\n", "unknown setting 'training.epochs'"),
        ("trainig:\n  seed: 3\n", "unknown section 'trainig'; did you mean 'training'"),
        ("training: 3\n", "section 'training' must hold"),
        ("- a\n- b\n", "must hold sections"),
        ("training: {seed: 3\n", r"c.yaml:\d+: not valid YAML"),
    ],
)
def test_a_wrong_yaml_file_is_named_with_its_fault(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        config.load_config_from_yaml(path)


def test_a_missing_yaml_file_is_said_to_be_missing(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such configuration file"):
        config.load_config_from_yaml(tmp_path / "none.yaml")


def test_an_empty_yaml_file_is_the_defaults(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("")
    assert config.load_config_from_yaml(path) == config.Config()


def test_differing_fields_lists_exactly_what_differs() -> None:
    a = config.resolve({})
    b = config.resolve({"training.seed": 1, "data.batch_size": 4})
    assert config.differing_fields(a, b) == ["data.batch_size", "training.seed"]


def test_every_field_is_documented_under_it() -> None:
    import ast

    tree = ast.parse(Path(config.__file__).read_text(encoding="utf-8"))
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and node.name.endswith("Config") and node.name != "Config":
            for field, after in zip(node.body, node.body[1:]):
                if isinstance(field, ast.AnnAssign):
                    assert isinstance(after, ast.Expr), f"{node.name}.{ast.unparse(field.target)} has no text under it"


def test_a_class_named_twice_is_refused() -> None:
    with pytest.raises(ConfigError, match="data.classes: 'a' stands there more than once; name each class once"):
        config.resolve({"data.classes": "a,b,a"})


def test_progressive_resizing_from_above_the_full_size_is_refused() -> None:
    with pytest.raises(ConfigError, match="starts at 300 px, above data.image_size=224"):
        config.resolve({"training.progressive_resizing": 300})


def test_paths_that_are_not_here_are_taken_from_above_the_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    project, here = tmp_path / "project", tmp_path / "here"
    (project / "films").mkdir(parents=True)
    here.mkdir()
    monkeypatch.chdir(here)
    settings = config.resolve({"data.data_dir": "films", "data.exclude": "absent.csv"})
    for source in (project / "best_model.pth", project / "runs" / "third" / "best_model.pth", project / "bundle"):
        found = config.located(settings, source).data
        assert found.data_dir == str(project / "films") and found.exclude == "absent.csv"
    assert config.located(settings, tmp_path / "best_model.pth") == settings
    (here / "films").mkdir()
    assert config.located(settings, project / "best_model.pth") == settings


def test_a_setting_newer_than_a_stored_configuration_changes_nothing() -> None:
    stored = config.resolve({"data.min_crop_scale": 0.8}).to_dict()
    assert config.config_from_dict(stored, source="new").data.gamma == config.resolve({}).data.gamma > 0
    del stored["data"]["gamma"]
    old = config.config_from_dict(stored, source="old")
    assert (old.data.gamma, old.data.min_crop_scale) == (0.0, 0.8)

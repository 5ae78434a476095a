"""serving_metrics.py: what is counted is what happened, and a restart goes on counting."""

from __future__ import annotations

import json
import statistics
from datetime import datetime, timezone
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from errors import ConfigError
from serving_metrics import Metrics, ScoreRecord


def test_the_exposition_is_what_prometheus_parses_and_each_server_has_its_own() -> None:
    metrics, other = Metrics(), Metrics()
    metrics.batch(3, 0.2, 0.01)
    metrics.requests.labels("/predict", "200").inc()
    families = {family.name: family for family in text_string_to_metric_families(metrics.text().decode())}
    samples = {(s.name, s.labels.get("le")): s.value for s in families["medimg_batch_size"].samples}
    assert samples["medimg_batch_size_bucket", "2.0"] == 0 and samples["medimg_batch_size_bucket", "4.0"] == 1
    assert 'status="200"' in metrics.text().decode() and 'status="200"' not in other.text().decode()


def test_scores_are_summed_up_by_day_and_survive_a_restart(tmp_path: Path) -> None:
    path, scores = tmp_path / "scores.json", [0.0, 0.31, 0.32, 1.0]
    for half in (scores[:2], scores[2:]):
        record = ScoreRecord(path, model_version="m")
        for score in half:
            record.add(score, positive=score > 0.5, in_distribution=None if score else False)
        record.flush()
    (day,) = json.loads(path.read_text())["days"].items()
    assert day[0] == datetime.now(timezone.utc).date().isoformat()
    assert day[1]["films"] == 4 and day[1]["out_of_distribution"] == 1 and day[1]["positive_share"] == 0.25
    assert day[1]["mean"] == pytest.approx(statistics.mean(scores))
    assert day[1]["standard_deviation"] == pytest.approx(statistics.pstdev(scores))
    assert [index for index, count in enumerate(day[1]["bins"]) for _ in range(count)] == [0, 6, 6, 19]


def test_a_record_of_another_model_a_foreign_file_and_a_closed_folder_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "scores.json"
    ScoreRecord(path, model_version="m")
    with pytest.raises(ConfigError, match="is of model m; name one file a model"):
        ScoreRecord(path, model_version="other")
    path.write_text("[]")
    with pytest.raises(ConfigError, match="is no score record"):
        ScoreRecord(path, model_version="m")
    with pytest.raises(ConfigError, match="cannot be written"):
        ScoreRecord(Path("/proc/none/scores.json"), model_version="m")

"""Dockerfile, compose.yaml and docs/deploy.md: what they name exists here, and their limits agree with the server's."""

from __future__ import annotations

import fnmatch
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml

import main
from config import ServingConfig, resolve

ROOT = Path(main.__file__).parent
DOCKERFILE = (ROOT / "Dockerfile").read_text(encoding="utf-8").replace("\\\n", " ")
LINES = [line.split(maxsplit=1) for line in DOCKERFILE.splitlines() if line and not line.startswith("#")]
COMPOSE = yaml.safe_load((ROOT / "compose.yaml").read_text(encoding="utf-8"))
PAGE = (ROOT / "docs" / "deploy.md").read_text(encoding="utf-8")
ROUTES = set(re.findall(r'api\.get\(\s*"(/\w*)"', (ROOT / "inference_api.py").read_text(encoding="utf-8")))
SERVING = ServingConfig()


def fence(language: str) -> str:
    """The one block of this language in docs/deploy.md."""
    found = re.findall(rf"^```{language}\n(.*?)^```", PAGE, flags=re.DOTALL | re.MULTILINE)
    assert len(found) == 1
    return found[0]


MANIFESTS = list(yaml.safe_load_all(fence("yaml")))
POD = next(item for item in MANIFESTS if item["kind"] == "Deployment")["spec"]["template"]["spec"]
CONTAINER = POD["containers"][0]


def instructions(name: str) -> list[str]:
    return [rest for word, rest in LINES if word == name]


def parsed(words: list[str]) -> Any:
    """The settings of a command of ours; fails on an unknown verb or flag."""
    arguments, extras = main.build_parser(main.VERBS)[0].parse_known_args(words)
    assert not extras
    return resolve(*main.layers(arguments))


# --- the image ------------------------------------------------------------------------------------------------------


def copied() -> list[str]:
    return [source for rest in instructions("COPY") if "--from" not in rest for source in shlex.split(rest)[:-1]]


def test_every_file_the_image_copies_exists() -> None:
    assert copied() and all(list(ROOT.glob(source)) for source in copied())


def test_the_build_context_holds_what_is_copied_and_nothing_else() -> None:
    rules = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")]
    assert rules[0] == "*"
    assert {rule.removeprefix("!") for rule in rules[1:]} == set(copied())
    assert not any(
        fnmatch.fnmatch(name, rule[1:]) for rule in rules[1:] for name in ("checkpoints", "data", ".git", ".env")
    )


def test_the_image_does_not_run_as_root() -> None:
    user = instructions("USER")[-1]
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", user)
    # What follows the last USER may not need root.
    after = [word for word, _ in LINES][[word for word, _ in LINES].index("USER") :]
    assert not {"RUN", "COPY", "ADD"} & set(after)


def test_images_are_named_with_a_version_and_python_is_new_enough() -> None:
    for image in instructions("FROM"):
        name, _, tag = image.split()[0].partition(":")
        assert name == "python" and re.match(r"3\.1[0-9]", tag) and "latest" not in tag


def test_every_instruction_is_known_and_nothing_is_fetched_by_hand() -> None:
    known = {
        "FROM",
        "ARG",
        "WORKDIR",
        "RUN",
        "COPY",
        "ENV",
        "USER",
        "EXPOSE",
        "STOPSIGNAL",
        "HEALTHCHECK",
        "ENTRYPOINT",
        "CMD",
    }
    assert {word for word, _ in LINES} <= known
    assert not re.search(r"curl|wget|https?://(?!127\.0\.0\.1)|sudo|chmod 777", DOCKERFILE)


def exec_form(name: str) -> list[str]:
    words = yaml.safe_load(instructions(name)[-1])
    assert isinstance(words, list)
    return words


def test_what_the_container_starts_parses_and_listens_where_it_is_asked() -> None:
    assert exec_form("ENTRYPOINT") == ["python", "main.py"]
    config = parsed(exec_form("CMD"))
    assert (config.serving.host, str(config.serving.port)) == ("0.0.0.0", instructions("EXPOSE")[0])


def test_the_health_check_asks_a_route_of_the_server_and_is_valid_python() -> None:
    check = instructions("HEALTHCHECK")[0]
    words = yaml.safe_load(check[check.index("CMD") + 4 :])
    compile(words[2], "healthcheck", "exec")
    port, path = re.findall(r"127\.0\.0\.1:(\d+)(/\w+)", words[2])[0]
    assert port == instructions("EXPOSE")[0] and path in ROUTES


def test_nothing_in_the_image_reports_to_anybody() -> None:
    settings = dict(re.findall(r"(\w+)=(\S+)", " ".join(instructions("ENV"))))
    for name in ("NO_ALBUMENTATIONS_UPDATE", "HF_HUB_OFFLINE", "HF_HUB_DISABLE_TELEMETRY"):
        assert settings[name] == "1"


# --- compose --------------------------------------------------------------------------------------------------------


def seconds(text: str) -> float:
    return float(text.removesuffix("s"))


LONGEST_STOP = SERVING.deadline_s + SERVING.body_timeout_s


def test_compose_starts_the_same_server_behind_loopback_with_the_weights_read_only() -> None:
    service = COMPOSE["services"]["api"]
    assert parsed(service["command"]) == parsed(exec_form("CMD"))
    assert service["ports"] == ["127.0.0.1:8000:8000"]
    assert all(volume.endswith(":ro") for volume in service["volumes"])
    assert service["read_only"] and service["cap_drop"] == ["ALL"]


def test_compose_leaves_time_to_finish_what_was_taken_on() -> None:
    assert seconds(COMPOSE["services"]["api"]["stop_grace_period"]) >= LONGEST_STOP


@pytest.mark.parametrize("name", ["MEDIMG_API_KEYS", "MEDIMG_AUDIT_SALT"])
def test_every_variable_that_compose_passes_is_read_by_the_server(name: str) -> None:
    assert name in COMPOSE["services"]["api"]["environment"]
    assert any(name in path.read_text(encoding="utf-8") for path in ROOT.glob("*.py"))


# --- docs/deploy.md -------------------------------------------------------------------------------------------------


def test_the_table_of_paths_names_routes_of_the_server() -> None:
    paths = re.findall(r"^\| `(/\w*)` \|", PAGE, flags=re.MULTILINE)
    assert len(paths) == 5 and set(paths) <= ROUTES


def test_the_systemd_unit_starts_a_command_that_parses_and_waits_for_its_end() -> None:
    unit = dict(line.split("=", 1) for line in fence("ini").splitlines() if "=" in line)
    words = shlex.split(unit["ExecStart"])
    assert words[0].endswith("/python") and words[1] == "main.py"
    assert parsed(words[2:]).serving.host == "127.0.0.1"
    assert float(unit["TimeoutStopSec"]) >= LONGEST_STOP


def test_every_setting_of_the_unit_stands_in_a_section() -> None:
    assert re.findall(r"^\[(\w+)\]$", fence("ini"), flags=re.MULTILINE) == ["Unit", "Service", "Install"]


def test_nginx_lets_through_what_the_server_takes_and_waits_longer_than_it() -> None:
    server = fence("nginx")
    assert int(re.findall(r"client_max_body_size (\d+)m;", server)[0]) >= SERVING.max_body_mb
    assert seconds(re.findall(r"proxy_read_timeout (\S+);", server)[0]) > SERVING.deadline_s
    assert f"proxy_pass http://127.0.0.1:{SERVING.port};" in server
    assert "TLSv1.3" in server and server.count("{") == server.count("}")


def test_the_manifest_starts_a_command_that_parses() -> None:
    assert parsed(CONTAINER["args"]).serving.api_keys_file == "/keys/keys"


@pytest.mark.parametrize("probe", ["startupProbe", "readinessProbe", "livenessProbe"])
def test_every_probe_asks_a_route_of_the_server(probe: str) -> None:
    get = CONTAINER[probe]["httpGet"]
    assert get["path"] in ROUTES and get["port"] in {port["name"] for port in CONTAINER["ports"]}


def test_a_busy_server_is_taken_out_of_rotation_and_not_killed() -> None:
    assert CONTAINER["readinessProbe"]["httpGet"]["path"] == "/readyz"
    assert CONTAINER["livenessProbe"]["httpGet"]["path"] == "/livez"


def test_the_pod_runs_as_the_images_user_without_privileges_and_within_limits() -> None:
    assert POD["securityContext"]["runAsUser"] == int(instructions("USER")[-1].split(":")[0])
    assert POD["securityContext"]["runAsNonRoot"] and not POD["automountServiceAccountToken"]
    assert CONTAINER["securityContext"]["readOnlyRootFilesystem"]
    assert set(CONTAINER["resources"]) == {"requests", "limits"}
    assert POD["terminationGracePeriodSeconds"] >= LONGEST_STOP


def test_every_mount_of_the_pod_has_its_volume() -> None:
    assert {mount["name"] for mount in CONTAINER["volumeMounts"]} == {volume["name"] for volume in POD["volumes"]}


def test_the_manifests_select_the_pods_they_are_about() -> None:
    labels = {"app": "medimg"}
    kinds = {item["kind"]: item["spec"] for item in MANIFESTS}
    assert kinds["Deployment"]["template"]["metadata"]["labels"] == labels
    assert kinds["Service"]["selector"] == labels
    assert kinds["PodDisruptionBudget"]["selector"]["matchLabels"] == labels
    assert kinds["NetworkPolicy"]["podSelector"]["matchLabels"] == labels and kinds["NetworkPolicy"]["egress"] == []


def test_the_stated_time_to_stop_is_the_servers() -> None:
    assert f"({LONGEST_STOP:g} s)" in PAGE

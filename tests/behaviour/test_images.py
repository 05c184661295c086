"""The image, the containers and the cluster job refer to files and commands that exist.

No container accepts connections from outside the machine.
"""

from __future__ import annotations

import importlib.util
import json
import re
import tomllib
from pathlib import Path
from typing import Any

import yaml

from deployments.local import DEFAULTS, POOL
from glmbatch.cli.server import locked
from tests.support import ROOT

HERE = ROOT / "deployments"
DOCKERFILE = (HERE / "Dockerfile").read_text()
COMPOSE: dict[str, Any] = yaml.safe_load((HERE / "compose.yaml").read_text())
OVER: dict[str, Any] = yaml.safe_load((HERE / "compose.gpu.yaml").read_text())
CLUSTER: dict[str, Any] = json.loads((HERE / "kubernetes.json").read_text())
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def commands() -> dict[str, list[str]]:
    """The command of each container except the database."""
    own = re.search(r"^CMD (.*)$", DOCKERFILE, flags=re.MULTILINE)
    assert own is not None
    commands = {}
    for name, service in COMPOSE["services"].items():
        if name != "database":
            commands[name] = service.get("command") or json.loads(own[1])
    return commands


def test_the_image_copies_existing_files_kept_by_dockerignore() -> None:
    copied: list[str] = []
    for sources in re.findall(r"^COPY (.*) \S+$", DOCKERFILE, flags=re.MULTILINE):
        copied += sources.split()
    included = re.findall(r"^!(.*)$", (ROOT / ".dockerignore").read_text(), flags=re.MULTILINE)
    assert sorted(copied) == sorted(included)
    assert all((ROOT / name).exists() for name in copied)
    assert {"flows", "tasks", "glmbatch", "deployments"} <= set(copied)


def test_the_image_installs_versions_pinned_for_its_python() -> None:
    python = re.search(r"^FROM python:(3\.\d+)-slim", DOCKERFILE, flags=re.MULTILINE)
    assert python is not None and PROJECT["requires-python"] == f">={python[1]}"
    assert f"--python-version {python[1]}" in (ROOT / "Makefile").read_text(), (
        "constraints.txt is compiled for another version"
    )
    assert "-c constraints.txt" in DOCKERFILE
    assert set(re.findall(r"--extra (\w+)", DOCKERFILE)) <= PROJECT["optional-dependencies"].keys()
    for file in (DOCKERFILE, (ROOT / "Makefile").read_text()):
        assert "'uv>=0.9,<1'" in file


def test_each_container_runs_our_code_or_prefect() -> None:
    for name, command in commands().items():
        if command[0] == "python":
            assert importlib.util.find_spec(command[2]) is not None, name
        else:
            assert command[0] == "prefect", name
    assert commands()["deploy"][-2:] == ["deployments.local", "deploy"]
    assert commands()["worker"][:5] == ["prefect", "worker", "start", "--pool", POOL]


def test_only_the_host_loopback_is_exposed() -> None:
    ports = {name: service.get("ports", []) for name, service in COMPOSE["services"].items()}
    assert ports.pop("server") == ["127.0.0.1:4200:4200"]
    assert not any(ports.values())


def test_no_password_is_stored_in_the_files() -> None:
    password = COMPOSE["services"]["database"]["environment"]["POSTGRES_PASSWORD"]
    assert password.startswith("${POSTGRES_PASSWORD:?")


def test_the_container_server_has_the_same_protections() -> None:
    server = COMPOSE["services"]["server"]["environment"]
    password = server["PREFECT_SERVER_API_AUTH_STRING"]
    assert password.startswith("${PREFECT_PASSWORD:?")
    assert {**server, "PREFECT_SERVER_API_AUTH_STRING": ""}.items() >= locked(4200, "").items()
    for name in ("deploy", "worker"):
        client = COMPOSE["services"][name]["environment"]
        assert client["PREFECT_API_AUTH_STRING"] == "${PREFECT_PASSWORD:?}"


def test_containers_wait_for_their_dependencies() -> None:
    services = COMPOSE["services"]
    waiting = []
    for name, service in services.items():
        for needed, how in service.get("depends_on", {}).items():
            waiting.append(name)
            ends = how["condition"] == "service_completed_successfully"
            assert ends or "healthcheck" in services[needed]
    assert waiting == ["server", "deploy", "worker"]


def test_containers_keep_data_in_named_volumes() -> None:
    named = set()
    for service in COMPOSE["services"].values():
        for volume in service.get("volumes", []):
            if not volume.startswith(".."):
                named.add(volume.split(":")[0])
    assert named == COMPOSE["volumes"].keys()


def test_the_worker_sends_heartbeats_as_often_as_expected() -> None:
    # deployments/silent_runs.yaml expects these heartbeats.
    frequency = "PREFECT_FLOWS_HEARTBEAT_FREQUENCY"
    worker = COMPOSE["services"]["worker"]
    assert worker["environment"][frequency] == DEFAULTS[frequency]
    # Without heartbeats a run counts as crashed after a minute and a half, in a cluster too.
    assert f"{frequency}={DEFAULTS[frequency]} " in DOCKERFILE


def test_the_gpu_file_extends_existing_containers() -> None:
    assert OVER["services"].keys() <= COMPOSE["services"].keys()


def test_the_cluster_job_declares_its_variables() -> None:
    named = set(re.findall(r"{{ (\w+) }}", json.dumps(CLUSTER["job_configuration"])))
    assert named == CLUSTER["variables"]["properties"].keys()


def test_the_cluster_job_requests_a_gpu() -> None:
    job = CLUSTER["job_configuration"]
    pod = job["job_manifest"]["spec"]["template"]["spec"]
    container = pod["containers"][0]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == "{{ gpus }}"
    assert CLUSTER["variables"]["properties"]["gpus"]["default"] == 1
    assert f"WORKDIR {container['workingDir']}\n" in DOCKERFILE
    assert Path(container["volumeMounts"][0]["mountPath"]).is_relative_to(container["workingDir"])

"""The image, the containers and the cluster's job name what exists.

They listen to nobody outside the machine.
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
    """What each container runs."""
    own = re.search(r"^CMD (.*)$", DOCKERFILE, flags=re.MULTILINE)
    assert own is not None
    commands = {}
    for name, service in COMPOSE["services"].items():
        if name != "database":
            commands[name] = service.get("command") or json.loads(own[1])
    return commands


def test_the_image_copies_what_is_there_and_is_let_through() -> None:
    copied: list[str] = []
    for sources in re.findall(r"^COPY (.*) \S+$", DOCKERFILE, flags=re.MULTILINE):
        copied += sources.split()
    let_through = re.findall(r"^!(.*)$", (ROOT / ".dockerignore").read_text(), flags=re.MULTILINE)
    assert sorted(copied) == sorted(let_through)
    assert all((ROOT / name).exists() for name in copied)
    assert {"flows", "tasks", "glmbatch", "deployments"} <= set(copied)


def test_the_image_installs_what_is_pinned_for_its_python() -> None:
    python = re.search(r"^FROM python:(3\.\d+)-slim", DOCKERFILE, flags=re.MULTILINE)
    assert python is not None and PROJECT["requires-python"] == f">={python[1]}"
    assert f"--python-version {python[1]}" in (ROOT / "Makefile").read_text(), (
        "constraints are made for it"
    )
    assert "-c constraints.txt" in DOCKERFILE
    assert set(re.findall(r"--extra (\w+)", DOCKERFILE)) <= PROJECT["optional-dependencies"].keys()
    for file in (DOCKERFILE, (ROOT / "Makefile").read_text()):
        assert "'uv>=0.9,<1'" in file


def test_each_container_runs_a_command_of_ours_or_of_prefect() -> None:
    for name, command in commands().items():
        if command[0] == "python":
            assert importlib.util.find_spec(command[2]) is not None, name
        else:
            assert command[0] == "prefect", name
    assert commands()["deploy"][-2:] == ["deployments.local", "deploy"]
    assert commands()["worker"][:5] == ["prefect", "worker", "start", "--pool", POOL]


def test_only_loopback_of_the_host_is_listened_on() -> None:
    ports = {name: service.get("ports", []) for name, service in COMPOSE["services"].items()}
    assert ports.pop("server") == ["127.0.0.1:4200:4200"]
    assert not any(ports.values())


def test_no_password_is_written_down() -> None:
    password = COMPOSE["services"]["database"]["environment"]["POSTGRES_PASSWORD"]
    assert password.startswith("${POSTGRES_PASSWORD:?")


def test_the_server_in_a_container_is_locked_like_ours() -> None:
    server = COMPOSE["services"]["server"]["environment"]
    password = server["PREFECT_SERVER_API_AUTH_STRING"]
    assert password.startswith("${PREFECT_PASSWORD:?")
    assert {**server, "PREFECT_SERVER_API_AUTH_STRING": ""}.items() >= locked(4200, "").items()
    for name in ("deploy", "worker"):
        client = COMPOSE["services"][name]["environment"]
        assert client["PREFECT_API_AUTH_STRING"] == "${PREFECT_PASSWORD:?}"


def test_containers_wait_for_those_they_need() -> None:
    services = COMPOSE["services"]
    waiting = []
    for name, service in services.items():
        for needed, how in service.get("depends_on", {}).items():
            waiting.append(name)
            ends = how["condition"] == "service_completed_successfully"
            assert ends or "healthcheck" in services[needed]
    assert waiting == ["server", "deploy", "worker"]


def test_containers_keep_what_must_stay() -> None:
    named = set()
    for service in COMPOSE["services"].values():
        for volume in service.get("volumes", []):
            if not volume.startswith(".."):
                named.add(volume.split(":")[0])
    assert named == COMPOSE["volumes"].keys()


def test_the_worker_gives_signs_of_life_as_often_as_awaited() -> None:
    # deployments/silent_runs.yaml waits for them.
    frequency = "PREFECT_FLOWS_HEARTBEAT_FREQUENCY"
    worker = COMPOSE["services"]["worker"]
    assert worker["environment"][frequency] == DEFAULTS[frequency]
    # Without signs of life a run of a minute and a half is taken for crashed: in a cluster too.
    assert f"{frequency}={DEFAULTS[frequency]} " in DOCKERFILE


def test_the_gpu_is_added_to_containers_that_exist() -> None:
    assert OVER["services"].keys() <= COMPOSE["services"].keys()


def test_the_job_of_a_cluster_declares_what_it_fills_in() -> None:
    named = set(re.findall(r"{{ (\w+) }}", json.dumps(CLUSTER["job_configuration"])))
    assert named == CLUSTER["variables"]["properties"].keys()


def test_the_job_of_a_cluster_asks_for_a_gpu() -> None:
    job = CLUSTER["job_configuration"]
    pod = job["job_manifest"]["spec"]["template"]["spec"]
    container = pod["containers"][0]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == "{{ gpus }}"
    assert CLUSTER["variables"]["properties"]["gpus"]["default"] == 1
    assert f"WORKDIR {container['workingDir']}\n" in DOCKERFILE
    assert Path(container["volumeMounts"][0]["mountPath"]).is_relative_to(container["workingDir"])

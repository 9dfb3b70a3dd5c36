"""The image's Dockerfile and the compose file, held against hadolint and the Compose Specification's own schema.

The schema is that of github.com/compose-spec/compose-spec (tests/schemas/compose, with its licence).
"""

from __future__ import annotations

import copy
import gzip
import json
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

REPOSITORY = Path(__file__).parents[2]
DOCKER = REPOSITORY / "infra" / "deploy" / "docker"
HADOLINT = Path(sys.executable).with_name("hadolint")
_VARIABLE = re.compile(r"\$(?:(\$)|\{([A-Z0-9_]+)(?:(:-|:\?)([^}]*))?\})")


def lint(dockerfile: str) -> list[str]:
    """What hadolint says of a Dockerfile, rule by rule."""
    command = [str(HADOLINT), "--no-color", "--format", "json", "-"]
    done = subprocess.run(command, input=dockerfile, capture_output=True, text=True, check=False)
    return [f"{found['line']} {found['code']} {found['message']}" for found in json.loads(done.stdout)]


@pytest.fixture(scope="module")
def dockerfile() -> str:
    return (DOCKER / "Dockerfile").read_text()


def test_hadolint_has_nothing_to_say_about_the_dockerfile(dockerfile: str) -> None:
    assert lint(dockerfile) == []


@pytest.mark.parametrize(
    ("old", "new", "rule"),
    [
        ("FROM ${BASE} AS build", "FROM debian AS build", "DL3006"),  # no tag
        ("WORKDIR /source", "WORKDIR source", "DL3000"),
        ("USER 1000", "USER root", "DL3002"),
        ("rm -rf /var/lib/apt/lists/*", "true", "DL3009"),
        ("COPY --from=build ", "COPY --from=built ", "DL3022"),
        ('CMD ["hvqd", "--help"]', "CMD hvqd --help", "DL3025"),
        ("WORKDIR /source", "WORKDIRR /source", "DL1000"),
    ],
)
def test_a_broken_dockerfile_is_refused(dockerfile: str, old: str, new: str, rule: str) -> None:
    broken = dockerfile.replace(old, new, 1)
    assert broken != dockerfile
    assert any(rule in found for found in lint(broken)), lint(broken)


def test_the_image_is_built_from_the_lock_in_two_stages_and_runs_without_root(dockerfile: str) -> None:
    stages = dockerfile.split("\nFROM ")
    assert len(stages) == 3, "what comes before the first stage, and two stages"
    build, image = stages[1:]
    installs = [line for line in re.findall(r"pip install (.+)", build) if not line.startswith("--no-deps")]
    assert len(installs) == 4
    assert all("-c constraints.txt" in line or '"torch==$TORCH_VERSION' in line for line in installs), installs
    assert image.index("USER 1000") < image.index("CMD"), "the last user counts"
    assert image.count("USER ") == 1
    variants = set(re.findall(r"^ +(\w+)\) ", build, re.MULTILINE))
    assert variants == {"cpu", "cuda"}


def test_the_image_has_the_torch_that_the_installer_has(dockerfile: str) -> None:
    installer = (REPOSITORY / "scripts" / "install.sh").read_text()
    (version,) = re.findall(r"^version=(\S+)$", installer, re.MULTILINE)
    assert f"ARG TORCH_VERSION={version}\n" in dockerfile


def test_what_is_sent_to_the_builder_is_what_the_dockerfile_copies(dockerfile: str) -> None:
    allowed = {line[1:] for line in (REPOSITORY / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    copied = {
        source
        for line in re.findall(r"^COPY (?!--from)(.+)$", dockerfile, re.MULTILINE)
        for source in line.split()[:-1]
    }
    assert allowed == copied
    packages = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]["find"]
    assert {name.rstrip("*") for name in packages["include"]} == copied - {"constraints.txt", "pyproject.toml"}
    assert all((REPOSITORY / name).exists() for name in copied)


# ---- compose ----


class UnsetVariableError(Exception):
    """A variable without default has no value."""


def filled(text: str, variables: Mapping[str, str]) -> str:
    """The text with ${NAME}, ${NAME:-default} and ${NAME:?message} replaced, as the specification's chapter 12 has it.

    Raises:
        UnsetVariableError: there is neither a value nor a default.
    """

    def value(found: re.Match[str]) -> str:
        if found[1]:
            return "$"
        name, kind, rest = found[2], found[3], found[4]
        if variables.get(name):
            return variables[name]
        if kind == ":-":
            return rest
        raise UnsetVariableError(rest or name)

    return _VARIABLE.sub(value, text)


def settings(name: str = "env.example") -> dict[str, str]:
    """What an .env file sets."""
    lines = [line for line in (DOCKER / name).read_text().splitlines() if line and not line.startswith("#")]
    return dict(line.split("=", 1) for line in lines)


@pytest.fixture(scope="module")
def schema() -> jsonschema.Draft7Validator:
    path = REPOSITORY / "tests" / "schemas" / "compose" / "compose-spec.json.gz"
    return jsonschema.Draft7Validator(json.loads(gzip.decompress(path.read_bytes())))


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    value = yaml.safe_load(filled((DOCKER / "compose.yaml").read_text(), settings()))
    assert isinstance(value, dict)
    return value


def messages(error: jsonschema.ValidationError) -> Iterator[str]:
    yield error.message
    for part in error.context or ():
        yield from messages(part)


@pytest.mark.parametrize("name", ["compose.yaml", "compose.cuda.yaml"])
def test_compose_files_keep_to_the_specification(schema: jsonschema.Draft7Validator, name: str) -> None:
    value = yaml.safe_load(filled((DOCKER / name).read_text(), settings()))
    assert [message for error in schema.iter_errors(value) for message in messages(error)] == []


@pytest.mark.parametrize(
    ("service", "change", "message"),
    [
        ("postgres", {"volume": ["postgres:/data"]}, "'volume' does not match"),
        ("ray-head", {"healthcheck": {"tests": ["CMD", "true"]}}, "'tests' does not match"),
        ("mlflow", {"depends_on": {"postgres": {"condition": "service_is_there"}}}, "is not one of"),
        ("ray-worker", {"deploy": {"replicas": [2]}}, "is not of type 'integer'"),
    ],
)
def test_a_broken_compose_file_is_refused(
    schema: jsonschema.Draft7Validator, compose: dict[str, Any], service: str, change: dict[str, Any], message: str
) -> None:
    broken = copy.deepcopy(compose)
    broken["services"][service] |= change
    found = [text for error in schema.iter_errors(broken) for text in messages(error)]
    assert any(message in text for text in found), found


def test_no_variable_is_left_open_and_no_secret_has_a_default() -> None:
    text = (DOCKER / "compose.yaml").read_text()
    variables = {found[2]: found[3] for found in _VARIABLE.finditer(text)}
    needed = {name for name, kind in variables.items() if kind == ":?"}
    assert needed == set(settings()), "env.example has exactly what must be set"
    assert {name for name in variables if re.search("PASSWORD|KEY|TOKEN", name)} == needed
    assert set(variables.values()) == {":-", ":?"}, "every variable has a default, or says what to set"
    assert "$" not in filled(text, settings()).replace("$(", "")
    for name in needed:
        with pytest.raises(UnsetVariableError, match=rf"^set {name} in \.env$"):
            filled(text, {other: value for other, value in settings().items() if other != name})


def test_services_name_only_volumes_files_and_services_that_there_are(compose: dict[str, Any]) -> None:
    services = compose["services"]
    assert set(services) == {"postgres", "s3", "mlflow", "ray-head", "ray-worker", "prometheus", "grafana"}
    mounts = [mount for service in services.values() for mount in service.get("volumes", [])]
    assert len(mounts) == 8
    for mount in mounts:
        source = mount.split(":")[0]
        assert (DOCKER / source).exists() if source.startswith(".") else source in compose["volumes"], mount
    for name, service in services.items():
        needed = service.get("depends_on", [])
        assert set(needed) <= set(services), name
        if isinstance(needed, dict):
            assert all("healthcheck" in services[other] for other in needed), f"{name} waits until others are healthy"
        tag = service["image"].rsplit(":", 1)[-1]
        assert tag not in ("latest", service["image"]), f"{name}: an image without version"


def test_ports_listen_on_this_machine_alone_and_are_those_that_others_ask_for(compose: dict[str, Any]) -> None:
    services = compose["services"]
    ports = {port for service in services.values() for port in service.get("ports", [])}
    assert {int(port.split(":")[1]) for port in ports} == {8333, 5000, 8265, 9090, 3000}
    assert all(port.startswith("127.0.0.1:") for port in ports)
    scrape = yaml.safe_load((DOCKER / "prometheus.yaml").read_text())["scrape_configs"]
    (found,) = [config for job in scrape for config in job["dns_sd_configs"]]
    for name in found["names"]:
        assert f"--metrics-export-port={found['port']}" in services[name]["command"]
    source = yaml.safe_load((DOCKER / "grafana" / "datasource.yaml").read_text())["datasources"][0]
    assert source["url"] == "http://prometheus:9090"

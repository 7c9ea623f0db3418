"""What a user installs: the wheel of a clean checkout, in an environment of its own, run from elsewhere."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
PACKAGE_FOLDERS = ("envs", "controllers", "training_runs")


def run(*command: object, cwd: Path) -> str:
    # Not this checkout's package: nothing of the caller's Python path may reach the other environment.
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "PIP_", "VIRTUAL_ENV"))}
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, cwd=cwd, env=environment)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


def listed(*options: str) -> list[str]:
    command = ["git", "ls-files", "-z", *options]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")[:-1]


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A copy of what git tracks or would track, links as links."""
    if not (ROOT / ".git").exists() or shutil.which("git") is None:
        pytest.skip("needs the git checkout")
    folder = tmp_path_factory.mktemp("checkout") / "lbw-rl"
    for name in listed("--cached", "--others", "--exclude-standard"):
        source, target = ROOT / name, folder / name
        if source.is_symlink() or source.is_file():  # a tracked file may be deleted in the working tree
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, target, follow_symlinks=False)
    return folder


@pytest.fixture(scope="module")
def wheel(checkout, tmp_path_factory):
    out = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-w", out, checkout, cwd=out)
    (built,) = out.glob("*.whl")
    return built


def test_the_links_are_links(checkout):
    for name in PACKAGE_FOLDERS:
        assert os.readlink(checkout / "lbw_rl" / name) == f"../{name}"


def test_the_wheel_holds_the_package_and_claims_no_other_name(checkout, wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        metadata = next(n for n in names if n.endswith(".dist-info/METADATA"))
        text = archive.read(metadata).decode()
        entry_points = archive.read(metadata.replace("METADATA", "entry_points.txt")).decode()
    assert {n.partition("/")[0] for n in names} == {"lbw_rl", metadata.partition("/")[0]}
    inside = {n for n in names if n.startswith("lbw_rl/")}
    sources = {p.relative_to(checkout).as_posix() for p in (checkout / "lbw_rl").rglob("*.py")}
    for folder in PACKAGE_FOLDERS:
        sources |= {f"lbw_rl/{p.relative_to(checkout).as_posix()}" for p in (checkout / folder).rglob("*.py")}
    assert sources <= inside
    data = {f"lbw_rl/{p.relative_to(checkout).as_posix()}" for p in checkout.glob("training_runs/recipes/*.toml")}
    assert data  # recipes
    data |= {f"lbw_rl/{p.relative_to(checkout).as_posix()}" for p in checkout.glob("controllers/pretrained/*/*")}
    monitoring = [p for p in checkout.glob("training_runs/monitoring/**/*.*") if p.suffix in (".yml", ".json", ".md")]
    assert len(monitoring) == 8
    data |= {f"lbw_rl/{p.relative_to(checkout).as_posix()}" for p in monitoring}
    data.add("lbw_rl/py.typed")
    assert inside - sources == data
    assert "lbw-rl = lbw_rl.cli:main" in entry_points
    assert "License-Expression: Apache-2.0" in text
    assert "Requires-Python: >=3.11" in text


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """The scripts of an environment that holds the wheel; the packages it depends on are found here, not copied."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False, symlinks=True)
    python = folder / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", python]
    run(*pip, "install", "--no-deps", "--no-index", wheel, cwd=folder)
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder).strip())
    # A path of a .pth file is searched, but the .pth files in it are not: no editable install comes along.
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return folder / "bin"


@pytest.fixture
def elsewhere(tmp_path):
    return tmp_path


def test_every_module_imports_from_the_installed_wheel(checkout, installed, elsewhere):
    program = (
        "import importlib, json, pkgutil, lbw_rl\n"
        "def fail(name): raise ImportError(name)\n"
        "found = [m.name for m in pkgutil.walk_packages(lbw_rl.__path__, 'lbw_rl.', onerror=fail)]\n"
        "origins = [importlib.import_module(name).__file__ for name in found]\n"
        "print(json.dumps([lbw_rl.__file__, found, origins]))"
    )
    origin, found, origins = json.loads(run(installed / "python", "-c", program, cwd=elsewhere).splitlines()[-1])
    site = Path(origin).parent.parent
    assert installed.parent in site.parents
    assert all(Path(o).is_relative_to(site) for o in origins)
    expected = set()
    for path in [
        *checkout.glob("lbw_rl/**/*.py"),
        *(p for f in PACKAGE_FOLDERS for p in checkout.glob(f"{f}/**/*.py")),
    ]:
        parts = path.relative_to(checkout).with_suffix("").parts
        parts = parts if parts[0] == "lbw_rl" else ("lbw_rl", *parts)
        expected.add(".".join(parts[:-1] if parts[-1] == "__init__" else parts))
    assert set(found) == expected - {"lbw_rl"}


def test_the_console_script_works_from_anywhere(checkout, installed, elsewhere):
    findings = json.loads(run(installed / "lbw-rl", "doctor", "--json", cwd=elsewhere))
    assert findings["links"] == "ok"
    shipped = sorted(p.parent.name for p in checkout.glob("controllers/pretrained/*/policy.json"))
    if shipped:
        assert findings["policy"] == f"{shipped[-1]}, intact"
    assert "lbw-rl" in run(installed / "lbw-rl", "doctor", cwd=elsewhere)


def test_a_run_works_from_anywhere(installed, elsewhere):
    settings = ["train.steps=3", "train.batch_size=2", "data.eval_sequences=4", "train.threads=1", "train.device=cpu"]
    arguments = [part for setting in settings for part in ("--set", setting)]
    command = [installed / "lbw-rl", "run", "mini-llama", "--controller", "lbw-guard", "--json", *arguments]
    summary = json.loads(run(*command, "--out", "out", cwd=elsewhere))
    assert summary["steps"] == 3
    assert (elsewhere / "out/ledger.jsonl").is_file()

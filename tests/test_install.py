"""Wheel and source distribution: built, installed into an empty environment without a compiler, and run there."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

from regulate.kernels.cpu import build, shipped

pytestmark = [pytest.mark.gate, pytest.mark.install]

ROOT = Path(__file__).parents[1]
LEFT = (".git", ".venv*", "build", "dist", "runs", "*.egg-info", ".*_cache", ".hypothesis", "__pycache__")
TARGETS = build.TARGETS.get(platform.machine().lower(), ())
# A network, and a step by the native kernels and by the equations.
RUN = """
import json, torch, regulate
from regulate.kernels.cpu import library, native, shipped
from regulate.models.cifar import cifar_resnet
{setup}
calls = []
step = native.call
native.call = lambda *arguments: (calls.append(arguments[0]), step(*arguments))[1]
model = cifar_resnet(20).eval()
image = torch.randn(2, 3, 32, 32)
same = torch.equal(regulate.regulate(model)(image), model(image))
cell = regulate.ConvLSTMCell(20)
image = torch.randn(2, 20, 9, 7)
native_state = cell(image, None)
with regulate.kernels.use("reference"):
    state = cell(image, None)
print(json.dumps({{
    "file": regulate.__file__,
    "why_not": regulate.kernels.why_no_native(),
    "set": regulate.kernels.instruction_set(),
    "origin": regulate.kernels.origin(),
    "library": library.library()._name,
    "same": same,
    "calls": len(calls),
    "close": all(torch.allclose(a, b, atol=1e-6) for a, b in zip(native_state, state)),
}}))
"""


def built(kind: str, source: Path, out: Path, **environment: str) -> Path:
    """Build as pip does, with the setuptools that is here."""
    code = f"from setuptools import build_meta; print(build_meta.build_{kind}({str(out)!r}))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=source, env={**os.environ, **environment}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return out / done.stdout.splitlines()[-1]


@pytest.fixture(scope="module")
def sdist(tmp_path_factory):
    """The source distribution, and where it is unpacked."""
    folder = tmp_path_factory.mktemp("sdist")
    shutil.copytree(ROOT, folder / "source", ignore=shutil.ignore_patterns(*LEFT))
    path = built("sdist", folder / "source", folder)
    with tarfile.open(path) as archive:
        archive.extractall(folder, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
    return path, folder / path.name.removesuffix(".tar.gz")


@pytest.fixture(scope="module")
def wheel(sdist, tmp_path_factory):
    """Built from the source distribution, as where there is no wheel for a platform."""
    return built("wheel", sdist[1], tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def environment(wheel, tmp_path_factory):
    """The Python of an environment that holds the wheel, and sees the torch that is here."""
    folder = tmp_path_factory.mktemp("environment")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    python = folder / "bin" / "python"
    install = [sys.executable, "-m", "pip", "--python", str(python), "install", "-q", "--no-index", "--no-deps"]
    subprocess.run([*install, str(wheel)], check=True)
    # After pip, which would find another installation there.
    (site,) = folder.glob("lib/python*/site-packages")
    (site / "torch.pth").write_text("\n".join({sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}))
    return python


def run(command: list[str], cache: Path) -> str:
    """Run something where no compiler is to be found; nothing must be compiled."""
    kept = {key: value for key, value in os.environ.items() if key not in ("CXX", "PYTHONPATH")}
    kept.update(PATH="", XDG_CACHE_HOME=str(cache))
    done = subprocess.run(command, env=kept, cwd=cache.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not cache.exists()
    return done.stdout


def found(python: Path, cache: Path, setup: str = "") -> dict[str, object]:
    return json.loads(run([str(python), "-c", RUN.format(setup=setup)], cache))


def test_the_source_distribution_holds_every_tracked_file(sdist):
    if not (ROOT / ".git").exists():
        pytest.skip("needs the repository")
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True)
    tracked = {name for name in listed.stdout.splitlines() if (ROOT / name).is_file()} - {".gitignore"}
    with tarfile.open(sdist[0]) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    assert tracked - held == set()


def test_tests_run_from_the_source_distribution(sdist):
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-p",
            "no:cacheprovider",
            "tests/docs/test_docs_examples.py",
            "-k",
            "page or links",
        ],
        cwd=sdist[1],
        env={**os.environ, "PYTHONPATH": str(sdist[1])},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout
    assert "passed" in done.stdout


def test_the_wheel_holds_a_library_for_each_instruction_set(wheel):
    tags = wheel.name.removesuffix(".whl").split("-")[-3:]
    assert tags[:2] == ["py3", "none"]
    assert (tags[2] == "any") == (not TARGETS)
    names = zipfile.ZipFile(wheel).namelist()
    libraries = {Path(name).name for name in names if name.startswith("regulate/kernels/cpu/compiled/")}
    assert libraries == {target.file for target in TARGETS}
    sources = {path.name for path in (ROOT / "regulate" / "kernels" / "cpu").iterdir() if path.suffix in (".cpp", ".h")}
    assert {"light.cpp", "vec.h"} <= sources and {f"regulate/kernels/cpu/{name}" for name in sources} <= set(names)
    assert "regulate/py.typed" in names
    assert not [name for name in names if name.startswith(("tests", "examples", "setup"))]


@pytest.mark.skipif(not TARGETS, reason="wheels for this machine hold no library")
def test_the_wheels_library_runs_without_a_compiler(environment, tmp_path):
    said = found(environment, tmp_path / "cache")
    assert Path(said["file"]).is_relative_to(environment.parents[1])
    assert (said["why_not"], said["origin"]) == (None, "from the wheel")
    assert said["same"] and said["close"] and said["calls"] > 3
    assert Path(said["library"]).name == next(t.file for t in TARGETS if set(t.needs.split()) <= shipped.features())


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.name)
def test_each_library_is_the_one_for_its_processors(target, environment, tmp_path):
    """A processor is what it says that it has."""
    if not set(target.needs.split()) <= shipped.features():
        pytest.skip("this processor does not run it")
    said = found(environment, tmp_path / "cache", f"shipped.features = lambda: set({target.needs.split()})")
    assert Path(said["library"]).name == target.file
    assert said["close"] and said["calls"] > 3
    sets = {"x86-64-v4": "AVX-512", "x86-64-v3": "AVX2", "x86-64": "SSE2", "armv8-a": "NEON"}
    assert said["set"] == sets[target.name]


@pytest.mark.skipif(not TARGETS, reason="wheels for this machine hold no library")
def test_a_library_that_does_not_load_gives_way_to_the_next(environment, tmp_path):
    spoil = (
        "import pathlib; p = pathlib.Path('spoiled.so'); p.write_text('no'); shipped.libraries = lambda: [p, *these]"
    )
    said = found(environment, tmp_path / "cache", f"these = shipped.libraries(); {spoil}")
    assert said["origin"] == "from the wheel"
    assert said["close"]


def test_the_command_and_its_doctor(environment, tmp_path):
    said = run([str(environment.parent / "regulate"), "doctor"], tmp_path / "cache")
    assert len(said.splitlines()) == 10
    if TARGETS:
        assert "yes: float32 on the CPU" in said
        assert "from the wheel" in said
    assert "regulate     0." in said


def test_without_a_compiler_the_wheel_is_for_any_platform(sdist, tmp_path):
    wheel = built("wheel", sdist[1], tmp_path, PATH="", CXX="")
    assert wheel.name.endswith("-py3-none-any.whl")
    assert not [name for name in zipfile.ZipFile(wheel).namelist() if name.endswith(".so")]

"""The source distribution holds all that a build needs, and the wheel all that a user needs."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ARCHS = "90+PTX"

pytestmark = pytest.mark.slow


def run(*command: str | Path, cwd: Path, **environment: str) -> str:
    done = subprocess.run(
        [str(word) for word in command],
        cwd=cwd,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def build_wheel(folder: Path, **environment: str) -> Path:
    """A wheel built from the source distribution alone, with the build tools of this environment."""
    run(
        sys.executable,
        "setup.py",
        "-q",
        "egg_info",
        "--egg-base",
        folder,
        "sdist",
        "--dist-dir",
        folder / "sdist",
        cwd=ROOT,
    )
    (sdist,) = (folder / "sdist").glob("*.tar.gz")
    run(
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-index",
        "--no-deps",
        "--no-build-isolation",
        "--wheel-dir",
        folder / "wheel",
        sdist,
        cwd=folder,
        IDDPM_CUDA_ARCHS=ARCHS,
        **environment,
    )
    (wheel,) = (folder / "wheel").glob("*.whl")
    return wheel


def empty_environment(folder: Path, wheel: Path) -> Path:
    """The Python of a new environment with the wheel in it, to which torch is merely visible."""
    run(sys.executable, "-m", "venv", "--without-pip", folder / "venv", cwd=folder)
    python = folder / "venv" / "bin" / "python"
    run(
        sys.executable,
        "-m",
        "pip",
        "--python",
        python,
        "install",
        "--no-index",
        "--no-deps",
        wheel,
        cwd=folder,
    )
    site = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder)
    visible = Path(site.strip()) / "visible.pth"
    visible.write_text(sysconfig.get_path("purelib") + "\n")
    return python


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    return build_wheel(tmp_path_factory.mktemp("wheel"))


def test_the_wheel_holds_the_package_and_nothing_else(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.partition("/")[0] for name in names}
    assert tops == {"iddpm_ext", next(top for top in tops if top.endswith(".dist-info"))}
    assert {"iddpm_ext/py.typed", "iddpm_ext/report/page.html.jinja"} <= set(names)
    assert any(name.startswith("iddpm_ext/_C.") and name.endswith(".so") for name in names)
    weights = {f"iddpm_ext/weights/{path.name}" for path in (ROOT / "iddpm_ext/weights").glob("*")}
    assert weights <= set(names)


def test_the_source_distribution_holds_all_that_is_tracked(tmp_path):
    """So that its tests and its documentation's run where it is unpacked."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode or not listed.stdout:
        pytest.skip("not a repository")
    egg_info = (sys.executable, "setup.py", "-q", "egg_info", "--egg-base", tmp_path)
    run(*egg_info, "sdist", "--dist-dir", tmp_path, cwd=ROOT)
    (sdist,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    ours = {".gitignore", ".ci/run", ".github/workflows/wheels.yml", "MANIFEST.in"}
    assert {name for name in listed.stdout.split() if name not in held} <= ours


def test_the_wheel_runs_in_an_empty_environment_and_another_directory(wheel, tmp_path):
    python = empty_environment(tmp_path, wheel)
    code = "import iddpm_ext; from iddpm_ext import _native; print(iddpm_ext.__file__); "
    code += "print(_native.native().build_info()['isa'])"
    where, isa = run(python, "-c", code, cwd=tmp_path).split()
    assert Path(where).is_relative_to(tmp_path)
    assert isa in ("base", "avx2", "avx512")


def test_without_cpp_the_wheel_is_pure_and_says_why_it_has_no_kernels(tmp_path):
    wheel = build_wheel(tmp_path, IDDPM_CPP="0")
    assert wheel.name.endswith("-py3-none-any.whl")
    python = empty_environment(tmp_path, wheel)
    code = "from iddpm_ext import _native; print(_native.cpu_absence())"
    assert "IDDPM_CPP=0" in run(python, "-c", code, cwd=tmp_path)

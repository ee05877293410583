"""The source distribution holds all that a build needs, and the wheel all that a user needs."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

import iddpm_ext

ROOT = Path(__file__).resolve().parent.parent
# The object files of `make build`: a wheel of the same tree need not compile them again.
OBJECTS = (
    ROOT / "build" / f"iddpm-objects-{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
)

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


def build_wheel(folder: Path, python: str = sys.executable, **environment: str) -> Path:
    """A wheel built from the source distribution alone, in another folder, by the build tools of this
    environment; of its object files those are compiled that no build of this tree has made."""
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
        python,
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
        IDDPM_CUDA="0",
        IDDPM_OBJECTS=str(OBJECTS),
        PYTHONPATH=str(build_tools(folder)),
        **environment,
    )
    (wheel,) = (folder / "wheel").glob("*.whl")
    return wheel


def build_tools(folder: Path) -> Path:
    """A folder with what a build needs, all of it pure Python, for any interpreter to import."""
    tools = folder / "tools"
    tools.mkdir(exist_ok=True)
    site = Path(sysconfig.get_path("purelib"))
    for name in ("setuptools", "pybind11", "_distutils_hack"):
        found = importlib.util.find_spec(name)
        assert found is not None and found.origin is not None
        source = Path(found.origin).parent
        if not (tools / name).exists():
            (tools / name).symlink_to(source)
        site = source.parent
        for info in site.glob(f"{name}-*.dist-info"):
            if not (tools / info.name).exists():
                (tools / info.name).symlink_to(info)
    return tools


def pythons() -> list[str]:
    """Every CPython that this package supports on this machine, one of each minor version."""
    found: dict[str, str] = {}
    for minor in range(10, 15):
        here = shutil.which(f"python3.{minor}")
        pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
        for candidate in [
            *sorted(pyenv.glob(f"3.{minor}.*/bin/python")),
            *([here] if here else []),
        ]:
            if (
                subprocess.run(
                    [candidate, "-c", "import venv, pip"], capture_output=True
                ).returncode
                == 0
            ):
                found.setdefault(f"3.{minor}", str(candidate))
    return list(found.values())


def empty_environment(folder: Path, wheel: Path, base: str = sys.executable) -> Path:
    """The Python of a new environment with the wheel in it, to which torch is merely visible."""
    run(base, "-m", "venv", "--without-pip", folder / "venv", cwd=folder)
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
    torch = importlib.util.find_spec("torch")
    assert torch is not None and torch.origin is not None
    visible.write_text(f"{Path(torch.origin).parent.parent}\n")
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
    weights = {name for name in names if name.startswith("iddpm_ext/weights/")}
    assert weights == {f"iddpm_ext/weights/fashion-mnist.{kind}" for kind in ("safetensors", "md")}
    assert not any(name.endswith(".so") and "_C." not in name for name in names)


def test_the_checkers_of_wheels_find_nothing(wheel):
    sdist = next((wheel.parent.parent / "sdist").glob("*.tar.gz"))
    bin_folder = Path(sys.executable).parent
    for module, arguments in (
        ("twine", ["check", "--strict", sdist, wheel]),
        ("check_wheel_contents", [wheel]),
    ):
        pytest.importorskip(module)
        run(sys.executable, "-m", module, *arguments, cwd=bin_folder)


def test_the_wheel_asks_for_no_library_that_a_linux_lacks(wheel):
    """OpenMP's runtime is PyTorch's; everything else is in every distribution with this glibc."""
    pytest.importorskip("auditwheel")
    shown = run(sys.executable, "-m", "auditwheel", "show", wheel, cwd=wheel.parent)
    assert "manylinux_2_" in shown, shown
    libraries = set(re.findall(r'"?(lib[\w+-]+\.so\.\d+)', shown))
    assert libraries <= {"libgomp.so.1", "libc.so.6", "libstdc++.so.6", "libm.so.6", "libgcc_s.so.1",
                         "libpthread.so.0", "librt.so.1", "libdl.so.2"}  # fmt: skip


def test_a_source_distribution_does_not_guess_its_commit(wheel, tmp_path):
    python = empty_environment(tmp_path, wheel)
    code = "import torch; from iddpm_ext import _C; print(_C.build_info()['source'])"
    source = eval(run(python, "-c", code, cwd=tmp_path))
    assert source["commit"] == "" and source["reason"]


@pytest.mark.parametrize("base", pythons())
def test_every_python_here_installs_a_wheel_of_its_own_and_samples(base, tmp_path):
    """Where torch for it is at hand; else its module is loaded, which needs no torch."""
    python = empty_environment(tmp_path, build_wheel(tmp_path, base), base)
    code = "from iddpm_ext import _C, __version__; print(__version__, _C.build_info()['isa'])"
    assert run(python, "-c", code, cwd=tmp_path).split()[0] == iddpm_ext.__version__
    tag = run(python, "-c", "import sys; print(sys.implementation.cache_tag)", cwd=tmp_path).strip()
    if tag != sys.implementation.cache_tag:
        return
    arguments = ["sample", "fashion-mnist", "-n", "2", "--steps", "4", "--out", "x.png"]
    run(python, "-m", "iddpm_ext", *arguments, cwd=tmp_path)
    assert (tmp_path / "x.png").is_file()


def test_the_larger_models_are_a_package_of_their_own(wheel, tmp_path):
    python = empty_environment(tmp_path, wheel)
    absent = [python, "-c", "import iddpm_ext; iddpm_ext.load('cifar10-small')"]
    done = subprocess.run(absent, cwd=tmp_path, capture_output=True, text=True)
    assert "pip install ./models" in done.stderr
    pip = (sys.executable, "-m", "pip")
    plain = ("--no-index", "--no-deps")
    run(
        *pip,
        "wheel",
        *plain,
        "--no-build-isolation",
        "-w",
        tmp_path / "w",
        ROOT / "models",
        cwd=tmp_path,
    )
    (models,) = (tmp_path / "w").glob("*.whl")
    run(*pip, "--python", python, "install", *plain, models, cwd=tmp_path)
    code = "import iddpm_ext; print(iddpm_ext.load('cifar10-small').config.image_size)"
    assert run(python, "-c", code, cwd=tmp_path).strip() == "32"


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
    assert isa in ("base", "avx2", "avx512", "amx")


def test_without_cpp_the_wheel_is_pure_and_says_why_it_has_no_kernels(tmp_path):
    wheel = build_wheel(tmp_path, IDDPM_CPP="0")
    assert wheel.name.endswith("-py3-none-any.whl")
    python = empty_environment(tmp_path, wheel)
    code = "from iddpm_ext import _native; print(_native.cpu_absence())"
    assert "IDDPM_CPP=0" in run(python, "-c", code, cwd=tmp_path)

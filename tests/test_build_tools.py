"""The object cache recompiles only what changed; the search for a toolkit gives reasons."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import cuda_toolkit
import objects
import pytest

ROOT = Path(__file__).resolve().parent.parent
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")

FAKE_NVCC = """#!/bin/sh
case "$1" in
    --version) echo "Cuda compilation tools, release 12.4, V12.4.131" ;;
    --dryrun) echo "#\\$ TOP={top}" >&2 ;;
    --list-gpu-arch) printf 'compute_75\\ncompute_80\\ncompute_90\\n' ;;
    *) echo "fake nvcc compiles nothing"; exit 1 ;;
esac
"""


@pytest.fixture
def project(tmp_path) -> Path:
    (tmp_path / "cache").mkdir()
    (tmp_path / "a.h").write_text("inline int a() { return 1; }\n")
    (tmp_path / "a.cpp").write_text('#include "a.h"\nint b() { return a(); }\n')
    return tmp_path


def unit(project: Path, *flags: str, identity: str = "", volatile: tuple[str, ...] = ()):
    command = ("g++", "-c", *flags)
    return objects.Unit("a", project / "a.cpp", command, identity, volatile)


def compiled(project: Path, *flags: str, **options) -> bool:
    return objects.compile_one(unit(project, *flags, **options), project / "cache")[1]


@needs_compiler
def test_an_object_is_compiled_again_only_when_what_it_includes_changes(project):
    assert compiled(project)
    assert not compiled(project)
    os.utime(project / "a.h")
    assert not compiled(project), "a new date alone, as after a checkout, is no change"
    (project / "a.h").write_text("inline int a() { return 2; }\n")
    assert compiled(project)
    assert not compiled(project)


@needs_compiler
def test_an_object_is_compiled_again_when_its_command_or_compiler_changes(project):
    assert compiled(project)
    assert compiled(project, "-O1")
    assert compiled(project, "-O1", identity="another compiler")
    assert not compiled(project)


@needs_compiler
def test_the_path_of_a_temporary_build_environment_does_not_count(project):
    first, second = str(project / "env-1"), str(project / "env-2")
    assert compiled(project, f"-I{first}", volatile=(first,))
    assert not compiled(project, f"-I{second}", volatile=(second,))


@needs_compiler
def test_a_compile_error_carries_the_compilers_words_and_leaves_nothing(project):
    (project / "a.cpp").write_text("int b() { return undeclared_name; }\n")
    with pytest.raises(objects.CompileError, match="undeclared_name"):
        compiled(project)
    assert list((project / "cache").iterdir()) == []


@pytest.fixture
def toolkit_folder(tmp_path, monkeypatch) -> Path:
    """A toolkit under toolkit/, found through an nvcc in another folder."""
    top = tmp_path / "toolkit"
    (top / "include").mkdir(parents=True)
    (top / "lib").mkdir()
    (top / "include" / "cuda_runtime.h").touch()
    (top / "lib" / "libcudart_static.a").touch()
    nvcc = tmp_path / "elsewhere" / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text(FAKE_NVCC.format(top=top))
    nvcc.chmod(0o755)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "elsewhere"))
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    return top


def test_the_toolkit_is_where_nvcc_says_not_where_nvcc_lies(toolkit_folder):
    toolkit = cuda_toolkit.find_toolkit()
    assert toolkit.cudart == toolkit_folder / "lib" / "libcudart_static.a"
    assert toolkit.include == toolkit_folder / "include"
    assert (toolkit.release, toolkit.found_by) == ("12.4", "CUDA_HOME")


def test_a_toolkit_without_the_static_runtime_is_refused(toolkit_folder):
    (toolkit_folder / "lib" / "libcudart_static.a").unlink()
    with pytest.raises(cuda_toolkit.CudaUnavailable, match="no libcudart_static"):
        cuda_toolkit.find_toolkit()


def test_cuda_home_without_nvcc_is_the_reason_and_not_skipped(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    with pytest.raises(cuda_toolkit.CudaUnavailable, match="CUDA_HOME is set, but there is no"):
        cuda_toolkit.find_toolkit()


def test_default_architectures_are_those_that_nvcc_knows_and_end_with_ptx(toolkit_folder):
    archs, remark = cuda_toolkit.choose_archs(cuda_toolkit.find_toolkit(), None)
    assert archs == "75;80;90+PTX"
    assert remark == "nvcc 12.4 does not know 100, 120+PTX"


def test_an_architecture_that_was_asked_for_and_is_unknown_is_refused(toolkit_folder):
    with pytest.raises(
        cuda_toolkit.CudaUnavailable, match=r"compiles for \(75, 80, 90\), got 80;120"
    ):
        cuda_toolkit.choose_archs(cuda_toolkit.find_toolkit(), "80;120")


def test_native_architectures_are_those_of_the_gpus(toolkit_folder, tmp_path, monkeypatch):
    smi = tmp_path / "bin" / "nvidia-smi"
    smi.parent.mkdir()
    smi.write_text("#!/bin/sh\nprintf '9.0\\n8.6\\n9.0\\n'\n")
    smi.chmod(0o755)
    toolkit = cuda_toolkit.find_toolkit()
    monkeypatch.setenv("PATH", f"{smi.parent}:{os.environ['PATH']}")
    assert cuda_toolkit.choose_archs(toolkit, "native") == ("86;90", "")
    smi.write_text("#!/bin/sh\nexit 9\n")
    placeholder = cuda_toolkit.PLACEHOLDER_ARCHS
    assert cuda_toolkit.choose_archs(toolkit, "native") == (placeholder, "native: no GPU here")


@pytest.mark.parametrize(
    ("listed", "archs", "remark"),
    [
        ("8.0;9.0+PTX", "80;90+PTX", ""),
        ("7.0 7.5 8.0 9.0 12.0+PTX", "75;80;90", " without 70, 120+PTX"),
        ("Ampere Hopper+PTX", "80;90+PTX", " without 86"),
    ],
)
def test_the_list_of_torch_is_followed_and_what_is_left_of_it_said(
    toolkit_folder, monkeypatch, listed, archs, remark
):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", listed)
    toolkit = cuda_toolkit.find_toolkit()
    for default in (None, "native"):
        found = cuda_toolkit.choose_archs(toolkit, None, default=default)
        assert found == (archs, f"TORCH_CUDA_ARCH_LIST{remark}")
    assert cuda_toolkit.choose_archs(toolkit, "90") == ("90", ""), "IDDPM_CUDA_ARCHS goes before it"


def test_a_list_of_torch_without_any_architecture_of_ours_is_the_reason(
    toolkit_folder, monkeypatch
):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "6.0;Volta")
    with pytest.raises(
        cuda_toolkit.CudaUnavailable, match=r"TORCH_CUDA_ARCH_LIST must .* got 6\.0;V"
    ):
        cuda_toolkit.choose_archs(cuda_toolkit.find_toolkit(), None, default="native")


def test_gencode_adds_ptx_where_asked():
    assert cuda_toolkit.gencode("80;90+PTX") == [
        "-gencode=arch=compute_80,code=sm_80",
        "-gencode=arch=compute_90,code=sm_90",
        "-gencode=arch=compute_90,code=compute_90",
    ]


def setup_py(tmp_path: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "setup.py", "build_ext", "--build-lib", str(tmp_path / "lib")]
    return subprocess.run(
        command, cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True
    )


def test_without_a_compiler_the_build_stops_and_names_the_way_out(tmp_path):
    result = setup_py(tmp_path, PATH=str(tmp_path), CXX="")
    assert result.returncode != 0
    assert "no C++ compiler" in result.stderr and "IDDPM_CPP=0" in result.stderr


@pytest.mark.parametrize("named", ["no-such-compiler", "false", "ccache no-such-compiler"])
def test_a_compiler_that_does_not_run_is_an_error_not_another_compiler(tmp_path, named):
    result = setup_py(tmp_path, CXX=named)
    assert result.returncode != 0
    assert f"CXX must be a C++ compiler that runs, got '{named}'" in result.stderr


@needs_compiler
def test_a_line_is_said_for_every_file_that_is_compiled(project):
    said: list[str] = []
    units = [unit(project), unit(project, "-O1")]
    assert objects.compile_all(units, project / "cache", said.append)[1] == 2
    assert [line.split(",")[0] for line in sorted(said)] == ["[ 1/2] a", "[ 2/2] a"]
    said.clear()
    assert objects.compile_all(units, project / "cache", said.append)[1] == 0 and said == []


needs_clang = pytest.mark.skipif(shutil.which("clang++") is None, reason="no clang++")


# Build -> the processor that it is for, and its files.
BUILDS = {
    "base": ("nehalem", "*"),
    "avx2": ("haswell", "*"),
    "avx512": ("skylake-avx512", "*"),
    "avx512_bf16": ("sapphirerapids", "*_bf16"),
    "amx": ("sapphirerapids", "*_amx"),
    "amx_emulated": ("haswell", "*_amx"),
}


@needs_clang
@pytest.mark.skipif(platform.machine() != "x86_64", reason="instruction sets of x86-64")
@pytest.mark.parametrize("isa", BUILDS)
def test_the_kernels_are_c_plus_plus_to_clang_too(isa):
    """By -fsyntax-only, in seconds; CI compiles and links everything."""
    command = ["clang++", "-std=c++17", "-fsyntax-only", "-Icsrc", "-Wall", "-Wextra", "-Werror"]
    processor, pattern = BUILDS[isa]
    command += ["-Wno-psabi", "-Wno-unknown-pragmas", "-Wno-unused-variable"]
    command += [f"-DIDDPM_ISA={isa}", f"-march={processor}"]
    command += [
        str(source)
        for source in sorted(ROOT.glob(f"csrc/*/{pattern}.cpp"))
        if pattern != "*"
        or not (source.parent.name == "common" or source.stem.endswith(("_bf16", "_amx")))
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[:3000]


@needs_compiler
def test_cuda_that_is_demanded_and_impossible_stops_the_build_with_the_reason(
    toolkit_folder, tmp_path
):
    result = setup_py(tmp_path, IDDPM_CUDA="1", CUDA_HOME=str(tmp_path / "elsewhere"))
    assert result.returncode != 0
    assert "IDDPM_CUDA=1, but" in result.stderr
    assert "fake nvcc compiles nothing" in result.stderr


@pytest.mark.slow
@needs_compiler
def test_a_broken_nvcc_leaves_a_cpu_build_that_knows_the_reason(toolkit_folder, tmp_path):
    result = setup_py(tmp_path, IDDPM_CUDA="auto", CUDA_HOME=str(tmp_path / "elsewhere"))
    assert result.returncode == 0, result.stderr
    (module,) = (tmp_path / "lib" / "iddpm_ext").glob("_C.*.so")
    code = (
        "import importlib.util as u\n"
        f"spec = u.spec_from_file_location('_C', {str(module)!r})\n"
        "module = u.module_from_spec(spec)\n"
        "spec.loader.exec_module(module)\n"
        "print(module.build_info()['cuda'])"
    )
    record = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout
    assert "'built': False" in record and "fake nvcc compiles nothing" in record

"""Builds ``iddpm_ext/_C``: the C++ kernels always, the CUDA kernels where a toolkit works.

Environment:
    IDDPM_CPP=0           install without the compiled module (the reference backend alone)
    IDDPM_CUDA=auto|0|1   build CUDA kernels if possible (default), never, or fail if impossible;
                          "emulate" compiles them for the CPU (tests/cuda_emu), for tests, and
                          with IDDPM_CUDA_ONLY="q_sample,checksum" those folders of csrc/ alone
    IDDPM_CUDA_ARCHS      "80;90+PTX", or "native" for this machine's GPUs, the default of builds
                          that stay in the tree; wheels take tools/cuda_toolkit.py's list.
                          TORCH_CUDA_ARCH_LIST is followed where this is not set
    IDDPM_SANITIZE        "address,undefined": compile for these sanitizers
    IDDPM_OBJECTS         folder of the object files; those of another build of the same tree are taken
    CXX, MAX_JOBS         the C++ compiler, "clang++" or "ccache g++"; how many run at once

What was decided, and the reason for every fallback, is printed and kept in ``_C.build_info()``.
"""

from __future__ import annotations

import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.compat.py310 import tomllib

sys.path.insert(0, str(Path(__file__).resolve().parent / "tools"))

from cuda_toolkit import CudaUnavailable, Toolkit, choose_archs, find_toolkit, gencode
from index_readme import index_readme
from objects import CompileError, Unit, compile_all, compile_one
from source_state import source_state

ROOT = Path(__file__).resolve().parent
CSRC = Path("csrc")
EMULATOR = Path("tests/cuda_emu")
LAUNCHERS = ("ccache", "sccache", "distcc", "icecc")
X86 = platform.machine().lower() in ("x86_64", "amd64")
MODULE_FLAGS = ("-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra")
# Without these two, gcc leaves loops with exp or a comparison in them scalar.
KERNEL_FLAGS = (
    "-fno-trapping-math",
    "-fno-math-errno",
    "-Wno-psabi",
    "-Wno-unknown-pragmas",
    "-fno-exceptions",  # nothing throws, and clang's handler is a symbol that all builds share
    # The AVX-512 intrinsics of gcc 12; clang does not know the option.
    "-Wno-maybe-uninitialized",
    "-Wno-unknown-warning-option",
)
ISA_FLAGS = {
    "base": ("-msse4.2", "-mpopcnt") if X86 else (),
    "avx2": ("-mavx2", "-mfma", "-mf16c", "-mpopcnt"),
    "avx512": (
        "-mavx512f",
        "-mavx512bw",
        "-mavx512dq",
        "-mavx512vl",
        "-mfma",
        "-mf16c",
        "-mpopcnt",
        "-mprefer-vector-width=512",
    ),
}
ISAS = tuple(ISA_FLAGS) if X86 else ("base",)
# For csrc/*/*_bf16.cpp, compiled once, for CPUs with AVX-512 and its bfloat16 products.
BF16_FLAGS = ("-mavx512bf16",)
# For csrc/*/*_amx.cpp, compiled for AMX and, for tests on any CPU, in plain C++ for AVX2.
AMX_FLAGS = (*BF16_FLAGS, "-mamx-tile", "-mamx-bf16")


@dataclass(frozen=True)
class Cuda:
    """The CUDA half of the build record."""

    built: bool
    reason: str
    archs: str = ""
    nvcc: str = ""
    release: str = ""


def say(text: str) -> None:
    """One line of the build's log."""
    print(f"iddpm_ext: {text}", flush=True)


def find_compiler() -> tuple[tuple[str, ...], str]:
    """The words of the C++ compiler's command and its version line; stops the build without one."""
    asked = tuple(shlex.split(os.environ.get("CXX", "")))
    for words in [asked] if asked else [("g++",), ("clang++",), ("c++",)]:
        if shutil.which(words[0]):
            version = subprocess.run([*words, "--version"], capture_output=True, text=True)
            if version.returncode == 0:
                return words, version.stdout.splitlines()[0]
    if asked:
        raise SystemExit(
            f"iddpm_ext: CXX must be a C++ compiler that runs, got {os.environ['CXX']!r}"
        )
    raise SystemExit(
        "iddpm_ext: no C++ compiler found (g++, clang++, c++). Install one, or set "
        "IDDPM_CPP=0 to install the pure PyTorch reference backend alone."
    )


def host_compiler(cxx: tuple[str, ...]) -> str:
    """The compiler's name among the words of its command, without ccache and flags, for nvcc."""
    return next(word for word in cxx if Path(word).name not in LAUNCHERS)


def probe_openmp(cxx: tuple[str, ...]) -> tuple[tuple[str, ...], str]:
    """The OpenMP flags and "", or serial flags and the reason."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "probe.cpp")
        source.write_text("#include <omp.h>\nint main() { return omp_get_max_threads() < 1; }\n")
        command = [*cxx, "-fopenmp", str(source), "-o", str(Path(folder, "probe"))]
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode == 0:
        return ("-fopenmp",), ""
    return ("-fopenmp-simd", "-Wno-unknown-pragmas"), f"no OpenMP: {done.stderr.strip()[-200:]}"


def probe_flags(cxx: tuple[str, ...], flags: tuple[str, ...]) -> bool:
    """Whether the compiler knows these flags beside those of AVX-512."""
    if not X86:
        return False
    command = [*cxx, *ISA_FLAGS["avx512"], *flags, "-xc++", "-fsyntax-only", os.devnull]
    return subprocess.run(command, capture_output=True).returncode == 0


def sanitizer_flags() -> tuple[str, ...]:
    """The flags that IDDPM_SANITIZE asks for."""
    asked = os.environ.get("IDDPM_SANITIZE", "")
    return (f"-fsanitize={asked}", "-fno-omit-frame-pointer", "-g", "-O1") if asked else ()


def c_string(text: str) -> str:
    """``text`` as a C++ string literal."""
    plain = text.encode("ascii", "replace").decode()
    return '"' + plain.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n") + '"'


class BuildKernels(build_ext):
    """Compiles csrc/ with a cache of object files, each CPU kernel once per instruction set."""

    def run(self) -> None:
        """Build; setuptools clears ``inplace`` while it does, and it decides the architectures."""
        in_tree = self.inplace or self.editable_mode
        self.archs = os.environ.get("IDDPM_CUDA_ARCHS") or None
        self.default_archs = "native" if in_tree else None
        super().run()

    def build_extension(self, ext: Extension) -> None:
        """Compile and link ``iddpm_ext._C``."""
        start = time.perf_counter()
        self.cxx, self.compiler = find_compiler()
        self.openmp, openmp_reason = probe_openmp(self.cxx)
        self.bf16 = probe_flags(self.cxx, BF16_FLAGS)
        self.amx = probe_flags(self.cxx, AMX_FLAGS)
        self.cache = self.object_cache()
        cuda, toolkit = self.decide_cuda()
        record: dict[str, object] = {
            "compiler": self.compiler,
            "isa_compiled": [*ISAS, *(["amx"] if self.amx else [])],
            "bf16_compiled": self.bf16,
            "amx_compiled": self.amx,
            "openmp": {"built": not openmp_reason, "reason": openmp_reason},
            "cuda": asdict(cuda),
            "sanitize": os.environ.get("IDDPM_SANITIZE", ""),
            "source": asdict(source_state(ROOT)),
        }
        emulated = cuda.built and not toolkit
        units = [self.bindings_unit(cuda.built, emulated), self.record_unit(record)]
        units += self.common_units()
        units += [unit for isa in ISAS for unit in self.kernel_units(isa)]
        units += [*self.bf16_units(), *self.amx_units()]
        cuda_sources = sorted(CSRC.glob("*/*.cu"))
        if toolkit:
            units += [self.cuda_unit(toolkit, cuda.archs, source) for source in cuda_sources]
        only = os.environ.get("IDDPM_CUDA_ONLY") if emulated else None
        if emulated:
            folders = None if only is None else {"common", *only.split(",")}
            units += [
                self.emulated_unit(source)
                for source in cuda_sources
                if folders is None or source.parent.name in folders
            ]
        say(f"C++ for {', '.join(ISAS)} with {self.compiler}; {openmp_reason or 'OpenMP'}")
        say(f"CUDA for {cuda.archs} ({cuda.reason})" if cuda.built else f"no CUDA: {cuda.reason}")
        try:
            objects, compiled = compile_all(units, self.cache, say)
            if only is not None:
                objects[0] = self.weakened(objects[0])
            self.link(objects, toolkit, Path(self.get_ext_fullpath(ext.name)))
        except CompileError as error:
            raise SystemExit(f"iddpm_ext: {error}") from None
        say(f"{compiled} of {len(units)} files compiled, {time.perf_counter() - start:.1f} s")

    def object_cache(self) -> Path:
        """build/ of the source tree, or the build's temporary folder where that is read-only."""
        if "IDDPM_OBJECTS" in os.environ:
            cache = Path(os.environ["IDDPM_OBJECTS"]).resolve()
            cache.mkdir(parents=True, exist_ok=True)
            return cache
        name = f"iddpm-objects-{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
        for folder in (Path("build"), Path(self.build_temp)):
            try:
                cache = folder.resolve() / name
                cache.mkdir(parents=True, exist_ok=True)
                if os.access(cache, os.W_OK):
                    return cache
            except OSError:
                continue
        raise SystemExit(f"iddpm_ext: neither build/ nor {self.build_temp} can be written")

    def decide_cuda(self) -> tuple[Cuda, Toolkit | None]:
        """Whether CUDA is built, for what, and why; a toolkit counts only if a probe compiles."""
        mode = os.environ.get("IDDPM_CUDA", "auto")
        if mode not in ("auto", "0", "1", "emulate"):
            raise SystemExit(f"iddpm_ext: IDDPM_CUDA must be auto, 0, 1 or emulate, got {mode!r}")
        if mode == "0":
            return Cuda(False, "IDDPM_CUDA=0"), None
        if mode == "emulate":
            return Cuda(True, "IDDPM_CUDA=emulate", "the CPU"), None
        try:
            toolkit = find_toolkit()
            archs, remark = choose_archs(toolkit, self.archs, default=self.default_archs)
            probe = self.cache / "probe.cu"
            probe.write_text("#include <cuda_runtime.h>\n__global__ void probe() {}\n")
            compile_one(self.cuda_unit(toolkit, archs.split(";")[0], probe), self.cache)
        except (CudaUnavailable, CompileError) as error:
            if mode == "1":
                raise SystemExit(f"iddpm_ext: IDDPM_CUDA=1, but {error}") from None
            return Cuda(False, str(error)), None
        reason = f"nvcc {toolkit.release} from {toolkit.found_by}" + (remark and f"; {remark}")
        return Cuda(True, reason, archs, toolkit.nvcc, toolkit.release), toolkit

    def unit(self, name: str, source: Path, *flags: str) -> Unit:
        """A C++ object file."""
        command = (*self.cxx, *MODULE_FLAGS, *self.openmp, f"-I{CSRC}", *flags, "-c")
        return Unit(name, source, (*command, *sanitizer_flags()), self.compiler)

    def bindings_unit(self, with_cuda: bool, emulated: bool) -> Unit:
        """bindings.cpp, the only file that includes Python; compiled first, as it is the slowest."""
        import pybind11

        headers = pybind11.get_include()
        flags = ["-DIDDPM_WITH_CUDA"] if with_cuda else []
        flags += (
            ["-O0"] if emulated else []
        )  # a quarter of the time, in every fresh run of the tests
        flags += ["-isystem", sysconfig.get_path("include"), "-isystem", headers]
        unit = self.unit("bindings", CSRC / "bindings.cpp", *flags)
        identity = f"{unit.identity} pybind11 {pybind11.__version__}"
        return Unit(unit.name, unit.source, unit.command, identity, (headers,))

    def record_unit(self, record: dict[str, object]) -> Unit:
        """The build record, compiled in, since editable installs would not have a generated Python file."""
        variable = "const char* const kBuildRecord"
        literal = c_string(json.dumps(record))
        text = f"namespace iddpm {{\nextern {variable};\n{variable} = {literal};\n}}\n"
        source = self.cache / "build_record.cpp"
        if not source.exists() or source.read_text() != text:
            source.write_text(text)
        return self.unit("build_record", source)

    @property
    def features(self) -> list[str]:
        """Macros for what the compiler knows beyond `ISA_FLAGS`."""
        return [
            *(["-DIDDPM_WITH_BF16"] if self.bf16 else []),
            *(["-DIDDPM_WITH_AMX"] if self.amx else []),
        ]

    def common_units(self) -> list[Unit]:
        """csrc/common/*.cpp, compiled once for any CPU."""
        return [
            self.unit(f"common-{s.stem}", s, *self.features)
            for s in sorted(CSRC.glob("common/*.cpp"))
        ]

    def kernel_units(self, isa: str) -> list[Unit]:
        """Every other csrc/*/*.cpp, compiled for ``isa``."""
        sources = [
            source
            for source in sorted(CSRC.glob("*/*.cpp"))
            if source.parent.name != "common" and not source.stem.endswith(("_bf16", "_amx"))
        ]
        flags = [*KERNEL_FLAGS, *ISA_FLAGS[isa], f"-DIDDPM_ISA={isa}"]
        flags += self.features
        return [self.unit(f"{s.stem}-{isa}", s, *flags) for s in sources]

    def bf16_units(self) -> list[Unit]:
        """csrc/*/*_bf16.cpp, for AVX-512 with bfloat16 products."""
        if not self.bf16:
            return []
        flags = (*KERNEL_FLAGS, *ISA_FLAGS["avx512"], *BF16_FLAGS, "-DIDDPM_ISA=avx512_bf16")
        return [self.unit(s.stem, s, *flags) for s in sorted(CSRC.glob("*/*_bf16.cpp"))]

    def amx_units(self) -> list[Unit]:
        """csrc/*/*_amx.cpp, for AMX where the compiler knows it, and emulated for AVX2."""
        if not X86:
            return []
        compilations = {"amx_emulated": ISA_FLAGS["avx2"]}
        if self.amx:
            compilations["amx"] = (*ISA_FLAGS["avx512"], *AMX_FLAGS)
        return [
            self.unit(f"{s.stem}-{isa}", s, *KERNEL_FLAGS, *flags, f"-DIDDPM_ISA={isa}")
            for isa, flags in compilations.items()
            for s in sorted(CSRC.glob("*/*_amx.cpp"))
        ]

    def cuda_unit(self, toolkit: Toolkit, archs: str, source: Path) -> Unit:
        """A CUDA object file."""
        command = (
            toolkit.nvcc,
            "-std=c++17",
            "-O3",
            "-ccbin",
            host_compiler(self.cxx),
            f"-I{CSRC}",
            "-Xcompiler",
            "-fPIC,-fvisibility=hidden",
            "-Xfatbin",
            "-compress-all",
            "-lineinfo",
            *gencode(archs),
            "-c",
        )
        return Unit(f"{source.stem}-cuda", source, command, f"{toolkit.release} {self.compiler}")

    def emulated_unit(self, source: Path) -> Unit:
        """A CUDA file as C++: its kernels run on the CPU, under the tests' emulator."""
        flags = ("-x", "c++", f"-I{EMULATOR}", "-O1", "-g", "-ffp-contract=off")
        return self.unit(f"{source.stem}-emulated", source, *flags, "-Wno-unknown-pragmas")

    def weakened(self, bindings: Path) -> Path:
        """A copy of the bindings that can be linked without some of the kernels that they refer to."""
        copy = bindings.with_suffix(f".weak.{os.getpid()}.o")
        command = ["objcopy", "--weaken", str(bindings), str(copy)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise CompileError(f"cannot weaken {bindings.name}\n{done.stderr}")
        return copy

    def link(self, objects: list[Path], toolkit: Toolkit | None, target: Path) -> None:
        """Links next to ``target`` and renames, so that processes that have it loaded are not affected."""
        target.parent.mkdir(parents=True, exist_ok=True)
        fresh = target.with_name(f".{target.name}.{os.getpid()}")
        shared = ["-bundle", "-undefined", "dynamic_lookup"]
        if sys.platform != "darwin":
            shared = ["-shared", "-Wl,--exclude-libs,ALL", "-Wl,--as-needed"]
        command = [*self.cxx, *shared, *self.openmp, *sanitizer_flags(), *map(str, objects)]
        if toolkit:
            command += [str(toolkit.cudart), "-lrt", "-lpthread", "-ldl"]
        if not sanitizer_flags():
            command.append("-s")
        done = subprocess.run([*command, "-o", str(fresh)], capture_output=True, text=True)
        if done.returncode:
            fresh.unlink(missing_ok=True)
            raise CompileError(f"cannot link {target.name}\n{done.stderr}")
        fresh.replace(target)


def extensions() -> list[Extension]:
    """The one extension module, or none with IDDPM_CPP=0."""
    if os.environ.get("IDDPM_CPP", "1") == "0":
        say("IDDPM_CPP=0: no compiled module, the reference backend alone")
        return []
    if sys.platform == "win32":
        raise SystemExit("iddpm_ext: no Windows build yet; set IDDPM_CPP=0 for pure PyTorch")
    return [Extension("iddpm_ext._C", sources=[str(s) for s in sorted(CSRC.rglob("*.cpp"))])]


def description() -> str:
    """README.md for an index, its links led to `project.urls` Source of pyproject.toml, if that is there."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return index_readme((ROOT / "README.md").read_text(), project.get("urls", {}).get("Source"))


setup(
    ext_modules=extensions(),
    cmdclass={"build_ext": BuildKernels},
    long_description=description(),
    long_description_content_type="text/markdown",
)

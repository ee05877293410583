"""Finds a CUDA toolkit that works, or says why there is none."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

# sm_80 code runs on 8.6 and 8.9, sm_120's PTX on whatever comes next.
DEFAULT_ARCHS = "75;80;90;100;120+PTX"
# Used on machines without a GPU, to check that the kernels compile.
PLACEHOLDER_ARCHS = "90+PTX"
# The oldest architecture that the kernels support.
LOWEST_ARCH = 75
# The names that TORCH_CUDA_ARCH_LIST may have instead of numbers.
_TORCH_NAMES = {
    "Ampere": "80;86", "Ada": "89", "Hopper": "90", "Blackwell": "100;103;120",
}  # fmt: skip


class CudaUnavailable(Exception):
    """CUDA kernels cannot be built here; the text is the reason."""


@dataclass(frozen=True)
class Toolkit:
    """An nvcc with its release, include directory and static runtime, and how it was found."""

    nvcc: str
    found_by: str
    release: str
    include: Path
    cudart: Path

    def supported(self) -> set[str]:
        """Compute capabilities this nvcc compiles for, as "90"."""
        return set(re.findall(r"compute_(\d+)", _output([self.nvcc, "--list-gpu-arch"])))


def find_toolkit() -> Toolkit:
    """The first nvcc of CUDA_HOME, CUDA_PATH, PATH, /usr/local/cuda and pip's NVIDIA wheels.

    Raises CudaUnavailable.
    """
    for nvcc, found_by in _candidates():
        if not Path(nvcc).is_file():
            if found_by.startswith("CUDA_"):
                raise CudaUnavailable(f"{found_by} is set, but there is no {nvcc}")
            continue
        release = re.search(r"release (\d+\.\d+)", _output([nvcc, "--version"]))
        if release is None:
            raise CudaUnavailable(f"{nvcc} --version names no release")
        top = _top(nvcc)
        return Toolkit(nvcc, found_by, release[1], _include(top), _cudart(top))
    raise CudaUnavailable("no nvcc in CUDA_HOME, CUDA_PATH, PATH, /usr/local/cuda or site-packages")


def choose_archs(
    toolkit: Toolkit, asked: str | None, *, default: str | None = None
) -> tuple[str, str]:
    """The architectures to build, as "80;90+PTX", and a remark ("" if they are as requested).

    ``asked`` is IDDPM_CUDA_ARCHS: a list of that form, or ``native`` for this machine's own GPUs. If it is
    None, TORCH_CUDA_ARCH_LIST is used, without architectures that cannot be built; if that is not set,
    ``default``: ``native``, or None for those of DEFAULT_ARCHS that nvcc supports.
    Raises CudaUnavailable.
    """
    of_torch = os.environ.get("TORCH_CUDA_ARCH_LIST", "").strip()
    if asked is None and of_torch:
        return _archs_of_torch(toolkit, of_torch)
    asked = asked or default
    if asked == "native":
        return _native_archs()
    supported = toolkit.supported()
    archs = _listed(asked or DEFAULT_ARCHS)
    unknown = [arch for arch in archs if _number(arch) not in supported]
    if not unknown:
        return ";".join(archs), ""
    known = ", ".join(sorted(supported, key=int))
    if asked is not None:
        raise CudaUnavailable(
            f"IDDPM_CUDA_ARCHS must name architectures nvcc {toolkit.release} compiles for "
            f"({known}), got {asked}"
        )
    kept = [arch for arch in archs if arch not in unknown]
    if not kept:
        raise CudaUnavailable(f"nvcc {toolkit.release} compiles for none of {DEFAULT_ARCHS}")
    if not kept[-1].endswith("+PTX"):
        kept[-1] += "+PTX"
    return ";".join(kept), f"nvcc {toolkit.release} does not know {', '.join(unknown)}"


def _archs_of_torch(toolkit: Toolkit, text: str) -> tuple[str, str]:
    """The architectures of TORCH_CUDA_ARCH_LIST that these kernels and nvcc support, and a remark.

    Containers set it for everything that is built in them, including old architectures and names.
    """
    supported = toolkit.supported()
    kept: list[str] = []
    left: list[str] = []
    for word in _listed(text):
        names, ptx = word.removesuffix("+PTX"), "+PTX" * word.endswith("+PTX")
        for arch in _TORCH_NAMES.get(names, names).split(";"):
            number = _number(arch)
            known = number in supported and int(number) >= LOWEST_ARCH
            (kept if known else left).append(arch + ptx)
    if not kept:
        raise CudaUnavailable(
            f"TORCH_CUDA_ARCH_LIST must name an architecture from {LOWEST_ARCH} on that nvcc "
            f"{toolkit.release} compiles for, got {text}"
        )
    without = f" without {', '.join(left)}" if left else ""
    return ";".join(dict.fromkeys(kept)), f"TORCH_CUDA_ARCH_LIST{without}"


def _listed(text: str) -> list[str]:
    return [arch.replace(".", "") for arch in re.split(r"[;,\s]+", text) if arch]


def gencode(archs: str) -> list[str]:
    """nvcc's flags for ``archs`` such as "80;90+PTX"."""
    flags = []
    for arch in archs.split(";"):
        number = re.sub(r"\+PTX$", "", arch)
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if arch.endswith("+PTX"):
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return flags


def _candidates() -> Iterator[tuple[str, str]]:
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        if os.environ.get(variable):
            yield os.path.join(os.environ[variable], "bin", "nvcc"), variable
    if on_path := shutil.which("nvcc"):
        yield on_path, "PATH"
    yield "/usr/local/cuda/bin/nvcc", "/usr/local/cuda"
    for nvcc in sorted(Path(sysconfig.get_path("purelib")).glob("nvidia/cu*/bin/nvcc")):
        yield str(nvcc), "site-packages"


def _top(nvcc: str) -> Path:
    """The toolkit's root, as nvcc reports it: the nvcc on PATH may be a wrapper elsewhere."""
    plan = _output([nvcc, "--dryrun", "-x", "cu", os.devnull, "-c", "-o", os.devnull])
    top = re.search(r"^#\$ TOP=(.+)$", plan, re.MULTILINE)
    if top is None:
        raise CudaUnavailable(f"{nvcc} --dryrun names no toolkit directory")
    return Path(top[1].strip()).resolve()


def _include(top: Path) -> Path:
    for include in (top / "include", top / "targets/x86_64-linux/include"):
        if (include / "cuda_runtime.h").is_file():
            return include
    raise CudaUnavailable(f"no cuda_runtime.h under {top}")


def _cudart(top: Path) -> Path:
    for name in ("lib64", "lib", "targets/x86_64-linux/lib", "targets/sbsa-linux/lib"):
        if (top / name / "libcudart_static.a").is_file():
            return top / name / "libcudart_static.a"
    raise CudaUnavailable(f"no libcudart_static.a under {top}")


def _native_archs() -> tuple[str, str]:
    query = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    try:
        found = re.findall(r"^\d+\.\d+$", _output(query), re.MULTILINE)
    except CudaUnavailable:
        found = []
    if not found:
        return PLACEHOLDER_ARCHS, "native: no GPU here"
    return ";".join(sorted({cap.replace(".", "") for cap in found}, key=int)), ""


def _number(arch: str) -> str:
    """The digits of "90", "90a" or "90a+PTX"."""
    digits = re.match(r"\d+", arch)
    return digits[0] if digits else arch


def _output(command: list[str]) -> str:
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    except OSError as error:
        raise CudaUnavailable(f"{command[0]} does not run: {error}") from error
    if done.returncode:
        raise CudaUnavailable(f"{' '.join(command)} fails: {done.stdout.strip()[-400:]}")
    return done.stdout

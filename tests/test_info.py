"""`iddpm info` tells what was built, what can run, and why the rest cannot."""

from __future__ import annotations

import pytest

from iddpm_ext import _native
from iddpm_ext.cli import _environment as info
from iddpm_ext.ops.spec import REGISTRY

NO_CUDA = {"built": False, "reason": "IDDPM_CUDA=0", "archs": ""}
NO_DRIVER = {
    "built": True,
    "reason": "nvcc 13.0 from PATH",
    "archs": "90+PTX",
    "devices": 0,
    "runtime_version": 13000,
    "driver_version": 0,
    "error": "cudaErrorInsufficientDriver",
}


class FakeNative:
    """Stands in for `_C` with another build's record."""

    def __init__(self, cuda):
        self.record = {
            "compiler": "g++ 12",
            "openmp": {"built": False, "reason": "no OpenMP: cannot find -lgomp"},
            "sanitize": "",
            "isa": "base",
            "isa_available": ["base"],
            "isa_compiled": ["base", "avx2"],
            "cuda": cuda,
        }

    def build_info(self):
        return self.record


@pytest.fixture
def built(monkeypatch):
    def install(cuda):
        monkeypatch.setattr(_native, "_module", FakeNative(cuda))
        monkeypatch.setattr(_native, "_absence", None)

    return install


def test_the_report_lists_every_op_with_the_backend_it_takes():
    lines = info.report().splitlines()
    for name in REGISTRY:
        assert any(line.split()[:1] == [name] for line in lines)


def test_the_report_shows_every_fallback_with_its_reason(built):
    built(NO_CUDA)
    text = info.report()
    assert "no OpenMP: cannot find -lgomp" in text
    assert "base (this CPU runs base; compiled: base, avx2)" in text
    assert "the CUDA kernels were not built: IDDPM_CUDA=0" in text


def test_a_package_without_compiled_kernels_still_reports(monkeypatch):
    monkeypatch.setattr(_native, "_module", None)
    monkeypatch.setattr(_native, "_absence", "iddpm_ext._C is not built")
    assert "no: iddpm_ext._C is not built" in info.report()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({}, "no CUDA device (no NVIDIA driver is installed)"),
        ({"driver_version": 12040}, "too old for a CUDA 13 build: rebuild with a 12.x toolkit"),
        ({"driver_version": 13000, "error": "cudaErrorNoDevice"}, "(cudaErrorNoDevice)"),
    ],
)
def test_a_cuda_build_without_a_device_says_what_is_missing(built, change, reason):
    built({**NO_DRIVER, **change})
    assert reason in _native.cuda_absence()


def test_a_cuda_build_with_a_device_can_run(built):
    built({**NO_DRIVER, "devices": 1, "driver_version": 13000, "error": ""})
    assert _native.cuda_absence() is None
    assert "can run" in info.report()


def test_asking_for_an_absent_module_gives_the_reason(monkeypatch):
    monkeypatch.setattr(_native, "_module", None)
    monkeypatch.setattr(_native, "_absence", "iddpm_ext._C is not built")
    with pytest.raises(RuntimeError, match="is not built"):
        _native.native()

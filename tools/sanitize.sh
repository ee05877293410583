#!/bin/sh
# sanitize.sh PYTHON TESTS...: run tests with the C++ code under AddressSanitizer and UBSan, then
# put the ordinary build back. torch's CPU memory is malloc'ed, so overruns of tensors are seen too.
set -e
python=$1
shift
trap '"$python" setup.py -q build_ext --inplace' EXIT
IDDPM_SANITIZE=address,undefined IDDPM_CUDA=0 "$python" setup.py -q build_ext --inplace
# libstdc++ too: the sanitizer must find __cxa_throw before the first exception.
libraries="$(${CXX:-g++} -print-file-name=libasan.so) $(${CXX:-g++} -print-file-name=libstdc++.so)"
LD_PRELOAD="$libraries" ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=halt_on_error=1 \
    "$python" -m pytest -q "$@"

#!/bin/sh
# Builds tests/driver.cpp with the address and undefined behaviour sanitizers and runs it. CXX, OPT and FLAGS may be set.
set -eu
cd "$(dirname "$0")/.."
out=${TMPDIR:-/tmp}/bitmill-sanitize
mkdir -p "$out"
flags="-std=c++17 ${OPT--O1} -g -ffp-contract=off -fopenmp -fno-omit-frame-pointer ${FLAGS--fsanitize=address,undefined -fno-sanitize-recover=all}"
x86=
case $(uname -m) in
x86_64)
  x86=-DBITMILL_X86
  ${CXX:-g++} $flags -w -mavx2 -mfma -mf16c -c lut/avx2.cpp -o "$out/avx2.o"
  ${CXX:-g++} $flags -w -mavx2 -mfma -mf16c -mavx512f -mavx512bw -mavx512vl -mavx512dq -mavx512vbmi -mavx512vnni \
    -c lut/avx512.cpp -o "$out/avx512.o"
  objects="$out/avx2.o $out/avx512.o" ;;
*) objects= ;;
esac
${CXX:-g++} $flags $x86 lut/layout.cpp lut/linear.cpp lut/scalar.cpp tests/driver.cpp $objects -o "$out/driver"
OMP_NUM_THREADS=2 "$out/driver"

#!/bin/sh
# Builds the tests of the kernels with the address and undefined behaviour sanitizers and runs them. CXX, OPT, FLAGS
# (of the compiler) and RUN (an emulator) may be set. With EMULATE_AVX512=1 the AVX-512 sources are compiled to plain C
# by SIMDe (package libsimde-dev) and run on any machine.
set -eu
cd "$(dirname "$0")/.."
out=${TMPDIR:-/tmp}/bitmill-sanitize
mkdir -p "$out"
cxx="${CXX:-g++} -std=c++17 ${OPT--O1} -g -ffp-contract=off -fopenmp -fno-omit-frame-pointer"
cxx="$cxx ${FLAGS--fsanitize=address,undefined -fno-sanitize-recover=all}"
avx2="-mavx2 -mfma -mf16c"
avx512="$avx2 -mavx512f -mavx512bw -mavx512vl -mavx512dq -mavx512vbmi -mavx512vnni"
objects=
compile() {  # flags, sources
  flags=$1; shift
  for source in "$@"; do
    object="$out/$(echo "$flags $source" | tr -c 'A-Za-z0-9\n' _ | cut -c1-200).o"
    $cxx $flags -c "$source" -o "$object"
    objects="$objects $object"
  done
}
case $(${CXX:-g++} -dumpmachine) in
x86_64*)
  compile "-w -DBITMILL_FOR_AVX2 $avx2" isa/lookup.cpp isa/kernels.cpp
  [ -n "${EMULATE_AVX512-}" ] || compile "-w -DBITMILL_FOR_AVX512 $avx512" isa/lookup.cpp isa/kernels.cpp
  shared=-DBITMILL_X86 ;;
aarch64*)
  compile "-w -DBITMILL_FOR_NEON" isa/lookup.cpp isa/kernels.cpp
  shared=-DBITMILL_ARM ;;
*) shared= ;;
esac
if [ -n "${EMULATE_AVX512-}" ]; then
  compile "-w -Itests/emulated -DBITMILL_FOR_AVX512" isa/lookup.cpp isa/kernels.cpp
  shared="$shared -DBITMILL_EMULATED_AVX512"
fi
compile "$shared -DBITMILL_FOR_SCALAR" isa/kernels.cpp
compile "$shared" isa.cpp lut/layout.cpp lut/grid.cpp lut/linear.cpp lut/scalar.cpp \
  additive/additive.cpp vector/vector.cpp rotation/rotation.cpp sparse/sparse.cpp fixed/fixed.cpp step/*.cpp kv/*.cpp solve/*.cpp tests/*.cpp
$cxx $objects -o "$out/driver"
OMP_NUM_THREADS=2 ${RUN-} "$out/driver"

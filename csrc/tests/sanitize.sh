#!/bin/sh
# Builds the tests of the kernels with the address and undefined behaviour sanitizers and runs them, or those named:
# `tests/sanitize.sh step lookup`. What was compiled before, from unchanged sources, is used again. CXX, OPT, FLAGS (of the
# compiler), RUN (an emulator) and ISAS (the instruction sets beside plain C++) may be set: avx512, which brings amx on
# emulated tiles, needs avx2, which brings avxvnni. With EMULATE_AVX512=1 the AVX-512 sources are compiled to plain C by
# SIMDe (package libsimde-dev) and run on any machine.
set -eu
cd "$(dirname "$0")/.."
cxx=${CXX:-g++}
# Checks are calls, and those of null pointers, which the address sanitizer finds too, are left out: inlined into the
# many kernels of an instruction set they took five times as long to compile.
case $($cxx --version) in
*clang*) calls="-mllvm -asan-instrumentation-with-call-threshold=0" ;;
*) calls="--param asan-instrumentation-with-call-threshold=0" ;;
esac
sanitizers="-fsanitize=address,undefined -fno-sanitize=null,object-size,vptr -fno-sanitize-recover=all $calls"
cxx="$cxx -std=c++17 ${OPT--O1} -g1 -ffp-contract=off -fopenmp -fno-omit-frame-pointer ${FLAGS-$sanitizers}"
case $(${CXX:-g++} -dumpmachine) in
x86_64*) isas=${ISAS-avx2 avx512} ;;
aarch64*) isas=${ISAS-neon} ;;
*) isas= ;;
esac
out=${TMPDIR:-/tmp}/bitmill-sanitize/$(echo "$cxx" | cksum | cut -d ' ' -f 1)
mkdir -p "$out"
objects=
is_current() {  # object
  [ -f "$1" ] && [ -f "$1.d" ] || return 1
  for used in $(sed 's/^[^:]*://; s/\\$//' "$1.d"); do
    [ -f "$used" ] && [ ! "$used" -nt "$1" ] || return 1
  done
}
compile() {  # flags, sources
  flags=$1; shift
  for source in "$@"; do
    object="$out/$(echo "$flags $source" | tr -c 'A-Za-z0-9\n' _ | cut -c1-200).o"
    if ! is_current "$object"; then
      $cxx $flags -MMD -MF "$object.d" -c "$source" -o "$object.new"
      mv "$object.new" "$object"
    fi
    objects="$objects $object"
  done
}
avx2="-mavx2 -mfma -mf16c"
avx512="$avx2 -mavx512f -mavx512bw -mavx512vl -mavx512dq -mavx512vbmi -mavx512vnni"
shared=
add() {  # definition of isa.cpp, flags of a set
  shared="$shared $1"; shift
  compile "-w $*" isa/lookup.cpp isa/kernels.cpp
}
case " $isas " in
*" avx512 "*)
  if [ -n "${EMULATE_AVX512-}" ]; then add -DBITMILL_EMULATED_AVX512 -DBITMILL_FOR_AVX512 -Itests/emulated
  else
    add "" -DBITMILL_FOR_AVX512 "$avx512 -fno-sanitize=alignment"
    shared="$shared -DBITMILL_TEST_AMX"  # on emulated tiles
    compile "-w $avx512 -DBITMILL_TEST_AMX -fno-sanitize=alignment" isa/amx.cpp
  fi ;;
*) shared=-DBITMILL_WITHOUT_AVX512 ;;
esac
case " $isas " in
*" avx2 "*)
  add -DBITMILL_X86 -DBITMILL_FOR_AVX2 "$avx2 -fno-sanitize=alignment"
  # AVX-VNNI, by the same instructions of AVX-512: they run where that does
  shared="$shared -DBITMILL_TEST_AVXVNNI"
  compile "-w $avx2 -mavx512f -mavx512vl -mavx512vnni -fno-sanitize=alignment" isa/avxvnni.cpp ;;
esac
case " $isas " in *" neon "*) add -DBITMILL_ARM -DBITMILL_FOR_NEON ;; esac
compile -DBITMILL_FOR_SCALAR isa/kernels.cpp
compile "$shared" isa.cpp
compile "" lut/layout.cpp lut/grid.cpp lut/linear.cpp lut/scalar.cpp additive/additive.cpp vector/vector.cpp \
  rotation/rotation.cpp sparse/sparse.cpp fixed/fixed.cpp step/*.cpp kv/*.cpp \
  solve/*.cpp tests/*.cpp
$cxx $objects -o "$out/driver"
OMP_NUM_THREADS=2 ${RUN-} "$out/driver" "$@"

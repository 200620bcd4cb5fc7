// Functions of the kernels are inlined by force: out of line, one instruction set's copy could stand in for another's.
#pragma once
#define BITMILL_INLINE inline __attribute__((always_inline))
#define BITMILL_NOINLINE __attribute__((noinline))

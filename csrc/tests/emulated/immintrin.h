// In place of the compiler's header of this name: AVX-512 in plain C, for any machine, by SIMDe (libsimde-dev). For the
// tests only (tests/sanitize.sh): intrinsics used by simd/avx512*.h that SIMDe 0.7.4 lacks.
#pragma once
#define SIMDE_NO_NATIVE
#define SIMDE_NO_INLINE  // hundreds of kernels of inlined loops would take long to compile
#define SIMDE_ENABLE_NATIVE_ALIASES
#include <simde/x86/avx512.h>
#include <simde/x86/f16c.h>

#include <cmath>
#include <cstdint>
#include <cstring>

namespace emulated {

template <class From, class Vector>
struct Lanes {  // of a vector
    From v[sizeof(Vector) / sizeof(From)];
    explicit Lanes(const Vector& from) { std::memcpy(v, &from, sizeof v); }
};

// A vector of 64 bytes whose lane i is value(i).
template <class Vector, class To, class Value>
Vector each(const Value& value) {
    To lanes[sizeof(Vector) / sizeof(To)];
    for (int i = 0; i < static_cast<int>(sizeof(Vector) / sizeof(To)); ++i) lanes[i] = value(i);
    Vector out;
    std::memcpy(&out, lanes, sizeof out);
    return out;
}

// Lanes of type From, each as a lane of type To.
template <class Vector, class To, class From, class Narrow>
Vector widened(const Narrow& narrow) {
    const Lanes<From, Narrow> from(narrow);
    return each<Vector, To>([&](int i) { return static_cast<To>(from.v[i]); });
}

inline float rounded(float value) {  // to 14 bits, as the instruction is no better
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    bits &= ~uint32_t{0x1ff};
    std::memcpy(&value, &bits, 4);
    return value;
}

}  // namespace emulated

inline __m512i _mm512_cvtepu8_epi32(__m128i v) { return emulated::widened<__m512i, int32_t, uint8_t>(v); }
inline __m512i _mm512_cvtepi16_epi32(__m256i v) { return emulated::widened<__m512i, int32_t, int16_t>(v); }
inline __m512i _mm512_cvtepu16_epi32(__m256i v) { return emulated::widened<__m512i, int32_t, uint16_t>(v); }
inline __m512 _mm512_cvtepi32_ps(__m512i v) { return emulated::widened<__m512, float, int32_t>(v); }

inline float _cvtsh_ss(uint16_t half) { return simde_float16_to_float32(simde_uint16_as_float16(half)); }
inline __m512 _mm512_cvtph_ps(__m256i v) {
    const emulated::Lanes<uint16_t, __m256i> halves(v);
    return emulated::each<__m512, float>([&](int i) { return _cvtsh_ss(halves.v[i]); });
}
inline __m512 _mm512_rsqrt14_ps(__m512 v) {
    const emulated::Lanes<float, __m512> of(v);
    return emulated::each<__m512, float>([&](int i) { return emulated::rounded(1 / std::sqrt(of.v[i])); });
}
inline __m512 _mm512_i32gather_ps(__m512i at, const void* table, int scale) {
    const emulated::Lanes<int32_t, __m512i> places(at);
    return emulated::each<__m512, float>([&](int i) {
        float number;
        std::memcpy(&number, static_cast<const char*>(table) + int64_t{places.v[i]} * scale, 4);
        return number;
    });
}

// In the order of compilers: halves are taken together until one is left.
template <class Together>
float emulated_reduce(__m512 v, const Together& together) {
    emulated::Lanes<float, __m512> of(v);
    for (int width = 8; width; width /= 2)
        for (int i = 0; i < width; ++i) of.v[i] = together(of.v[i], of.v[i + width]);
    return of.v[0];
}
inline float _mm512_reduce_add_ps(__m512 v) {
    return emulated_reduce(v, [](float a, float b) { return a + b; });
}
inline float _mm512_reduce_max_ps(__m512 v) {
    return emulated_reduce(v, [](float a, float b) { return a > b ? a : b; });
}

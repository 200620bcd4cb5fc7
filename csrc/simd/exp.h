// exp in fp32 within 2 units in the last place, without branches: loops of it become vectors.
#pragma once
#include <cstdint>
#include <cstring>

#include "inline.h"
#include "round.h"

namespace bitmill {

// Of numbers beyond +-87 it is that of +-87: 1.6e-38 and 6e37.
BITMILL_INLINE float exponential(float x) {
    x = x < -87.0f ? -87.0f : x;
    x = x > 87.0f ? 87.0f : x;
    const float whole = x * 1.44269504f + rounding - rounding;
    const float rest = x - whole * 0.693359375f - whole * -2.12194440e-4f;  // ln 2 in two parts
    float y = 1.9875691500e-4f;  // Cephes' polynomial
    y = y * rest + 1.3981999507e-3f;
    y = y * rest + 8.3334519073e-3f;
    y = y * rest + 4.1665795894e-2f;
    y = y * rest + 1.6666665459e-1f;
    y = y * rest + 5.0000001201e-1f;
    y = y * rest * rest + rest + 1.0f;
    const int32_t bits = (static_cast<int32_t>(whole) + 127) << 23;
    float power;
    std::memcpy(&power, &bits, 4);
    return y * power;
}

// Of 16 numbers of at most 0, with V's multiply-adds.
template <class V>
BITMILL_INLINE typename V::Floats exponentials(typename V::Floats x) {
    constexpr float most = rounding + 127;
    x = V::larger(V::all(-87.0f), x);  // in this order NaN stays
    const auto power = V::fma(x, V::all(1.44269504f), V::all(most));
    const auto whole = V::sub(power, V::all(most));
    const auto rest = V::fnma(whole, V::all(-2.12194440e-4f), V::fnma(whole, V::all(0.693359375f), x));
    auto y = V::all(1.9875691500e-4f);
    for (const float next : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f})
        y = V::fma(y, rest, V::all(next));
    y = V::fma(V::mul(y, rest), rest, V::add(rest, V::all(1.0f)));
    return V::mul(y, V::power(power));
}

}  // namespace bitmill

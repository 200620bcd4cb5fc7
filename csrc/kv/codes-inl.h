// Streams of codes, and what the codes stand for.
#pragma once
#include <cstdint>
#include <utility>

#include "../simd/inline.h"

namespace bitmill {

// f(n) for n of [first, first + count), unrolled with integral_constant<int, n> if V requires it.
template <int first, class F, int... n>
BITMILL_INLINE void unrolled_from(const F& f, std::integer_sequence<int, n...>) {
    (f(std::integral_constant<int, first + n>{}), ...);
}
template <class V, int first, int count, class F>
BITMILL_INLINE void unrolled(const F& f) {
    if constexpr (V::unrolls) unrolled_from<first>(f, std::make_integer_sequence<int, count>{});
    else
        for (int n = first; n < first + count; ++n) f(n);
}

// Calls f(integral_constant<int, n>) for the n of the list that equals `value`.
template <int... n, class F>
BITMILL_INLINE void chosen(int64_t value, const F& f) {
    ((value == n ? f(std::integral_constant<int, n>{}) : void()), ...);
}

// Code n of every lane's stream, whose words have a stride of 16; bits above the code are undefined.
template <class V, int bits, class N>
BITMILL_INLINE typename V::Ints code_at(const uint32_t* words, N n) {
    if constexpr (!V::unrolls) {
        return V::code(words, n * bits, bits);
    } else {
        constexpr int word = N::value * bits / 32, shift = N::value * bits % 32;
        const auto low = V::template moved<shift>(V::words(words + 16 * word));
        if constexpr (shift + bits <= 32) return low;
        else return V::either(low, V::template moved<shift - 32>(V::words(words + 16 * (word + 1))));
    }
}

// Numbers of codes: of a table, or, of 8 bits, the codes themselves.
template <class V, int bits>
struct KvLevels {
    typename V::template Numbers<bits> numbers;
    BITMILL_INLINE explicit KvLevels(const float* sixteen) : numbers(sixteen) {}
    BITMILL_INLINE typename V::Floats at(typename V::Ints code) const { return numbers.look(code); }
};
template <class V>
struct KvLevels<V, 8> {
    BITMILL_INLINE explicit KvLevels(const float*) {}
    BITMILL_INLINE typename V::Floats at(typename V::Ints code) const { return V::to_float(V::template masked<8>(code)); }
};

// What to multiply numbers below 2^16 by, and to shift right by 32, to divide them by n.
BITMILL_INLINE uint64_t over(int64_t n) { return (uint64_t{1} << 32) / static_cast<uint64_t>(n) + 1; }

// Independent sums of `count` vectors: two each, to hide the latency of additions, if the registers suffice.
template <class V, int count>
constexpr int chains = 2 * count + 4 <= V::floats ? 2 : 1;

}  // namespace bitmill

// From run-time properties to template arguments. What exists:
//
//     table of        bits   rows a tile   blocks a group   entries
//     all rows        1..8   16            4, 8n            1 byte, or 2
//     each row        1..3   16            4, 8n            1 byte, or 2
//                     4      4             2, 4, 8n         1 byte, or 2
//                     5..8   1             8n               2 bytes
//     a bank          1..4   as each row                    1 byte
//     ... of sums     4      16            4, 8n            1 byte
//
// Two bytes of up to 4 bits only with int16 inputs: the rounding of int8 inputs hides what they would gain. Inputs in
// float32 have kernels of their own (lut/floats-inl.h).
//
// Included by one source file for each instruction set, which is compiled with its own flags.
#pragma once
#include "inputs-inl.h"
#include "lookup-inl.h"

namespace bitmill {

template <class V>
struct Choose {
    const Weights& w;
    const Act act;
    const int tokens;

    template <int bits, int R, Source source, bool wide, Act kind>
    Kernel batch() const {
        if (tokens == 1) return tiles<V, bits, R, source, wide, kind, 1>;
        if constexpr (V::batch > 1) {
            if (tokens == V::batch) return tiles<V, bits, R, source, wide, kind, V::batch>;
        }
        return nullptr;
    }

    template <int bits, int R, Source source, bool wide>
    Kernel inputs() const {
        if (act == Act::int16) return batch<bits, R, source, wide, Act::int16>();
        if constexpr (wide && bits < 5) return nullptr;
        else return batch<bits, R, source, wide, Act::int8>();
    }

    template <int bits, int R, Source source>
    Kernel entries() const {
        const int F = w.layout.group_blocks;
        const bool groups = F % 8 == 0 || (R == 16 && F == 4) || (R == 4 && (F == 2 || F == 4));
        if (w.layout.rows_per_tile != R || !groups) return nullptr;
        if constexpr (source != Source::bank) {
            if (w.wide) return inputs<bits, R, source, true>();
        }
        if constexpr (R == 1) return nullptr;
        else return w.wide ? nullptr : inputs<bits, R, source, false>();
    }

    template <int bits>
    Kernel tables() const {
        constexpr int R = bits < 4 ? 16 : bits == 4 ? 4 : 1;
        if (w.source == Source::shared) return entries<bits, 16, Source::shared>();
        if (w.source == Source::own) return entries<bits, R, Source::own>();
        if constexpr (bits == 4) {
            if (w.summed()) return entries<4, 16, Source::bank>();
        }
        if constexpr (bits <= 4) return entries<bits, R, Source::bank>();
        else return nullptr;
    }

    Kernel operator()() const {
        switch (w.layout.bits) {
            case 1: return tables<1>();
            case 2: return tables<2>();
            case 3: return tables<3>();
            case 4: return tables<4>();
            case 5: return tables<5>();
            case 6: return tables<6>();
            case 7: return tables<7>();
            case 8: return tables<8>();
            default: return nullptr;
        }
    }
};

template <class V>
Kernel choose(const Weights& w, Act act, int tokens) {
    return Choose<V>{w, act, tokens}();
}

}  // namespace bitmill

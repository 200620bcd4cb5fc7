// 64 bytes as four vectors of NEON (AArch64): lookups of up to 64 entries, and dot products of signed bytes.
#pragma once
#include <arm_neon.h>

#include <cstdint>
#include <cstring>

#include "inline.h"

namespace bitmill {

struct Neon {
    struct Bytes { uint8x16_t v[4]; };
    struct Ints { int32x4_t v[4]; };
    struct Floats { float32x4_t v[4]; };
    struct Shorts { int16x8_t v[8]; };
    static constexpr int batch = 1;   // tokens that one pass over the codes serves
    static constexpr int bias = 128;  // entries are taken less it in `dot`: there is none of unsigned and signed bytes

    template <class Out, class Each>
    static BITMILL_INLINE Out each(const Each& value) {
        return {{value(0), value(1), value(2), value(3)}};
    }
    static BITMILL_INLINE uint8x16_t same(int v) { return vdupq_n_u8(static_cast<uint8_t>(v)); }
    static BITMILL_INLINE Bytes load(const uint8_t* p) {
        return each<Bytes>([&](int i) { return vld1q_u8(p + 16 * i); });
    }

    template <int by>
    static BITMILL_INLINE Bytes shifted(Bytes v) {  // right, left where negative
        if constexpr (by > 0) return each<Bytes>([&](int i) { return vshrq_n_u8(v.v[i], by); });
        else if constexpr (by < 0) return each<Bytes>([&](int i) { return vshlq_n_u8(v.v[i], -by); });
        else return v;
    }

    template <int mask>
    static BITMILL_INLINE Bytes select(Bytes x, Bytes y) {  // bits of x where the mask has them, else of y
        return each<Bytes>([&](int i) { return vbslq_u8(same(mask), x.v[i], y.v[i]); });
    }

    static BITMILL_INLINE Bytes differ(Bytes x, Bytes y) {
        return each<Bytes>([&](int i) { return veorq_u8(x.v[i], y.v[i]); });
    }

    template <int R>
    static BITMILL_INLINE Bytes spread(const int8_t* x) {  // one block's columns to all of its R rows
        const uint8_t* p = reinterpret_cast<const uint8_t*>(x);
        if constexpr (R == 16) {
            uint32_t four;
            std::memcpy(&four, x, 4);
            return each<Bytes>([&](int) { return vreinterpretq_u8_u32(vdupq_n_u32(four)); });
        } else {
            return each<Bytes>([&](int i) { return vld1q_u8(p + (R == 4 ? 0 : 16 * i)); });
        }
    }

    static BITMILL_INLINE Ints no_ints() { return each<Ints>([](int) { return vdupq_n_s32(0); }); }
    static BITMILL_INLINE int32x4_t dot(int32x4_t sum, uint8x16_t u, uint8x16_t x) {
        const int8x16_t a = vreinterpretq_s8_u8(u), b = vreinterpretq_s8_u8(x);
#ifdef __ARM_FEATURE_DOTPROD
        return vdotq_s32(sum, a, b);
#else
        const int32x4_t low = vpaddlq_s16(vmull_s8(vget_low_s8(a), vget_low_s8(b)));
        return vaddq_s32(sum, vpaddq_s32(low, vpaddlq_s16(vmull_high_s8(a, b))));
#endif
    }
    static BITMILL_INLINE Ints dot(Ints sum, Bytes u, Bytes x) {
        return each<Ints>([&](int i) { return dot(sum.v[i], u.v[i], x.v[i]); });
    }

    static BITMILL_INLINE Ints dot_small(Ints sum, Bytes u, Bytes x, Bytes v, Bytes y) {  // two blocks', entries up to 63
        return dot(dot(sum, u, x), v, y);
    }

    static constexpr int fixed_tokens = 4;
    template <int less>  // what entries are less by
    static BITMILL_INLINE void store_bytes(uint8_t* to, Bytes v) {
        for (int i = 0; i < 4; ++i) vst1q_u8(to + 16 * i, veorq_u8(v.v[i], same(less)));
    }
    template <int less>
    static BITMILL_INLINE void store_pairs(uint8_t* to, Bytes v) {  // as 16 bits: two columns of all rows, then the other two
        const uint8x16_t first = {0, 255, 1, 255, 4, 255, 5, 255, 8, 255, 9, 255, 12, 255, 13, 255};  // 255: zero
        const uint8x16_t second = {2, 255, 3, 255, 6, 255, 7, 255, 10, 255, 11, 255, 14, 255, 15, 255};
        for (int i = 0; i < 4; ++i) {
            const uint8x16_t u = veorq_u8(v.v[i], same(less));
            vst1q_u8(to + 16 * i, vqtbl1q_u8(u, first));
            vst1q_u8(to + 64 + 16 * i, vqtbl1q_u8(u, second));
        }
    }
    struct Pairs;  // of signed 16 bits, and of bytes (neon_pairs.h)
    struct Quads;

    // 64 sums of 16 bits, of which every table gives the low and the high bytes separately.
    static BITMILL_INLINE Shorts no_shorts() {
        const int16x8_t none = vdupq_n_s16(0);
        return {{none, none, none, none, none, none, none, none}};
    }
    static BITMILL_INLINE Shorts add(Shorts sum, Bytes low, Bytes high) {
        for (int i = 0; i < 4; ++i) {
            const uint8x16_t a = low.v[i], b = high.v[i];
            sum.v[2 * i] = vaddq_s16(sum.v[2 * i], vreinterpretq_s16_u8(vzip1q_u8(a, b)));
            sum.v[2 * i + 1] = vaddq_s16(sum.v[2 * i + 1], vreinterpretq_s16_u8(vzip2q_u8(a, b)));
        }
        return sum;
    }
    static BITMILL_INLINE void to_floats(Shorts s, Floats (&out)[4]) {
        for (int i = 0; i < 8; ++i) {
            out[i / 2].v[i % 2 * 2] = vcvtq_f32_s32(vmovl_s16(vget_low_s16(s.v[i])));
            out[i / 2].v[i % 2 * 2 + 1] = vcvtq_f32_s32(vmovl_high_s16(s.v[i]));
        }
    }

    static BITMILL_INLINE Floats all(float v) { return each<Floats>([&](int) { return vdupq_n_f32(v); }); }
    static BITMILL_INLINE Floats zero() { return all(0); }
    static BITMILL_INLINE Floats to_float(Ints v) { return each<Floats>([&](int i) { return vcvtq_f32_s32(v.v[i]); }); }
    static BITMILL_INLINE Floats fma(Floats x, Floats y, Floats z) {
        return each<Floats>([&](int i) { return vfmaq_f32(z.v[i], x.v[i], y.v[i]); });
    }
    static BITMILL_INLINE Floats fnma(Floats x, Floats y, Floats z) {
        return each<Floats>([&](int i) { return vfmsq_f32(z.v[i], x.v[i], y.v[i]); });
    }
    static BITMILL_INLINE Floats add(Floats x, Floats y) {
        return each<Floats>([&](int i) { return vaddq_f32(x.v[i], y.v[i]); });
    }
    static BITMILL_INLINE Floats sub(Floats x, Floats y) {
        return each<Floats>([&](int i) { return vsubq_f32(x.v[i], y.v[i]); });
    }
    static BITMILL_INLINE Floats mul(Floats x, Floats y) {
        return each<Floats>([&](int i) { return vmulq_f32(x.v[i], y.v[i]); });
    }
    static BITMILL_INLINE Floats inverse_root(Floats v) {  // 1 / sqrt(v), nearly to the last bit
        return each<Floats>([&](int i) {
            float32x4_t r = vrsqrteq_f32(v.v[i]);
            for (int step = 0; step < 2; ++step) r = vmulq_f32(r, vrsqrtsq_f32(vmulq_f32(v.v[i], r), r));
            return r;
        });
    }
    static BITMILL_INLINE void store(float* p, Floats v) {
        for (int i = 0; i < 4; ++i) vst1q_f32(p + 4 * i, v.v[i]);
    }
    static BITMILL_INLINE float sum(Floats v) {
        return vaddvq_f32(vaddq_f32(vaddq_f32(v.v[0], v.v[1]), vaddq_f32(v.v[2], v.v[3])));
    }
    static BITMILL_INLINE Floats of_bf16(const uint16_t* p) {
        return each<Floats>([&](int i) { return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(p + 4 * i), 16)); });
    }

    // Numbers of R rows, each in all lanes of its row.
    static BITMILL_INLINE float32x4_t halves(const uint16_t* p) { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p))); }
    static BITMILL_INLINE float one(const uint16_t* half) { return vgetq_lane_f32(vcvt_f32_f16(vreinterpret_f16_u16(vdup_n_u16(*half))), 0); }
    static BITMILL_INLINE float one(const uint8_t* byte) { return *byte; }
    static BITMILL_INLINE float one(const float* p) { return *p; }
    static BITMILL_INLINE float32x4_t four(const uint16_t* p) { return halves(p); }
    static BITMILL_INLINE float32x4_t four(const float* p) { return vld1q_f32(p); }
    static BITMILL_INLINE float32x4_t four(const uint8_t* p) {
        uint32_t bytes;
        std::memcpy(&bytes, p, 4);
        return vcvtq_f32_u32(vmovl_u16(vget_low_u16(vmovl_u8(vcreate_u8(bytes)))));
    }
    template <int R, class T>
    static BITMILL_INLINE Floats rows(const T* p) {
        if constexpr (R == 16) return each<Floats>([&](int i) { return four(p + 4 * i); });
        else return each<Floats>([&](int i) { return vdupq_n_f32(one(p + (R == 4 ? i : 0))); });
    }

    template <int R>
    static BITMILL_INLINE Floats named(const float* powers, const uint8_t* ids, int shift) {  // powers[id >> shift]
        float numbers[R];
        for (int r = 0; r < R; ++r) numbers[r] = powers[ids[r] >> shift];
        return rows<R>(numbers);
    }

    // Bytes 16 i to 16 i + 15 as numbers, and numbers from tables of floats.
    template <int i>
    static BITMILL_INLINE Ints sixteen(Bytes b) {
        const uint16x8_t low = vmovl_u8(vget_low_u8(b.v[i])), high = vmovl_high_u8(b.v[i]);
        const auto wide = [](uint32x4_t v) { return vreinterpretq_s32_u32(v); };
        return {{wide(vmovl_u16(vget_low_u16(low))), wide(vmovl_high_u16(low)), wide(vmovl_u16(vget_low_u16(high))),
                 wide(vmovl_high_u16(high))}};
    }
    template <int bits>
    static BITMILL_INLINE Ints masked(Ints v) {
        return each<Ints>([&](int i) { return vandq_s32(v.v[i], vdupq_n_s32((1 << bits) - 1)); });
    }
    template <int bits>
    static BITMILL_INLINE Ints of_rows(Ints v) {  // four rows' tables of 2^bits follow each other
        return each<Ints>([&](int i) { return vorrq_s32(v.v[i], vdupq_n_s32(i << bits)); });
    }
    template <int bits>
    static BITMILL_INLINE Floats look(const float* table, Ints at) {
        int32_t places[16];
        float found[16];
        for (int i = 0; i < 4; ++i) vst1q_s32(places + 4 * i, at.v[i]);
        for (int i = 0; i < 16; ++i) found[i] = table[places[i]];
        return rows<16>(found);
    }
    static BITMILL_INLINE Floats fours_of(const float* p) {  // p[0] to p[3], four times
        return each<Floats>([&](int) { return vld1q_f32(p); });
    }

    static BITMILL_INLINE uint8x16_t entry(const uint8_t* p) { return veorq_u8(vld1q_u8(p), same(bias)); }

    // One table for all 64 bytes, in pieces of 64 entries.
    template <int bits>
    struct Whole {
        static constexpr int top = bits - 1;  // where the code's last bit is expected
        static constexpr int pieces = bits <= 6 ? 1 : 1 << (bits - 6);
        uint8x16x4_t entries[pieces];

        BITMILL_INLINE void load(const uint8_t* record) { load_small(record, bias); }
        BITMILL_INLINE void load_small(const uint8_t* record, int less = 0) {  // for dot_small, or less `less`
            for (int i = 0; i < pieces; ++i)
                for (int j = 0; j < 4; ++j) entries[i].val[j] = veorq_u8(vld1q_u8(record + 64 * i + 16 * j), same(less));
        }

        BITMILL_INLINE uint8x16_t look(uint8x16_t code) const {
            if constexpr (bits < 8) code = vandq_u8(code, same((1 << bits) - 1));
            if constexpr (bits <= 4) return vqtbl1q_u8(entries[0].val[0], code);
            uint8x16_t found = vqtbl4q_u8(entries[0], code);
            for (int i = 1; i < pieces; ++i) found = vqtbx4q_u8(found, entries[i], vsubq_u8(code, same(64 * i)));
            return found;
        }
        BITMILL_INLINE Bytes look(Bytes code) const {
            return each<Bytes>([&](int i) { return look(code.v[i]); });
        }
    };

    static BITMILL_INLINE uint8x16_t fours(uint8x16_t at) {  // in the four entries of each of 4 rows
        const uint64x2_t starts = vcombine_u64(vcreate_u64(0x0404040400000000), vcreate_u64(0x0c0c0c0c08080808));
        return vorrq_u8(at, vreinterpretq_u8_u64(starts));
    }

    static constexpr bool split_third_bit = false;  // Lanes<3> takes whole codes

    // A table for every row: 4 rows of 4 entries in 16 bytes, two of these for 8 entries, or a row of 16.
    template <int bits>
    struct Lanes {
        static constexpr int top = bits - 1;
        static constexpr int vectors = bits == 3 ? 2 : 1;
        Bytes entries[vectors];

        BITMILL_INLINE void load(const uint8_t* record) {
            for (int i = 0; i < vectors; ++i)
                entries[i] = each<Bytes>([&](int j) { return entry(record + 64 * i + 16 * j); });
        }

        BITMILL_INLINE void load_mirrored(const uint8_t* record) {  // halves of tables, 8 or 4 bytes a row
            if constexpr (bits == 4) {
                entries[0] = each<Bytes>([&](int i) {
                    const uint8x8_t first = vld1_u8(record + 8 * i);
                    return veorq_u8(vcombine_u8(first, vmvn_u8(vrev64_u8(first))), same(bias));
                });
            } else {
                entries[0] = each<Bytes>([&](int i) { return entry(record + 16 * i); });
                entries[1] = each<Bytes>([&](int i) { return vmvnq_u8(vrev32q_u8(entries[0].v[i])); });
            }
        }

        const uint8_t* bank;
        BITMILL_INLINE void hold_bank(const uint8_t* tables) { bank = tables; }
        BITMILL_INLINE void from_bank(const uint8_t* ids, int mask) {
            uint8_t record[64 * vectors];
            if constexpr (bits == 4) {
                for (int r = 0; r < 4; ++r) std::memcpy(record + 16 * r, bank + 16 * (ids[r] & mask), 16);
            } else {
                for (int i = 0; i < vectors; ++i)
                    for (int r = 0; r < 16; ++r) std::memcpy(record + 64 * i + 4 * r, bank + 128 * i + 4 * (ids[r] & mask), 4);
            }
            for (int i = 0; i < vectors; ++i) entries[i] = Neon::load(record + 64 * i);
        }

        BITMILL_INLINE Bytes look(Bytes code) const {
            if constexpr (bits == 4) {
                return each<Bytes>([&](int i) { return vqtbl1q_u8(entries[0].v[i], vandq_u8(code.v[i], same(15))); });
            } else {
                return each<Bytes>([&](int i) {
                    const uint8x16_t at = fours(vandq_u8(code.v[i], same(bits == 1 ? 1 : 3)));
                    if constexpr (bits < 3) return vqtbl1q_u8(entries[0].v[i], at);
                    const uint8x16_t upper = vshlq_n_u8(vandq_u8(code.v[i], same(4)), 2);
                    return vqtbl2q_u8({{entries[0].v[i], entries[vectors - 1].v[i]}}, vorrq_u8(at, upper));
                });
            }
        }
    };

    // Tables of 16 rows with entry[code] = first[code & 3] + second[code >> 2], stored as those of 3 bits.
    struct Sums : Lanes<3> {
        static constexpr int top = 3;
        BITMILL_INLINE Bytes look(Bytes code) const {
            return each<Bytes>([&](int i) {
                const uint8x16_t low = vandq_u8(code.v[i], same(3)), high = vandq_u8(vshrq_n_u8(code.v[i], 2), same(3));
                return vaddq_u8(vqtbl1q_u8(entries[0].v[i], fours(low)), vqtbl1q_u8(entries[1].v[i], fours(high)));
            });
        }
    };
};

}  // namespace bitmill

#include "neon_pairs.h"

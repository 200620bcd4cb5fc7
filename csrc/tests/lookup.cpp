// The lookup kernels of every instruction set against those in plain C++, on random weights of odd shapes.
#include "../isa.h"
#include "../lut/linear.h"
#include "../step/linear.h"
#include "../step/step.h"
#include "driver.h"

namespace bitmill {
namespace {

struct Case {
    Layout layout;
    Source source;
    bool wide, per_group, mirrored;
    int zero_kind, scale_kind;  // none, bytes, halves; none, halves, floats
    bool floats = false;
};

struct Arrays {
    std::vector<uint8_t> codes, tables, ids, zeros;
    std::vector<float> powers, row_scales;
    std::vector<uint8_t> scales;
    std::vector<uint32_t> words;
    Weights w{};
};

Arrays make(const Case& c) {
    const Layout& l = c.layout;
    Arrays a;
    const int64_t words = (l.columns * l.bits + 31) / 32,
                  places = l.tiles() * l.padded_groups() * l.rows_per_tile;
    a.words.assign(l.rows * words, 0);
    for (int64_t r = 0; r < l.rows; ++r)
        for (int64_t i = 0; i < l.columns * l.bits; ++i)
            if (below(2)) a.words[r * words + i / 32] |= 1u << i % 32;
    a.codes.assign(l.tiles() * l.tile_bytes(), 0);
    to_layout(l, a.words.data(), words, a.codes.data(), 2);
    std::vector<uint32_t> back(a.words.size(), 0xffffffff);
    from_layout(l, a.codes.data(), back.data(), words, 2);
    if (back != a.words) throw std::runtime_error("codes do not come back");
    const int64_t one = c.source == Source::own && l.rows_per_tile == 16 && l.bits == 3 ? 128
                        : l.bits == 8                                               ? 256
                        : l.bits == 7                                               ? 128
                                                                                    : 64;
    const int64_t bytes = one * (c.wide ? 2 : 1) / (c.mirrored ? 2 : 1);
    const int64_t record = c.floats ? 4 * float_record(l.bits, l.rows_per_tile, c.source) : bytes,
                  each = c.source == Source::own ? c.per_group ? l.padded_groups() : 1 : 0;
    if (c.floats) {
        const auto numbers = random_floats(
            c.source == Source::bank ? 32 << l.bits : record / 4 * (each ? l.tiles() * each : 1));
        a.tables.resize(4 * numbers.size());
        std::memcpy(a.tables.data(), numbers.data(), a.tables.size());
    } else if (c.source == Source::bank) {
        a.tables = random_bytes(512);
        for (auto& entry : a.tables) entry &= l.rows_per_tile == 16 && l.bits == 4 ? 31 : 63;  // or sums of at most 63
    }
    else a.tables = random_bytes(record * (each ? l.tiles() * each : 1));
    if (c.source == Source::shared || l.rows_per_tile == 1)  // shorter tables are repeated
        for (size_t at = 0; at < a.tables.size(); ++at)
            if (l.bits < 6 && c.source != Source::bank && !c.floats)
                a.tables[at] = a.tables[at / 64 * 64 + at % 64 % (size_t{1} << l.bits)];
    a.powers.resize(16);
    for (auto& p : a.powers) p = 0.5f + below(100) / 50.0f;
    if (c.source == Source::bank) a.ids = random_bytes(places);
    for (auto& id : a.ids) id &= 127;  // 32 tables, 4 powers
    a.row_scales.assign(l.tiles() * l.rows_per_tile, 0.25f);
    if (c.zero_kind) a.zeros = random_bytes(places * c.zero_kind);
    if (c.zero_kind == 2)
        for (int64_t i = 0; i < places; ++i) a.zeros[2 * i + 1] = 0x40;  // halves from 2 to 2.5
    if (c.scale_kind) a.scales = random_bytes(places * (c.scale_kind == 1 ? 2 : 4));
    for (int64_t i = 0; i < places && c.scale_kind == 1; ++i) a.scales[2 * i + 1] = 0x38;
    for (int64_t i = 0; i < places && c.scale_kind == 2; ++i) {
        const float s = 0.1f + static_cast<float>(below(8));
        std::memcpy(&a.scales[4 * i], &s, 4);
    }
    a.w = {l, c.source, c.wide, a.codes.data(), a.tables.data(), c.mirrored, record, each, a.ids.data(), 5,
           a.powers.data(), c.scale_kind ? a.scales.data() : nullptr, c.scale_kind == 2,
           static_cast<Zero>(c.zero_kind), 3.5f, a.zeros.data(), a.row_scales.data()};
    return a;
}

void run(const Case& c) {
    const Arrays a = make(c);
    const Layout& l = c.layout;
    for (const Act act : {Act::int8, Act::int16, Act::float32}) {
        if ((act == Act::float32) != c.floats) continue;
        for (const int tokens : {1, 5}) {
            std::vector<float> x(tokens * l.columns), expected(tokens * l.rows, NAN);
            for (auto& v : x) v = static_cast<float>(below(2001) - 1000) / 300.0f;
            use_isa("scalar");
            linear(a.w, x.data(), tokens, act, expected.data(), 1);
            for (const auto& name : available_isas()) {
                use_isa(name);
                if (name == "scalar" || (!c.floats && !isa().lookup->choose(a.w, act, 1))) continue;
                std::vector<float> y(tokens * l.rows, NAN);
                linear(a.w, x.data(), tokens, act, y.data(), 2);
                report(difference(y, expected), 5e-5,
                       "%s: %ld x %ld, group %ld, %d bits, R %d, F %d, source %d, wide %d, int%d, %d tokens",
                       name.c_str(), static_cast<long>(l.rows), static_cast<long>(l.columns),
                       static_cast<long>(l.group), l.bits, l.rows_per_tile, l.group_blocks,
                       static_cast<int>(c.source), c.wide,
                       act == Act::int8    ? 8
                       : act == Act::int16 ? 16
                                           : 32,
                       tokens);  // fp32 sums in another order
            }
        }
    }
}

// Many tokens, where there are panels, against one after the other.
void run_many(const Case& c) {
    const Arrays a = make(c);
    const Layout& l = c.layout;
    for (const int tokens : {1, 2, 9, 33}) {
        const auto x = random_floats(tokens * l.columns);
        std::vector<float> expected(tokens * l.rows, NAN);
        use_isa("scalar");
        linear(a.w, x.data(), tokens, Act::int16, expected.data(), 1);
        for (const auto& name : available_isas()) {
            use_isa(name);
            if (!has_gemm(a.w)) continue;
            std::vector<float> y(tokens * l.rows, NAN);
            linear_gemm(a.w, {x.data(), nullptr, nullptr, 0}, tokens, Act::int16, 0, y.data(), 2);
            report(difference(y, expected), 3e-4, "%s, many: %ld x %ld, group %ld, %d bits, F %d, source %d, %d tokens",
                   name.c_str(), static_cast<long>(l.rows), static_cast<long>(l.columns), static_cast<long>(l.group),
                   l.bits, l.group_blocks, static_cast<int>(c.source), tokens);
        }
    }
}

// Integers of 8 bits: alike in every instruction set but plain C++, which rounds products and sums separately; so steps are
// powers of two, and what is left are exact sums. Inputs reach to -128; steps are of a token, a group and a part of one.
void run_codes(const Case& c) {
    Arrays a = make(c);
    const Layout& l = c.layout;
    if (c.wide || c.floats) return;
    a.w.zero_kind = Zero::constant, a.w.zero = 2, a.w.scales = nullptr, a.w.wide_scales = false;
    for (auto& p : a.powers) p = 0.5f;
    for (const int64_t step : {l.columns, l.group, int64_t{32}})
        for (const int tokens : {1, 3, 9, 33}) {
            if (step % l.group && l.group % step && step < l.columns) continue;
            const int64_t steps = (l.columns - 1) / step + 1;
            const auto bytes = random_bytes(tokens * l.columns);
            std::vector<int8_t> x(bytes.begin(), bytes.end());
            x[below(static_cast<int>(x.size()))] = -128;
            std::vector<float> sizes(tokens * steps), expected(tokens * l.rows);
            for (auto& size : sizes) size = std::ldexp(1.0f, below(3) - 1);
            std::vector<float> row(l.columns);
            for (int64_t r = 0; r < l.rows; ++r) {
                lookup_row(a.w, Act::int8, r, row.data());
                for (int64_t t = 0; t < tokens; ++t) {
                    double sum = 0;
                    for (int64_t k = 0; k < l.columns; ++k) sum += static_cast<double>(row[k]) * x[t * l.columns + k] * sizes[t * steps + k / step];
                    expected[t * l.rows + r] = static_cast<float>(sum);
                }
            }
            for (const auto& name : available_isas()) {
                use_isa(name);
                std::vector<float> y(tokens * l.rows, NAN);
                linear_gemm(a.w, {nullptr, x.data(), sizes.data(), steps}, tokens, Act::int8, step, y.data(), 2);
                report(difference(y, expected), 0, "%s, codes: %ld x %ld, group %ld, %d bits, F %d, source %d, step %ld, %d tokens",
                       name.c_str(), static_cast<long>(l.rows), static_cast<long>(l.columns), static_cast<long>(l.group),
                       l.bits, l.group_blocks, static_cast<int>(c.source), static_cast<long>(step), tokens);
            }
        }
}

float to_half(float x) {
    uint16_t half;
    isa().step->to_fp16(&x, 1, &half);
    const int exponent = half >> 10 & 31, mantissa = half & 1023;
    return exponent ? std::ldexp(1024.0f + mantissa, exponent - 25) : std::ldexp(1.0f * mantissa, -24);
}

// A token as lut/grid.h says that it is rounded, in the order of its columns; `kept` are not.
std::vector<float> rounded(const Grid& grid, std::vector<float> x, const std::vector<bool>& kept) {
    const auto columns = static_cast<int64_t>(x.size());
    const float top = static_cast<float>((1 << grid.bits) - 1);
    for (int64_t first = 0; first < columns; first += grid.width) {
        const int64_t last = std::min(first + grid.width, columns);
        float low = 0, high = 0;
        for (int64_t i = first; i < last; ++i)
            if (!kept[i]) low = std::min(low, x[i]), high = std::max(high, x[i]);
        float scale = to_half((grid.symmetric ? 2 * std::max(high, -low) : high - low) / top);
        if (scale == 0) scale = 1;
        float zero = grid.symmetric ? static_cast<float>(1 << (grid.bits - 1)) : std::min(std::nearbyint(-low / scale), top);
        if (grid.scale > 0) scale = grid.scale, zero = grid.symmetric ? zero : grid.zero;
        for (int64_t i = first; i < last; ++i)
            if (!kept[i]) x[i] = scale * std::max(-zero, std::min(std::nearbyint(x[i] / scale), top - zero));
    }
    return x;
}

// Inputs on a grid, a few tokens at once and one in a team, against their plain sums.
void run_grid(const Case& c) {
    const Arrays a = make(c);
    const Layout& l = c.layout;
    const Grid grids[] = {{8, l.columns, true}, {8, l.columns, false}, {4, l.group, false}, {6, 2 * l.group, true},
                          {8, l.columns, true, 0.02f}, {8, l.columns, false, 0.02f, 100}, {8, l.columns, true, 0, 0, 3.2f},
                          {8, l.columns, false, 0, 0, 3.0f}};
    for (const Grid& grid : grids)
        for (const int tokens : {1, 5}) {
            const auto x = random_floats(tokens * l.columns);
            std::vector<bool> kept(l.columns);
            for (size_t i = 0; grid.threshold > 0 && i < x.size(); ++i)
                if (std::fabs(x[i]) >= grid.threshold) kept[i % l.columns] = true;
            std::vector<float> row(l.columns), expected(tokens * l.rows);
            for (int64_t t = 0; t < tokens; ++t) {
                const auto values = rounded(grid, {x.begin() + t * l.columns, x.begin() + (t + 1) * l.columns}, kept);
                for (int64_t r = 0; r < l.rows; ++r) {
                    lookup_row(a.w, Act::int8, r, row.data());
                    double sum = 0;
                    for (int64_t k = 0; k < l.columns; ++k) sum += static_cast<double>(row[k]) * values[k];
                    expected[t * l.rows + r] = static_cast<float>(sum);
                }
            }
            for (const auto& name : available_isas()) {
                use_isa(name);
                if (!has_grid_linear(a.w, grid)) continue;
                std::vector<float> y(tokens * l.rows, NAN), one(l.rows, NAN);
                grid_linear(a.w, grid, x.data(), tokens, y.data(), 2);
                report(difference(y, expected), 1e-4, "%s, grid: %ld x %ld, group %ld, %d bits, source %d, wide %d; inputs %d bits, threshold %g",
                       name.c_str(), static_cast<long>(l.rows), static_cast<long>(l.columns), static_cast<long>(l.group), l.bits,
                       static_cast<int>(c.source), c.wide, grid.bits, grid.threshold);
                if (tokens > 1) continue;
                const GridLinear linear(a.w, grid);
                Barrier barrier;
                for (int t = 0; t < 3; ++t) {
                    RoundedInputs inputs;
                    linear.apply({t, 3, &barrier}, {inputs, nullptr, nullptr}, x.data(), one.data());
                }
                report(difference(one, y), 0, "%s, grid: a team of three", name.c_str());
            }
        }
}

Layout layout_of(const int64_t (&shape)[3], int bits, int R) {
    const int64_t blocks = (shape[2] * R + 63) / 64;
    int F = static_cast<int>((blocks + 7) / 8 * 8);
    if (R == 16 && blocks <= 4) F = 4;
    if (R == 4 && blocks <= 4) F = blocks <= 2 ? 2 : 4;
    return {shape[0], shape[1], shape[2], bits, R, F};
}

// Every kind of weights.
template <class Each>
void for_cases(const Each& each) {
    const int64_t shapes[][3] = {{1, 1, 1},     {3, 7, 7},     {17, 130, 16},
                                 {33, 300, 64}, {20, 577, 40}, {5, 96, 32}};
    int turn = 0;
    for (const auto& s : shapes)
        for (int bits = 1; bits <= 8; ++bits)
            for (const Source source : {Source::shared, Source::own, Source::bank})
                for (const bool wide : {false, true}) {
                    if (source == Source::bank && (wide || bits > 4)) continue;
                    const int R = source == Source::shared || bits < 4 ? 16 : bits == 4 ? 4 : 1;
                    if (R == 1 && !wide) continue;
                    ++turn;
                    const bool halved = source == Source::own && (bits == 3 || bits == 4) && turn % 4 < 2;
                    each(s, Case{layout_of(s, bits, R), source, wide, turn % 2 == 0, halved, turn % 3, turn / 3 % 3});
                }
}

}  // namespace

void test_lookup() {
    for_cases([](const auto& s, const Case& c) {
        const Layout& l = c.layout;
        if (c.source == Source::bank && l.bits == 4)
            for (const auto& each : {run, run_many, run_codes}) each({layout_of(s, 4, 16), c.source, false, false, false, c.zero_kind, 0});
        for (const auto& each : {run, run_many, run_codes}) each(c);
        Case other = c;
        other.wide = other.mirrored = false;
        if (l.rows_per_tile == 1) run_codes(other);  // which few tokens multiply with two bytes an entry
        other.floats = true;
        if (!c.wide || l.rows_per_tile == 1) run(other);
    });
}

void test_grid() {
    for_cases([](const auto&, const Case& c) { run_grid(c); });
}

}  // namespace bitmill

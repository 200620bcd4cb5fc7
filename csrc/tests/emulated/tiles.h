// The tile instructions of AMX that simd/amx.h uses, in plain C++: for the tests, on any machine.
#pragma once
#include <cstdint>
#include <cstring>

namespace emulated {

struct Tiles {
    bool configured = false;
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {};
    uint8_t data[8][16][64] = {};
};
inline thread_local Tiles tiles;

inline void check(bool fine) {  // as the processor, which stops the program
    if (!fine) __builtin_trap();
}

inline void load_config(const void* from) {
    const auto* bytes = static_cast<const uint8_t*>(from);
    check(bytes[0] == 1);
    tiles = Tiles{};
    tiles.configured = true;
    std::memcpy(tiles.row_bytes, bytes + 16, 32);
    std::memcpy(tiles.rows, bytes + 48, 16);
    for (int i = 0; i < 8; ++i) check(tiles.rows[i] <= 16 && tiles.row_bytes[i] <= 64 && (tiles.rows[i] > 0) == (tiles.row_bytes[i] > 0));
}

inline void load(int tile, const void* from, int64_t stride) {
    check(tiles.configured && tiles.rows[tile] > 0);
    std::memset(tiles.data[tile], 0, sizeof tiles.data[tile]);
    for (int r = 0; r < tiles.rows[tile]; ++r) std::memcpy(tiles.data[tile][r], static_cast<const uint8_t*>(from) + r * stride, tiles.row_bytes[tile]);
}

inline void store(int tile, void* to, int64_t stride) {
    check(tiles.configured && tiles.rows[tile] > 0);
    for (int r = 0; r < tiles.rows[tile]; ++r) std::memcpy(static_cast<uint8_t*>(to) + r * stride, tiles.data[tile][r], tiles.row_bytes[tile]);
}

inline void dot(int sum, int left, int right) {  // signed bytes times unsigned ones
    const Tiles& t = tiles;
    check(t.configured && t.rows[sum] == t.rows[left] && t.row_bytes[sum] == t.row_bytes[right] && t.row_bytes[left] == 4 * t.rows[right]);
    for (int m = 0; m < t.rows[sum]; ++m)
        for (int n = 0; n < t.row_bytes[sum] / 4; ++n) {
            int32_t total;
            std::memcpy(&total, tiles.data[sum][m] + 4 * n, 4);
            for (int k = 0; k < t.rows[right]; ++k)
                for (int i = 0; i < 4; ++i) total += static_cast<int8_t>(t.data[left][m][4 * k + i]) * t.data[right][k][4 * n + i];
            std::memcpy(tiles.data[sum][m] + 4 * n, &total, 4);
        }
}

}  // namespace emulated

#undef _tile_loadconfig
#undef _tile_zero
#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbsud
#undef _tile_release
#define _tile_loadconfig emulated::load_config
#define _tile_zero(tile) std::memset(emulated::tiles.data[tile], 0, sizeof emulated::tiles.data[tile])
#define _tile_loadd emulated::load
#define _tile_stored emulated::store
#define _tile_dpbsud emulated::dot
#define _tile_release() (emulated::tiles.configured = false)

#include "layout.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "../threads.h"
#include "../words.h"

namespace bitmill {
namespace {

// Calls field(offset of its 64 bytes in the chunk, first bit there, width, first bit in the code) for block i.
template <class Field>
void each_field(int bits, int i, const Field& field) {
    if (bits == 8) return field(64 * i, 0, 8, 0);
    int base = 0, done = 0;
    if (bits & 4) {
        field(64 * (i / 2), 4 * (i % 2), 4, done);
        base += 256, done += 4;
    }
    if (bits & 2) {
        field(base + 64 * (i / 4), 2 * (i % 4), 2, done);
        base += 128, done += 2;
    }
    if (bits & 1) field(base, i, 1, done);
}

void pack_block(const uint8_t* codes, int bits, int i, uint8_t* chunk) {
    each_field(bits, i, [&](int offset, int shift, int width, int done) {
        const int mask = (1 << width) - 1;
        for (int b = 0; b < 64; ++b)
            chunk[offset + b] = static_cast<uint8_t>(chunk[offset + b] | (codes[b] >> done & mask) << shift);
    });
}

// The codes of one tile, (rows of the tile, padded columns), from its chunks, and back.
void unpack_tile(const Layout& l, const uint8_t* stored, uint8_t* codes) {
    const int64_t width = l.block_columns(), columns = l.padded_columns();
    uint8_t block[64];
    for (int64_t b = 0; b < l.chunks() * 8; ++b) {
        unpack_block(stored + b / 8 * 64 * l.bits, l.bits, static_cast<int>(b % 8), block);
        for (int r = 0; r < l.rows_per_tile; ++r) std::memcpy(codes + r * columns + b * width, block + r * width, width);
    }
}

void pack_tile(const Layout& l, const uint8_t* codes, uint8_t* stored) {
    const int64_t width = l.block_columns(), columns = l.padded_columns();
    uint8_t block[64];
    for (int64_t b = 0; b < l.chunks() * 8; ++b) {
        for (int r = 0; r < l.rows_per_tile; ++r) std::memcpy(block + r * width, codes + r * columns + b * width, width);
        pack_block(block, l.bits, static_cast<int>(b % 8), stored + b / 8 * 64 * l.bits);
    }
}

// body(first column, its padded place, columns) for every group.
template <class Body>
void each_group(const Layout& l, const Body& body) {
    for (int64_t g = 0; g < l.groups(); ++g)
        body(g * l.group, g * l.group_blocks * l.block_columns(), std::min(l.group, l.columns - g * l.group));
}

}  // namespace

void unpack_block(const uint8_t* chunk, int bits, int i, uint8_t* codes) {
    std::memset(codes, 0, 64);
    each_field(bits, i, [&](int offset, int shift, int width, int done) {
        const int mask = (1 << width) - 1;
        for (int b = 0; b < 64; ++b)
            codes[b] = static_cast<uint8_t>(codes[b] | (chunk[offset + b] >> shift & mask) << done);
    });
}

// read(row, codes) gives a row's codes.
template <class Read>
void fill_layout(const Layout& l, uint8_t* out, int threads, const Read& read) {
    parallel_for(l.tiles(), threads, [&](int64_t first, int64_t last) {
        std::vector<uint8_t> row(l.columns), tile(l.rows_per_tile * l.padded_columns());
        for (int64_t t = first; t < last; ++t) {
            for (int64_t r = 0; r < l.rows_per_tile && t * l.rows_per_tile + r < l.rows; ++r) {
                read(t * l.rows_per_tile + r, row.data());
                each_group(l, [&](int64_t from, int64_t to, int64_t count) {
                    std::memcpy(tile.data() + r * l.padded_columns() + to, row.data() + from, count);
                });
            }
            pack_tile(l, tile.data(), out + t * l.tile_bytes());
        }
    });
}

void to_layout(const Layout& l, const uint32_t* words, int64_t words_per_row, uint8_t* out, int threads) {
    fill_layout(l, out, threads, [&](int64_t row, uint8_t* codes) {
        read_words(words + row * words_per_row, l.bits, l.columns, codes);
    });
}

void bytes_to_layout(const Layout& l, const uint8_t* codes, uint8_t* out, int threads) {
    fill_layout(l, out, threads, [&](int64_t row, uint8_t* to) { std::memcpy(to, codes + row * l.columns, l.columns); });
}

void unpack_rows(const Layout& l, const uint8_t* stored, int64_t first, int64_t count, uint8_t* out, int threads) {
    const int64_t R = l.rows_per_tile, start = first / R, stop = (first + count + R - 1) / R;
    parallel_for(stop - start, threads, [&](int64_t from_tile, int64_t to_tile) {
        std::vector<uint8_t> tile(R * l.padded_columns());
        for (int64_t t = start + from_tile; t < start + to_tile; ++t) {
            unpack_tile(l, stored + t * l.tile_bytes(), tile.data());
            for (int64_t row = std::max(first, t * R); row < std::min(first + count, (t + 1) * R); ++row)
                each_group(l, [&](int64_t to, int64_t from, int64_t columns) {
                    std::memcpy(out + (row - first) * l.columns + to,
                                tile.data() + row % R * l.padded_columns() + from, columns);
                });
        }
    });
}

void gather_rows(const Layout& l, const uint8_t* stored, const int64_t* rows, int64_t count, uint8_t* out, int threads) {
    const int64_t R = l.rows_per_tile, width = l.block_columns();
    parallel_for(count, threads, [&](int64_t first, int64_t last) {
        std::vector<uint8_t> padded(l.padded_columns());
        for (int64_t i = first; i < last; ++i) {
            const uint8_t* tile = stored + rows[i] / R * l.tile_bytes();
            std::fill(padded.begin(), padded.end(), uint8_t{0});
            for (int64_t b = 0; b < l.chunks() * 8; ++b) {
                const uint8_t* chunk = tile + b / 8 * 64 * l.bits + rows[i] % R * width;
                uint8_t* to = padded.data() + b * width;
                each_field(l.bits, static_cast<int>(b % 8), [&](int offset, int shift, int bits, int done) {
                    for (int64_t c = 0; c < width; ++c)
                        to[c] = static_cast<uint8_t>(to[c] | (chunk[offset + c] >> shift & ((1 << bits) - 1)) << done);
                });
            }
            each_group(l, [&](int64_t to, int64_t from, int64_t columns) {
                std::memcpy(out + i * l.columns + to, padded.data() + from, columns);
            });
        }
    });
}

void from_layout(const Layout& l, const uint8_t* stored, uint32_t* words, int64_t words_per_row, int threads) {
    parallel_for(l.tiles(), threads, [&](int64_t first, int64_t last) {
        std::vector<uint8_t> codes(l.rows_per_tile * l.columns);
        for (int64_t t = first; t < last; ++t) {
            const int64_t row = t * l.rows_per_tile, count = std::min<int64_t>(l.rows_per_tile, l.rows - row);
            unpack_rows(l, stored, row, count, codes.data(), 1);
            for (int64_t r = 0; r < count; ++r)
                write_words(codes.data() + r * l.columns, l.bits, l.columns, words + (row + r) * words_per_row);
        }
    });
}

}  // namespace bitmill

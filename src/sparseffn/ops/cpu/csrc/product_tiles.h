// Products of bfloat16 on tiles, 2 x 2 sums at a time: of rows in blocks with a panel that is packed as for pairs, or with lines where
// they lie. Measured on one core (Xeon, family 6, model 167): 1,600 GFLOP/s from the second-level cache, where products of pairs reach
// 60 and those of floats 100.
#pragma once

#include "product_pairs.h"
#include "tiles.h"

namespace sparseffn {

#if defined(SPARSEFFN_TILES)

// A block of memory that is one tile: rows, numbers of each, and in all.
constexpr int64_t kTileRows = 16, kTileDepth = 32, kTileNumbers = kTileRows * kTileDepth;

inline int64_t tiles_of(int64_t numbers, int64_t of_one) { return (numbers + of_one - 1) / of_one; }

// Calls f(i, j) for R x N tiles, up to 2 x 2, with constants.
template <int R, int N, class F> SPARSEFFN_INLINE void in_each_tile(F&& f) {
    constexpr std::integral_constant<int, 0> zero;
    constexpr std::integral_constant<int, 1> one;
    f(zero, zero);
    if constexpr (N > 1) f(zero, one);
    if constexpr (R > 1) f(one, zero);
    if constexpr (R > 1 && N > 1) f(one, one);
}

// Sums of R x N tiles, at kPanelColumns from row to row, of R blocks of rows, so many numbers apart, times N registers of a panel's
// columns. Blocks of the same rows lie one behind the other. In each step so many lines of what comes next are fetched.
template <int R, int N>
SPARSEFFN_OWN_FRAME void sums_of_tiles(const bf16* a, int64_t apart, const uint32_t* panel, int64_t ld, int64_t depth_tiles,
                                       Coming& next, int64_t lines, float* to) {
    constexpr int64_t kNumber = sizeof(float);
    in_each_tile<R, N>([](auto i, auto j) { Tiles::set_to_zero<2 * i + j>(); });
    for (int64_t k = 0; k < depth_tiles; ++k) {
        next.fetch(lines);
        Tiles::load<4>(a + k * kTileNumbers, Tiles::kBytes);
        if constexpr (R > 1) Tiles::load<5>(a + apart + k * kTileNumbers, Tiles::kBytes);
        const uint32_t* b = panel + k * kTileRows * ld;
        Tiles::load<6>(b, ld * kNumber);
        if constexpr (N > 1) Tiles::load<7>(b + kPairLanes, ld * kNumber);
        in_each_tile<R, N>([](auto i, auto j) { Tiles::add_product<2 * i + j, 4 + i, 6 + j>(); });
    }
    in_each_tile<R, N>([&](auto i, auto j) {
        Tiles::store<2 * i + j>(to + i * kTileRows * kPanelColumns + j * kPairLanes, kPanelColumns * kNumber);
    });
}

// Calls out(i, registers) for each of so many rows, in blocks, times a panel that ends with whole tiles.
template <class Out>
SPARSEFFN_OWN_FRAME void product_tiles(const bf16* blocks, int64_t apart, int64_t rows, const uint32_t* panel, int64_t depth_tiles,
                                       int64_t columns, Coming& next, int64_t lines, Out&& out) {
    alignas(64) float sums[2 * kTileRows * kPanelColumns];
    with_constant<kPanelVectors>(vectors_in(columns), [&](auto n) {
        constexpr int N = decltype(n)::value;
        for (int64_t first = 0; first < rows; first += 2 * kTileRows) {
            const int64_t some = std::min(rows - first, 2 * kTileRows);
            const bf16* a = blocks + first / kTileRows * apart;
            for (int j = 0; j < N; j += 2)
                with_constant<2>(std::min(N - j, 2), [&](auto n_tiles) {
                    constexpr int C = decltype(n_tiles)::value;
                    const uint32_t* b = panel + j * kPairLanes;
                    float* to = sums + j * kPairLanes;
                    if (some > kTileRows) sums_of_tiles<2, C>(a, apart, b, N * kPairLanes, depth_tiles, next, lines, to);
                    else sums_of_tiles<1, C>(a, apart, b, N * kPairLanes, depth_tiles, next, lines, to);
                });
            for (int64_t i = 0; i < some; ++i) {
                __m512 row[N];
                std::memcpy(row, sums + i * kPanelColumns, sizeof row);
                out(first + i, row);
            }
        }
    });
}

// A panel as tiles read it: zero to the end of its last one.
inline void end_panel(int64_t depth, int64_t columns, uint32_t* panel) {
    const int64_t ld = vectors_in(columns) * kPairLanes, pairs = tiles_of(depth, kTileDepth) * kTileRows;
    std::fill(panel + pairs_in(depth) * ld, panel + pairs * ld, 0u);
}

// Tiles of lines of a matrix, which are read where they lie: up to 16 of them from `first` on, 32 numbers of each from `k` on. What is
// not there is zero: then the tile is copied.
class LineTiles {
  public:
    LineTiles(const bf16* first, int64_t lines, int64_t apart, int64_t depth)
        : first_(first), lines_(std::min(lines, kTileRows)), apart_(apart), depth_(depth) {}
    template <int T> SPARSEFFN_INLINE void load(int64_t k) {
        if (lines_ == kTileRows && k + kTileDepth <= depth_) Tiles::load<T>(first_ + k, apart_ * sizeof(bf16));
        else {
            copy(k);
            Tiles::load<T>(copy_, Tiles::kBytes);
        }
    }

  private:
    SPARSEFFN_OWN_FRAME void copy(int64_t k) {
        const __mmask32 there = first_halves(depth_ - k);
        for (int64_t i = 0; i < kTileRows; ++i) {
            const bf16* line = first_ + (i < lines_ ? i : 0) * apart_;
            _mm512_store_si512(copy_ + i * kTileDepth, _mm512_maskz_loadu_epi16(i < lines_ ? there : 0, line + k));
        }
    }

    const bf16* first_;
    int64_t lines_, apart_, depth_;
    alignas(64) bf16 copy_[kTileNumbers];
};

// Lines that are fetched into the second-level cache while others are read, all of them side by side: each is a stream of its own for
// the hardware, and many of them come faster than one (family 6, model 167, cold: 15 GB/s instead of 10).
struct LinesAhead {
    const char* at = nullptr;
    int64_t apart = 0, count = 0;

    SPARSEFFN_INLINE void fetch(int64_t byte) const {
        for (int64_t q = 0; q < count; ++q) __builtin_prefetch(at + q * apart + byte, 0, 2);
    }
    // Part i of n.
    LinesAhead part(int64_t i, int64_t n) const {
        const int64_t begin = count * i / n, end = count * (i + 1) / n;
        return {at + begin * apart, apart, end - begin};
    }
};

// Sums [lines, rows] of R tiles of lines, from line `first` of so many, times N blocks of rows that are turned: [pairs, rows].
template <int R, int N>
SPARSEFFN_OWN_FRAME void sums_of_lines(const bf16* lines, int64_t count, int64_t lines_apart, int64_t depth, const bf16* rows,
                                       int64_t apart, const LinesAhead& ahead, float* to) {
    LineTiles one(lines, count, lines_apart, depth);
    LineTiles two(R > 1 ? lines + kTileRows * lines_apart : lines, count - kTileRows, lines_apart, depth);
    in_each_tile<R, N>([](auto i, auto j) { Tiles::set_to_zero<2 * i + j>(); });
    for (int64_t k = 0; k < depth; k += kTileDepth) {
        ahead.fetch(k * sizeof(bf16));
        one.load<4>(k);
        if constexpr (R > 1) two.load<5>(k);
        const bf16* b = rows + k * kTileRows;
        Tiles::load<6>(b, Tiles::kBytes);
        if constexpr (N > 1) Tiles::load<7>(b + apart, Tiles::kBytes);
        in_each_tile<R, N>([](auto i, auto j) { Tiles::add_product<2 * i + j, 4 + i, 6 + j>(); });
    }
    in_each_tile<R, N>([&](auto i, auto j) {
        Tiles::store<2 * i + j>(to + (i * 2 + j) * kTileRows * kTileRows, kTileRows * sizeof(float));
    });
}

// to[row][line], at kPanelColumns from row to row: so many rows, in turned blocks, times lines.
SPARSEFFN_OWN_FRAME inline void product_lines_by_tiles(const bf16* blocks, int64_t apart, int64_t rows, const bf16* lines,
                                                       int64_t lines_apart, int64_t depth, int64_t columns, const Coming& next,
                                                       float* to) {
    alignas(64) float sums[4][kTileRows][kTileRows];
    for (int64_t c = 0; c < columns; c += 2 * kTileRows) {
        const int64_t after = c + 2 * kTileRows, apart_bytes = lines_apart * static_cast<int64_t>(sizeof(bf16));
        LinesAhead ahead{reinterpret_cast<const char*>(lines + after * lines_apart), apart_bytes,
                         std::min(columns - after, 2 * kTileRows)};
        if (after >= columns) ahead = {next.at(), next.stride(), next.at() ? 2 * kTileRows : 0};
        for (int64_t r = 0; r < rows; r += 2 * kTileRows) {
            const int64_t n_columns = tiles_of(std::min(columns - c, 2 * kTileRows), kTileRows);
            const int64_t n_rows = tiles_of(std::min(rows - r, 2 * kTileRows), kTileRows);
            const LinesAhead own = ahead.part(r / (2 * kTileRows), tiles_of(rows, 2 * kTileRows));
            const bf16* b = blocks + r / kTileRows * apart;
            with_constant<2>(static_cast<int>(n_columns), [&](auto i) {
                with_constant<2>(static_cast<int>(n_rows), [&](auto j) {
                    constexpr int R = decltype(i)::value, N = decltype(j)::value;
                    sums_of_lines<R, N>(lines + c * lines_apart, columns - c, lines_apart, depth, b, apart, own, sums[0][0]);
                });
            });
            for (int64_t i = 0; i < n_columns; ++i)
                for (int64_t j = 0; j < n_rows; ++j) {
                    PairLine square[kTileRows];
                    std::memcpy(square, sums[2 * i + j], sizeof square);
                    transpose_square<kTileRows / 2>(square);
                    for (int64_t q = 0; q < kTileRows; ++q)
                        _mm512_storeu_si512(to + (r + j * kTileRows + q) * kPanelColumns + c + i * kTileRows, (__m512i)square[q]);
                }
        }
    }
}

#endif

}  // namespace sparseffn

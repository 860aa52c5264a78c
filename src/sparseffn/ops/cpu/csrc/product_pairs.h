// Products of many bfloat16 rows, on instructions that add a pair of products to a float: acc += a[k] b[k] + a[k + 1] b[k + 1].
// B is packed by panels of columns, the pairs of a column side by side; rows of A are read where they lie, as pairs already.
// Measured on one core (Zen 5): 565 GFLOP/s, two such instructions a cycle, from panels of up to 128 KiB; a float product reaches
// 270.
#pragma once

#include "matrix.h"

#if defined(__AVX512BF16__) && defined(__AVX512BW__)
#define SPARSEFFN_PAIR_PRODUCTS
#include <immintrin.h>
#endif

namespace sparseffn {

// Whether products of many rows of this type go by pairs.
#if defined(SPARSEFFN_PAIR_PRODUCTS)
template <class S> constexpr bool kByPairs = std::is_same_v<S, bf16>;
#else
template <class S> constexpr bool kByPairs = false;
#endif

#if defined(SPARSEFFN_PAIR_PRODUCTS)

// Compiled into a caller with much else, a tile's sums leave their registers: the same product takes twice as long.
#define SPARSEFFN_OWN_FRAME __attribute__((noinline))

// A tile of kPairRows rows and kPanelVectors registers of columns keeps its sums in 24 of 32 registers.
constexpr int kPairRows = 6, kPanelVectors = 4, kPairLanes = 16;
constexpr int64_t kPanelColumns = kPanelVectors * kPairLanes;
// A tile of a gradient of weights: rows and registers of columns.
constexpr int kOuterRows = 8, kOuterVectors = 3;

typedef uint32_t PairLine __attribute__((vector_size(64)));

inline int64_t pairs_in(int64_t depth) { return (depth + 1) / 2; }
inline int vectors_in(int64_t columns) { return static_cast<int>((columns + kPairLanes - 1) / kPairLanes); }
// The first n of a register's 16-bit numbers.
inline __mmask32 first_halves(int64_t n) {
    return n >= 32 ? ~__mmask32(0) : n <= 0 ? 0 : static_cast<__mmask32>((uint32_t(1) << n) - 1);
}

// Lines that are fetched ahead of those that are woven: the hardware does not follow them from page to page.
constexpr int64_t kLinesAhead = 16;

// Calls put(pair, column, 16 pairs) for all pairs of lines and all registers of columns; what is not there is zero. From column c on,
// 32 of them, line k is at line_at(k) + c.
template <class LineAt, class Put> void weave(int64_t depth, int64_t columns, LineAt&& line_at, Put&& put) {
    alignas(64) static constexpr uint16_t kOrder[32] = {0, 32, 1, 33, 2, 34, 3, 35, 4, 36, 5, 37, 6, 38, 7, 39,
                                                        8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
    const __m512i low = _mm512_load_si512(kOrder), high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
    for (int64_t k = 0; k < depth; k += 2) {
        const bool both = k + 1 < depth;
        const auto first = line_at(k), second = both ? line_at(k + 1) : first;
        const decltype(first) ahead[2] = {line_at(std::min(k + kLinesAhead, depth - 1)),
                                          line_at(std::min(k + 1 + kLinesAhead, depth - 1))};
        for (int64_t c = 0; c < columns; c += 32) {
            for (const auto& line : ahead) __builtin_prefetch(line + c);
            const __mmask32 mask = first_halves(columns - c);
            const __m512i a = _mm512_maskz_loadu_epi16(mask, first + c);
            const __m512i b = _mm512_maskz_loadu_epi16(both ? mask : 0, second + c);
            put(k / 2, c, _mm512_permutex2var_epi16(a, low, b));
            if (c + kPairLanes < columns) put(k / 2, c + kPairLanes, _mm512_permutex2var_epi16(a, high, b));
        }
    }
}

// The same for lines whose every second number is a column.
inline void pack_every_second(const Matrix<bf16>& b, int64_t depth, int64_t columns, uint32_t* to, int64_t ld) {
    for (int64_t k = 0; k < depth; k += 2)
        for (int64_t c = 0; c < columns; c += kPairLanes) {
            // Not the one behind the last, which may be nobody's.
            const __mmask32 mask = first_halves(2 * (columns - c) - 1);
            const __m512i one = _mm512_maskz_loadu_epi16(mask, b.at(k, c));
            const __m512i two = _mm512_maskz_loadu_epi16(k + 1 < depth ? mask : 0, b.at(k + 1 < depth ? k + 1 : k, c));
            const PairLine pairs = ((PairLine)one & 0xffffu) | (PairLine)two << 16;
            _mm512_storeu_si512(to + k / 2 * ld + c, (__m512i)pairs);
        }
}

// The same for columns that are lines: squares of pairs are transposed.
inline void pack_columns(const Matrix<bf16>& b, int64_t depth, int64_t columns, uint32_t* to, int64_t ld) {
    // The hardware does not follow so many lines far enough.
    constexpr int64_t kBytesAhead = 512;
    for (int64_t c = 0; c < columns; c += kPairLanes)
        for (int64_t k = 0; k < depth; k += 2 * kPairLanes) {
            const __mmask32 mask = first_halves(depth - k);
            PairLine lines[kPairLanes];
            for (int i = 0; i < kPairLanes; ++i) {
                if (c + i < columns) __builtin_prefetch(reinterpret_cast<const char*>(b.at(k, c + i)) + kBytesAhead);
                lines[i] = (PairLine)_mm512_maskz_loadu_epi16(c + i < columns ? mask : 0, b.at(k, c + i < columns ? c + i : c));
            }
            transpose_square<kPairLanes / 2>(lines);
            const int64_t pairs = std::min<int64_t>(kPairLanes, pairs_in(depth) - k / 2);
            for (int64_t j = 0; j < pairs; ++j) _mm512_storeu_si512(to + (k / 2 + j) * ld + c, (__m512i)lines[j]);
        }
}

// A panel of B [depth, columns]: to[k / 2][c] is the pair of rows k and k + 1 in column c, zero where there is none, for whole
// registers of columns.
inline void pack_panel(const Matrix<bf16>& b, int64_t depth, int64_t columns, uint32_t* to) {
    const int64_t ld = vectors_in(columns) * kPairLanes;
    if (b.column == 1)
        return weave(depth, columns, [&](int64_t k) { return b.at(k, 0); },
                     [&](int64_t pair, int64_t c, __m512i v) { _mm512_storeu_si512(to + pair * ld + c, v); });
    if (b.row == 1) return pack_columns(b, depth, columns, to, ld);
    if (b.column == 2) return pack_every_second(b, depth, columns, to, ld);
    for (int64_t k = 0; k < depth; k += 2)
        for (int64_t c = 0; c < ld; ++c) {
            const uint32_t one = c < columns ? b.at(k, c)->bits : 0;
            const uint32_t two = c < columns && k + 1 < depth ? b.at(k + 1, c)->bits : 0;
            to[k / 2 * ld + c] = one | two << 16;
        }
}

// Pairs of a product's depth in a turn, in which some of what comes next is fetched.
constexpr int64_t kPairsOfTurn = kTerms / 2;

// acc[i][j] = sum over pairs of pair_at(i, k) panel[k][j]; `pair_at` gives 32 bits.
template <int R, int N, class PairAt>
SPARSEFFN_INLINE void tile_pairs(int64_t pairs, const uint32_t* panel, __m512 (&acc)[R][N], PairAt&& pair_at) {
    for (int64_t k = 0; k < pairs; ++k) {
        tile_step<R, N>(
            acc, [&](int i) { return _mm512_set1_epi32(static_cast<int>(pair_at(i, k))); },
            [&](int j) { return _mm512_loadu_si512(panel + (k * N + j) * kPairLanes); },
            [](__m512 sum, __m512i a, __m512i b) { return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b); });
    }
}

// Calls out(i, registers) for each row i of A times the panel. Rows of A are contiguous. In each turn so many lines of what comes
// next are fetched.
template <class Out>
SPARSEFFN_OWN_FRAME void product_pairs(const bf16* const* a, int64_t rows, const uint32_t* panel, int64_t depth, int64_t columns,
                                       Coming& next, int64_t lines, Out&& out) {
    with_constant<kPanelVectors>(vectors_in(columns), [&](auto n) {
        constexpr int N = decltype(n)::value;
        const auto block = [&](int64_t first, auto r) {
            constexpr int R = decltype(r)::value;
            const bf16* row[R];
            for (int i = 0; i < R; ++i) row[i] = a[first + i];
            __m512 acc[R][N] = {};
            for (int64_t begin = 0; begin < depth / 2; begin += kPairsOfTurn) {
                next.fetch(lines);
                const int64_t pairs = std::min(kPairsOfTurn, depth / 2 - begin);
                tile_pairs<R, N>(pairs, panel + begin * N * kPairLanes, acc, [&](int i, int64_t k) {
                    uint32_t pair;
                    std::memcpy(&pair, row[i] + 2 * (begin + k), sizeof pair);
                    return pair;
                });
            }
            // What follows the last number of a row may be NaN, which zero does not undo.
            if (depth % 2)
                tile_pairs<R, N>(1, panel + depth / 2 * N * kPairLanes, acc,
                                 [&](int i, int64_t) { return static_cast<uint32_t>(row[i][depth - 1].bits); });
            for (int i = 0; i < R; ++i) out(first + i, acc[i]);
        };
        in_tiles<kPairRows>(rows, block);
    });
}

#endif

}  // namespace sparseffn

// Products of few bfloat16 rows with a matrix whose rows are lines of memory, which are read once and in their order. Two lines
// are woven into pairs of a column, whose products the processor adds to a float sum.
#pragma once

#include <algorithm>

#include "product.h"

namespace sparseffn {

// Lines that are read side by side. As many after them are fetched meanwhile, in the order of memory where these lie in one piece.
// Measured cold on two cores (Zen 5), 32 experts of 128 units at width 1,024, 64 tokens: 2.2 ms without, 0.53 with each line
// fetched from where one before it is read, 0.56 to 0.70 so further ahead; in the order of memory 4% less than 0.53, one token 5%.
// They come into the first-level cache: from the second, lines of 128 numbers took 1.03 to 1.16 of the time (Zen 4).
constexpr int kLinesAtOnce = 8;

#if defined(SPARSEFFN_PAIRS)

// 32 columns of two lines as 16 pairs each of columns 0-3, 8-11, ... and 4-7, 12-15, ...
struct Pairs {
    __m512bh even, odd;

    static Pairs of(__m512i first, __m512i second) {
        return {(__m512bh)_mm512_unpacklo_epi16(first, second), (__m512bh)_mm512_unpackhi_epi16(first, second)};
    }
};

// y[i][columns j..j + 32] += sum over N lines of a[i][line] B[line]; `mask` has the columns there are.
template <int N>
SPARSEFFN_INLINE void add_lines(const bf16* const* a, int64_t at, int64_t rows, const bf16* const* lines, int64_t j,
                                uint32_t mask, float* const* y) {
    constexpr int P = (N + 1) / 2;
    const __m512i low = _mm512_set_epi32(23, 22, 21, 20, 7, 6, 5, 4, 19, 18, 17, 16, 3, 2, 1, 0);
    const __m512i high = _mm512_set_epi32(31, 30, 29, 28, 15, 14, 13, 12, 27, 26, 25, 24, 11, 10, 9, 8);
    Pairs pairs[P];
    for (int p = 0; p < P; ++p) {
        const __m512i first = _mm512_maskz_loadu_epi16(mask, lines[2 * p] + j);
        const __m512i second = 2 * p + 1 < N ? _mm512_maskz_loadu_epi16(mask, lines[2 * p + 1] + j) : _mm512_setzero_si512();
        pairs[p] = Pairs::of(first, second);
    }
    const __mmask16 left = static_cast<__mmask16>(mask), right = static_cast<__mmask16>(mask >> 16);
    for (int64_t i = 0; i < rows; ++i) {
        __m512 even = _mm512_setzero_ps(), odd = _mm512_setzero_ps();
        for (int p = 0; p < P; ++p) {
            uint32_t pair = 0;
            std::memcpy(&pair, a[i] + at + 2 * p, 2 * p + 1 < N ? 4 : 2);
            const __m512bh x = (__m512bh)_mm512_set1_epi32(static_cast<int>(pair));
            even = _mm512_dpbf16_ps(even, x, pairs[p].even);
            odd = _mm512_dpbf16_ps(odd, x, pairs[p].odd);
        }
        float* to = y[i] + j;
        const __m512 one = _mm512_permutex2var_ps(even, low, odd), two = _mm512_permutex2var_ps(even, high, odd);
        _mm512_mask_storeu_ps(to, left, _mm512_maskz_loadu_ps(left, to) + one);
        _mm512_mask_storeu_ps(to + 16, right, _mm512_maskz_loadu_ps(right, to + 16) + two);
    }
}

// y[i] += a[i] B for rows of `depth` numbers, where B's row k is line_at(k).
template <class LineAt>
void product_lines(const bf16* const* a, int64_t rows, int64_t depth, int64_t columns, float* const* y,
                   LineAt&& line_at) {
    for (int64_t k = 0; k < depth; k += kLinesAtOnce)
        with_constant<kLinesAtOnce>(static_cast<int>(std::min<int64_t>(kLinesAtOnce, depth - k)), [&](auto n) {
            constexpr int N = decltype(n)::value;
            const bf16* lines[N];
            for (int q = 0; q < N; ++q) lines[q] = line_at(k + q);
            const int64_t more = std::min<int64_t>(N, depth - k - N);
            const bf16* after = more > 0 ? line_at(k + N) : nullptr;
            const bool in_one_piece = more == N && line_at(k + 2 * N - 1) - after == (N - 1) * columns;
            for (int64_t j = 0; j < columns; j += 32) {
                if (in_one_piece)
                    for (int q = 0; q < N; ++q) __builtin_prefetch(after + N * j + 32 * q);
                else
                    for (int q = 0; q < more; ++q) __builtin_prefetch(line_at(k + N + q) + j);
                const int64_t left = columns - j;
                add_lines<N>(a, k, rows, lines, j, left >= 32 ? ~uint32_t(0) : (uint32_t(1) << left) - 1, y);
            }
        });
}

#endif

}  // namespace sparseffn

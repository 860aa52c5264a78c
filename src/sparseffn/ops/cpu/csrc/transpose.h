// Transposes: squares of one register's lanes are transposed in registers.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <utility>

#include "product.h"
#include "shuffle.h"

namespace sparseffn {

// Rows that one call of transpose_rows takes: whole squares of every type.
constexpr int64_t kStrip = 16;

// Lanes of a square: as many numbers as one register computes with.
template <class S> constexpr int kSquare = kLanes<compute_t<S>>;
template <int Bytes> struct bits_of;
template <> struct bits_of<2> { using type = uint16_t; };
template <> struct bits_of<4> { using type = uint32_t; };
template <> struct bits_of<8> { using type = uint64_t; };
template <class S> struct line_of {
    typedef typename bits_of<sizeof(S)>::type type __attribute__((vector_size(kSquare<S> * sizeof(S))));
};

// Of the squares of side H that a and b hold in turns, swaps a's every second one for b's every first.
template <int H, class V, int... Q> SPARSEFFN_INLINE void swap_squares(V& a, V& b, std::integer_sequence<int, Q...>) {
    constexpr int n = sizeof...(Q);
    const V first = SPARSEFFN_SHUFFLE(V, a, b, (Q & H ? n + Q - H : Q)...);
    b = SPARSEFFN_SHUFFLE(V, a, b, (Q & H ? n + Q : Q + H)...);
    a = first;
}

// Transposes squares of side 2 H: in each, the two of side H off the diagonal change places, then all four are transposed.
template <int H, class V, int N> SPARSEFFN_INLINE void transpose_square(V (&lines)[N]) {
    if constexpr (H > 0) {
#pragma GCC unroll 16
        for (int i = 0; i < N; ++i)
            if (!(i & H)) swap_squares<H>(lines[i], lines[i + H], std::make_integer_sequence<int, N>{});
        transpose_square<H / 2>(lines);
    }
}

// Rows first..first + kStrip of a, [rows, columns] at lda, as columns of its transpose at ldb.
template <class S>
void transpose_rows(const S* a, int64_t rows, int64_t columns, int64_t lda, int64_t first, S* b, int64_t ldb) {
    constexpr int N = kSquare<S>;
    const int64_t last = std::min(first + kStrip, rows);
    for (int64_t r = first; r < last; r += N) {
        int64_t c = 0;
        for (; r + N <= rows && c + N <= columns; c += N) {
            typename line_of<S>::type lines[N];
            for (int i = 0; i < N; ++i) {
                std::memcpy(&lines[i], a + (r + i) * lda + c, sizeof lines[i]);
                __builtin_prefetch(a + (r + i + N) * lda + c);
            }
            transpose_square<N / 2>(lines);
            for (int j = 0; j < N; ++j) std::memcpy(b + (c + j) * ldb + r, &lines[j], sizeof lines[j]);
        }
        for (; c < columns; ++c)
            for (int64_t i = r; i < std::min(r + N, last); ++i) b[c * ldb + i] = a[i * lda + c];
    }
}

// b = a^T by one thread.
template <class S> void transpose(const S* a, int64_t rows, int64_t columns, int64_t lda, S* b, int64_t ldb) {
    for (int64_t first = 0; first < rows; first += kStrip) transpose_rows(a, rows, columns, lda, first, b, ldb);
}

}  // namespace sparseffn

// Matrix-product tiles with gathered rows: rows of A are pointers, so that a gather costs nothing; B comes by panels of columns
// (`ByPanels`). Accumulation is in C, in an order that depends on the number of rows alone.
#pragma once

#include <algorithm>
#include <utility>
#include <vector>

#include "vectors.h"

// A tile's accumulators live in registers only where the tile is compiled into its caller.
#define SPARSEFFN_INLINE __attribute__((always_inline)) inline

namespace sparseffn {

// `v` in a register, loaded once for all of its uses. Where the uses are few, GCC 12 loads it again for each on x86-64, and a tile
// then waits for the loads.
template <class V> SPARSEFFN_INLINE V held(V v) {
#if defined(__x86_64__)
    asm("" : "+v"(v));
#endif
    return v;
}

// Calls f(i, j, waiting(i), passing(j)) for all pairs: one side waits in registers for the other, which passes one by one.
template <int Waiting, int Passing, class W, class P, class F> SPARSEFFN_INLINE void meet(W&& waiting, P&& passing, F&& f) {
    decltype(waiting(0)) all[Waiting];
#pragma GCC unroll 8
    for (int i = 0; i < Waiting; ++i) all[i] = held(waiting(i));
#pragma GCC unroll 8
    for (int j = 0; j < Passing; ++j) {
        const auto one = Waiting > 1 ? held(passing(j)) : passing(j);
#pragma GCC unroll 8
        for (int i = 0; i < Waiting; ++i) f(i, j, all[i], one);
    }
}

// acc[i][j] = sum(acc[i][j], a(i), b(j)). The shorter side waits.
template <int R, int N, class V, class A, class B, class Sum>
SPARSEFFN_INLINE void tile_step(V (&acc)[R][N], A&& a, B&& b, Sum&& sum) {
    if constexpr (R < N) meet<R, N>(a, b, [&](int i, int j, auto x, auto y) { acc[i][j] = sum(acc[i][j], x, y); });
    else meet<N, R>(b, a, [&](int j, int i, auto y, auto x) { acc[i][j] = sum(acc[i][j], x, y); });
}

// What tile_step adds, of floats and doubles.
template <class V> struct MultiplyAdd {
    SPARSEFFN_INLINE V operator()(V acc, V a, V b) const { return acc + a * b; }
};

// Lines of B that are fetched ahead, in rows: the hardware does not follow strided lines far enough.
constexpr int64_t kAhead = 12;

// Part of a line of memory.
struct Run {
    const char *at, *end;
};

// Lines of memory that are read next, brought into the second-level cache by and by. Fetched all at once, at the start of each
// tile, many were not there in time: measured on two cores (Zen 5), 512 tokens of gated experts in bfloat16 took 10 to 15% longer.
class Coming {
  public:
    Coming() = default;
    template <class S> Coming(const S* at, int64_t lines, int64_t stride, int64_t length)
        : line_(reinterpret_cast<const char*>(at)),
          bytes_(length * static_cast<int64_t>(sizeof(S))),
          stride_(stride * static_cast<int64_t>(sizeof(S))),
          lines_(lines) {
        // Without gaps all are one line.
        if (stride == length && lines > 0) bytes_ *= std::exchange(lines_, 1);
    }

    // Lines of a cache to fetch in each of so many turns: an equal part, rounded up.
    int64_t share(int64_t turns) const {
        turns = std::max<int64_t>(turns, 1);
        return (lines_ * ((bytes_ + kLine - 1) / kLine) + turns - 1) / turns;
    }
    // The next n lines of a cache, or what is left of the line of memory; an empty run at `otherwise` where nothing is left. To take
    // from the following line, too, made short ones no faster and all others up to 4% slower (Zen 4).
    Run take(int64_t n, const void* otherwise) {
        if (lines_ == 0) return {static_cast<const char*>(otherwise), static_cast<const char*>(otherwise)};
        const Run run{line_ + at_, line_ + std::min(at_ + n * kLine, bytes_)};
        skip(n);
        return run;
    }
    // The line that is fetched next, and bytes from line to line; null where nothing comes.
    const char* at() const { return line_; }
    int64_t stride() const { return stride_; }
    void fetch(int64_t n) {
        for (; n > 0 && lines_ > 0; --n) {
            __builtin_prefetch(line_ + at_, 0, 2);
            skip(1);
        }
    }

  private:
    void skip(int64_t n) {
        at_ += n * kLine;
        if (at_ < bytes_) return;
        at_ = 0;
        line_ += stride_;
        --lines_;
    }

    const char* line_ = nullptr;
    int64_t bytes_ = 0, stride_ = 0, lines_ = 0, at_ = 0;
};

// Terms that are added up one after the other; sums of such sums err less than one long sum. Measured at 1,024 and 4,096
// tokens: 64 instead are 0 to 2% faster, and their largest error can be more than twice PyTorch's.
constexpr int64_t kTerms = 32;

inline int64_t turns_in(int64_t depth) { return (depth + kTerms - 1) / kTerms; }

// Of a panel's tiles of rows the first one reads from memory, and perhaps copies.
enum class Tile { kFirst, kCopies, kLater };
template <Tile Kind> constexpr std::integral_constant<Tile, Kind> kind{};

// acc[i][j] = sum_k a[i][k] B[k, j]: rows of A contiguous in k. The first tile of a panel brings B into the cache, the others
// so many lines of what comes next in each turn, one with a term, and then where they end again and again: a branch in the innermost
// loop took up to 11% longer, all lines at the start of a turn 3 to 7% (Zen 4). One that copies leaves B's lines side by side in
// `copy`, too.
template <class C, class S, int R, int N, Tile Kind>
SPARSEFFN_INLINE void tile_product(const C* const* a, const S* b, int64_t ldb, int64_t depth, Coming& next, int64_t per_turn,
                                   [[maybe_unused]] S* copy, Vec<C> (&acc)[R][N]) {
    constexpr bool First = Kind != Tile::kLater;
    // A tile of few rows waits for memory, of which the second-level cache has more requests under way; one of more would wait for
    // that cache.
    constexpr int kLevel = R <= kRows / 2 ? 2 : 3;
    Coming ahead = next;
    const C* row[R];
    for (int i = 0; i < R; ++i) {
        row[i] = a[i];
        for (int j = 0; j < N; ++j) acc[i][j] = Vec<C>{};
    }
    for (int64_t begin = 0; begin < depth; begin += kTerms) {
        Vec<C> part[R][N] = {};
        const int64_t end = begin + kTerms < depth ? begin + kTerms : depth;
        Run run = First ? Run{} : ahead.take(std::min(per_turn, end - begin), b);
        for (int64_t k = begin; k < end; ++k) {
            if constexpr (First)
                for (int j = 0; j < N; ++j) __builtin_prefetch(b + (k + kAhead) * ldb + j * kLanes<C>, 0, kLevel);
            else {
                __builtin_prefetch(run.at, 0, 2);
                run.at = std::min(run.at + kLine, run.end);
            }
            if constexpr (Kind == Tile::kCopies)
                std::memcpy(static_cast<void*>(copy + k * N * kLanes<C>), b + k * ldb, N * kLanes<C> * sizeof(S));
            tile_step<R, N>(part, [&](int i) { return splat<C>(row[i][k]); }, [&](int j) { return load(b + k * ldb + j * kLanes<C>); },
                            MultiplyAdd<Vec<C>>{});
        }
        for (int i = 0; i < R; ++i)
            for (int j = 0; j < N; ++j) acc[i][j] += part[i][j];
    }
    next = ahead;
}

// acc[i][j] = sum_r a(r)[i] b(r)[j] over rows r: the outer products of a gradient of weights.
template <class C, int R, int N, class A, class B> SPARSEFFN_INLINE void tile_outer(A&& a, B&& b, int64_t depth, Vec<C> (&acc)[R][N]) {
    for (int i = 0; i < R; ++i)
        for (int j = 0; j < N; ++j) acc[i][j] = Vec<C>{};
    for (int64_t begin = 0; begin < depth; begin += kTerms) {
        Vec<C> part[R][N] = {};
        const int64_t end = begin + kTerms < depth ? begin + kTerms : depth;
        for (int64_t r = begin; r < end; ++r) {
            const C* x = a(r);
            const C* y = b(r);
            tile_step<R, N>(part, [&](int i) { return splat<C>(x[i]); }, [&](int j) { return load(y + j * kLanes<C>); },
                            MultiplyAdd<Vec<C>>{});
        }
        for (int i = 0; i < R; ++i)
            for (int j = 0; j < N; ++j) acc[i][j] += part[i][j];
    }
}

// Calls f(std::integral_constant<int, n>) for the n in 1..Most that equals `value`.
template <int Most, class F> inline void with_constant(int value, F&& f) {
    if constexpr (Most > 0) {
        if (value == Most) f(std::integral_constant<int, Most>{});
        else with_constant<Most - 1>(value, f);
    }
}

template <int Most> inline int64_t tiles_in(int64_t rows) { return (rows + Most - 1) / Most; }

// Calls f(first, std::integral_constant<int, n>) for rows in tiles of n <= Most, as equal as they can be: one of one or two
// rows, left over, takes nearly as long as one of three, as each of its few sums waits for the product before.
template <int Most, class F> inline void in_tiles(int64_t rows, F&& f) {
    for (int64_t first = 0, left = tiles_in<Most>(rows); left > 0; --left) {
        const int n = static_cast<int>((rows - first + left - 1) / left);
        with_constant<Most>(n, [&](auto size) { f(first, size); });
        first += n;
    }
}

// A panel of some columns of B, whole registers of them.
template <class C, class S> struct Panel {
    const S* data;
    int64_t ld;
    int vectors;
};

// Elements of the memory for a packed panel.
template <class C> inline int64_t panel_size(int64_t depth) { return depth * 2 * kVectors * kLanes<C>; }
// The same where panels are read where they lie, but for a ragged one.
template <class C> inline int64_t ragged_size(int64_t depth, int64_t columns) {
    return columns % kLanes<C> == 0 ? 0 : panel_size<C>(depth);
}

// Calls out(i, first column, columns, values) for each row i of `A B`, a panel of W registers of columns at a time, as B gives
// them (`ByPanels`). `next` is what comes after B.
template <class C, int Rows, int W, class B, class Out>
inline void product_of(const C* const* a, int64_t rows, const B& b, int64_t columns, const Coming& next, Out&& out) {
    const auto columns_at = [=](int64_t first) { return static_cast<int>(std::min<int64_t>(columns - first, W * kLanes<C>)); };
    // All tiles but a panel's first fetch what comes after B or, where panels are packed, the next one: packing waits for its lines.
    // In place a panel's first tile fetches its own, and to fetch panel by panel instead of what comes after B took 3 to 4% more
    // (64 tokens of WT-S in float32, cold, Zen 4).
    const int64_t turns = (rows - 1) / Rows * turns_in(b.depth), panels = (columns + W * kLanes<C> - 1) / (W * kLanes<C>);
    Coming coming = next;
    int64_t per_turn = next.share(turns * panels);
    for (int64_t first = 0; first < columns; first += W * kLanes<C>) {
        const int width = columns_at(first);
        const int64_t after = first + width;
        if (b.packs()) {
            coming = after < columns ? b.coming(after, columns_at(after)) : next;
            per_turn = coming.share(turns);
        }
        const auto panel = b.panel(first, width);
        with_constant<W>(panel.vectors, [&](auto n) {
            constexpr int N = decltype(n)::value;
            const auto block = [&](int64_t i, auto r, auto k, const auto* data, int64_t ld) {
                constexpr int R = decltype(r)::value;
                Vec<C> acc[R][N];
                tile_product<C, std::decay_t<decltype(*data)>, R, N, decltype(k)::value>(a + i, data, ld, b.depth, coming, per_turn,
                                                                                       b.space, acc);
                for (int q = 0; q < R; ++q) out(i + q, first, width, acc[q]);
            };
            // The ragged tile comes first: it has registers to spare for fetching ahead.
            const int64_t ragged = rows % Rows || rows == 0 ? rows % Rows : Rows;
            const auto all = [&](auto k, const auto* data, int64_t ld) {
                with_constant<Rows>(static_cast<int>(ragged), [&](auto r) { block(0, r, k, panel.data, panel.ld); });
                for (int64_t i = ragged; i < rows; i += Rows)
                    block(i, std::integral_constant<int, Rows>{}, kind<Tile::kLater>, data, ld);
            };
            if constexpr (Rows == kRows && N == W)
                if (rows > Rows && b.copies(panel)) return all(kind<Tile::kCopies>, b.space, N * kLanes<C>);
            all(kind<Tile::kFirst>, panel.data, panel.ld);
        });
    }
}

// Few rows take panels of twice the width: B is then read in longer stretches.
template <class C, class B, class Out>
inline void product(const C* const* a, int64_t rows, const B& b, int64_t columns, const Coming& next, Out&& out) {
    if (rows <= kRows / 2) product_of<C, kRows / 2, 2 * kVectors>(a, rows, b, columns, next, out);
    else product_of<C, kRows, kVectors>(a, rows, b, columns, next, out);
}

// Lines of B that are read side by side where they come from a list. As many after them are fetched meanwhile into the second-level
// cache: measured cold on two cores (Zen 4, 412 x 128), one to three rows take 0.65 of the time; fetched into the first-level cache
// they take 0.8 to 1.1 of it.
constexpr int kListed = 8;

// y[i] += sum over k in list of a[i][k] B[k, :], for R rows of A and B of at least one register's columns: each listed line is
// read once, from its first element to its last. With 4,096 of them one after the other, the largest error was 0.2 to 0.7 of
// PyTorch's.
template <class C, class S, int R>
inline void add_listed(const C* const* a, const S* b, int64_t ldb, int64_t columns, const std::vector<int64_t>& list,
                       C* const* y) {
    const int64_t count = static_cast<int64_t>(list.size());
    for (int64_t first = 0; first < count; first += kListed)
        with_constant<kListed>(static_cast<int>(count - first < kListed ? count - first : kListed), [&](auto n) {
            constexpr int N = decltype(n)::value;
            const int64_t* ks = list.data() + first;
            const S* after[N];
            for (int q = 0; q < N; ++q) after[q] = b + ks[first + N + q < count ? N + q : q] * ldb;
            const auto sum = [&](int64_t j, Vec<C> (&acc)[R]) {
                for (int q = 0; q < N; ++q) __builtin_prefetch(after[q] + j, 0, 2);
                for (int i = 0; i < R; ++i) acc[i] = Vec<C>{};
                for (int q = 0; q < N; ++q) {
                    const Vec<C> line = held(load(b + ks[q] * ldb + j));
                    for (int i = 0; i < R; ++i) acc[i] += splat<C>(a[i][ks[q]]) * line;
                }
            };
            Vec<C> acc[R];
            int64_t j = 0;
            for (; j + kLanes<C> <= columns; j += kLanes<C>) {
                sum(j, acc);
                for (int i = 0; i < R; ++i) store(y[i] + j, load(y[i] + j) + acc[i]);
            }
            if (j == columns) return;
            // The last columns as the end of a whole register.
            const int64_t from = columns - kLanes<C>;
            sum(from, acc);
            for (int i = 0; i < R; ++i)
                for (int64_t c = j; c < columns; ++c) y[i][c] += acc[i][c - from];
        });
}

// Sum over the lanes of a register, by halves.
template <class C> inline C sum_of_lanes(Vec<C> v) {
    C lanes[kLanes<C>];
    store(lanes, v);
    for (int half = kLanes<C> / 2; half > 0; half /= 2)
        for (int q = 0; q < half; ++q) lanes[q] += lanes[q + half];
    return lanes[0];
}

template <class C, int N> inline void put(C* to, const Vec<C> (&values)[N], int columns) {
    std::memcpy(to, values, columns * sizeof(C));
}

// The same, rounded to what is stored.
template <class S, int N> inline void put_narrowed(S* to, const Vec<compute_t<S>> (&values)[N], int columns) {
    using C = compute_t<S>;
    if constexpr (std::is_same_v<S, C>) return put(to, values, columns);
    C row[N * kLanes<C>];
    std::memcpy(row, values, sizeof row);
    for (int c = 0; c < columns; ++c) to[c] = narrow<S>(row[c]);
}

template <class C, int N> inline void add(C* to, const Vec<C> (&values)[N], int columns) {
    for (int j = 0; j < N; ++j) {
        const int left = columns - j * kLanes<C>;
        C* at = to + j * kLanes<C>;
        if (left >= kLanes<C>) store(at, load(at) + values[j]);
        else
            for (int c = 0; c < left; ++c) at[c] += values[j][c];
    }
}

}  // namespace sparseffn

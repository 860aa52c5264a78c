// Weighted sums of value rows, y[t] = sum_k w[t, k] values[i[t, k]], and their gradients.
//
// Pairs (token, k) are grouped by neighbouring value rows: a group's rows stay in the first-level cache while all tokens that
// use some of them pass by, and a token's sums are read and written once for all of its pairs of a group. Sums run in a fixed
// order. Measured with 512 of 2,053 rows of 412 floats: 25 to 40 cycles a pair, where a dense product over zeros takes 52.
#pragma once

#include <vector>

#include "blocks.h"
#include "parallel.h"
#include "product.h"

namespace sparseffn {

// Neighbouring rows that are taken together, and pairs of one token that are.
constexpr int64_t kGroupRows = 32;
constexpr int kRun = 8;
// Tokens whose sums, and whose rows of an input, stay in the second-level cache.
constexpr int64_t kSumTokens = 128, kGradientTokens = 384;

template <class C> inline int64_t whole_lanes(int64_t n) { return (n + kLanes<C> - 1) / kLanes<C> * kLanes<C>; }

// [rows, ld] of whole vectors, zero beyond the width. Rows begin at lines of memory: a load or store across two takes twice as
// long.
template <class C> class Lines {
  public:
    const int64_t ld;

    Lines(int64_t rows, int64_t width) : ld(whole_lanes<C>(width)), data_(rows * ld + kLanes<C>) {
        constexpr uintptr_t kStep = kLanes<C> * sizeof(C);
        const uintptr_t at = reinterpret_cast<uintptr_t>(data_.data());
        first_ = data_.data() + (kStep - at % kStep) % kStep / sizeof(C);
    }
    C* row(int64_t r) { return first_ + r * ld; }
    const C* row(int64_t r) const { return first_ + r * ld; }
    template <class S> void take(const S* from, int64_t r, int64_t width) {
        for (int64_t c = 0; c < width; ++c) row(r)[c] = upcast(from[c]);
        std::fill(row(r) + width, row(r) + ld, C(0));
    }
    void clear(int64_t rows) { std::fill_n(first_, rows * ld, C(0)); }

  private:
    Buffer<C> data_;
    C* first_;
};

// Pairs in stretches of tokens, in each sorted by the group of their row and then by token.
class Grouping {
  public:
    Grouping(int64_t tokens, int64_t k, int64_t rows, int64_t stretch)
        : tokens_(tokens), k_(k), stretch_(stretch), groups_((rows + kGroupRows - 1) / kGroupRows), pairs_(tokens * k),
          offsets_(stretches() * (groups_ + 2)) {}

    int64_t groups() const { return groups_; }
    int64_t stretches() const { return (tokens_ + stretch_ - 1) / stretch_; }
    Range tokens(int64_t s) const { return {s * stretch_, std::min((s + 1) * stretch_, tokens_)}; }

    void sort(int64_t s, const int64_t* indices) {
        int32_t* at = offsets_.data() + s * (groups_ + 2);
        const int64_t first = s * stretch_ * k_, n = (tokens(s).end - tokens(s).begin) * k_;
        std::fill_n(at, groups_ + 2, 0);
        for (int64_t p = 0; p < n; ++p) ++at[indices[first + p] / kGroupRows + 2];
        for (int64_t g = 0; g < groups_; ++g) at[g + 2] += at[g + 1];
        for (int64_t p = 0; p < n; ++p) pairs_[first + at[indices[first + p] / kGroupRows + 1]++] = static_cast<int32_t>(p);
    }

    // Calls f(first pair, pairs after it as differences, count): pairs of one token and group, up to kRun at a time. A pair is
    // token * k + slot, counted from the stretch's first token.
    template <class F> void in_runs(int64_t s, int64_t group, F&& f) const {
        const int32_t* at = offsets_.data() + s * (groups_ + 2) + group;
        const int32_t *p = pairs_.data() + s * stretch_ * k_ + at[0], *end = pairs_.data() + s * stretch_ * k_ + at[1];
        while (p < end) {
            const int64_t token = *p / static_cast<int32_t>(k_);
            const int64_t next = (token + 1) * k_;
            int n = 1;
            while (n < kRun && p + n < end && p[n] < next) ++n;
            f(token, p, n);
            p += n;
        }
    }

  private:
    int64_t tokens_, k_, stretch_, groups_;
    Buffer<int32_t> pairs_, offsets_;
};

// y += sum of N rows times their weights.
template <int N, class C> SPARSEFFN_INLINE void add_rows(const C* const* rows, const C* weights, int64_t ld, C* y) {
    // Copies, which no store can reach: else they were read again for every register of columns.
    const C* row[N];
    Vec<C> w[N];
    for (int q = 0; q < N; ++q) {
        row[q] = rows[q];
        w[q] = splat<C>(weights[q]);
    }
    for (int64_t c = 0; c < ld; c += kLanes<C>) {
        Vec<C> sum = load(y + c);
        for (int q = 0; q < N; ++q) sum += w[q] * load(row[q] + c);
        store(y + c, sum);
    }
}

// rows[q] += weights[q] x, one after the other: one row may be there twice.
template <int N, class C> SPARSEFFN_INLINE void add_to_rows(C* const* rows, const C* weights, int64_t ld, const C* x) {
    C* row[N];
    Vec<C> w[N];
    for (int q = 0; q < N; ++q) {
        row[q] = rows[q];
        w[q] = splat<C>(weights[q]);
    }
    for (int64_t c = 0; c < ld; c += kLanes<C>) {
        const Vec<C> v = load(x + c);
        for (int q = 0; q < N; ++q) store(row[q] + c, load(row[q] + c) + w[q] * v);
    }
}

// Sum over the lanes of a register, by halves as `sum_of_lanes`, without a detour through memory.
template <class C> SPARSEFFN_INLINE C lane_sum(Vec<C> v) {
#if defined(__AVX512F__)
    if constexpr (std::is_same_v<C, float>) return _mm512_reduce_add_ps((__m512)v);
    else return _mm512_reduce_add_pd((__m512d)v);
#else
    return sum_of_lanes<C>(v);
#endif
}

// dots[q] = rows[q] . x
template <int N, class C> SPARSEFFN_INLINE void dot_rows(const C* const* rows, int64_t ld, const C* x, C* dots) {
    // As many chains of sums as hide an addition's latency.
    constexpr int kChains = N >= 5 ? 1 : N >= 3 ? 2 : N == 2 ? 4 : 8;
    Vec<C> acc[N][kChains] = {};
    int64_t c = 0;
    for (; c + kChains * kLanes<C> <= ld; c += kChains * kLanes<C>)
        for (int j = 0; j < kChains; ++j) {
            const Vec<C> v = load(x + c + j * kLanes<C>);
            for (int q = 0; q < N; ++q) acc[q][j] += v * load(rows[q] + c + j * kLanes<C>);
        }
    for (; c < ld; c += kLanes<C>)
        for (int q = 0; q < N; ++q) acc[q][0] += load(x + c) * load(rows[q] + c);
    for (int q = 0; q < N; ++q) {
        for (int j = 1; j < kChains; ++j) acc[q][0] += acc[q][j];
        dots[q] = lane_sum<C>(acc[q][0]);
    }
}

// The rows of a group that pairs use, in the type of computation.
template <class S> class Group {
    using C = compute_t<S>;

  public:
    explicit Group(int64_t width) : width_(width), lines_(kGroupRows, width) {}

    void start(const S* values, int64_t group) {
        values_ = values;
        first_ = group * kGroupRows;
        taken_ = 0;
    }
    const C* row(int64_t index) {
        const int64_t r = index - first_;
        if (!(taken_ >> r & 1)) {
            lines_.take(values_ + index * width_, r, width_);
            taken_ |= uint64_t(1) << r;
        }
        return lines_.row(r);
    }

  private:
    int64_t width_, first_ = 0;
    const S* values_ = nullptr;
    uint64_t taken_ = 0;
    Lines<C> lines_;
};

// sums[token] += the rows of a stretch's pairs times their weights.
template <class S>
void add_stretch(const Table<S>& t, const S* values, const compute_t<S>* all_weights, const Grouping& pairs, int64_t s,
                 Group<S>& group, Lines<compute_t<S>>& sums) {
    using C = compute_t<S>;
    const int64_t first = pairs.tokens(s).begin * t.k;
    for (int64_t g = 0; g < pairs.groups(); ++g) {
        group.start(values, g);
        pairs.in_runs(s, g, [&](int64_t token, const int32_t* p, int n) {
            const C* rows[kRun];
            C weights[kRun];
            for (int q = 0; q < n; ++q) {
                rows[q] = group.row(t.indices[first + p[q]]);
                weights[q] = all_weights[first + p[q]];
            }
            with_constant<kRun>(n, [&](auto count) { add_rows<decltype(count)::value>(rows, weights, sums.ld, sums.row(token)); });
        });
    }
}

// Few pairs: value rows are read where they lie.
template <class S>
void add_token(const Table<S>& t, const S* values, const compute_t<S>* all_weights, int64_t token, Range columns, compute_t<S>* y) {
    using C = compute_t<S>;
    for (int64_t k = 0; k < t.k; k += kRun) {
        const int n = static_cast<int>(std::min<int64_t>(kRun, t.k - k));
        const C* weights = all_weights + token * t.k + k;
        // Those of the next run, of the next token after the last one's, are fetched meanwhile.
        const int64_t* indices = t.indices + token * t.k + k;
        const int64_t left = t.tokens * t.k - token * t.k - k;
        const S *rows[kRun], *after[kRun];
        for (int q = 0; q < n; ++q) {
            rows[q] = values + indices[q] * t.width;
            after[q] = n + q < left ? values + indices[n + q] * t.width : rows[q];
        }
        int64_t c = columns.begin;
        for (; c + kLanes<C> <= columns.end; c += kLanes<C>) {
            Vec<C> sum = load(y + c);
            for (int q = 0; q < n; ++q) __builtin_prefetch(after[q] + c, 0, 2);
            for (int q = 0; q < n; ++q) sum += splat<C>(weights[q]) * load(rows[q] + c);
            store(y + c, sum);
        }
        for (; c < columns.end; ++c)
            for (int q = 0; q < n; ++q) y[c] += weights[q] * upcast(rows[q][c]);
    }
}

template <class S> void sum_token(const Table<S>& t, int64_t token, Range columns, compute_t<S>* sum, S* y) {
    for (int64_t c = columns.begin; c < columns.end; ++c) sum[c] = t.bias ? upcast(t.bias[c]) : compute_t<S>(0);
    add_token(t, t.values, t.weights, token, columns, sum);
    if (t.more_values) add_token(t, t.more_values, t.more_weights, token, columns, sum);
    for (int64_t c = columns.begin; c < columns.end; ++c) y[token * t.width + c] = narrow<S>(sum[c]);
}

// Few tokens: threads divide the columns, so that one token keeps all of them busy.
template <class S> void sum_by_columns(const Table<S>& t, S* y) {
    using C = compute_t<S>;
    Buffer<C> sum(t.width);
#pragma omp parallel num_threads(t.threads)
    {
        const Range part = part_of(whole_lanes<C>(t.width) / kLanes<C>, omp_get_thread_num(), omp_get_num_threads());
        const Range columns{part.begin * kLanes<C>, std::min(part.end * kLanes<C>, t.width)};
        for (int64_t token = 0; token < t.tokens; ++token) sum_token(t, token, columns, sum.data(), y);
    }
}

template <class S> void sum_by_groups(const Table<S>& t, S* y) {
    using C = compute_t<S>;
    Grouping pairs(t.tokens, t.k, t.rows, kSumTokens);
    std::vector<Group<S>> groups;
    std::vector<Lines<C>> sums;
    for (int i = 0; i < t.threads; ++i) {
        groups.emplace_back(t.width);
        sums.emplace_back(kSumTokens, t.width);
    }
#pragma omp parallel for num_threads(t.threads) schedule(dynamic, 1)
    for (int64_t s = 0; s < pairs.stretches(); ++s) {
        Lines<C>& own = sums[omp_get_thread_num()];
        const Range tokens = pairs.tokens(s);
        pairs.sort(s, t.indices);
        own.clear(tokens.end - tokens.begin);
        for (int64_t i = 0; t.bias && i < tokens.end - tokens.begin; ++i) own.take(t.bias, i, t.width);
        add_stretch(t, t.values, t.weights, pairs, s, groups[omp_get_thread_num()], own);
        if (t.more_values) add_stretch(t, t.more_values, t.more_weights, pairs, s, groups[omp_get_thread_num()], own);
        for (int64_t token = tokens.begin; token < tokens.end; ++token)
            for (int64_t c = 0; c < t.width; ++c) y[token * t.width + c] = narrow<S>(own.row(token - tokens.begin)[c]);
    }
}

template <class S> void sum_rows(const Table<S>& t, S* y) {
    // Grouping pays where rows are used more than once.
    if (t.tokens >= kSumTokens && kSumTokens * t.k > t.rows) return sum_by_groups(t, y);
    if (t.tokens < 4 * t.threads) return sum_by_columns(t, y);
    using C = compute_t<S>;
    std::vector<Buffer<C>> sums;
    for (int i = 0; i < t.threads; ++i) sums.emplace_back(t.width);
#pragma omp parallel for num_threads(t.threads) schedule(static)
    for (int64_t token = 0; token < t.tokens; ++token)
        sum_token(t, token, Range{0, t.width}, sums[omp_get_thread_num()].data(), y);
}

// Sums of a group's gradient, added to those of earlier stretches: wide where the gradient is not.
template <class S> class RowSums {
    using C = compute_t<S>;

  public:
    RowSums(S* to, int64_t rows, int64_t width) : to_(to), rows_(rows), width_(width), wide_(std::is_same_v<S, C> ? 0 : rows * width) {}

    // The group's sums, [rows of the group, whole lanes], after a stretch.
    void put(int64_t group, const Lines<C>& sums, bool first, bool last) {
        const int64_t begin = group * kGroupRows, end = std::min(begin + kGroupRows, rows_);
        for (int64_t r = begin; r < end; ++r) {
            const C* row = sums.row(r - begin);
            if constexpr (std::is_same_v<S, C>) {
                C* to = to_ + r * width_;
                if (first) std::copy_n(row, width_, to);
                else
                    for (int64_t c = 0; c < width_; ++c) to[c] += row[c];
            } else {
                C* to = wide_.data() + r * width_;
                for (int64_t c = 0; c < width_; ++c) to[c] = first ? row[c] : to[c] + row[c];
                if (last)
                    for (int64_t c = 0; c < width_; ++c) to_[r * width_ + c] = narrow<S>(to[c]);
            }
        }
    }

  private:
    S* to_;
    int64_t rows_, width_;
    Buffer<C> wide_;
};

// The outer products of a gradient: to[row] += weight of a pair times the token's x, for the pairs of a group.
template <class C>
void add_outer_pairs(const Grouping& pairs, int64_t s, int64_t group, const int64_t* indices, const C* weights, int64_t k,
                     const Lines<C>& x, Lines<C>& to) {
    const int64_t begin = pairs.tokens(s).begin;
    pairs.in_runs(s, group, [&](int64_t token, const int32_t* p, int n) {
        C* rows[kRun];
        C w[kRun];
        for (int q = 0; q < n; ++q) {
            rows[q] = to.row(indices[begin * k + p[q]] - group * kGroupRows);
            w[q] = weights[begin * k + p[q]];
        }
        with_constant<kRun>(n, [&](auto count) { add_to_rows<decltype(count)::value>(rows, w, x.ld, x.row(begin + token)); });
    });
}

// dots[pair] = value row of a pair . the token's x, for the pairs of a group.
template <class S>
void dot_pairs(const Table<S>& t, const Grouping& pairs, int64_t s, int64_t g, Group<S>& group, const Lines<compute_t<S>>& x,
               compute_t<S>* dots) {
    using C = compute_t<S>;
    const int64_t begin = pairs.tokens(s).begin;
    group.start(t.values, g);
    pairs.in_runs(s, g, [&](int64_t token, const int32_t* p, int n) {
        const C* rows[kRun];
        C found[kRun];
        for (int q = 0; q < n; ++q) rows[q] = group.row(t.indices[begin * t.k + p[q]]);
        with_constant<kRun>(n, [&](auto count) { dot_rows<decltype(count)::value>(rows, x.ld, x.row(begin + token), found); });
        for (int q = 0; q < n; ++q) dots[begin * t.k + p[q]] = found[q];
    });
}

// What one thread needs for gradients.
template <class S> struct RowSpace {
    Group<S> group;
    Lines<compute_t<S>> sums;
    explicit RowSpace(int64_t width) : group(width), sums(kGroupRows, width) {}
};
template <class S> std::vector<RowSpace<S>> row_spaces(int64_t width, int threads) {
    std::vector<RowSpace<S>> all;
    for (int i = 0; i < threads; ++i) all.emplace_back(width);
    return all;
}

// By all threads of a team: pairs are grouped, and `take` is called for every token.
template <class F> void group_and_take(Grouping& pairs, const int64_t* indices, F&& take) {
#pragma omp for schedule(dynamic, 1) nowait
    for (int64_t s = 0; s < pairs.stretches(); ++s) pairs.sort(s, indices);
    const int64_t tokens = pairs.stretches() ? pairs.tokens(pairs.stretches() - 1).end : 0;
#pragma omp for schedule(static)
    for (int64_t token = 0; token < tokens; ++token) take(token);
}

// By all threads of a team: calls f(stretch, group, is first stretch, is last); a group is one thread's at a time.
template <class F> void for_groups(const Grouping& pairs, F&& f) {
    for (int64_t s = 0; s < pairs.stretches(); ++s) {
#pragma omp for schedule(dynamic, 1)
        for (int64_t g = 0; g < pairs.groups(); ++g) f(s, g, s == 0, s + 1 == pairs.stretches());
    }
}

// Gradients of the value rows, and of the weights.
template <class S> void row_gradients(const Table<S>& t, const S* grad, S* grad_values, compute_t<S>* grad_weights) {
    using C = compute_t<S>;
    Grouping pairs(t.tokens, t.k, t.rows, kGradientTokens);
    Lines<C> sent(t.tokens, t.width);
    RowSums<S> to(grad_values, grad_values ? t.rows : 0, t.width);
    auto spaces = row_spaces<S>(t.width, t.threads);
#pragma omp parallel num_threads(t.threads)
    {
        RowSpace<S>& ws = spaces[omp_get_thread_num()];
        group_and_take(pairs, t.indices, [&](int64_t token) { sent.take(grad + token * t.width, token, t.width); });
        for_groups(pairs, [&](int64_t s, int64_t group, bool first, bool last) {
            if (grad_weights) dot_pairs(t, pairs, s, group, ws.group, sent, grad_weights);
            if (!grad_values) return;
            ws.sums.clear(kGroupRows);
            add_outer_pairs(pairs, s, group, t.indices, t.weights, t.k, sent, ws.sums);
            to.put(group, ws.sums, first, last);
        });
    }
}

}  // namespace sparseffn

// Weighted sums of value rows, y[t] = sum_k w[t, k] values[i[t, k]], and their gradients.
//
// Pairs (token, k) are sorted by value row, so that a row is read once for all pairs of a block that use it: forward in blocks
// of tokens whose outputs stay in the cache, backward over all tokens at once. Sums run in a fixed order.
#include <vector>

#include "product.h"
#include "routing.h"

namespace sparseffn {
namespace {

// Tokens of a forward block.
constexpr int64_t kBlock = 128;

template <class S> struct Table {
    using C = compute_t<S>;
    const S* values;         // [rows, width]
    const int64_t* indices;  // [tokens, k]
    const C* weights;        // [tokens, k]
    int64_t rows, width, tokens, k;
    int threads;
};

// y[columns] += sum of four rows times their weights: y is read and written once for the four.
template <class S>
void add_rows(const S* const* rows, const compute_t<S>* weights, int n, Range columns, compute_t<S>* y) {
    using C = compute_t<S>;
    int64_t c = columns.begin;
    for (; c + kLanes<C> <= columns.end; c += kLanes<C>) {
        Vec<C> sum = load(y + c);
        for (int q = 0; q < n; ++q) sum += splat<C>(weights[q]) * load(rows[q] + c);
        store(y + c, sum);
    }
    for (; c < columns.end; ++c)
        for (int q = 0; q < n; ++q) y[c] += weights[q] * upcast(rows[q][c]);
}

template <class S> void sum_token(const Table<S>& t, int64_t token, Range columns, compute_t<S>* y) {
    constexpr int kAtOnce = 8;
    const S* rows[kAtOnce];
    std::fill(y + columns.begin, y + columns.end, compute_t<S>(0));
    for (int64_t k = 0; k < t.k; k += kAtOnce) {
        const int n = static_cast<int>(std::min<int64_t>(kAtOnce, t.k - k));
        for (int q = 0; q < n; ++q) rows[q] = t.values + t.indices[token * t.k + k + q] * t.width;
        add_rows(rows, t.weights + token * t.k + k, n, columns, y);
    }
}

// Few tokens: threads divide the columns, so that one token keeps all of them busy.
template <class S> void sum_by_columns(const Table<S>& t, S* y) {
    using C = compute_t<S>;
#pragma omp parallel num_threads(t.threads)
    {
        const int64_t lines = (t.width + kLanes<C> - 1) / kLanes<C>;
        const Range part = part_of(lines, omp_get_thread_num(), omp_get_num_threads());
        const Range columns{part.begin * kLanes<C>, std::min(part.end * kLanes<C>, t.width)};
        Buffer<C> sum(t.width);
        for (int64_t token = 0; token < t.tokens; ++token) {
            sum_token(t, token, columns, sum.data());
            for (int64_t c = columns.begin; c < columns.end; ++c) y[token * t.width + c] = narrow<S>(sum[c]);
        }
    }
}

template <class S> void sum_by_tokens(const Table<S>& t, S* y) {
    using C = compute_t<S>;
    const int64_t blocks = (t.tokens + kBlock - 1) / kBlock;
#pragma omp parallel num_threads(t.threads)
    {
        Buffer<C> sums(kBlock * t.width);
        Buffer<int64_t> order(kBlock * t.k), offsets(t.rows + 1);
#pragma omp for schedule(dynamic, 1)
        for (int64_t b = 0; b < blocks; ++b) {
            const int64_t first = b * kBlock, n = std::min(kBlock, t.tokens - first);
            const int64_t* indices = t.indices + first * t.k;
            const C* weights = t.weights + first * t.k;
            sort_by_expert(indices, n * t.k, t.rows, order.data(), offsets.data());
            std::fill(sums.data(), sums.data() + n * t.width, C(0));
            for (int64_t v = 0; v < t.rows; ++v) {
                const S* row = t.values + v * t.width;
                for (int64_t p = offsets[v]; p < offsets[v + 1]; ++p)
                    add_rows(&row, weights + order[p], 1, Range{0, t.width}, sums.data() + order[p] / t.k * t.width);
            }
            for (int64_t i = 0; i < n * t.width; ++i) y[first * t.width + i] = narrow<S>(sums[i]);
        }
    }
}

template <class S> void sum(const Table<S>& t, S* y) {
    // Sorting pays where rows are used more than once in a block.
    if (t.tokens >= kBlock && kBlock * t.k > t.rows) sum_by_tokens(t, y);
    else if (t.tokens < 4 * t.threads) sum_by_columns(t, y);
    else {
        using C = compute_t<S>;
#pragma omp parallel num_threads(t.threads)
        {
            Buffer<C> sum(t.width);
#pragma omp for schedule(static)
            for (int64_t token = 0; token < t.tokens; ++token) {
                sum_token(t, token, Range{0, t.width}, sum.data());
                for (int64_t c = 0; c < t.width; ++c) y[token * t.width + c] = narrow<S>(sum[c]);
            }
        }
    }
}

// One pass over the pairs of a value row: its gradient, and the product with the outputs' gradients for the weights'.
template <class S> void gradients(const Table<S>& t, const S* grad, S* grad_values, compute_t<S>* grad_weights) {
    using C = compute_t<S>;
    const int64_t pairs = t.tokens * t.k;
    Buffer<int64_t> order(pairs), offsets(t.rows + 1);
    sort_by_expert(t.indices, pairs, t.rows, order.data(), offsets.data());
    Buffer<C> wide(std::is_same_v<S, C> ? 0 : t.tokens * t.width);
    const C* gy;
    if constexpr (std::is_same_v<S, C>) gy = grad;
    else gy = wide.data();
#pragma omp parallel num_threads(t.threads)
    {
        if constexpr (!std::is_same_v<S, C>) {
#pragma omp for schedule(static)
            for (int64_t i = 0; i < t.tokens * t.width; ++i) wide[i] = upcast(grad[i]);
        }
        Buffer<C> sum(t.width), value(t.width);
#pragma omp for schedule(dynamic, 16)
        for (int64_t v = 0; v < t.rows; ++v) {
            std::fill(sum.data(), sum.data() + t.width, C(0));
            for (int64_t c = 0; c < t.width; ++c) value[c] = upcast(t.values[v * t.width + c]);
            for (int64_t p = offsets[v]; p < offsets[v + 1]; ++p) {
                const C* row = gy + order[p] / t.k * t.width;
                const C weight = t.weights[order[p]];
                Vec<C> dot{};
                C rest = 0;
                int64_t c = 0;
                for (; c + kLanes<C> <= t.width; c += kLanes<C>) {
                    const Vec<C> g = load(row + c);
                    dot += g * load(value.data() + c);
                    store(sum.data() + c, load(sum.data() + c) + splat<C>(weight) * g);
                }
                for (; c < t.width; ++c) {
                    rest += row[c] * value[c];
                    sum[c] += weight * row[c];
                }
                for (int q = 0; q < kLanes<C>; ++q) rest += dot[q];
                grad_weights[order[p]] = rest;
            }
            for (int64_t c = 0; c < t.width; ++c) grad_values[v * t.width + c] = narrow<S>(sum[c]);
        }
    }
}

// sizes: rows, width, tokens, k, threads.
template <class S> Table<S> table(const void* values, const int64_t* indices, const void* weights, const int64_t* sizes) {
    return {static_cast<const S*>(values), indices,  static_cast<const compute_t<S>*>(weights),
            sizes[0], sizes[1], sizes[2], sizes[3], static_cast<int>(sizes[4])};
}

}  // namespace
}  // namespace sparseffn

using namespace sparseffn;

extern "C" {

// 1 if an index is not that of a row; nothing is written then.
int sparseffn_weighted_rows(int dtype, const void* values, const int64_t* indices, const void* weights,
                            const int64_t* sizes, void* y) {
    for (int64_t p = 0; p < sizes[2] * sizes[3]; ++p)
        if (indices[p] < 0 || indices[p] >= sizes[0]) return 1;
    with_type(dtype, [&](auto* tag) {
        using S = std::remove_pointer_t<decltype(tag)>;
        sum(table<S>(values, indices, weights, sizes), static_cast<S*>(y));
    });
    return 0;
}

void sparseffn_weighted_rows_backward(int dtype, const void* values, const int64_t* indices, const void* weights,
                                      const int64_t* sizes, const void* grad, void* grad_values, void* grad_weights) {
    with_type(dtype, [&](auto* tag) {
        using S = std::remove_pointer_t<decltype(tag)>;
        gradients(table<S>(values, indices, weights, sizes), static_cast<const S*>(grad), static_cast<S*>(grad_values),
                  static_cast<compute_t<S>*>(grad_weights));
    });
}
}

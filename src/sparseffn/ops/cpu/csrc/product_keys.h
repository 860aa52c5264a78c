// Product-key memory (equation 8 of arXiv 2310.10837): n_a + n_b sub-keys a head score n_a n_b values, of which each head reads
// its k best.
//
//     u_a = keys_a x_a,  u_b = keys_b x_b,  u[i] = u_b[i / n_a] + u_a[i mod n_a],  y = sum over heads and their k best: act(u[i]) values[i]
#pragma once

#include <vector>

#include "blocks.h"
#include "panels.h"
#include "rows.h"
#include "select.h"
#include "upcast.h"

namespace sparseffn {

// Up to so many keys are ranked by counting those before each, which the compiler vectorises.
constexpr int64_t kCounted = 256;

// Finds the k largest sums of one row after the other, exactly.
//
// With both halves sorted, a pair of ranks (i, j) has (i + 1)(j + 1) - 1 pairs before it with no smaller sum: only pairs with
// (i + 1)(j + 1) <= k can be among the k largest.
template <class C> class BestSums {
  public:
    BestSums(int64_t n_a, int64_t n_b, int64_t k)
        : n_a_(n_a), n_b_(n_b), k_(k), most_a_(std::min(k, n_a)), most_b_(std::min(k, n_b)), top_a_(most_a_), top_b_(most_b_),
          best_a_(most_a_) {
        for (int64_t j = 0; j < most_b_; ++j)
            for (int64_t i = 0; i < most_a_ && (i + 1) * (j + 1) <= k; ++i)
                pairs_.push_back({static_cast<int32_t>(i), static_cast<int32_t>(j)});
        const int64_t n = static_cast<int64_t>(pairs_.size());
        sums_.resize(n);
        keys_.resize(std::max({n, n_a, n_b}));
        selector_ = Selector<Key<C>>(static_cast<int64_t>(keys_.size()), k);
    }

    // Calls out(q, sum, index) for q = 0..k - 1; in descending order if wanted, else in that of the candidates.
    template <class Out> void find(const C* a, const C* b, bool ordered, Out&& out) {
        rank(a, n_a_, most_a_, top_a_);
        rank(b, n_b_, most_b_, top_b_);
        for (int64_t i = 0; i < most_a_; ++i) best_a_[i] = a[top_a_[i]];
        int64_t n = 0;
        for (int64_t j = 0; j < most_b_; ++j) {
            const int64_t width = std::min(most_a_, k_ / (j + 1));
            const C other = b[top_b_[j]];
            for (int64_t i = 0; i < width; ++i) sums_[n + i] = other + best_a_[i];
            n += width;
        }
        for (int64_t p = 0; p < n; ++p) keys_[p] = sortable(sums_[p]);
        int32_t* chosen = selector_.ascending(keys_.data(), n, k_);
        if (ordered) sort_descending(keys_.data(), chosen, k_);
        for (int64_t q = 0; q < k_; ++q) {
            const auto [i, j] = pairs_[chosen[q]];
            out(q, sums_[chosen[q]], static_cast<int64_t>(top_b_[j]) * n_a_ + top_a_[i]);
        }
    }

  private:
    // Positions of the largest scores, in descending order, ties by position.
    void rank(const C* scores, int64_t n, int64_t most, std::vector<int32_t>& top) {
        Key<C>* keys = keys_.data();
        for (int64_t i = 0; i < n; ++i) keys[i] = sortable(scores[i]);
        if (n > kCounted) return selector_.best(keys, n, most, true, top.data());
        for (int64_t i = 0; i < n; ++i) {
            Key<C> before = 0;
            const Key<C> own = keys[i];
            for (int64_t j = 0; j < i; ++j) before += keys[j] >= own;
            for (int64_t j = i + 1; j < n; ++j) before += keys[j] > own;
            if (before < most) top[before] = static_cast<int32_t>(i);
        }
    }

    int64_t n_a_, n_b_, k_, most_a_, most_b_;
    std::vector<std::pair<int32_t, int32_t>> pairs_;
    std::vector<int32_t> top_a_, top_b_;
    std::vector<C> best_a_, sums_;
    std::vector<Key<C>> keys_;
    Selector<Key<C>> selector_{0, 0};
};

// Coefficients of a head's reads from their sums, in place.
template <class S> void read(const ProductKeys<S>& p, int64_t at, compute_t<S>* sums) {
    using C = compute_t<S>;
    if (p.softmax) {
        C most = sums[0], total = 0;
        for (int64_t q = 0; q < p.k; ++q) most = std::max(most, sums[q]);
        for (int64_t q = 0; q < p.k; ++q) total += sums[q] = exp_of(sums[q] - most);
        for (int64_t q = 0; q < p.k; ++q) p.coefficients[at + q] = narrow<S>(sums[q] / total);
        return;
    }
    with_activation(p.activation, [&](auto a) {
        for (int64_t q = 0; q < p.k; ++q) {
            p.coefficients[at + q] = narrow<S>(activate(decltype(a)::value, sums[q]));
            if (p.slopes) p.slopes[at + q] = narrow<S>(slope_of(decltype(a)::value, sums[q]).slope);
        }
    });
}

// Tokens that are scored together.
constexpr int64_t kScored = 16 * kRows;

// What one thread needs.
template <class S> struct ReadSpace {
    using C = compute_t<S>;
    Buffer<C> a, b, sums;
    BestSums<C> best;
    std::vector<const C*> rows;

    ReadSpace(const ProductKeys<S>& p, int64_t ld_a, int64_t ld_b)
        : a(kScored * ld_a), b(kScored * ld_b), sums(p.k), best(p.n_a, p.n_b, p.k), rows(kScored) {}
};

template <class S> void select_reads(const ProductKeys<S>& p, const compute_t<S>* x) {
    using C = compute_t<S>;
    Panels<S> keys_a(p.heads * p.n_a, p.half), keys_b(p.heads * p.n_b, p.half);
    std::vector<ReadSpace<S>> spaces;
    for (int t = 0; t < p.threads; ++t) spaces.emplace_back(p, keys_a.padded(), keys_b.padded());
    const int64_t blocks = (p.tokens + kScored - 1) / kScored;
#pragma omp parallel num_threads(p.threads)
    {
        keys_a.fill(p.keys_a);
        keys_b.fill(p.keys_b);
        ReadSpace<S>& ws = spaces[omp_get_thread_num()];
#pragma omp for schedule(dynamic, 1)
        for (int64_t block = 0; block < blocks; ++block) {
            const int64_t first = block * kScored, n = std::min(kScored, p.tokens - first);
            for (int64_t i = 0; i < n; ++i) ws.rows[i] = x + (first + i) * 2 * p.half;
            keys_a.multiply(ws.rows.data(), n, ws.a.data(), keys_a.padded());
            for (int64_t i = 0; i < n; ++i) ws.rows[i] += p.half;
            keys_b.multiply(ws.rows.data(), n, ws.b.data(), keys_b.padded());
            for (int64_t i = 0; i < n; ++i)
                for (int64_t h = 0; h < p.heads; ++h) {
                    const int64_t at = (first + i) * p.reads() + h * p.k;
                    ws.best.find(ws.a.data() + i * keys_a.padded() + h * p.n_a, ws.b.data() + i * keys_b.padded() + h * p.n_b, false,
                                 [&](int64_t q, C sum, int64_t index) {
                                     ws.sums[q] = sum;
                                     p.indices[at + q] = index;
                                 });
                    read(p, at, ws.sums.data());
                }
        }
    }
}

template <class S> void product_keys_forward(const ProductKeys<S>& p, S* y) {
    const Upcast<S> x(p.x, p.tokens * 2 * p.half, p.threads);
    select_reads(p, x.data());
    const Upcast<S> coefficients(p.coefficients, p.tokens * p.reads(), p.threads);
    sum_rows(Table<S>{p.values, p.indices, coefficients.data(), p.n_a * p.n_b, 2 * p.half, p.tokens, p.reads(), p.threads}, y);
}

// Gradients of the values and of the sub-keys' scores: [tokens, heads n_a] and [tokens, heads n_b]. `grad_coefficients` may be
// null.
template <class S>
void product_keys_backward(const ProductKeys<S>& p, const S* grad_y, const S* grad_coefficients, S* grad_values,
                           compute_t<S>* grad_a, compute_t<S>* grad_b) {
    using C = compute_t<S>;
    const int64_t reads = p.reads();
    const Upcast<S> coefficients(p.coefficients, p.tokens * reads, p.threads);
    Buffer<C> d(p.tokens * reads);
    row_gradients(Table<S>{p.values, p.indices, coefficients.data(), p.n_a * p.n_b, 2 * p.half, p.tokens, reads, p.threads}, grad_y,
                  grad_values, d.data());
#pragma omp parallel for num_threads(p.threads) schedule(static)
    for (int64_t t = 0; t < p.tokens; ++t) {
        C *a = grad_a + t * p.heads * p.n_a, *b = grad_b + t * p.heads * p.n_b;
        std::fill_n(a, p.heads * p.n_a, C(0));
        std::fill_n(b, p.heads * p.n_b, C(0));
        for (int64_t h = 0; h < p.heads; ++h) {
            const int64_t at = t * reads + h * p.k;
            const C* alpha = coefficients.data() + at;
            C mean = 0;
            for (int64_t q = 0; q < p.k; ++q) {
                if (grad_coefficients) d[at + q] += upcast(grad_coefficients[at + q]);
                mean += alpha[q] * d[at + q];
            }
            for (int64_t q = 0; q < p.k; ++q) {
                C slope = 1, sent = d[at + q];
                if (p.softmax) {
                    slope = alpha[q];
                    sent -= mean;
                } else if (p.slopes) {
                    slope = upcast(p.slopes[at + q]);
                } else if (p.activation == kRelu) {
                    slope = alpha[q] > C(0) ? C(1) : C(0);
                }
                a[h * p.n_a + p.indices[at + q] % p.n_a] += slope * sent;
                b[h * p.n_b + p.indices[at + q] / p.n_a] += slope * sent;
            }
        }
    }
}

}  // namespace sparseffn

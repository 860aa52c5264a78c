// Top-K activation (equations 6 and 7 of arXiv 2310.10837) in one pass over the tokens:
//
//     u = drop * act(keys x + key_bias),   gated: times (gate_keys x + gate_bias)
//     y[t] = sum over the K largest u[i] (or |u[i]|, either times the norm of values[i]):  u[i] values[i],  plus value_bias
//
// A block of tokens is scored and ranked while its rows of scores are in the second-level cache: scores of all tokens are never
// written. The survivors' values are then added up, see rows.h.
#pragma once

#include <vector>

#include "blocks.h"
#include "dots.h"
#include "panels.h"
#include "rows.h"
#include "select.h"
#include "upcast.h"

namespace sparseffn {

// Tokens that are scored together: their rows of 2,000 scores fill half of a second-level cache of 1 MiB.
constexpr int64_t kTopKTokens = 12 * kRows;
// Up to this many tokens keys are read where they lie, in dot products, by all threads.
constexpr int64_t kTopKDots = 8;

// What one thread needs. Made before threads start: what they cannot get must not end the process.
template <class S> struct TopKSpace {
    using C = compute_t<S>;
    Buffer<C> scores, gate_scores, products;
    Buffer<Key<C>> keys;
    Selector<Key<C>> selector;
    const int32_t* chosen = nullptr;  // a token's survivors, the selector's own
    std::vector<const C*> rows;

    // For so many tokens, with so many elements in a row of scores.
    TopKSpace(const TopK<S>& p, int64_t tokens, int64_t ld)
        : scores(tokens * ld),
          gate_scores(p.gate_keys ? tokens * ld : 0),
          products(p.slopes ? p.units : 0),
          keys(p.units),
          selector(p.units, p.k),
          rows(tokens) {}
};
template <class S> std::vector<TopKSpace<S>> topk_spaces(const TopK<S>& p, int64_t tokens, int64_t ld) {
    std::vector<TopKSpace<S>> all;
    for (int t = 0; t < p.threads; ++t) all.emplace_back(p, tokens, ld);
    return all;
}

template <class S> Buffer<compute_t<S>> norms_of(const TopK<S>& p) {
    using C = compute_t<S>;
    Buffer<C> norms(p.by_norm ? p.units : 0);
    if (!p.by_norm) return norms;
#pragma omp parallel for num_threads(p.threads) schedule(static)
    for (int64_t i = 0; i < p.units; ++i) {
        C sum = 0;
        for (int64_t c = 0; c < p.width; ++c) sum += upcast(p.values[i * p.width + c]) * upcast(p.values[i * p.width + c]);
        norms[i] = std::sqrt(sum);
    }
    return norms;
}

// A token's products become its coefficients, in place; the keys' products are copied where slopes are wanted.
template <class S>
void activate_units(const TopK<S>& p, int64_t token, compute_t<S>* row, compute_t<S>* gate_row, TopKSpace<S>& ws) {
    using C = compute_t<S>;
    const int64_t n = p.units;
    if (p.key_bias)
        for (int64_t i = 0; i < n; ++i) row[i] += upcast(p.key_bias[i]);
    if (p.gate_bias)
        for (int64_t i = 0; i < n; ++i) gate_row[i] += upcast(p.gate_bias[i]);
    if (p.slopes) std::copy_n(row, n, ws.products.data());
    with_activation(p.activation, [&](auto a) {
        if (gate_row)
            for (int64_t i = 0; i < n; ++i) row[i] = gated(decltype(a)::value, row[i], gate_row[i], p.clamp);
        else
            for (int64_t i = 0; i < n; ++i) row[i] = activate(decltype(a)::value, row[i]);
    });
    if (p.keep) {
        const uint8_t* keep = p.keep + token * n;
        for (int64_t i = 0; i < n; ++i) row[i] = keep[i] ? row[i] * p.keep_scale : C(0);
    }
}

// Positions of a token's survivors, in ws.chosen.
template <class S> void rank(const TopK<S>& p, const compute_t<S>* row, const compute_t<S>* norms, TopKSpace<S>& ws) {
    Key<compute_t<S>>* keys = ws.keys.data();
    const auto by = [&](auto score) {
        for (int64_t i = 0; i < p.units; ++i) keys[i] = sortable(score(i));
    };
    if (p.by_magnitude && p.by_norm) by([&](int64_t i) { return std::abs(row[i]) * norms[i]; });
    else if (p.by_magnitude) by([&](int64_t i) { return std::abs(row[i]); });
    else if (p.by_norm) by([&](int64_t i) { return row[i] * norms[i]; });
    else by([&](int64_t i) { return row[i]; });
    ws.chosen = ws.selector.ascending(keys, p.units, p.k);
}

template <class S> void keep_slopes(const TopK<S>& p, int64_t token, const compute_t<S>* gate_row, TopKSpace<S>& ws) {
    using C = compute_t<S>;
    S* slopes = p.slopes + token * p.parts() * p.k;
    const uint8_t* keep = p.keep ? p.keep + token * p.units : nullptr;
    with_activation(p.activation, [&](auto a) {
        for (int64_t j = 0; j < p.k; ++j) {
            const int64_t i = ws.chosen[j];
            const C drop = keep ? (keep[i] ? p.keep_scale : C(0)) : C(1), h = ws.products[i];
            if (gate_row) {
                const GatedSlope<C> s = gated_slope(decltype(a)::value, h, gate_row[i], p.clamp);
                slopes[j] = narrow<S>(drop * s.by_key);
                slopes[p.k + j] = narrow<S>(drop * s.by_gate);
            } else {
                slopes[j] = narrow<S>(drop * slope_of(decltype(a)::value, h).slope);
            }
        }
    });
}

// From a token's products to its survivors.
template <class S>
void survive(const TopK<S>& p, int64_t token, compute_t<S>* row, compute_t<S>* gate_row, const compute_t<S>* norms,
             TopKSpace<S>& ws) {
    activate_units(p, token, row, gate_row, ws);
    rank(p, row, norms, ws);
    if (p.slopes) keep_slopes(p, token, gate_row, ws);
    for (int64_t j = 0; j < p.k; ++j) {
        p.indices[token * p.k + j] = ws.chosen[j];
        p.coefficients[token * p.k + j] = narrow<S>(row[ws.chosen[j]]);
    }
}

template <class S> void select_blocks(const TopK<S>& p, const compute_t<S>* x, const compute_t<S>* norms) {
    using C = compute_t<S>;
    Panels<S> keys(p.units, p.width), gate_keys(p.gate_keys ? p.units : 0, p.width);
    const int64_t ld = keys.padded();
    auto spaces = topk_spaces(p, kTopKTokens, ld);
#pragma omp parallel num_threads(p.threads)
    {
        keys.fill(p.keys);
        if (p.gate_keys) gate_keys.fill(p.gate_keys);
        TopKSpace<S>& ws = spaces[omp_get_thread_num()];
        const Range own = part_of(p.tokens, omp_get_thread_num(), omp_get_num_threads());
        for (int64_t first = own.begin; first < own.end; first += kTopKTokens) {
            const int64_t n = std::min(kTopKTokens, own.end - first);
            for (int64_t i = 0; i < n; ++i) ws.rows[i] = x + (first + i) * p.width;
            keys.multiply(ws.rows.data(), n, ws.scores.data(), ld);
            if (p.gate_keys) gate_keys.multiply(ws.rows.data(), n, ws.gate_scores.data(), ld);
            for (int64_t i = 0; i < n; ++i) {
                C* gate_row = p.gate_keys ? ws.gate_scores.data() + i * ld : nullptr;
                survive(p, first + i, ws.scores.data() + i * ld, gate_row, norms, ws);
            }
        }
    }
}

// Few tokens: threads divide the keys, then the tokens.
template <class S> void select_few(const TopK<S>& p, const compute_t<S>* x, const compute_t<S>* norms) {
    using C = compute_t<S>;
    Buffer<C> scores(p.tokens * p.units), gate_scores(p.gate_keys ? p.tokens * p.units : 0);
    std::vector<const C*> rows(p.tokens);
    for (int64_t i = 0; i < p.tokens; ++i) rows[i] = x + i * p.width;
    auto spaces = topk_spaces(p, 0, 0);
#pragma omp parallel num_threads(p.threads)
    {
        const Range own = part_of(p.units, omp_get_thread_num(), omp_get_num_threads());
        const auto multiply = [&](const S* keys, C* to) {
            product_dots<C, S>(rows.data(), p.tokens, keys + own.begin * p.width, p.width, p.width, own.end - own.begin,
                               [&](int64_t i, int64_t j, int n, const C* sums) {
                                   std::copy_n(sums, n, to + i * p.units + own.begin + j);
                               });
        };
        multiply(p.keys, scores.data());
        if (p.gate_keys) multiply(p.gate_keys, gate_scores.data());
#pragma omp barrier
#pragma omp for schedule(static)
        for (int64_t i = 0; i < p.tokens; ++i)
            survive(p, i, scores.data() + i * p.units, p.gate_keys ? gate_scores.data() + i * p.units : nullptr, norms,
                    spaces[omp_get_thread_num()]);
    }
}

template <class S> void topk_forward(const TopK<S>& p, S* y) {
    const Buffer<compute_t<S>> norms = norms_of(p);
    const Upcast<S> x(p.x, p.tokens * p.width, p.threads);
    if (p.tokens <= kTopKDots) select_few(p, x.data(), norms.data());
    else select_blocks(p, x.data(), norms.data());
    const Upcast<S> coefficients(p.coefficients, p.tokens * p.k, p.threads);
    sum_rows(Table<S>{p.values, p.indices, coefficients.data(), p.units, p.width, p.tokens, p.k, p.threads, p.value_bias}, y);
}

}  // namespace sparseffn

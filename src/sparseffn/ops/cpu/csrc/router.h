// Scores, top-K and gates of a router, and their gradients.
#pragma once

#include <cmath>

#include "linear.h"
#include "outer.h"
#include "routing.h"
#include "select.h"
#include "upcast.h"

namespace sparseffn {

enum Gate : int { kSigmoid = 0, kSoftmax = 1, kRenormalised = 2 };

// Dot product in a fixed order.
template <class C> inline C dot(const C* x, const C* w, int64_t n) {
    Vec<C> even{}, odd{};
    int64_t i = 0;
    for (; i + 2 * kLanes<C> <= n; i += 2 * kLanes<C>) {
        even += load(x + i) * load(w + i);
        odd += load(x + i + kLanes<C>) * load(w + i + kLanes<C>);
    }
    C rest = 0;  // not onto the sum of lanes, at whose size each term would be rounded
    for (; i < n; ++i) rest += x[i] * w[i];
    return sum_of_lanes<C>(even + odd) + rest;
}

// Gates of the chosen experts, the first of which has the largest logit.
template <class C> inline void gates_of(Gate kind, const C* logits, int64_t experts, const int64_t* chosen, int64_t k, C* gates) {
    if (kind == kSigmoid) {
        for (int64_t j = 0; j < k; ++j) gates[j] = C(1) / (C(1) + std::exp(-logits[chosen[j]]));
        return;
    }
    const C top = logits[chosen[0]];
    double sum = 0;  // one number a token, of up to N_E terms one after the other
    if (kind == kSoftmax)
        for (int64_t e = 0; e < experts; ++e) sum += std::exp(logits[e] - top);
    else
        for (int64_t j = 0; j < k; ++j) sum += std::exp(logits[chosen[j]] - top);
    for (int64_t j = 0; j < k; ++j) gates[j] = std::exp(logits[chosen[j]] - top) / static_cast<C>(sum);
}

// From here on transposing the selector pays; below, each logit is a dot product.
constexpr int64_t kManyTokens = 128;

// Scores each token against every row of the selector, chooses and gates.
template <class S>
inline void route(const S* x, const S* selector, Gate kind, int64_t tokens, int64_t width, int64_t experts, int64_t k,
                  int threads, compute_t<S>* logits, int64_t* indices, compute_t<S>* gates) {
    using C = compute_t<S>;
    const Upcast<S> inputs(x, tokens * width, threads), rows(selector, experts * width, threads);
    const bool many = tokens >= kManyTokens;
    if (many) linear(inputs.data(), rows.data(), tokens, width, experts, threads, logits);
#pragma omp parallel num_threads(threads) if (tokens * experts * width > 1 << 17)
    {
        Buffer<Key<C>> keys(experts);
#pragma omp for schedule(static)
        for (int64_t t = 0; t < tokens; ++t) {
            C* scores = logits + t * experts;
            for (int64_t e = 0; e < experts; ++e) {
                if (!many) scores[e] = dot(inputs.data() + t * width, rows.data() + e * width, width);
                keys[e] = sortable(scores[e]);
            }
            best(keys.data(), experts, k, true, indices + t * k);
            gates_of(kind, scores, experts, indices + t * k, k, gates + t * k);
        }
    }
}

// Adds to a token's gradient of logits what comes through the gates of its chosen experts. A softmax over all experts is not
// among them: its gradient needs all logits.
template <class C>
inline void through_gates(Gate kind, const C* gates, const C* grad_gates, const int64_t* chosen, int64_t k, C* grad_logits) {
    double common = 0;
    for (int64_t j = 0; j < k && kind == kRenormalised; ++j) common += double(gates[j]) * grad_gates[j];
    for (int64_t j = 0; j < k; ++j)
        grad_logits[chosen[j]] += kind == kRenormalised ? gates[j] * (grad_gates[j] - static_cast<C>(common))
                                                        : grad_gates[j] * gates[j] * (C(1) - gates[j]);
}

// Gradients of the selector's product for few tokens: gx += d selector, and gselector = d^T x.
template <class C>
inline void selector_gradients(const C* d, const C* x, const C* selector, int64_t tokens, int64_t width, int64_t experts,
                               int threads, C* gx, C* gselector) {
#pragma omp parallel num_threads(threads) if (tokens * experts * width > 1 << 17)
    {
        const int thread = omp_get_thread_num(), team = omp_get_num_threads();
        Buffer<C> padded(std::max(padded_size<C>(experts, width), tokens * kVectors * kLanes<C>));
        std::vector<const C*> d_rows(tokens), x_rows(tokens), padded_rows(tokens);
        const Range own = part_of(tokens, thread, team), rows = part_of(experts, thread, team);
        for (int64_t t = 0; t < tokens; ++t) {
            d_rows[t] = d + t * experts;
            x_rows[t] = x + t * width;
        }
        product<C, C>(d_rows.data() + own.begin, own.end - own.begin, selector, width, experts, width, padded.data(), Fetch{},
                      [&](int64_t i, int64_t column, int columns, const auto& acc) {
                          add(gx + (own.begin + i) * width + column, acc, columns);
                      });
        for (int64_t t = 0; t < tokens; ++t) d_rows[t] += rows.begin;
        outer_of_few(d_rows.data(), x_rows.data(), tokens, rows.end - rows.begin, width, gselector + rows.begin * width,
                     width, padded, padded_rows);
    }
}

}  // namespace sparseffn

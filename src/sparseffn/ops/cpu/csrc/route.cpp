// See route.h.
#include "route.h"

#include <algorithm>
#include <cmath>
#include <optional>
#include <vector>

#include "linear.h"
#include "outer.h"
#include "select.h"
#include "upcast.h"

namespace sparseffn {
namespace {

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

// Weights of the chosen experts, the first of which has the largest logit, and the shares of all where these are asked for.
template <class C>
void gates_of(Gate kind, const C* logits, int64_t experts, const int64_t* chosen, int64_t k, C* gates, C* shares) {
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
    if (shares)
        for (int64_t e = 0; e < experts; ++e) shares[e] = std::exp(logits[e] - top) / static_cast<C>(sum);
}

// From here on transposing the selector pays; below, each logit is a dot product.
constexpr int64_t kManyTokens = 128;
// Multiply-adds that are worth a second thread.
constexpr int64_t kWorth = 1 << 17;

// A matrix in the type of computation.
template <class C> class Wide {
  public:
    Wide(const Stored& matrix, int64_t n, int threads) {
        with_type(matrix.type, [&](auto* tag) {
            using S = std::remove_pointer_t<decltype(tag)>;
            if constexpr (std::is_same_v<S, C>) {
                data_ = static_cast<const S*>(matrix.data);
            } else {
                const S* from = static_cast<const S*>(matrix.data);
                C* to = copy_.emplace(n).data();
#pragma omp parallel for num_threads(threads) if (n > kWorth) schedule(static)
                for (int64_t i = 0; i < n; ++i) to[i] = static_cast<C>(upcast(from[i]));
                data_ = to;
            }
        });
    }
    const C* data() const { return data_; }

  private:
    std::optional<Buffer<C>> copy_;
    const C* data_ = nullptr;
};

template <class C, class F> void score_tokens(const Routes& r, C* logits, F&& then) {
    const Wide<C> x(r.x, r.tokens * r.width, r.threads), selector(r.selector, r.experts * r.width, r.threads);
    const bool many = r.tokens >= kManyTokens;
    if (many) linear(x.data(), selector.data(), r.tokens, r.width, r.experts, r.threads, logits);
#pragma omp parallel num_threads(r.threads) if (r.tokens * r.experts * r.width > kWorth)
    {
        Buffer<Key<C>> keys(r.experts);
#pragma omp for schedule(static)
        for (int64_t t = 0; t < r.tokens; ++t) {
            C* scores = logits + t * r.experts;
            if (!many)
                for (int64_t e = 0; e < r.experts; ++e)
                    scores[e] = dot(x.data() + t * r.width, selector.data() + e * r.width, r.width);
            then(t, scores, keys);
        }
    }
}

template <class C> void route_in(const Routes& r, C* logits, int64_t* indices, C* gates, C* shares) {
    score_tokens(r, logits, [&](int64_t t, const C* scores, Buffer<Key<C>>& keys) {
        for (int64_t e = 0; e < r.experts; ++e) keys[e] = sortable(scores[e]);
        best(keys.data(), r.experts, r.k, true, indices + t * r.k);
        gates_of(r.gate, scores, r.experts, indices + t * r.k, r.k, gates + t * r.k,
                 r.gate == kSoftmax && shares ? shares + t * r.experts : nullptr);
    });
}

// Through the weights of a token's chosen experts.
template <class C>
void through_gates(Gate kind, const C* gates, const C* shares, const C* grad, const int64_t* chosen, int64_t k,
                   int64_t experts, C* d) {
    if (kind == kSigmoid) {
        for (int64_t j = 0; j < k; ++j) d[chosen[j]] += grad[j] * gates[j] * (C(1) - gates[j]);
        return;
    }
    double common = 0;
    for (int64_t j = 0; j < k; ++j) common += double(gates[j]) * grad[j];
    for (int64_t j = 0; j < k; ++j) d[chosen[j]] += gates[j] * (kind == kSoftmax ? grad[j] : grad[j] - static_cast<C>(common));
    for (int64_t e = 0; e < experts && kind == kSoftmax; ++e) d[e] -= shares[e] * static_cast<C>(common);
}

template <class C>
void logits_gradient_in(const Routes& r, const int64_t* indices, const C* gates, const C* shares, const C* grad_logits,
                        const C* grad_gates, C* out) {
    const int64_t n = r.tokens * r.experts;
    if (grad_logits) std::copy_n(grad_logits, n, out);
    else std::fill_n(out, n, C(0));
    for (int64_t t = 0; t < r.tokens && grad_gates; ++t)
        through_gates(r.gate, gates + t * r.k, shares + t * r.experts, grad_gates + t * r.k, indices + t * r.k, r.k, r.experts,
                      out + t * r.experts);
}

template <class C> void selector_gradients_in(const Routes& r, const C* d, C* grad_x, C* grad_selector) {
    const Wide<C> x(r.x, r.tokens * r.width, r.threads), selector(r.selector, r.experts * r.width, r.threads);
#pragma omp parallel num_threads(r.threads) if (r.tokens * r.experts * r.width > kWorth)
    {
        const int thread = omp_get_thread_num(), team = omp_get_num_threads();
        Buffer<C> padded(std::max(padded_size<C>(r.experts, r.width), r.tokens * kVectors * kLanes<C>));
        std::vector<const C*> d_rows(r.tokens), x_rows(r.tokens), padded_rows(r.tokens);
        const Range own = part_of(r.tokens, thread, team), rows = part_of(r.experts, thread, team);
        for (int64_t t = 0; t < r.tokens; ++t) {
            d_rows[t] = d + t * r.experts;
            x_rows[t] = x.data() + t * r.width;
        }
        product<C, C>(d_rows.data() + own.begin, own.end - own.begin, selector.data(), r.width, r.experts, r.width, padded.data(),
                      Fetch{}, [&](int64_t i, int64_t column, int columns, const auto& acc) {
                          put(grad_x + (own.begin + i) * r.width + column, acc, columns);
                      });
        for (int64_t t = 0; t < r.tokens; ++t) d_rows[t] += rows.begin;
        outer_of_few(d_rows.data(), x_rows.data(), r.tokens, rows.end - rows.begin, r.width,
                     grad_selector + rows.begin * r.width, r.width, padded, padded_rows);
    }
}

template <class F> void in_precision(const Routes& r, F&& f) {
    if (r.is_double) f(static_cast<double*>(nullptr));
    else f(static_cast<float*>(nullptr));
}

}  // namespace

void route(const Routes& r, void* logits, int64_t* indices, void* gates, void* shares) {
    in_precision(r, [&](auto* tag) {
        using C = std::remove_pointer_t<decltype(tag)>;
        route_in<C>(r, static_cast<C*>(logits), indices, static_cast<C*>(gates), static_cast<C*>(shares));
    });
}

void scores(const Routes& r, void* logits) {
    in_precision(r, [&](auto* tag) {
        using C = std::remove_pointer_t<decltype(tag)>;
        score_tokens(r, static_cast<C*>(logits), [](int64_t, const C*, Buffer<Key<C>>&) {});
    });
}

void logits_gradient(const Routes& r, const int64_t* indices, const void* gates, const void* shares, const void* grad_logits,
                     const void* grad_gates, void* out) {
    in_precision(r, [&](auto* tag) {
        using C = std::remove_pointer_t<decltype(tag)>;
        logits_gradient_in<C>(r, indices, static_cast<const C*>(gates), static_cast<const C*>(shares),
                              static_cast<const C*>(grad_logits), static_cast<const C*>(grad_gates), static_cast<C*>(out));
    });
}

void selector_gradients(const Routes& r, const void* d_logits, void* grad_x, void* grad_selector) {
    in_precision(r, [&](auto* tag) {
        using C = std::remove_pointer_t<decltype(tag)>;
        selector_gradients_in<C>(r, static_cast<const C*>(d_logits), static_cast<C*>(grad_x), static_cast<C*>(grad_selector));
    });
}

}  // namespace sparseffn

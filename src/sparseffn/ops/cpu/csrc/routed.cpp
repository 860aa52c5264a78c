// A mixture's evaluation in one call: scores, top-K, gates, experts. For one token the calls between these cost more than the
// work.
#include <cmath>

#include "experts_types.h"
#include "linear.h"
#include "select.h"
#include "widened.h"

namespace sparseffn {
namespace {

enum Gate : int { kSigmoid = 0, kSoftmax = 1, kRenormalised = 2 };

// Dot product in a fixed order.
template <class C> C dot(const C* x, const C* w, int64_t n) {
    Vec<C> even{}, odd{};
    int64_t i = 0;
    for (; i + 2 * kLanes<C> <= n; i += 2 * kLanes<C>) {
        even += load(x + i) * load(w + i);
        odd += load(x + i + kLanes<C>) * load(w + i + kLanes<C>);
    }
    even += odd;
    C sum = 0;
    for (int q = 0; q < kLanes<C>; ++q) sum += even[q];
    for (; i < n; ++i) sum += x[i] * w[i];
    return sum;
}

// Gates of the chosen experts, the first of which has the largest logit.
template <class C> void gates_of(Gate kind, const C* logits, int64_t experts, const int64_t* chosen, int64_t k, C* gates) {
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

// From here on turning the selector pays; below, each logit is a dot product.
constexpr int64_t kManyTokens = 128;

// Scores each token against every row of the selector, chooses and gates.
template <class S>
void route(const S* x, const S* selector, Gate kind, int64_t tokens, int64_t width, int64_t experts, int64_t k,
           int threads, int64_t* indices, compute_t<S>* gates) {
    using C = compute_t<S>;
    const Widened<S> inputs(x, tokens * width, threads), rows(selector, experts * width, threads);
    Buffer<C> logits(tokens * experts);
    const bool many = tokens >= kManyTokens;
    if (many) linear(inputs.data(), rows.data(), tokens, width, experts, threads, logits.data());
#pragma omp parallel num_threads(threads) if (tokens * experts * width > 1 << 17)
    {
        Buffer<Key<C>> keys(experts);
#pragma omp for schedule(static)
        for (int64_t t = 0; t < tokens; ++t) {
            C* scores = logits.data() + t * experts;
            for (int64_t e = 0; e < experts; ++e) {
                if (!many) scores[e] = dot(inputs.data() + t * width, rows.data() + e * width, width);
                keys[e] = sortable(scores[e]);
            }
            best(keys.data(), experts, k, true, indices + t * k);
            gates_of(kind, scores, experts, indices + t * k, k, gates + t * k);
        }
    }
}

}  // namespace
}  // namespace sparseffn

using namespace sparseffn;

// x [tokens, width], selector [experts, width], keys, values; out: y, indices and gates [tokens, k]. Plain arguments, as packing
// them into arrays would take a caller in Python longer than the call. Without indices and gates these are kept to itself. 2 if a
// gate is not finite.
extern "C" int sparseffn_routed_experts(int dtype, const void* x, const void* selector, const void* keys, const void* values,
                                        int64_t tokens, int64_t width, int64_t experts, int64_t size, int64_t k,
                                        int activation, int gate, int threads, void* y, int64_t* indices, void* gates_out) {
    int problem = 0;
    with_type(dtype, [&](auto* tag) {
        using S = std::remove_pointer_t<decltype(tag)>;
        using C = compute_t<S>;
        const bool kept = indices != nullptr;
        Buffer<int64_t> own_indices(kept ? 0 : tokens * k);
        Buffer<C> own_gates(kept ? 0 : tokens * k);
        C* gates = kept ? static_cast<C*>(gates_out) : own_gates.data();
        if (!kept) indices = own_indices.data();
        route(static_cast<const S*>(x), static_cast<const S*>(selector), static_cast<Gate>(gate), tokens, width, experts, k,
              threads, indices, gates);
        if (!all_finite(gates, tokens * k)) {
            problem = 2;
            return;
        }
        Buffer<int64_t> order(tokens * k), offsets(experts + 1);
        sort_by_expert(indices, tokens * k, experts, order.data(), offsets.data());
        forward(Problem<S>{static_cast<const S*>(x), static_cast<const S*>(keys), static_cast<const S*>(values), gates,
                           nullptr, nullptr, C(1), static_cast<Activation>(activation), width, size,
                           Routing{order.data(), offsets.data(), tokens, experts, k}, threads},
                static_cast<S*>(y));
    });
    return problem;
}

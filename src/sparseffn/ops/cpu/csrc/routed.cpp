// A mixture's evaluation in one call: scores, top-K, gates, experts. For one token the calls between these cost more than the
// work.
#include "experts_types.h"
#include "router.h"

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
        Buffer<C> logits(tokens * experts);
        C* gates = kept ? static_cast<C*>(gates_out) : own_gates.data();
        if (!kept) indices = own_indices.data();
        route(static_cast<const S*>(x), static_cast<const S*>(selector), static_cast<Gate>(gate), tokens, width, experts, k,
              threads, logits.data(), indices, gates);
        if (!all_finite(gates, tokens * k)) {
            problem = 2;
            return;
        }
        Buffer<int64_t> order(tokens * k), offsets(experts + 1);
        sort_by_expert(indices, tokens * k, experts, order.data(), offsets.data());
        forward(plain_problem(static_cast<const S*>(x), static_cast<const S*>(keys), static_cast<const S*>(values), gates,
                              static_cast<S*>(nullptr), static_cast<Activation>(activation), width, size,
                              Routing{order.data(), offsets.data(), tokens, experts, k}, threads),
                static_cast<S*>(y));
    });
    return problem;
}

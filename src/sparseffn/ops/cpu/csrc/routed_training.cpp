// A mixture's training step in one call forward and one backward, for the few tokens whose calls between the parts would cost
// more than the work; in float or double, and for gates that depend on the chosen logits alone.
#include "experts_types.h"
#include "router.h"

using namespace sparseffn;

namespace {

template <class F> void in_full_precision(int dtype, F&& f) {
    if (dtype == 0) f(static_cast<float*>(nullptr));
    else f(static_cast<double*>(nullptr));
}

}  // namespace

extern "C" {

// As sparseffn_routed_experts; also out: logits [tokens, experts], hidden [tokens * k, size] and the sorted selections.
int sparseffn_routed_training(int dtype, const void* x, const void* selector, const void* keys, const void* values,
                              int64_t tokens, int64_t width, int64_t experts, int64_t size, int64_t k, int activation,
                              int gate, int threads, void* y, void* logits, int64_t* indices, void* gates, void* hidden,
                              int64_t* order, int64_t* offsets) {
    int problem = 0;
    in_full_precision(dtype, [&](auto* tag) {
        using C = std::remove_pointer_t<decltype(tag)>;
        route(static_cast<const C*>(x), static_cast<const C*>(selector), static_cast<Gate>(gate), tokens, width, experts, k,
              threads, static_cast<C*>(logits), indices, static_cast<C*>(gates));
        if (!all_finite(static_cast<const C*>(gates), tokens * k)) {
            problem = 2;
            return;
        }
        sort_by_expert(indices, tokens * k, experts, order, offsets);
        forward(plain_problem(static_cast<const C*>(x), static_cast<const C*>(keys), static_cast<const C*>(values),
                              static_cast<const C*>(gates), static_cast<C*>(hidden), static_cast<Activation>(activation),
                              width, size, Routing{order, offsets, tokens, experts, k}, threads),
                static_cast<C*>(y));
    });
    return problem;
}

// in: what the forward took and kept, and the gradients of y, of the gates and of the logits, the last two null where there is
// none; out: the gradients of x, selector, keys and values.
void sparseffn_routed_training_backward(int dtype, const void* x, const void* selector, const void* keys, const void* values,
                                        int64_t tokens, int64_t width, int64_t experts, int64_t size, int64_t k,
                                        int activation, int gate, int threads, const int64_t* indices, const void* gates,
                                        void* hidden, const int64_t* order, const int64_t* offsets, const void* grad_y,
                                        const void* grad_gates, const void* grad_logits, void* grad_x, void* grad_selector,
                                        void* grad_keys, void* grad_values) {
    in_full_precision(dtype, [&](auto* tag) {
        using C = std::remove_pointer_t<decltype(tag)>;
        Buffer<C> d_gates(tokens * k), d_logits(tokens * experts);
        Gradients<C> to{};
        to.y = static_cast<const C*>(grad_y);
        to.x = static_cast<C*>(grad_x);
        to.keys = in_order(static_cast<C*>(grad_keys), width, size);
        to.values = in_order(static_cast<C*>(grad_values), size, width);
        to.gates = d_gates.data();
        backward(plain_problem(static_cast<const C*>(x), static_cast<const C*>(keys), static_cast<const C*>(values),
                               static_cast<const C*>(gates), static_cast<C*>(hidden), static_cast<Activation>(activation),
                               width, size, Routing{order, offsets, tokens, experts, k}, threads),
                 to);
        for (int64_t i = 0; i < tokens * k && grad_gates; ++i) d_gates[i] += static_cast<const C*>(grad_gates)[i];
        if (grad_logits) std::copy_n(static_cast<const C*>(grad_logits), tokens * experts, d_logits.data());
        else std::fill_n(d_logits.data(), tokens * experts, C(0));
        for (int64_t t = 0; t < tokens; ++t)
            through_gates(static_cast<Gate>(gate), static_cast<const C*>(gates) + t * k, d_gates.data() + t * k,
                          indices + t * k, k, d_logits.data() + t * experts);
        selector_gradients(d_logits.data(), static_cast<const C*>(x), static_cast<const C*>(selector), tokens, width, experts,
                           threads, static_cast<C*>(grad_x), static_cast<C*>(grad_selector));
    });
}
}

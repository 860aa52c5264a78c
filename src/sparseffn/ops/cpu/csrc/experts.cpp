// The expert computation behind a C interface.
#include "experts_types.h"

using namespace sparseffn;

namespace {

template <class S>
Problem<S> problem(const void* const* in, const int64_t* sizes, double keep_scale) {
    using C = compute_t<S>;
    return {static_cast<const S*>(in[0]),       static_cast<const S*>(in[1]), static_cast<const S*>(in[2]),
            static_cast<const C*>(in[3]),       static_cast<S*>(const_cast<void*>(in[4])),
            static_cast<const uint8_t*>(in[5]), static_cast<C>(keep_scale),   static_cast<Activation>(sizes[5]),
            sizes[1],                           sizes[3],
            Routing{static_cast<const int64_t*>(in[6]), static_cast<const int64_t*>(in[7]), sizes[0], sizes[2], sizes[4]},
            static_cast<int>(sizes[6])};
}

}  // namespace

// in: x, keys, values, gates, hidden, keep, order, offsets; sizes: tokens, width, experts, size, k, activation, threads.
extern "C" {

// The selections in stable order of their expert. 1 if an index is not that of an expert, 2 if a gate is not finite.
int sparseffn_sort_by_expert(const int64_t* indices, int64_t rows, int64_t experts, int dtype, const void* gates,
                             int64_t* order, int64_t* offsets) {
    bool finite = true;
    with_type(dtype, [&](auto* tag) {
        using C = compute_t<std::remove_pointer_t<decltype(tag)>>;
        finite = all_finite(static_cast<const C*>(gates), rows);
    });
    if (!finite) return 2;
    return sort_by_expert(indices, rows, experts, order, offsets) ? 0 : 1;
}

void sparseffn_experts(int dtype, const void* const* in, const int64_t* sizes, double keep_scale, void* y) {
    with_type(dtype, [&](auto* tag) {
        using S = std::remove_pointer_t<decltype(tag)>;
        forward(problem<S>(in, sizes, keep_scale), static_cast<S*>(y));
    });
}

// out: gradient of y (in), of x, keys, values, gates.
void sparseffn_experts_backward(int dtype, const void* const* in, const int64_t* sizes, double keep_scale,
                                void* const* out) {
    with_type(dtype, [&](auto* tag) {
        using S = std::remove_pointer_t<decltype(tag)>;
        backward(problem<S>(in, sizes, keep_scale),
                 Gradients<S>{static_cast<const S*>(out[0]), static_cast<S*>(out[1]), static_cast<S*>(out[2]),
                              static_cast<S*>(out[3]), static_cast<compute_t<S>*>(out[4])});
    });
}

// As above, where `hidden` is what the activation keeps of the survivors and `positions` says which they are.
void sparseffn_experts_inner(int dtype, const void* const* in, const int64_t* sizes, double keep_scale, int64_t count,
                             int32_t* positions, void* y) {
    with_type(dtype, [&](auto* tag) {
        using S = std::remove_pointer_t<decltype(tag)>;
        Problem<S> p = problem<S>(in, sizes, keep_scale);
        forward_inner(p, Inner<S>{count, positions, p.hidden}, static_cast<S*>(y));
    });
}

void sparseffn_experts_inner_backward(int dtype, const void* const* in, const int64_t* sizes, double keep_scale,
                                      int64_t count, int32_t* positions, void* const* out) {
    with_type(dtype, [&](auto* tag) {
        using S = std::remove_pointer_t<decltype(tag)>;
        Problem<S> p = problem<S>(in, sizes, keep_scale);
        backward_inner(p, Inner<S>{count, positions, p.hidden},
                       Gradients<S>{static_cast<const S*>(out[0]), static_cast<S*>(out[1]), static_cast<S*>(out[2]),
                                    static_cast<S*>(out[3]), static_cast<compute_t<S>*>(out[4])});
    });
}
}

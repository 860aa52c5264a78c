// The operations' kernels on the CPU: tensors become what the headers compute with.
#include <ATen/ops/mm.h>
#include <torch/library.h>

#include <algorithm>

#include "experts_types.h"
#include "route.h"
#include "tensors.h"

extern "C" void sparseffn_assign(const double* scores, int64_t tokens, int64_t experts, int64_t* assigned);

namespace sparseffn {
namespace {

Gate gate_of(std::string_view name) {
    static const std::map<std::string_view, Gate> names{
        {"sigmoid", kSigmoid}, {"softmax", kSoftmax}, {"renormalised", kRenormalised}};
    return static_cast<Gate>(code_of(names, name, "gate"));
}

// ---- route

struct RouteInputs {
    Tensor x, selector, keep;
    Routes routes;

    RouteInputs(const Tensor& x_in, const Tensor& selector_in, int64_t k, std::string_view gate, const MaybeTensor& keep_in = {})
        : x(x_in.contiguous()), selector(selector_in.contiguous()), keep(in_order(keep_in)) {
        TORCH_CHECK(x.dim() == 2 && selector.dim() == 2 && x.size(1) == selector.size(1) && k >= 1 && k <= selector.size(0) &&
                        selector.is_cpu(),
                    "sparseffn::route: x [T, D], selector [E, D] and 1 <= k <= E do not fit together");
        check_given("route", keep, {x.size(0), selector.size(0)}, at::kBool, "keep");
        routes = {{data_of(x), type_of(x)}, {data_of(selector), type_of(selector)}, gate_of(gate), pointer_of<bool>(keep),
                  x.size(0), x.size(1), selector.size(0), k, wide_type(x) == at::kDouble,
                  threads_for(x.numel() * selector.size(0))};
    }
};

std::tuple<Tensor, Tensor, Tensor, Tensor> route_with(const Tensor& x, const Tensor& selector, int64_t k, std::string_view gate,
                                                      const MaybeTensor& keep, bool keep_shares) {
    const RouteInputs in(x, selector, k, gate, keep);
    const auto options = x.options().dtype(wide_type(x));
    const int64_t tokens = in.routes.tokens, experts = in.routes.experts;
    Tensor logits = at::empty({tokens, experts}, options), gates = at::empty({tokens, k}, options);
    Tensor indices = at::empty({tokens, k}, options.dtype(at::kLong)), shares;
    if (keep_shares) shares = in.routes.gate == kSoftmax ? at::empty({tokens, experts}, options) : at::empty({0}, options);
    if (tokens)
        route(in.routes, logits.mutable_data_ptr(), indices.mutable_data_ptr<int64_t>(), gates.mutable_data_ptr(),
              data_of_mutable(shares));
    return {logits, indices, gates, shares};
}

std::tuple<Tensor, Tensor, Tensor> route_cpu(const Tensor& x, const Tensor& selector, int64_t k, std::string_view gate,
                                             const MaybeTensor& keep) {
    auto [logits, indices, gates, shares] = route_with(x, selector, k, gate, keep, false);
    return {logits, indices, gates};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> route_kept_cpu(const Tensor& x, const Tensor& selector, int64_t k,
                                                          std::string_view gate, const MaybeTensor& keep) {
    return route_with(x, selector, k, gate, keep, true);
}

// From here on PyTorch's products of float32 and float64 take no longer.
constexpr int64_t kFewTokens = 128;

// Gradients of x and the selector from that of the logits.
std::tuple<Tensor, Tensor> selector_product_backward(const RouteInputs& in, const Tensor& d_logits, const Needed& needed) {
    const auto selector_type = in.selector.scalar_type(), wide = d_logits.scalar_type();
    const bool many = in.routes.tokens >= kFewTokens && in.x.scalar_type() == wide;
    const auto options = in.x.options();
    if (many || in.routes.tokens == 0)
        return {needed.made(0, options, [&] { return at::mm(d_logits, in.selector.to(wide)).to(in.x.scalar_type()); }),
                needed.made(1, options, [&] { return at::mm(d_logits.t(), in.x.to(wide)).to(selector_type); })};
    Tensor grad_x = needed.made(0, options, [&] { return new_tensor(in.x.sizes(), options); });
    Tensor grad_selector = needed.made(1, options, [&] { return at::empty(in.selector.sizes(), d_logits.options()); });
    selector_gradients(in.routes, d_logits.const_data_ptr(), data_of_mutable(grad_x), data_of_mutable(grad_selector));
    return {grad_x, needed[1] ? grad_selector.to(selector_type) : grad_selector};
}

std::tuple<Tensor, Tensor> route_backward_cpu(const MaybeTensor& grad_logits, const MaybeTensor& grad_gates, const Tensor& x,
                                              const Tensor& selector, int64_t k, std::string_view gate, const Tensor& indices,
                                              const Tensor& gates, const Tensor& shares, Needed::Flags flags) {
    const RouteInputs in(x, selector, k, gate);
    const Needed needed(flags, 2, "route_backward");
    const int64_t tokens = in.routes.tokens, experts = in.routes.experts;
    const Tensor through_logits = in_order(grad_logits), through_gates = in_order(grad_gates);
    const Tensor chosen = indices.contiguous(), weights = gates.contiguous(), all = shares.contiguous();
    const auto wide = wide_type(x);
    check_given("route_backward", through_logits, {tokens, experts}, wide, "grad_logits");
    check_given("route_backward", through_gates, {tokens, k}, wide, "grad_gates");
    check_like("route_backward", chosen, {tokens, k}, at::kLong, "indices");
    check_like("route_backward", weights, {tokens, k}, wide, "gates");
    if (in.routes.gate == kSoftmax) check_like("route_backward", all, {tokens, experts}, wide, "shares");
    check_between<int64_t>(chosen, 0, experts, "an expert");
    Tensor d_logits = at::empty({tokens, experts}, weights.options());
    logits_gradient(in.routes, pointer_of<int64_t>(chosen), data_of(weights), data_of(all), data_of(through_logits),
                    data_of(through_gates), data_of_mutable(d_logits));
    return selector_product_backward(in, d_logits, needed);
}

Tensor router_logits_cpu(const Tensor& x, const Tensor& selector) {
    const RouteInputs in(x, selector, 1, "sigmoid");
    Tensor logits = at::empty({in.routes.tokens, in.routes.experts}, x.options().dtype(wide_type(x)));
    if (in.routes.tokens) scores(in.routes, logits.mutable_data_ptr());
    return logits;
}

std::tuple<Tensor, Tensor> router_logits_backward_cpu(const Tensor& grad_logits, const Tensor& x, const Tensor& selector,
                                                      Needed::Flags flags) {
    const RouteInputs in(x, selector, 1, "sigmoid");
    const Needed needed(flags, 2, "router_logits_backward");
    const Tensor d_logits = grad_logits.contiguous();
    check_like("router_logits_backward", d_logits, {in.routes.tokens, in.routes.experts}, wide_type(x), "grad_logits");
    return selector_product_backward(in, d_logits, needed);
}

// ---- assignment

Tensor balanced_assignment_cpu(const Tensor& scores) {
    TORCH_CHECK(scores.dim() == 2 && scores.size(1) > 0, "sparseffn::balanced_assignment: scores must be [T, E] with an expert");
    type_of(scores);
    const Tensor wide = scores.to(at::kDouble).contiguous();
    Tensor assigned = at::empty({scores.size(0)}, wide.options().dtype(at::kLong));
    if (scores.size(0))
        sparseffn_assign(wide.const_data_ptr<double>(), scores.size(0), scores.size(1), assigned.mutable_data_ptr<int64_t>());
    return assigned;
}

// ---- experts

template <class S> Matrices<S> matrices(const MaybeTensor& t) {
    if (!t) return {nullptr, 0, 0, 0};
    return {pointer_if_given<S>(*t), t->stride(0), t->stride(1), t->stride(2)};
}
template <class S> OutMatrices<S> out_matrices(const Tensor& t) {
    if (t.dim() != 3) return {nullptr, 0, 0, 0};
    return {static_cast<S*>(t.mutable_data_ptr()), t.stride(0), t.stride(1), t.stride(2)};
}

// The arguments of `experts`, as its schema has them.
struct ExpertsInputs {
    Tensor x, gates, indices, keep, key_bias, gate_bias, value_bias;
    MaybeTensor keys, values, gate_keys;
    double keep_scale, alpha, limit;
    Activation activation;
    std::optional<int64_t> inner_k;

    void check() const {
        const auto& k = *keys;
        const auto& v = *values;
        const bool fits = x.dim() == 2 && k.dim() == 3 && v.dim() == 3 && k.size(1) == x.size(1) && v.size(0) == k.size(0) &&
                          v.size(1) == k.size(2);
        TORCH_CHECK(fits, "sparseffn::experts: x [T, D], keys [E, D, G] and values [E, G, D] do not fit together");
        TORCH_CHECK(indices.dim() == 2 && gates.sizes() == indices.sizes() && indices.size(0) == x.size(0) && indices.size(1) > 0 &&
                        indices.scalar_type() == at::kLong && gates.scalar_type() == wide_type(x),
                    "sparseffn::experts: gates and int64 indices must be [T, K]");
        const auto like_x = [&](const Tensor& t, at::IntArrayRef sizes, const char* name) {
            check_given("experts", t, sizes, x.scalar_type(), name);
        };
        like_x(k, k.sizes(), "keys");
        like_x(v, v.sizes(), "values");
        like_x(gate_keys.value_or(Tensor()), k.sizes(), "gate_keys");
        like_x(key_bias, {k.size(0), k.size(2)}, "key_bias");
        like_x(gate_bias, {k.size(0), k.size(2)}, "gate_bias");
        like_x(value_bias, {k.size(0), v.size(2)}, "value_bias");
        check_given("experts", keep, {indices.size(0), indices.size(1), k.size(2)}, at::kBool, "keep");
        TORCH_CHECK(v.size(2) == x.size(1), "sparseffn::experts: values must be as wide as x");
        check_gated("experts", gate_keys.has_value(), gate_bias.defined(), activation, limit);
        TORCH_CHECK(!inner_k || (*inner_k >= 1 && *inner_k <= indices.size(1) * k.size(2)),
                    "sparseffn::experts: inner_k must be between 1 and K G");
        TORCH_CHECK(gates.is_cpu() && indices.is_cpu() && x.is_cpu(), "sparseffn::experts: all tensors must be on one device");
    }

    // What the forward kept.
    void check_kept(const Tensor& hidden, const Tensor& positions, const Tensor& order, const Tensor& offsets) const {
        const char* operation = "experts_backward";
        const int64_t rows = indices.numel(), experts = keys->size(0), size = keys->size(2), parts = gate_keys ? 2 : 1;
        check_like(operation, hidden, {inner_k ? x.size(0) : rows, parts * inner_k.value_or(size)}, x.scalar_type(), "hidden");
        check_like(operation, order, {rows}, at::kLong, "order");
        check_like(operation, offsets, {experts + 1}, at::kLong, "offsets");
        const int64_t *edges = pointer_of<int64_t>(offsets), *sorted = pointer_of<int64_t>(order);
        const int64_t* chosen = pointer_of<int64_t>(indices);
        bool fits = edges[0] == 0 && edges[experts] == rows && std::is_sorted(edges, edges + experts + 1);
        // Selections ascend within each expert: none is there twice, so none is missing.
        for (int64_t e = 0; e < experts && fits; ++e)
            for (int64_t r = edges[e]; r < edges[e + 1] && fits; ++r)
                fits = sorted[r] >= 0 && sorted[r] < rows && chosen[sorted[r]] == e && (r == edges[e] || sorted[r] > sorted[r - 1]);
        TORCH_CHECK(fits, "sparseffn::experts_backward: `order` and `offsets` must be the selections sorted by expert");
        if (!inner_k) return;
        check_like(operation, positions, {x.size(0), *inner_k}, at::kInt, "positions");
        check_between<int32_t>(positions, -1, indices.size(1) * size, "a unit of the selected experts");
    }

    template <class S> Problem<S> problem(const Tensor& hidden, const int64_t* order, const int64_t* offsets) const {
        using C = compute_t<S>;
        Problem<S> p{};
        p.x = pointer_of<S>(x);
        p.keys = matrices<S>(keys);
        p.gate_keys = matrices<S>(gate_keys);
        p.values = matrices<S>(values);
        p.key_bias = pointer_of<S>(key_bias);
        p.gate_bias = pointer_of<S>(gate_bias);
        p.value_bias = pointer_of<S>(value_bias);
        p.gates = pointer_of<C>(gates);
        p.hidden = pointer<S>(hidden);
        p.keep = pointer_of<uint8_t>(keep);
        p.keep_scale = static_cast<C>(keep_scale);
        p.activation = activation;
        p.alpha = static_cast<C>(alpha);
        p.limit = static_cast<C>(limit);
        p.width = x.size(1);
        p.size = keys->size(2);
        p.routing = Routing{order, offsets, x.size(0), keys->size(0), indices.size(1)};
        p.threads = threads();
        return p;
    }
};

#define SPARSEFFN_EXPERTS_ARGUMENTS                                                                                            \
    const Tensor &x, const Tensor &keys, const Tensor &values, const Tensor &gates, const Tensor &indices,                     \
        const MaybeTensor &gate_keys, const MaybeTensor &key_bias, const MaybeTensor &gate_bias, const MaybeTensor &value_bias, \
        const MaybeTensor &keep, double keep_scale, std::string_view activation, double alpha, double limit,                   \
        std::optional<int64_t> inner_k
#define SPARSEFFN_EXPERTS_INPUTS                                                                                               \
    ExpertsInputs {                                                                                                            \
        x.contiguous(), gates.contiguous(), indices.contiguous(), in_order(keep), in_order(key_bias), in_order(gate_bias),     \
            in_order(value_bias), keys, values, gate_keys, keep_scale, alpha, limit, activation_of(activation), inner_k        \
    }

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> experts_with(const ExpertsInputs& in, bool keep_hidden) {
    in.check();
    const int64_t tokens = in.x.size(0), k = in.indices.size(1), experts = in.keys->size(0), size = in.keys->size(2);
    const int64_t parts = in.gate_keys ? 2 : 1;
    const auto whole = in.indices.options();
    Tensor y = new_tensor(in.x.sizes(), in.x.options());
    Tensor order, offsets, hidden, positions;
    // For one token, making tensors would take as long as the sort.
    Buffer<int64_t> own(keep_hidden ? 0 : tokens * k + experts + 1);
    int64_t *order_data = own.data(), *offsets_data = own.data() + tokens * k;
    if (keep_hidden) {
        order = at::empty({tokens * k}, whole);
        offsets = at::empty({experts + 1}, whole);
        order_data = order.mutable_data_ptr<int64_t>();
        offsets_data = offsets.mutable_data_ptr<int64_t>();
    }
    TORCH_CHECK(sort_by_expert(in.indices.const_data_ptr<int64_t>(), tokens * k, experts, order_data, offsets_data),
                "`indices` must be between 0 and ", experts - 1, ", an expert each; got one outside; fix: check what selects them");
    if (in.inner_k) {
        hidden = at::empty({tokens, parts * *in.inner_k}, in.x.options());
        positions = at::empty({tokens, *in.inner_k}, whole.dtype(at::kInt));
    } else if (keep_hidden) {
        hidden = new_tensor({tokens * k, parts * size}, in.x.options());
        positions = at::empty({0}, whole.dtype(at::kInt));
    }
    if (tokens && in.x.size(1))
        with_type(type_of(in.x), [&](auto* tag) {
            using S = std::remove_pointer_t<decltype(tag)>;
            const Problem<S> p = in.problem<S>(hidden, order_data, offsets_data);
            S* to = static_cast<S*>(y.mutable_data_ptr());
            if (in.inner_k) forward_inner(p, Inner<S>{*in.inner_k, positions.mutable_data_ptr<int32_t>(), p.hidden}, to);
            else forward(p, to);
        });
    return {y, hidden, positions, order, offsets};
}

Tensor experts_cpu(SPARSEFFN_EXPERTS_ARGUMENTS) { return std::get<0>(experts_with(SPARSEFFN_EXPERTS_INPUTS, false)); }

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> experts_kept_cpu(SPARSEFFN_EXPERTS_ARGUMENTS) {
    return experts_with(SPARSEFFN_EXPERTS_INPUTS, true);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> experts_backward_cpu(
    const Tensor& grad_y, SPARSEFFN_EXPERTS_ARGUMENTS, const Tensor& hidden, const Tensor& positions, const Tensor& order,
    const Tensor& offsets, Needed::Flags flags, bool joint) {
    const ExpertsInputs in = SPARSEFFN_EXPERTS_INPUTS;
    const Needed needed(flags, 8, "experts_backward");
    in.check();
    const Tensor grad = grad_y.contiguous(), kept = hidden.contiguous(), sorted = order.contiguous(), edges = offsets.contiguous();
    const Tensor survivors = positions.contiguous();
    check_like("experts_backward", grad, in.x.sizes(), in.x.scalar_type(), "grad_y");
    in.check_kept(kept, survivors, sorted, edges);
    TORCH_CHECK(keys.numel() > 0, "sparseffn::experts_backward: keys must have elements; got ", keys.sizes());
    const auto options = in.x.options();
    const auto flat = [&](size_t i, const Tensor& of) {
        return needed.made(i, options, [&] { return of.defined() ? new_tensor(of.sizes(), of.options()) : at::empty({0}, options); });
    };
    const auto weight = [&](size_t i, const MaybeTensor& of) {
        return needed.made(i, options, [&] { return of ? gradient_like(*of) : at::empty({0}, options); });
    };
    const bool halves = joint && in.gate_keys && needed[1] && needed[4] && are_halves(*in.keys, *in.gate_keys);
    auto [d_keys, d_gate_keys] = halves ? gradients_like_halves(*in.keys, *in.gate_keys)
                                        : std::pair(weight(1, in.keys), weight(4, in.gate_keys));
    Tensor d_x = flat(0, in.x), d_values = weight(2, in.values), d_gates = flat(3, in.gates);
    Tensor d_key_bias = flat(5, in.key_bias), d_gate_bias = flat(6, in.gate_bias), d_value_bias = flat(7, in.value_bias);
    with_type(type_of(in.x), [&](auto* tag) {
        using S = std::remove_pointer_t<decltype(tag)>;
        using C = compute_t<S>;
        const Problem<S> p = in.problem<S>(kept, pointer_of<int64_t>(sorted), pointer_of<int64_t>(edges));
        const Gradients<S> g{pointer_of<S>(grad),       pointer<S>(d_x),         out_matrices<S>(d_keys),
                             out_matrices<S>(d_gate_keys), out_matrices<S>(d_values), pointer<S>(d_key_bias),
                             pointer<S>(d_gate_bias),   pointer<S>(d_value_bias), pointer<C>(d_gates)};
        if (in.inner_k) backward_inner(p, Inner<S>{*in.inner_k, pointer<int32_t>(survivors), p.hidden}, g);
        else backward(p, g);
    });
    return {d_x, d_keys, d_values, d_gates, d_gate_keys, d_key_bias, d_gate_bias, d_value_bias};
}

}  // namespace
}  // namespace sparseffn

using namespace sparseffn;

TORCH_LIBRARY_IMPL(sparseffn, CPU, m) {
    m.impl("route", route_cpu);
    m.impl("route_kept", route_kept_cpu);
    m.impl("route_backward", route_backward_cpu);
    m.impl("router_logits", router_logits_cpu);
    m.impl("router_logits_kept", router_logits_cpu);
    m.impl("router_logits_backward", router_logits_backward_cpu);
    m.impl("balanced_assignment", balanced_assignment_cpu);
    m.impl("experts", experts_cpu);
    m.impl("experts_kept", experts_kept_cpu);
    m.impl("experts_backward", experts_backward_cpu);
}

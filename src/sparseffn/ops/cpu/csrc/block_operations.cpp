// The kernels of blocks of key-value pairs as operations on tensors.
#include <ATen/ops/mm.h>
#include <ATen/ops/sum.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include "blocks.h"
#include "tensors.h"

namespace sparseffn {
namespace {

Tensor zeros_like(const Tensor& t, const Tensor& x) { return at::zeros(t.defined() ? t.sizes() : at::IntArrayRef{0}, x.options()); }
Tensor empty_like(const Tensor& t, const Tensor& x) { return new_tensor(t.defined() ? t.sizes() : at::IntArrayRef{0}, x.options()); }

Tensor laid_like(const Tensor& gradient, const Tensor& weight) { return gradient_like(weight).copy_(gradient); }

// What the forward of a block kept of each token, and the gradients sent back: y's and the coefficients'.
void check_kept(const char* operation, const Tensor& x, int64_t tokens, int64_t chosen, int64_t units, int64_t slopes_wide,
                const Tensor& grad_y, const Tensor& grad_coefficients, const Tensor& indices, const Tensor& coefficients,
                const Tensor& slopes) {
    const auto type = x.scalar_type();
    check_like(operation, grad_y, x.sizes(), type, "grad_y");
    check_given(operation, grad_coefficients, {tokens, chosen}, type, "grad_coefficients");
    check_like(operation, indices, {tokens, chosen}, at::kLong, "indices");
    check_like(operation, coefficients, {tokens, chosen}, type, "coefficients");
    if (slopes_wide) check_like(operation, slopes, {tokens, slopes_wide}, type, "slopes");
    check_between<int64_t>(indices, 0, units, "a unit");
}

// ---- Top-K activation

struct TopKInputs {
    Tensor x, keys, values;
    int64_t k;
    Tensor gate_keys, key_bias, gate_bias, value_bias, keep;
    double keep_scale;
    Activation activation;
    double alpha, limit;
    bool by_norm, by_magnitude;

    int64_t tokens() const { return x.size(0); }
    int64_t parts() const { return gate_keys.defined() ? 2 : 1; }
    // ReLU's coefficients show its slope, the identity has none, unless dropout's zeros may be mistaken for its own.
    bool has_slopes() const {
        return gate_keys.defined() || !(activation == kRelu || (activation == kIdentity && !keep.defined()));
    }

    void check() const {
        const char* name = "topk_rows";
        TORCH_CHECK(x.dim() == 2 && keys.dim() == 2 && keys.size(1) == x.size(1) && x.is_cpu() && k >= 1 && k <= keys.size(0),
                    "sparseffn::topk_rows: x [T, D], keys [F, D] and 1 <= k <= F do not fit together");
        check_like(name, keys, keys.sizes(), x.scalar_type(), "keys");
        check_like(name, values, keys.sizes(), x.scalar_type(), "values");
        check_given(name, gate_keys, keys.sizes(), x.scalar_type(), "gate_keys");
        check_given(name, key_bias, {keys.size(0)}, x.scalar_type(), "key_bias");
        check_given(name, gate_bias, {keys.size(0)}, x.scalar_type(), "gate_bias");
        check_given(name, value_bias, {x.size(1)}, x.scalar_type(), "value_bias");
        check_given(name, keep, {tokens(), keys.size(0)}, at::kBool, "keep");
        check_gated("topk_rows", gate_keys.defined(), gate_bias.defined(), activation, limit);
    }

    template <class S> TopK<S> problem(const Tensor& indices, const Tensor& coefficients, const Tensor& slopes) const {
        using C = compute_t<S>;
        TopK<S> p{};
        p.x = pointer_of<S>(x);
        p.keys = pointer_of<S>(keys);
        p.gate_keys = pointer_if_given<S>(gate_keys);
        p.values = pointer_of<S>(values);
        p.key_bias = pointer_of<S>(key_bias);
        p.gate_bias = pointer_of<S>(gate_bias);
        p.value_bias = pointer_of<S>(value_bias);
        p.keep = pointer_of<uint8_t>(keep);
        p.keep_scale = static_cast<C>(keep_scale);
        p.activation = activation;
        p.clamp = {static_cast<C>(alpha), static_cast<C>(limit)};
        p.by_norm = by_norm;
        p.by_magnitude = by_magnitude;
        p.tokens = tokens();
        p.width = x.size(1);
        p.units = keys.size(0);
        p.k = k;
        p.threads = threads_for(p.tokens * p.units * p.width * parts());
        p.coefficients = pointer<S>(coefficients);
        p.indices = pointer<int64_t>(indices);
        p.slopes = pointer<S>(slopes);
        return p;
    }
};

#define SPARSEFFN_TOPK_ARGUMENTS                                                                                             \
    const Tensor &x, const Tensor &keys, const Tensor &values, int64_t k, const MaybeTensor &gate_keys,                      \
        const MaybeTensor &key_bias, const MaybeTensor &gate_bias, const MaybeTensor &value_bias, const MaybeTensor &keep,   \
        double keep_scale, std::string_view activation, double alpha, double limit, bool by_norm, bool by_magnitude
#define SPARSEFFN_TOPK_INPUTS                                                                                                \
    TopKInputs {                                                                                                             \
        x.contiguous(), keys.contiguous(), values.contiguous(), k, in_order(gate_keys), in_order(key_bias),                  \
            in_order(gate_bias), in_order(value_bias), in_order(keep), keep_scale, activation_of(activation), alpha, limit,  \
            by_norm, by_magnitude                                                                                            \
    }

std::tuple<Tensor, Tensor, Tensor, Tensor> topk_rows_with(const TopKInputs& in, bool keeps) {
    in.check();
    const auto options = in.x.options();
    Tensor y = new_tensor(in.x.sizes(), options), indices = at::empty({in.tokens(), in.k}, options.dtype(at::kLong));
    Tensor coefficients = at::empty({in.tokens(), in.k}, options), slopes;
    if (keeps) slopes = at::empty(in.has_slopes() ? at::IntArrayRef{in.tokens(), in.parts() * in.k} : at::IntArrayRef{0}, options);
    if (in.tokens())
        with_type(type_of(in.x), [&](auto* tag) {
            using S = std::remove_pointer_t<decltype(tag)>;
            topk_forward(in.problem<S>(indices, coefficients, slopes), pointer<S>(y));
        });
    return {y, indices, coefficients, slopes};
}

std::tuple<Tensor, Tensor, Tensor> topk_rows_cpu(SPARSEFFN_TOPK_ARGUMENTS) {
    auto [y, indices, coefficients, slopes] = topk_rows_with(SPARSEFFN_TOPK_INPUTS, false);
    return {y, indices, coefficients};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> topk_rows_kept_cpu(SPARSEFFN_TOPK_ARGUMENTS) {
    return topk_rows_with(SPARSEFFN_TOPK_INPUTS, true);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> topk_rows_backward_cpu(
    const MaybeTensor& grad_y, const MaybeTensor& grad_coefficients, SPARSEFFN_TOPK_ARGUMENTS, const Tensor& indices,
    const Tensor& coefficients, const Tensor& slopes, Needed::Flags flags) {
    const TopKInputs in = SPARSEFFN_TOPK_INPUTS;
    const Needed needed(flags, 7, "topk_rows_backward");
    in.check();
    const Tensor sent = grad_y ? grad_y->contiguous() : zeros_like(in.x, in.x), sent_coefficients = in_order(grad_coefficients);
    const Tensor chosen = indices.contiguous(), kept = coefficients.contiguous(), kept_slopes = slopes.contiguous();
    TORCH_CHECK(in.keys.numel() > 0, "sparseffn::topk_rows_backward: keys must have elements; got ", in.keys.sizes());
    check_kept("topk_rows_backward", in.x, in.tokens(), in.k, in.keys.size(0), in.has_slopes() ? in.parts() * in.k : 0, sent,
               sent_coefficients, chosen, kept, kept_slopes);
    const auto of = [&](size_t i, const Tensor& argument) {
        const auto make = in.tokens() ? empty_like : zeros_like;
        return needed.made(i, in.x.options(), [&] { return make(argument, in.x); });
    };
    const Tensor d_value_bias = needed[6] && in.value_bias.defined() ? at::sum(sent, 0) : empty_like(Tensor(), in.x);
    const Tensor d_x = of(0, in.x), d_keys = of(1, in.keys), d_values = of(2, in.values), d_gate_keys = of(3, in.gate_keys);
    const Tensor d_key_bias = of(4, in.key_bias), d_gate_bias = of(5, in.gate_bias);
    if (in.tokens())
        with_type(type_of(in.x), [&](auto* tag) {
            using S = std::remove_pointer_t<decltype(tag)>;
            topk_backward(in.problem<S>(chosen, kept, kept_slopes),
                          TopKGradients<S>{pointer_of<S>(sent), pointer_of<S>(sent_coefficients), pointer<S>(d_x), pointer<S>(d_keys),
                                           pointer<S>(d_gate_keys), pointer<S>(d_values), pointer<S>(d_key_bias),
                                           pointer<S>(d_gate_bias)});
        });
    return {d_x, d_keys, d_values, d_gate_keys, d_key_bias, d_gate_bias, d_value_bias};
}

// ---- product keys

struct ReadsInputs {
    Tensor x, keys_a, keys_b, values;
    int64_t k;
    bool softmax;
    Activation activation;

    ReadsInputs(const Tensor& x_in, const Tensor& keys_a_in, const Tensor& keys_b_in, const Tensor& values_in, int64_t k_in,
                std::string_view name)
        : x(x_in.contiguous()), keys_a(keys_a_in.contiguous()), keys_b(keys_b_in.contiguous()), values(values_in.contiguous()),
          k(k_in), softmax(name == "softmax"), activation(softmax ? kIdentity : activation_of(name)) {
        TORCH_CHECK(x.dim() == 2 && x.size(1) % 2 == 0 && keys_a.dim() == 3 && keys_b.dim() == 3 && x.is_cpu() &&
                        keys_a.size(2) == half() && keys_b.size(0) == heads() && activation != kClampedSwiglu,
                    "sparseffn::product_key_rows: x [T, D], keys_a [H, A, D / 2] and keys_b [H, B, D / 2] do not fit together");
        check_like("product_key_rows", keys_a, keys_a.sizes(), x.scalar_type(), "keys_a");
        check_like("product_key_rows", keys_b, {heads(), keys_b.size(1), half()}, x.scalar_type(), "keys_b");
        check_like("product_key_rows", values, {keys_a.size(1) * keys_b.size(1), x.size(1)}, x.scalar_type(), "values");
        TORCH_CHECK(k >= 1 && k <= values.size(0), "sparseffn::product_key_rows: k must be between 1 and A B");
    }

    int64_t tokens() const { return x.size(0); }
    int64_t half() const { return x.size(1) / 2; }
    int64_t heads() const { return keys_a.size(0); }
    int64_t work() const { return tokens() * heads() * ((keys_a.size(1) + keys_b.size(1)) * half() + k * x.size(1)); }
    bool has_slopes() const { return !softmax && activation != kRelu && activation != kIdentity; }

    template <class S> ProductKeys<S> problem(const Tensor& indices, const Tensor& coefficients, const Tensor& slopes) const {
        return {pointer_of<S>(x), pointer_of<S>(keys_a), pointer_of<S>(keys_b), pointer_of<S>(values), softmax, activation, tokens(),
                half(), heads(), keys_a.size(1), keys_b.size(1), k, threads_for(work()), pointer<S>(coefficients),
                pointer<int64_t>(indices), pointer<S>(slopes)};
    }
};

std::tuple<Tensor, Tensor, Tensor, Tensor> product_key_rows_with(const ReadsInputs& in, bool keeps) {
    const auto options = in.x.options();
    const int64_t reads = in.heads() * in.k;
    Tensor y = new_tensor(in.x.sizes(), options), indices = at::empty({in.tokens(), reads}, options.dtype(at::kLong));
    Tensor coefficients = at::empty({in.tokens(), reads}, options), slopes;
    if (keeps) slopes = at::empty(in.has_slopes() ? at::IntArrayRef{in.tokens(), reads} : at::IntArrayRef{0}, options);
    if (in.tokens())
        with_type(type_of(in.x), [&](auto* tag) {
            using S = std::remove_pointer_t<decltype(tag)>;
            product_keys_forward(in.problem<S>(indices, coefficients, slopes), pointer<S>(y));
        });
    return {y, indices, coefficients, slopes};
}

std::tuple<Tensor, Tensor, Tensor> product_key_rows_cpu(const Tensor& x, const Tensor& keys_a, const Tensor& keys_b,
                                                        const Tensor& values, int64_t k, std::string_view activation) {
    auto [y, indices, coefficients, slopes] = product_key_rows_with({x, keys_a, keys_b, values, k, activation}, false);
    return {y, indices, coefficients};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> product_key_rows_kept_cpu(const Tensor& x, const Tensor& keys_a, const Tensor& keys_b,
                                                                     const Tensor& values, int64_t k, std::string_view activation) {
    return product_key_rows_with({x, keys_a, keys_b, values, k, activation}, true);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> product_key_rows_backward_cpu(
    const MaybeTensor& grad_y, const MaybeTensor& grad_coefficients, const Tensor& x, const Tensor& keys_a, const Tensor& keys_b,
    const Tensor& values, int64_t k, std::string_view activation, const Tensor& indices, const Tensor& coefficients,
    const Tensor& slopes, Needed::Flags flags) {
    const ReadsInputs in(x, keys_a, keys_b, values, k, activation);
    const Needed needed(flags, 4, "product_key_rows_backward");
    const auto wide = wide_type(x);
    const auto of = [&](size_t i, auto&& make) { return needed.made(i, x.options(), make); };
    if (in.tokens() == 0)
        return {of(0, [&] { return zeros_like(in.x, x); }), of(1, [&] { return laid_like(zeros_like(in.keys_a, x), keys_a); }),
                of(2, [&] { return laid_like(zeros_like(in.keys_b, x), keys_b); }), of(3, [&] { return zeros_like(in.values, x); })};
    const Tensor sent = grad_y ? grad_y->contiguous() : zeros_like(in.x, x), sent_coefficients = in_order(grad_coefficients);
    const Tensor chosen = indices.contiguous(), kept = coefficients.contiguous(), kept_slopes = slopes.contiguous();
    const int64_t reads = in.heads() * in.k;
    check_kept("product_key_rows_backward", in.x, in.tokens(), reads, in.values.size(0), in.has_slopes() ? reads : 0, sent,
               sent_coefficients, chosen, kept, kept_slopes);
    const Tensor d_values = of(3, [&] { return empty_like(in.values, x); });
    const Tensor d_a = at::empty({in.tokens(), in.heads() * keys_a.size(1)}, x.options().dtype(wide));
    const Tensor d_b = at::empty({in.tokens(), in.heads() * keys_b.size(1)}, x.options().dtype(wide));
    with_type(type_of(in.x), [&](auto* tag) {
        using S = std::remove_pointer_t<decltype(tag)>;
        using C = compute_t<S>;
        product_keys_backward(in.problem<S>(chosen, kept, kept_slopes), pointer_of<S>(sent), pointer_of<S>(sent_coefficients),
                              pointer<S>(d_values), pointer<C>(d_a), pointer<C>(d_b));
    });
    const auto type = x.scalar_type();
    const auto half = [&](const Tensor& t, int64_t which) { return t.narrow(1, which * in.half(), in.half()); };
    const auto d_x = [&] {
        const Tensor d = at::empty(in.x.sizes(), d_a.options());
        half(d, 0).copy_(at::mm(d_a, in.keys_a.flatten(0, 1).to(wide)));
        half(d, 1).copy_(at::mm(d_b, in.keys_b.flatten(0, 1).to(wide)));
        return d.to(type);
    };
    const auto d_keys = [&](const Tensor& d, int64_t which, const Tensor& keys) {
        return laid_like(at::mm(d.t(), half(in.x.to(wide), which)).view(keys.sizes()).to(type), keys);
    };
    return {of(0, d_x), of(1, [&] { return d_keys(d_a, 0, keys_a); }), of(2, [&] { return d_keys(d_b, 1, keys_b); }), d_values};
}

std::tuple<Tensor, Tensor> product_key_topk_cpu(const Tensor& scores_a, const Tensor& scores_b, int64_t k) {
    TORCH_CHECK(scores_a.dim() >= 1 && scores_b.dim() == scores_a.dim() && scores_b.scalar_type() == scores_a.scalar_type() &&
                    scores_a.sizes().slice(0, scores_a.dim() - 1) == scores_b.sizes().slice(0, scores_b.dim() - 1) &&
                    k >= 1 && k <= scores_a.size(-1) * scores_b.size(-1) && scores_b.is_cpu(),
                "sparseffn::product_key_topk: scores_a (..., A), scores_b (..., B) and k do not fit together");
    const auto wide = wide_type(scores_a);
    const Tensor a = scores_a.to(wide).contiguous(), b = scores_b.to(wide).contiguous();
    std::vector<int64_t> sizes = a.sizes().vec();
    sizes.back() = k;
    Tensor sums = at::empty(sizes, a.options()), indices = at::empty(sizes, a.options().dtype(at::kLong));
    const int64_t rows = sums.numel() / k;
    const auto run = [&](auto* tag) {
        using C = std::remove_pointer_t<decltype(tag)>;
        const int threads = threads_for(16 * rows * (a.size(-1) + b.size(-1) + k));
        product_keys(pointer_of<C>(a), pointer_of<C>(b), rows, a.size(-1), b.size(-1), k, threads, pointer<C>(sums),
                     pointer<int64_t>(indices));
    };
    if (wide == at::kDouble) run(static_cast<double*>(nullptr));
    else run(static_cast<float*>(nullptr));
    return {sums.to(scores_a.scalar_type()), indices};
}

// ---- sums and selections

Tensor topk_cpu(const Tensor& scores, int64_t k, bool ordered) {
    TORCH_CHECK(scores.dim() >= 1 && k >= 1 && k <= scores.size(-1), "sparseffn::topk: k must be between 1 and the number of entries");
    const Tensor wide = scores.to(wide_type(scores)).contiguous();
    std::vector<int64_t> sizes = scores.sizes().vec();
    sizes.back() = k;
    Tensor chosen = at::empty(sizes, scores.options().dtype(at::kLong));
    const auto run = [&](auto* tag) {
        using C = std::remove_pointer_t<decltype(tag)>;
        topk(pointer_of<C>(wide), chosen.numel() / k, wide.size(-1), k, ordered, threads_for(16 * wide.numel()), pointer<int64_t>(chosen));
    };
    if (wide.scalar_type() == at::kDouble) run(static_cast<double*>(nullptr));
    else run(static_cast<float*>(nullptr));
    return chosen;
}

struct TableInputs {
    Tensor values, indices, weights;

    TableInputs(const Tensor& values_in, const Tensor& indices_in, const Tensor& weights_in)
        : values(values_in.contiguous()), indices(indices_in.contiguous()), weights(weights_in.to(wide_type(values_in)).contiguous()) {
        TORCH_CHECK(values.dim() == 2 && indices.dim() == 2 && weights.sizes() == indices.sizes() && indices.size(1) > 0 &&
                        indices.scalar_type() == at::kLong && weights_in.is_floating_point() && indices.is_cpu() && weights.is_cpu(),
                    "sparseffn::weighted_rows: values [N, D], int64 indices [T, K] and weights [T, K] do not fit together");
        check_between<int64_t>(indices, 0, values.size(0), "a row of `values`");
    }

    template <class S> Table<S> table() const {
        return {pointer_of<S>(values), pointer_of<int64_t>(indices), pointer_of<compute_t<S>>(weights), values.size(0),
                values.size(1), indices.size(0), indices.size(1), threads_for(indices.numel() * values.size(1))};
    }
};

Tensor weighted_rows_cpu(const Tensor& values, const Tensor& indices, const Tensor& weights) {
    const TableInputs in(values, indices, weights);
    Tensor y = new_tensor({indices.size(0), values.size(1)}, values.options());
    if (y.numel())
        with_type(type_of(values), [&](auto* tag) {
            using S = std::remove_pointer_t<decltype(tag)>;
            sum_rows(in.table<S>(), pointer<S>(y));
        });
    return y;
}

std::tuple<Tensor, Tensor> weighted_rows_backward_cpu(const Tensor& grad_y, const Tensor& values, const Tensor& indices,
                                                      const Tensor& weights, Needed::Flags flags) {
    const TableInputs in(values, indices, weights);
    const Needed needed(flags, 2, "weighted_rows_backward");
    const auto of = [&](size_t i, auto&& make) { return needed.made(i, values.options(), make); };
    const Tensor sent = grad_y.contiguous();
    check_like("weighted_rows_backward", sent, {indices.size(0), values.size(1)}, values.scalar_type(), "grad_y");
    if (sent.numel() == 0)
        return {of(0, [&] { return zeros_like(values, values); }), of(1, [&] { return zeros_like(weights, weights); })};
    const Tensor d_values = of(0, [&] { return empty_like(values, values); });
    const Tensor d_weights = of(1, [&] { return at::empty(in.weights.sizes(), in.weights.options()); });
    with_type(type_of(values), [&](auto* tag) {
        using S = std::remove_pointer_t<decltype(tag)>;
        row_gradients(in.table<S>(), pointer_of<S>(sent), pointer<S>(d_values), pointer<compute_t<S>>(d_weights));
    });
    return {d_values, needed[1] ? d_weights.to(weights.scalar_type()) : d_weights};
}

}  // namespace
}  // namespace sparseffn

using namespace sparseffn;

TORCH_LIBRARY_IMPL(sparseffn, CPU, m) {
    m.impl("topk_rows", topk_rows_cpu);
    m.impl("topk_rows_kept", topk_rows_kept_cpu);
    m.impl("topk_rows_backward", topk_rows_backward_cpu);
    m.impl("product_key_rows", product_key_rows_cpu);
    m.impl("product_key_rows_kept", product_key_rows_kept_cpu);
    m.impl("product_key_rows_backward", product_key_rows_backward_cpu);
    m.impl("product_key_topk", product_key_topk_cpu);
    m.impl("product_key_topk_kept", product_key_topk_cpu);
    m.impl("topk", topk_cpu);
    m.impl("weighted_rows", weighted_rows_cpu);
    m.impl("weighted_rows_kept", weighted_rows_cpu);
    m.impl("weighted_rows_backward", weighted_rows_backward_cpu);
}

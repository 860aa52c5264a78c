// Gradients of Top-K activation from what its forward kept: survivors, their coefficients, and derivatives of these.
#pragma once

#include "topk_forward.h"

namespace sparseffn {

// What a survivor's products get of its coefficient's gradient.
template <class S> class Chain {
    using C = compute_t<S>;

  public:
    Chain(const TopK<S>& p, int64_t token)
        : coefficients_(p.coefficients + token * p.k),
          slopes_(p.slopes ? p.slopes + token * p.parts() * p.k : nullptr),
          k_(p.k),
          relu_(p.activation == kRelu),
          scale_(p.keep ? p.keep_scale : C(1)) {}

    // Without slopes the activation is ReLU, of which the coefficient shows the slope, or the identity.
    C by_key(int64_t j) const {
        if (slopes_) return upcast(slopes_[j]);
        return relu_ ? (upcast(coefficients_[j]) > C(0) ? scale_ : C(0)) : C(1);
    }
    C by_gate(int64_t j) const { return upcast(slopes_[k_ + j]); }

  private:
    const S *coefficients_, *slopes_;
    int64_t k_;
    bool relu_;
    C scale_;
};

// Gradients of the biases of a group's units, by way of the pairs' gradients; of many tokens, hence in double.
template <class S> void add_bias(const Grouping& pairs, int64_t s, int64_t group, const TopK<S>& p, const compute_t<S>* d, double* bias) {
    const int64_t first = pairs.tokens(s).begin * p.k;
    pairs.in_runs(s, group, [&](int64_t, const int32_t* pair, int n) {
        for (int q = 0; q < n; ++q) bias[p.indices[first + pair[q]]] += d[first + pair[q]];
    });
}

// `d` holds the products of y's gradient with the pairs' values; it becomes the gradient of the keys' products, and `d_gate`
// that of the gate keys'.
template <class S>
void through_chain(const TopK<S>& p, const TopKGradients<S>& g, const Grouping& pairs, int64_t s, int64_t group, compute_t<S>* d,
                   compute_t<S>* d_gate) {
    using C = compute_t<S>;
    const int64_t begin = pairs.tokens(s).begin;
    pairs.in_runs(s, group, [&](int64_t token, const int32_t* pair, int n) {
        const Chain<S> chain(p, begin + token);
        for (int q = 0; q < n; ++q) {
            const int64_t at = begin * p.k + pair[q], j = pair[q] - token * p.k;
            const C sum = d[at] + (g.coefficients ? upcast(g.coefficients[at]) : C(0));
            d[at] = sum * chain.by_key(j);
            if (d_gate) d_gate[at] = sum * chain.by_gate(j);
        }
    });
}

template <class S> void topk_backward(const TopK<S>& p, const TopKGradients<S>& g) {
    using C = compute_t<S>;
    const int64_t n_pairs = p.tokens * p.k;
    const Upcast<S> coefficients(p.coefficients, n_pairs, p.threads);
    Table<S> values{p.values, p.indices, coefficients.data(), p.units, p.width, p.tokens, p.k, p.threads};
    Grouping pairs(p.tokens, p.k, p.units, kGradientTokens);
    Lines<C> x(p.tokens, p.width), y(p.tokens, p.width);
    Buffer<C> d(n_pairs), d_gate(p.gate_keys ? n_pairs : 0);
    const auto rows_of = [&](S* gradient) { return RowSums<S>(gradient, gradient ? p.units : 0, p.width); };
    RowSums<S> to_keys = rows_of(g.keys), to_values = rows_of(g.values), to_gate_keys = rows_of(g.gate_keys);
    auto spaces = row_spaces<S>(p.width, p.threads);
    std::vector<double> key_bias(g.key_bias ? p.units : 0), gate_bias(g.gate_bias ? p.units : 0);
#pragma omp parallel num_threads(p.threads)
    {
        RowSpace<S>& ws = spaces[omp_get_thread_num()];
        group_and_take(pairs, p.indices, [&](int64_t token) {
            x.take(p.x + token * p.width, token, p.width);
            y.take(g.y + token * p.width, token, p.width);
        });
        for_groups(pairs, [&](int64_t s, int64_t group, bool first, bool last) {
            const auto outer = [&](const C* weights, const Lines<C>& right, RowSums<S>& to) {
                ws.sums.clear(kGroupRows);
                add_outer_pairs(pairs, s, group, p.indices, weights, p.k, right, ws.sums);
                to.put(group, ws.sums, first, last);
            };
            dot_pairs(values, pairs, s, group, ws.group, y, d.data());
            through_chain(p, g, pairs, s, group, d.data(), p.gate_keys ? d_gate.data() : nullptr);
            if (g.values) outer(coefficients.data(), y, to_values);
            if (g.keys) outer(d.data(), x, to_keys);
            if (g.gate_keys) outer(d_gate.data(), x, to_gate_keys);
            if (g.key_bias) add_bias(pairs, s, group, p, d.data(), key_bias.data());
            if (g.gate_bias) add_bias(pairs, s, group, p, d_gate.data(), gate_bias.data());
        });
    }
    for (int64_t i = 0; i < p.units; ++i) {
        if (g.key_bias) g.key_bias[i] = narrow<S>(static_cast<C>(key_bias[i]));
        if (g.gate_bias) g.gate_bias[i] = narrow<S>(static_cast<C>(gate_bias[i]));
    }
    if (!g.x) return;
    Table<S> keys{p.keys, p.indices, d.data(), p.units, p.width, p.tokens, p.k, p.threads};
    keys.more_values = p.gate_keys;
    keys.more_weights = d_gate.data();
    sum_rows(keys, g.x);
}

}  // namespace sparseffn

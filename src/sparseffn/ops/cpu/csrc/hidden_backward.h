// From the gradient of a row of hidden units, weighted sums of values, to those of the products behind it and of its gate.
#pragma once

#include "hidden.h"

namespace sparseffn {

// Sum of unit(g, drop) over units, whose effects on memory are their own: a loop for the compiler to vectorise.
template <class C, class Unit> C sum_of_units(int64_t size, const uint8_t* keep, C keep_scale, Unit unit) {
    C sum = 0;
    if (keep) {
#pragma omp simd reduction(+ : sum)
        for (int64_t g = 0; g < size; ++g) sum += unit(g, keep[g] ? keep_scale : C(0));
    } else {
#pragma omp simd reduction(+ : sum)
        for (int64_t g = 0; g < size; ++g) sum += unit(g, C(1));
    }
    return sum;
}

// In: `d`, the gradient of some units of a row by the values. Out: those of the keys' product (in place), and in `d_gate` of the
// gate keys'; `scaled` gets s * drop * a. Returns what the gate's gradient gets from these units.
template <class S>
compute_t<S> through_activation(const Problem<S>& p, int64_t row, Range units, compute_t<S>* d, compute_t<S>* d_gate,
                                compute_t<S>* scaled) {
    using C = compute_t<S>;
    const int64_t selection = p.routing.order[row], size = units.end - units.begin;
    const S* kept = p.hidden + row * p.kept() * p.size + units.begin;
    const S* kept_gate = kept + p.size;
    const uint8_t* keep = p.keep ? p.keep + selection * p.size + units.begin : nullptr;
    const C gate = p.gates[selection];
    const Clamp<C> clamp{p.alpha, p.limit};
    C sum = 0;
    with_activation(p.activation, [&](auto activation) {
        constexpr Activation a = decltype(activation)::value;
        if (!d_gate)
            sum = sum_of_units<C>(size, keep, p.keep_scale, [=](int64_t g, C drop) {
                const Slope<C> s = slope_of(a, C(upcast(kept[g])));
                const C sent = d[g] * drop;
                scaled[g] = gate * drop * s.value;
                d[g] = sent * gate * s.slope;
                return sent * s.value;
            });
        else
            sum = sum_of_units<C>(size, keep, p.keep_scale, [=](int64_t g, C drop) {
                const GatedSlope<C> s = gated_slope(a, C(upcast(kept[g])), C(upcast(kept_gate[g])), clamp);
                const C sent = d[g] * drop;
                scaled[g] = gate * drop * s.value;
                d[g] = sent * gate * s.by_key;
                d_gate[g] = sent * gate * s.by_gate;
                return sent * s.value;
            });
    });
    return sum;
}

// What the gate's gradient gets through the bias of the values.
template <class S, class T> compute_t<S> through_value_bias(const Problem<S>& p, int64_t expert, const T* gy) {
    using C = compute_t<S>;
    if (!p.value_bias) return 0;
    const S* bias = p.value_bias + expert * p.width;
    Vec<C> sum{};
    C rest = 0;
    int64_t c = 0;
    for (; c + kLanes<C> <= p.width; c += kLanes<C>) sum += load(gy + c) * load(bias + c);
    for (; c < p.width; ++c) rest += upcast(gy[c]) * upcast(bias[c]);
    return sum_of_lanes<C>(sum) + rest;
}

// to[c] = sum over an expert's rows of weight(row) * row_at(row)[c].
template <class S, class Weight, class RowAt>
void bias_gradient(Range rows, int64_t columns, std::vector<double>& sums, S* to, Weight&& weight, RowAt&& row_at) {
    std::fill_n(sums.begin(), columns, 0.0);
    for (int64_t r = rows.begin; r < rows.end; ++r) {
        const auto row = row_at(r);
        const double w = weight(r);
        for (int64_t c = 0; c < columns; ++c) sums[c] += w * upcast(row[c]);
    }
    for (int64_t c = 0; c < columns; ++c) to[c] = narrow<S>(static_cast<compute_t<S>>(sums[c]));
}

// Gradients of an expert's biases from its rows of d, of d of the gate keys, and of y's gradient.
template <class S, class T, class D, class DGate>
void bias_gradients(const Problem<S>& p, const Gradients<S>& g, int64_t e, const T* gy, std::vector<double>& sums,
                    D&& d, DGate&& d_gate) {
    const Range rows{p.routing.offsets[e], p.routing.offsets[e + 1]};
    const auto one = [](int64_t) { return 1.0; };
    if (g.key_bias) bias_gradient(rows, p.size, sums, g.key_bias + e * p.size, one, d);
    if (g.gate_bias) bias_gradient(rows, p.size, sums, g.gate_bias + e * p.size, one, d_gate);
    if (g.value_bias)
        bias_gradient(rows, p.width, sums, g.value_bias + e * p.width,
                      [&](int64_t r) { return static_cast<double>(p.gates[p.routing.order[r]]); },
                      [&](int64_t r) { return gy + p.routing.token(r) * p.width; });
}

}  // namespace sparseffn

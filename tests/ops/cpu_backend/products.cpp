// The experts' products on a processor without Python: forward and backward of each storage type against loops in double, for odd
// sizes and for matrices that lie by rows, by columns or interleaved. Compiled by test_cpu_neon.py; exits with the number of faults.
#include <cmath>
#include <cstdio>
#include <random>
#include <vector>

#include "experts_types.h"

using namespace sparseffn;

namespace {

constexpr int64_t kTokens = 23, kWidth = 37, kSize = 19, kExperts = 4, kChosen = 2;
int faults = 0;

// Stored numbers, and the same in double.
template <class S> struct Numbers {
    std::vector<S> stored;
    std::vector<double> exact;

    Numbers(int64_t n, double scale, unsigned seed) : stored(n), exact(n) {
        std::mt19937 random(seed);
        std::normal_distribution<double> normal(0, scale);
        for (int64_t i = 0; i < n; ++i) {
            stored[i] = narrow<S>(static_cast<compute_t<S>>(normal(random)));
            exact[i] = upcast(stored[i]);
        }
    }
};

template <class T> struct View {
    T* data;
    int64_t expert, row, column;
    T& at(int64_t e, int64_t r, int64_t c) const { return data[e * expert + r * row + c * column]; }
};

template <class S> void compare(const char* what, const char* type, const char* layout, const std::vector<S>& found,
                                const std::vector<double>& wanted, double tolerance) {
    double worst = 0, largest = 1e-30;
    for (size_t i = 0; i < wanted.size(); ++i) {
        const double off = std::abs(double(upcast(found[i])) - wanted[i]);
        worst = off == off ? std::max(worst, off) : INFINITY;
        largest = std::max(largest, std::abs(wanted[i]));
    }
    const bool wrong = !(worst <= tolerance * largest);
    faults += wrong;
    std::printf("%-7s %-12s %-10s %.1e%s\n", type, layout, what, worst / largest, wrong ? "  WRONG" : "");
}

// y = sum of g (silu(x K) * (x U)) V, and the gradients for dy.
template <class S> void check(const char* type, const char* layout, double tolerance) {
    using C = compute_t<S>;
    const std::string order = layout;
    const int64_t half = kWidth * kSize, rows = kTokens * kChosen;
    const Numbers<S> x(kTokens * kWidth, 1, 1), up(kExperts * 2 * half, 0.3, 2), down(kExperts * half, 0.3, 3), dy(kTokens * kWidth, 1, 4);
    const Numbers<C> gates(rows, 1, 5);
    // Of keys, gate keys and values: [E, D, G] twice and [E, G, D], from the first element of `up` or `down`.
    int64_t second = kSize, line = 2 * kSize, row = line, column = 1, v_row = kWidth, v_column = 1;
    if (order == "by-columns") second = half, row = 1, column = kWidth, v_row = 1, v_column = kSize;
    if (order == "interleaved") second = 1, column = 2;
    std::vector<int64_t> chosen(rows), sorted(rows), offsets(kExperts + 1);
    for (int64_t r = 0; r < rows; ++r) chosen[r] = (r / kChosen + r % kChosen * 2 + 1) % (kExperts - 1);  // the last has none
    if (!sort_by_expert(chosen.data(), rows, kExperts, sorted.data(), offsets.data())) ++faults;

    std::vector<S> hidden(rows * 2 * kSize), y(kTokens * kWidth), dx(kTokens * kWidth), d_up(kExperts * 2 * half), d_down(kExperts * half);
    std::vector<C> d_gates(rows);
    Problem<S> p{};
    p.x = x.stored.data();
    p.keys = {up.stored.data(), 2 * half, row, column};
    p.gate_keys = {up.stored.data() + second, 2 * half, row, column};
    p.values = {down.stored.data(), half, v_row, v_column};
    p.gates = gates.stored.data();
    p.hidden = hidden.data();
    p.keep_scale = 1;
    p.activation = kSilu;
    p.width = kWidth;
    p.size = kSize;
    p.routing = {sorted.data(), offsets.data(), kTokens, kExperts, kChosen};
    p.threads = 2;
    forward(p, y.data());
    // Gradients are dense; interleaved matrices get theirs by rows.
    Gradients<S> g{};
    const int64_t g_row = order == "by-columns" ? 1 : kSize, g_column = order == "by-columns" ? kWidth : 1;
    g.y = dy.stored.data();
    g.x = dx.data();
    g.keys = {d_up.data(), half, g_row, g_column};
    g.gate_keys = {d_up.data() + kExperts * half, half, g_row, g_column};
    g.values = {d_down.data(), half, v_row, v_column};
    g.gates = d_gates.data();
    backward(p, g);

    std::vector<double> t_y(y.size()), t_dx(dx.size()), t_up(d_up.size()), t_down(d_down.size()), t_gates(rows);
    const View<const double> keys{up.exact.data(), 2 * half, row, column}, gate_keys{up.exact.data() + second, 2 * half, row, column},
        values{down.exact.data(), half, v_row, v_column};
    const View<double> d_keys{t_up.data(), half, g_row, g_column}, d_gate_keys{t_up.data() + kExperts * half, half, g_row, g_column},
        d_values{t_down.data(), half, v_row, v_column};
    for (int64_t r = 0; r < rows; ++r) {
        const int64_t t = r / kChosen, e = chosen[r];
        const double *in = &x.exact[t * kWidth], *sent = &dy.exact[t * kWidth], gate = gates.exact[r];
        for (int64_t u = 0; u < kSize; ++u) {
            double h = 0, factor = 0, back = 0;
            for (int64_t d = 0; d < kWidth; ++d) {
                h += in[d] * keys.at(e, d, u);
                factor += in[d] * gate_keys.at(e, d, u);
                back += sent[d] * values.at(e, u, d);
            }
            const double sigmoid = 1 / (1 + std::exp(-h)), unit = h * sigmoid * factor;
            const double d_h = gate * back * factor * sigmoid * (1 + h * (1 - sigmoid)), d_factor = gate * back * h * sigmoid;
            t_gates[r] += back * unit;
            for (int64_t d = 0; d < kWidth; ++d) {
                t_y[t * kWidth + d] += gate * unit * values.at(e, u, d);
                t_dx[t * kWidth + d] += d_h * keys.at(e, d, u) + d_factor * gate_keys.at(e, d, u);
                d_keys.at(e, d, u) += d_h * in[d];
                d_gate_keys.at(e, d, u) += d_factor * in[d];
                d_values.at(e, u, d) += gate * unit * sent[d];
            }
        }
    }
    compare("output", type, layout, y, t_y, tolerance);
    compare("d x", type, layout, dx, t_dx, tolerance);
    compare("d keys", type, layout, d_up, t_up, tolerance);
    compare("d values", type, layout, d_down, t_down, tolerance);
    compare("d gates", type, layout, d_gates, t_gates, tolerance);
}

}  // namespace

extern "C" const char* sparseffn_instruction_sets();

int main() {
    std::printf("%s\n", sparseffn_instruction_sets());
    for (const char* layout : {"by-rows", "by-columns", "interleaved"}) {
        check<float>("float", layout, 2e-6);
        check<double>("double", layout, 1e-14);
        check<bf16>("bf16", layout, 2e-2);
        check<half>("half", layout, 3e-3);
    }
    return faults;
}

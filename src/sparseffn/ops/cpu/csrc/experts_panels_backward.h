// Gradients of the expert computation of many bfloat16 rows. Those of the weights are sums over an expert's rows of outer
// products, so rows are taken in pairs there, of both factors.
#pragma once

#include "experts_panels.h"

namespace sparseffn {

#if defined(SPARSEFFN_PAIR_PRODUCTS)

// Rows of a sum of outer products that are packed at a time, and the columns of both factors that one thread takes: 420 KiB of
// the second-level cache.
constexpr int64_t kOuterDepth = 512, kOuterHeight = 128, kOuterWidth = 192;

// The same where no expert has as many rows: fewer pairs leave room for more columns, so that each is packed less often.
struct OuterShape {
    int64_t depth, height, width;

    // With so many experts, threads should find some blocks each.
    OuterShape(const Routing& routing, int64_t columns, int threads, int64_t (*pairs)(int64_t)) {
        int64_t most = 2;
        for (int64_t e = 0; e < routing.experts; ++e) most = std::max(most, routing.offsets[e + 1] - routing.offsets[e]);
        depth = std::min(kOuterDepth, 2 * pairs(most));
        int64_t times = std::min(kOuterDepth / depth, columns / kOuterHeight);
        while (times > 1 && columns / (times * kOuterHeight) * routing.experts < 4 * threads) times /= 2;
        times = std::max<int64_t>(times, 1);
        height = times * kOuterHeight;
        width = times * kOuterWidth;
    }
};

template <class Rows> struct OuterWorkspace {
    Buffer<uint32_t> left, right;
    Buffer<float> sums;
    std::vector<double> bias;

    OuterWorkspace(const Problem<bf16>& p, const OuterShape& shape)
        : left(Rows::pairs(shape.depth) * shape.height),
          right(Rows::pairs(shape.depth) * shape.width),
          sums(shape.depth < kOuterDepth ? 0 : kOuterHeight * kOuterWidth),
          bias(std::max(p.width, p.size)) {}
};

// Columns as blocks of whole pieces, nearly equal.
struct Blocks {
    int64_t columns, piece, n;

    Blocks(int64_t of, int64_t most, int64_t whole) : columns(of), piece(whole), n((of + most - 1) / most) {}
    Range at(int64_t i) const {
        const int64_t pieces = (columns + piece - 1) / piece;
        return {pieces * i / n * piece, std::min(pieces * (i + 1) / n * piece, columns)};
    }
};

// A gradient of weights, whose lines in memory run along `right`.
template <class Rows> struct PairedGradient {
    const Rows &left, &right;
    OutMatrices<bf16> to;
    Blocks heights, widths;
    bool streams;

    PairedGradient(const Rows& rows, const Rows& columns, const OutMatrices<bf16>& out, const OuterShape& shape, int64_t experts)
        : left(out.by_rows() ? rows : columns),
          right(out.by_rows() ? columns : rows),
          to(out),
          heights(left.columns(), shape.height, Rows::kOuterLines),
          widths(right.columns(), shape.width, Rows::kOuterColumns),
          streams(Rows::kStreams && experts * left.columns() * right.columns() * static_cast<int64_t>(sizeof(bf16)) >= kStreamed) {}
    int64_t parts() const { return heights.n * widths.n; }
};

// to[c] = the first n of `values`, rounded; past the caches where `streams`, which asks for whole lines of it.
template <int N> SPARSEFFN_INLINE void put_rounded(const __m512 (&values)[N], int64_t n, bool streams, bf16* to) {
    for (int j = 0; j < N && n > 0; j += 2, n -= 2 * kPairLanes, to += 2 * kPairLanes) {
        const __m512i rounded = (__m512i)_mm512_cvtne2ps_pbh(j + 1 < N ? values[j + 1] : values[j], values[j]);
        if (n < 2 * kPairLanes) _mm512_mask_storeu_epi16(to, first_halves(n), rounded);
        else if (streams) _mm512_stream_si512(reinterpret_cast<__m512i*>(to), rounded);
        else _mm512_storeu_si512(to, rounded);
    }
}

// One block of an expert's gradient; zero without rows.
template <class Rows>
void outer_part(const Problem<bf16>& p, const PairedGradient<Rows>& g, int64_t e, int64_t part, OuterWorkspace<Rows>& ws) {
    const Range lines = g.heights.at(part / g.widths.n), columns = g.widths.at(part % g.widths.n);
    const int64_t height = lines.end - lines.begin, width = columns.end - columns.begin;
    const Range rows{p.routing.offsets[e], p.routing.offsets[e + 1]};
    bf16* to = g.to.of(e) + lines.begin * g.to.ld() + columns.begin;
    const bool streams = g.streams && reinterpret_cast<uintptr_t>(to) % kLine == 0 && g.to.ld() * sizeof(bf16) % kLine == 0;
    for (int64_t first = rows.begin; first == rows.begin || first < rows.end; first += kOuterDepth) {
        const Range some{first, std::min(first + kOuterDepth, rows.end)};
        g.left.pack_left(e, some, lines, ws.left.data());
        g.right.pack_right(e, some, columns, ws.right.data());
        Rows::outer(some.end - some.begin, height, width, ws.left.data(), ws.right.data(), [&](int64_t i, int64_t column, const auto& acc) {
            constexpr int N = sizeof acc / sizeof acc[0];
            float* sum = ws.sums.data() + i * kOuterWidth + column;
            __m512 whole[N];
            for (int j = 0; j < N; ++j) {
                whole[j] = first == rows.begin ? acc[j] : _mm512_loadu_ps(sum + j * kPairLanes) + acc[j];
                if (some.end < rows.end) _mm512_storeu_ps(sum + j * kPairLanes, whole[j]);
            }
            if (some.end == rows.end)
                put_rounded(whole, std::min<int64_t>(width - column, N * kPairLanes), streams, to + i * g.to.ld() + column);
        });
    }
    if (streams) end_streams();
}

// Gradients of the hidden units, [rows, size] each, and of the gates, one addend for each panel.
template <class Rows> struct HiddenGradients {
    Rows d, d_gate, scaled;
    Buffer<float> gates;

    HiddenGradients(const Problem<bf16>& p, const Panels& panels, bool for_values)
        : d(p.routing, p.size),
          d_gate(p.routing, p.gate_keys ? p.size : 0),
          scaled(p.routing, for_values ? p.size : 0),
          gates(p.routing.rows() * panels.n) {}
};

template <class Rows>
void hidden_gradients_of(const Problem<bf16>& p, const Gradients<bf16>& g, const UnitsPart& part, const UnitsPart& following,
                         const Panels& panels, const Rows& gy, PanelWorkspace<Rows>& ws, HiddenGradients<Rows>& h) {
    const Matrices<bf16> values = p.values.transposed();
    const int64_t n_units = part.n_units(), e = part.expert;
    Coming next = following.coming(values, p.width);
    const int64_t lines = next.share(Rows::turns(part.rows.end - part.rows.begin, n_units, p.width));
    const MatrixPanel panel = gy.panel(part.of(values), p.width, n_units, ws.panel.data());
    for (int64_t first = part.rows.begin; first < part.rows.end; first += kWaiting) {
        const Range some{first, std::min(first + kWaiting, part.rows.end)};
        put_products(gy, e, some, panel, next, lines, ws.scratch, ws.units.data());
        for (int64_t r = some.begin; r < some.end; ++r) {
            float scaled[kPanelColumns], *d = ws.units.data() + (r - first) * kPanelColumns, *d_gate = nullptr;
            if (p.gate_keys) d_gate = ws.gate_units.data() + (r - first) * kPanelColumns;
            h.gates[r * panels.n + part.panel] = through_activation(p, r, part.units, d, d_gate, scaled);
            if (g.values) h.scaled.put(e, r, part.units.begin, n_units, scaled);
            h.d.put(e, r, part.units.begin, n_units, d);
            if (d_gate) h.d_gate.put(e, r, part.units.begin, n_units, d_gate);
        }
    }
}

template <class Rows> void backward_by_panels(const Problem<bf16>& p, const Gradients<bf16>& g) {
    const Routing& routing = p.routing;
    const Panels panels(p.size, 1);
    const std::vector<UnitsPart> parts = units_parts(routing, panels);
    // Rows of the transposed keys: an expert's units.
    const TokenParts inputs(p, p.keys.row == 1 && (!p.gate_keys || p.gate_keys.row == 1));
    HiddenGradients<Rows> h(p, panels, static_cast<bool>(g.values));
    auto all = one_for_each_thread<PanelWorkspace<Rows>>(p.threads, p, g.x ? inputs.sums() : 0);
    const OuterShape shape(routing, std::max(p.width, p.size), p.threads, Rows::pairs);
    auto outer = one_for_each_thread<OuterWorkspace<Rows>>(p.threads, p, shape);
    const RowsTimes<Rows> products[] = {{&h.d, p.keys.transposed(), p.size},
                                        {p.gate_keys ? &h.d_gate : nullptr, p.gate_keys.transposed(), p.size}};
    Rows x(routing, p.width, p.x), gy(routing, p.width, g.y);
    std::vector<PairedGradient<Rows>> weights;
    if (g.keys) weights.push_back({x, h.d, g.keys, shape, routing.experts});
    if (g.gate_keys) weights.push_back({x, h.d_gate, g.gate_keys, shape, routing.experts});
    if (g.values) weights.push_back({h.scaled, gy, g.values, shape, routing.experts});
    int64_t per_expert = 1;  // the first are the biases
    for (const PairedGradient<Rows>& w : weights) per_expert += w.parts();
    const int64_t n_parts = static_cast<int64_t>(parts.size()), n_inputs = g.x ? inputs.n() : 0;
#pragma omp parallel num_threads(p.threads)
    {
        [[maybe_unused]] const typename Rows::Thread ready;
        PanelWorkspace<Rows>& ws = all[omp_get_thread_num()];
        OuterWorkspace<Rows>& own = outer[omp_get_thread_num()];
        gy.fill();
        if (g.keys || g.gate_keys) x.fill();
#pragma omp for schedule(dynamic, 1)
        for (int64_t i = 0; i < n_parts; ++i)
            hidden_gradients_of(p, g, parts[i], parts[std::min(i + p.threads, n_parts - 1)], panels, gy, ws, h);
#pragma omp for schedule(dynamic, 1) nowait
        for (int64_t i = 0; i < n_inputs; ++i)
            sum_of_rows(p, products, nullptr, inputs, i, ws, g.x);
#pragma omp for schedule(dynamic, 1) nowait
        for (int64_t unit = 0; unit < routing.experts * per_expert; ++unit) {
            const int64_t e = unit / per_expert;
            int64_t part = unit % per_expert;
            if (part-- == 0) {
                bias_gradients(p, g, e, g.y, own.bias, [&](int64_t r) { return h.d.row(e, r, 0); },
                               [&](int64_t r) { return h.d_gate.row(e, r, 0); });
                for (int64_t r = routing.offsets[e]; r < routing.offsets[e + 1] && g.gates; ++r) {
                    float sum = through_value_bias(p, e, g.y + routing.token(r) * p.width);
                    for (int64_t i = 0; i < panels.n; ++i) sum += h.gates[r * panels.n + i];
                    g.gates[routing.order[r]] = sum;
                }
                continue;
            }
            auto w = weights.begin();
            for (; part >= w->parts(); ++w) part -= w->parts();
            outer_part(p, *w, e, part, own);
        }
    }
}

#if defined(SPARSEFFN_TILES)
// Rows of an expert, on average, or numbers of its matrices, from which on tiles of 16 rows take no longer than pairs. Measured: one row
// of 1,024 x 128 takes up to 1.3 of the time, of 412 x 128 up to 1.5, eight rows 0.86 to 1.07; one of 1,024 x 512 takes 0.62.
constexpr int64_t kTiledRows = 8, kTiledNumbers = 1 << 18;
#endif

inline void backward_by_panels(const Problem<bf16>& p, const Gradients<bf16>& g) {
#if defined(SPARSEFFN_TILES)
    const bool pays = p.routing.rows() >= kTiledRows * p.routing.experts || p.width * p.size >= kTiledNumbers;
    if (pays && has_tiles()) return backward_by_panels<TileRows>(p, g);
#endif
    backward_by_panels<PairRows>(p, g);
}

#endif

}  // namespace sparseffn

// Gradients of the expert computation: of rows, of both weight tensors and of the gates. Each output element is summed by one
// thread in a fixed order.
#pragma once

#include <vector>

#include "experts.h"

namespace sparseffn {

// Rows of a weight gradient that are added up before the tile is written.
constexpr int64_t kDepth = 512;

// to[e] = from[e]^T for the experts in use: [rows, columns] becomes [columns, rows], a block at a time.
template <class S>
void transpose(const Problem<S>& p, const S* from, int64_t rows, int64_t columns, S* to) {
    constexpr int64_t kBlock = 16;
#pragma omp for schedule(static) collapse(2)
    for (int64_t e = 0; e < p.routing.experts; ++e)
        for (int64_t c = 0; c < (columns + kBlock - 1) / kBlock; ++c) {
            if (p.routing.offsets[e] == p.routing.offsets[e + 1]) continue;
            const S* a = from + e * rows * columns;
            S* b = to + e * rows * columns;
            const int64_t first = c * kBlock, last = std::min(first + kBlock, columns);
            for (int64_t r = 0; r < rows; r += kBlock) {
                const int64_t end = std::min(r + kBlock, rows);
                if (end - r == kBlock && last - first == kBlock) {
                    S block[kBlock][kBlock];
                    for (int64_t i = 0; i < kBlock; ++i)
                        for (int64_t j = 0; j < kBlock; ++j) block[j][i] = a[(r + i) * columns + first + j];
                    for (int64_t j = 0; j < kBlock; ++j) std::memcpy(b + (first + j) * rows + r, block[j], sizeof block[j]);
                } else {
                    for (int64_t j = first; j < last; ++j)
                        for (int64_t i = r; i < end; ++i) b[j * rows + i] = a[i * columns + j];
                }
            }
        }
}

// For a row of hidden units: da (in place) becomes dh, `scaled` gets s * drop * act(h); returns the gate's gradient.
template <class S>
compute_t<S> through_activation(const Problem<S>& p, int64_t row, compute_t<S>* d, compute_t<S>* scaled) {
    using C = compute_t<S>;
    const int64_t selection = p.routing.order[row];
    const S* kept = p.hidden + row * p.size;
    const uint8_t* keep = p.keep ? p.keep + selection * p.size : nullptr;
    const C gate = p.gates[selection];
    C gate_gradient = 0;
    const auto pass = [&](auto activation) {
        constexpr Activation a = decltype(activation)::value;
        C sum = 0;
#pragma omp simd reduction(+ : sum)
        for (int64_t g = 0; g < p.size; ++g) {
            const Slope<C> s = slope_of(a, C(widen(kept[g])));
            const C drop = keep ? (keep[g] ? p.keep_scale : C(0)) : C(1);
            sum += d[g] * s.value * drop;
            scaled[g] = gate * drop * s.value;
            d[g] = d[g] * gate * drop * s.slope;
        }
        gate_gradient = sum;
    };
    switch (p.activation) {
        case kRelu: pass(std::integral_constant<Activation, kRelu>{}); break;
        case kGelu: pass(std::integral_constant<Activation, kGelu>{}); break;
        case kSilu: pass(std::integral_constant<Activation, kSilu>{}); break;
        default: pass(std::integral_constant<Activation, kIdentity>{}); break;
    }
    return gate_gradient;
}

// to [height, columns] = sum over rows of a[row] b[row]^T; zero without rows.
template <class S>
void outer(const std::vector<const compute_t<S>*>& a, const std::vector<const compute_t<S>*>& b, int64_t height,
           Range columns, int64_t ld, S* to, Buffer<compute_t<S>>& padded, Buffer<compute_t<S>>& sums,
           std::vector<const compute_t<S>*>& padded_rows) {
    using C = compute_t<S>;
    const int64_t rows = static_cast<int64_t>(a.size());
    const int width = static_cast<int>(columns.end - columns.begin);
    const int vectors = (width + kLanes<C> - 1) / kLanes<C>;
    const bool ragged = width % kLanes<C> != 0, several = rows > kDepth || !std::is_same_v<S, C>;
    const int64_t lds = vectors * kLanes<C>;
    if (several) std::fill(sums.data(), sums.data() + height * lds, C(0));
    for (int64_t begin = 0; begin < std::max<int64_t>(rows, 1); begin += kDepth) {
        const int64_t depth = std::min(kDepth, rows - begin);
        const C* const* right = b.data() + begin;
        int64_t at = columns.begin;
        if (ragged) {
            for (int64_t r = 0; r < depth; ++r) {
                std::memcpy(padded.data() + r * lds, b[begin + r] + columns.begin, width * sizeof(C));
                std::fill(padded.data() + r * lds + width, padded.data() + (r + 1) * lds, C(0));
                padded_rows[r] = padded.data() + r * lds;
            }
            right = padded_rows.data();
            at = 0;
        }
        with_constant<kVectors>(vectors, [&](auto n) {
            constexpr int N = decltype(n)::value;
            const auto block = [&](int64_t i, auto r) {
                constexpr int R = decltype(r)::value;
                Vec<C> acc[R][N];
                tile_outer<C, R, N>(a.data() + begin, i, right, at, depth, acc);
                for (int q = 0; q < R; ++q) {
                    if (several) add(sums.data() + (i + q) * lds, acc[q], width);
                    else if constexpr (std::is_same_v<S, C>) put(to + (i + q) * ld + columns.begin, acc[q], width);
                }
            };
            int64_t i = 0;
            for (; i + kRows <= height; i += kRows) block(i, std::integral_constant<int, kRows>{});
            with_constant<kRows - 1>(static_cast<int>(height - i), [&](auto r) { block(i, r); });
        });
    }
    if (several)
        for (int64_t i = 0; i < height; ++i)
            for (int c = 0; c < width; ++c) to[i * ld + columns.begin + c] = narrow<S>(sums[i * lds + c]);
}

template <class S> void backward(const Problem<S>& p, const Gradients<S>& g) {
    using C = compute_t<S>;
    const Routing& routing = p.routing;
    const int64_t n = routing.tokens * p.width, line = kVectors * kLanes<C>;
    const Widened<S> x(p.x, n, p.threads), gy(g.y, n, p.threads);
    Buffer<S> turned(routing.experts * p.width * p.size);
    Buffer<C> d(routing.rows() * p.size), scaled(routing.rows() * p.size);
    Buffer<C> wide_gx(std::is_same_v<S, C> ? 0 : n);
    C* gx;
    if constexpr (std::is_same_v<S, C>) gx = g.x;
    else gx = wide_gx.data();

    std::vector<std::pair<int64_t, Range>> chunks;
    for (int64_t e = 0; e < routing.experts; ++e)
        in_chunks<S>({routing.offsets[e], routing.offsets[e + 1]}, [&](Range rows) { chunks.push_back({e, rows}); });
    // Panels of the gradient of keys, then of values, expert by expert.
    const int64_t key_panels = (p.size + line - 1) / line, value_panels = (p.width + line - 1) / line;
    const int64_t panels = key_panels + value_panels;

#pragma omp parallel num_threads(p.threads)
    {
        Workspace<S> ws(p);
        transpose(p, p.values, p.size, p.width, turned.data());
#pragma omp for schedule(dynamic, 1)
        for (size_t c = 0; c < chunks.size(); ++c) {
            const auto [e, rows] = chunks[c];
            const int64_t count = rows.end - rows.begin;
            for (int64_t i = 0; i < count; ++i) ws.inputs[i] = gy.data() + routing.token(rows.begin + i) * p.width;
            C* da = d.data() + rows.begin * p.size;
            product<C, S>(ws.inputs.data(), count, turned.data() + e * p.width * p.size, p.size, p.width, p.size,
                          ws.padded.data(), Fetch{}, [&](int64_t i, int64_t first, int columns, const auto& acc) {
                              put(da + i * p.size + first, acc, columns);
                          });
            for (int64_t r = rows.begin; r < rows.end; ++r)
                g.gates[routing.order[r]] = through_activation(p, r, d.data() + r * p.size, scaled.data() + r * p.size);
        }
        transpose(p, p.keys, p.width, p.size, turned.data());
        const Range tokens = part_of(routing.tokens, omp_get_thread_num(), omp_get_num_threads());
        std::fill(gx + tokens.begin * p.width, gx + tokens.end * p.width, C(0));
        for (int64_t e = 0; e < routing.experts; ++e)
            in_chunks<S>(routing.rows_of(e, tokens), [&](Range rows) {
                for (int64_t i = 0; i < rows.end - rows.begin; ++i) ws.rows[i] = d.data() + (rows.begin + i) * p.size;
                product<C, S>(ws.rows.data(), rows.end - rows.begin, turned.data() + e * p.width * p.size, p.width, p.size,
                              p.width, ws.padded.data(), Fetch{}, [&](int64_t i, int64_t first, int columns, const auto& acc) {
                                  add(gx + routing.token(rows.begin + i) * p.width + first, acc, columns);
                              });
            });
        if constexpr (!std::is_same_v<S, C>)
            for (int64_t i = tokens.begin * p.width; i < tokens.end * p.width; ++i) g.x[i] = narrow<S>(gx[i]);

        Buffer<C> padded(kDepth * line), sums(std::max(p.width, p.size) * line);
        std::vector<const C*> hidden_rows, token_rows, padded_rows(kDepth);
#pragma omp for schedule(dynamic, 1)
        for (int64_t unit = 0; unit < routing.experts * panels; ++unit) {
            const int64_t e = unit / panels, panel = unit % panels;
            const bool of_keys = panel < key_panels;
            const int64_t first = (of_keys ? panel : panel - key_panels) * line;
            const int64_t height = of_keys ? p.width : p.size, width = of_keys ? p.size : p.width;
            const Range columns{first, std::min(first + line, width)};
            S* to = (of_keys ? g.keys : g.values) + e * p.width * p.size;
            hidden_rows.clear();
            token_rows.clear();
            for (int64_t r = routing.offsets[e]; r < routing.offsets[e + 1]; ++r) {
                hidden_rows.push_back((of_keys ? d.data() : scaled.data()) + r * p.size);
                token_rows.push_back((of_keys ? x.data() : gy.data()) + routing.token(r) * p.width);
            }
            if (of_keys) outer<S>(token_rows, hidden_rows, height, columns, width, to, padded, sums, padded_rows);
            else outer<S>(hidden_rows, token_rows, height, columns, width, to, padded, sums, padded_rows);
        }
    }
}

}  // namespace sparseffn

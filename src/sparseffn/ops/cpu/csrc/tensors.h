// From tensors to what the headers compute with.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>

#include <map>
#include <string_view>

#include "activations.h"

namespace sparseffn {

using at::Tensor;
using MaybeTensor = std::optional<Tensor>;

inline int type_of(const Tensor& t) {
    switch (t.scalar_type()) {
        case at::kFloat: return 0;
        case at::kDouble: return 1;
        case at::kBFloat16: return 2;
        case at::kHalf: return 3;
        default: TORCH_CHECK(false, "sparseffn: no kernel for ", t.scalar_type(), "; fix: cast to float32, float64, bfloat16 or float16");
    }
}

inline at::ScalarType wide_type(const Tensor& t) { return t.scalar_type() == at::kDouble ? at::kDouble : at::kFloat; }

inline int threads() { return at::in_parallel_region() ? 1 : at::get_num_threads(); }

template <class T> inline int code_of(const std::map<std::string_view, T>& names, std::string_view name, const char* what) {
    const auto found = names.find(name);
    TORCH_CHECK(found != names.end(), "sparseffn: unknown ", what, " ", name);
    return static_cast<int>(found->second);
}

inline Activation activation_of(std::string_view name) {
    static const std::map<std::string_view, Activation> names{
        {"relu", kRelu},   {"relu2", kRelu2},       {"gelu", kGelu}, {"gelu_tanh", kGeluTanh},
        {"silu", kSilu},   {"identity", kIdentity}, {"clamped_swiglu", kClampedSwiglu}};
    return static_cast<Activation>(code_of(names, name, "activation"));
}

inline const void* data_of(const Tensor& t) { return t.defined() && t.numel() ? t.const_data_ptr() : nullptr; }
inline void* data_of_mutable(const Tensor& t) { return t.defined() && t.numel() ? t.mutable_data_ptr() : nullptr; }
inline Tensor in_order(const MaybeTensor& t) { return t ? t->contiguous() : Tensor(); }

}  // namespace sparseffn

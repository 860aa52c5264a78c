// From tensors to what the headers compute with.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/List.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>

#include <algorithm>
#include <map>
#include <string_view>

#include "activations.h"
#include "large_pages.h"

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

// What is computed in.
inline at::ScalarType wide_type(const Tensor& t) { return type_of(t) == 1 ? at::kDouble : at::kFloat; }

inline int threads() { return at::in_parallel_region() ? 1 : at::get_num_threads(); }
// As many as so many multiply-adds are worth: starting another costs as much as some 10^5 of them.
inline int threads_for(int64_t work) { return static_cast<int>(std::min<int64_t>(threads(), 1 + work / (1 << 17))); }

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
// A contiguous tensor's numbers as S; null for one that is not there.
template <class S> inline const S* pointer_of(const Tensor& t) { return static_cast<const S*>(data_of(t)); }
// Of a tensor that is there though it holds nothing, some address.
template <class S> inline const S* pointer_if_given(const Tensor& t) {
    alignas(64) static constexpr char kNothing[64] = {};
    return t.defined() && !t.numel() ? reinterpret_cast<const S*>(kNothing) : pointer_of<S>(t);
}
template <class S> inline S* pointer(const Tensor& t) { return static_cast<S*>(data_of_mutable(t)); }
inline Tensor in_order(const MaybeTensor& t) { return t ? t->contiguous() : Tensor(); }

// Whether an expert's matrix has lines of rows or of columns.
inline bool has_lines(const Tensor& weight) { return weight.stride(1) == 1 || weight.stride(2) == 1; }

// Memory for a result, which is not initialised.
inline Tensor new_tensor(at::IntArrayRef sizes, const at::TensorOptions& options) {
    Tensor made = at::empty(sizes, options);
    want_large_pages(made.mutable_data_ptr(), made.nbytes());
    return made;
}

// The memory of a weight's gradient: in the weight's order where that has lines of rows or of columns, else one after the other. As
// ops/library.py says of fake tensors.
inline Tensor gradient_like(const Tensor& weight) {
    if (weight.dim() == 3) {
        const Tensor same = at::empty_like(weight);
        want_large_pages(same.mutable_data_ptr(), same.nbytes());
        if (has_lines(same)) return same;
    }
    return new_tensor(weight.sizes(), weight.options());
}

// Whether two weights are the halves of one without gaps: sides of it, or its even and odd lines.
inline bool are_halves(const Tensor& a, const Tensor& b) {
    if (!has_lines(a) || !a.storage().is_alias_of(b.storage()) || a.sizes() != b.sizes() || a.strides() != b.strides()) return false;
    std::vector<std::pair<int64_t, int64_t>> steps{{std::abs(b.storage_offset() - a.storage_offset()), 2}};
    for (int64_t d = 0; d < a.dim(); ++d)
        if (a.size(d) > 1) steps.emplace_back(a.stride(d), a.size(d));
    std::sort(steps.begin(), steps.end());
    int64_t reached = 1;
    for (const auto& [step, count] : steps) {
        if (step != reached) return false;
        reached *= count;
    }
    return true;
}

// Memory of the gradients of two halves of a weight that lie like them in one: whoever joins them copies nothing.
inline std::pair<Tensor, Tensor> gradients_like_halves(const Tensor& a, const Tensor& b) {
    const Tensor whole = new_tensor({2 * a.numel()}, a.options());
    const int64_t first = std::min(a.storage_offset(), b.storage_offset());
    return {whole.as_strided(a.sizes(), a.strides(), a.storage_offset() - first),
            whole.as_strided(b.sizes(), b.strides(), b.storage_offset() - first)};
}

// Which of its gradients a backward is asked for, in their order: all where nothing is said. One that is left out is empty.
class Needed {
  public:
    using Flags = std::optional<c10::List<bool>>;

    Needed(const Flags& flags, size_t gradients, const char* operation) : flags_(flags) {
        TORCH_CHECK(!flags || flags->size() == gradients, "sparseffn::", operation, ": `needed` must have ", gradients,
                    " entries; got ", flags ? flags->size() : 0);
    }
    bool operator[](size_t i) const { return !flags_ || flags_->get(i); }
    // What make() gives where gradient i is asked for.
    template <class Make> Tensor made(size_t i, const at::TensorOptions& options, Make&& make) const {
        return (*this)[i] ? make() : at::empty({0}, options);
    }

  private:
    const Flags& flags_;
};

// What an operation kept for its backward is looked at like any other: whoever calls the second by itself may pass anything.
inline void check_like(const char* operation, const Tensor& t, at::IntArrayRef sizes, at::ScalarType type, const char* name) {
    TORCH_CHECK(t.defined(), "sparseffn::", operation, ": `", name, "` must be a tensor; got none");
    TORCH_CHECK(t.sizes() == sizes && t.scalar_type() == type && t.is_cpu(), "sparseffn::", operation, ": `", name, "` must be ",
                type, " ", sizes, " on the CPU; got ", t.scalar_type(), " ", t.sizes(), " on ", t.device());
}
// The same of one that may be left out.
inline void check_given(const char* operation, const Tensor& t, at::IntArrayRef sizes, at::ScalarType type, const char* name) {
    if (t.defined()) check_like(operation, t, sizes, type, name);
}

// The gate of a block's units.
inline void check_gated(const char* operation, bool gate_keys, bool gate_bias, Activation activation, double limit) {
    TORCH_CHECK(gate_keys || (activation != kClampedSwiglu && !gate_bias), "sparseffn::", operation,
                ": clamped_swiglu and gate_bias need gate_keys");
    TORCH_CHECK(activation != kClampedSwiglu || limit > 0, "sparseffn::", operation, ": limit must be above 0; got ", limit);
}

template <class T> inline void check_between(const Tensor& t, int64_t low, int64_t high, const char* what) {
    const T* values = pointer_of<T>(t);
    bool inside = true;
    for (int64_t i = 0; i < t.numel(); ++i) inside &= values[i] >= low && values[i] < high;
    TORCH_CHECK(inside, "`indices` must be between ", low, " and ", high - 1, ", ", what, " each; got one outside; fix: check what "
                "selects them");
}

}  // namespace sparseffn

// Activations and their derivatives, written so that the compiler vectorises loops over them. NaN goes through all of them.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

namespace sparseffn {

enum Activation : int {
    kRelu = 0,
    kGelu = 1,
    kSilu = 2,
    kIdentity = 3,
    kRelu2 = 4,
    kGeluTanh = 5,
    kClampedSwiglu = 6,  // of gated experts alone
};

// e^x for float: 2^n times a polynomial on [-ln 2 / 2, ln 2 / 2]; relative error under 2e-7 (Cephes' coefficients).
inline float exp_of(float x) {
    x = x > 88.3762626647949f ? 88.3762626647949f : x;
    x = x < -87.3365447504f ? -87.3365447504f : x;
    const float shifted = x * 1.44269504088896341f + 12582912.0f;
    const float n = shifted - 12582912.0f;
    const float r = x - n * 0.693359375f + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    int32_t bits;
    std::memcpy(&bits, &shifted, sizeof bits);
    const int32_t power = (bits - 0x4B400000 + 127) << 23;
    float scale;
    std::memcpy(&scale, &power, sizeof scale);
    return p * scale;
}
inline double exp_of(double x) { return std::exp(x); }

// The normal distribution function; float by Abramowitz and Stegun 7.1.26 (error under 1.5e-7), from the smaller tail.
inline float normal_cdf(float x) {
    const float z = std::fabs(x) * 0.70710678118654752f;
    const float t = 1.0f / (1.0f + 0.3275911f * z);
    const float poly = t * (0.254829592f + t * (-0.284496736f + t * (1.421413741f + t * (-1.453152027f + t * 1.061405429f))));
    const float tail = 0.5f * poly * exp_of(-z * z);
    return x > 0.0f ? 1.0f - tail : tail;
}
inline double normal_cdf(double x) { return 0.5 * std::erfc(-x * 0.70710678118654752440); }

template <class C> inline C sigmoid_of(C x) { return C(1) / (C(1) + exp_of(-x)); }

// 2 sqrt(2 / pi) (x + 0.044715 x^3), whose sigmoid takes the normal distribution's place in GELU's approximation: that of its
// authors is written with tanh z = 2 sigmoid(2 z) - 1.
template <class C> inline C gelu_argument(C x) { return C(1.59576912160573071176) * x * (C(1) + C(0.044715) * x * x); }
template <class C> inline C gelu_argument_slope(C x) { return C(1.59576912160573071176) * (C(1) + C(0.134145) * x * x); }

// What is kept for backward: the output where it determines the derivative (the square's root for ReLU squared), else the input.
inline bool keeps_output(Activation a) { return a == kRelu || a == kIdentity || a == kRelu2; }

template <class C> inline C activate(Activation a, C h) {
    switch (a) {
        case kRelu: return h < C(0) ? C(0) : h;
        case kRelu2: return h < C(0) ? C(0) : h * h;
        case kGelu: return h * normal_cdf(h);
        case kGeluTanh: return h * sigmoid_of(gelu_argument(h));
        case kSilu: return h * sigmoid_of(h);
        default: return h;
    }
}

// The activation's value and derivative from what was kept.
template <class C> struct Slope {
    C value;
    C slope;
};

template <class C> inline Slope<C> slope_of(Activation a, C kept) {
    switch (a) {
        case kRelu: return {kept, kept > C(0) ? C(1) : C(0)};
        // From the input too, which gated experts keep.
        case kRelu2: {
            const C root = kept < C(0) ? C(0) : kept;
            return {root * root, C(2) * root};
        }
        case kGelu: {
            const C cdf = normal_cdf(kept);
            const C density = C(0.39894228040143267794) * exp_of(C(-0.5) * kept * kept);
            return {kept * cdf, cdf + kept * density};
        }
        case kGeluTanh: {
            // Of a large argument 1 - s is rounding errors, which are multiplied by 20 here.
            const C z = gelu_argument(kept), s = sigmoid_of(z);
            return {kept * s, s + kept * (s * sigmoid_of(-z)) * gelu_argument_slope(kept)};
        }
        case kSilu: {
            const C s = sigmoid_of(kept);
            return {kept * s, s * (C(1) + kept * (C(1) - s))};
        }
        default: return {kept, C(1)};
    }
}

// Numbers of the clamped SwiGLU.
template <class C> struct Clamp {
    C alpha, limit;

    C above(C h) const { return h > limit ? limit : h; }
    C both(C u) const { return u > limit ? limit : u < -limit ? -limit : u; }
};

// A gated unit from the products of its key, h, and of its gate's key, u.
template <class C> inline C gated(Activation a, C h, C u, const Clamp<C>& clamp) {
    if (a != kClampedSwiglu) return activate(a, h) * u;
    const C g = clamp.above(h);
    return (clamp.both(u) + C(1)) * (g * sigmoid_of(clamp.alpha * g));
}

// Its value and its derivatives by both products.
template <class C> struct GatedSlope {
    C value;
    C by_key, by_gate;
};

template <class C> inline GatedSlope<C> gated_slope(Activation a, C h, C u, const Clamp<C>& clamp) {
    if (a == kClampedSwiglu) {
        const C g = clamp.above(h), factor = clamp.both(u) + C(1), s = sigmoid_of(clamp.alpha * g);
        const C slope = s * (C(1) + clamp.alpha * g * (C(1) - s));
        return {factor * (g * s), h > clamp.limit ? C(0) : factor * slope, u > clamp.limit || u < -clamp.limit ? C(0) : g * s};
    }
    Slope<C> s = slope_of(a, h);
    // Of ReLU and its square the input is kept here, not the output.
    if (a == kRelu) s.value = activate(kRelu, h);
    return {s.value * u, s.slope * u, s.value};
}

// Calls f with the activation as a constant, so that a loop over units is vectorised.
template <class F> inline void with_activation(Activation a, F&& f) {
    switch (a) {
        case kRelu: return f(std::integral_constant<Activation, kRelu>{});
        case kGelu: return f(std::integral_constant<Activation, kGelu>{});
        case kSilu: return f(std::integral_constant<Activation, kSilu>{});
        case kRelu2: return f(std::integral_constant<Activation, kRelu2>{});
        case kGeluTanh: return f(std::integral_constant<Activation, kGeluTanh>{});
        case kClampedSwiglu: return f(std::integral_constant<Activation, kClampedSwiglu>{});
        default: return f(std::integral_constant<Activation, kIdentity>{});
    }
}

}  // namespace sparseffn

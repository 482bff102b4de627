// Counter-based random numbers, as in ops/prng.py: keys, and standard normal numbers in loops that the compiler vectorises.
#pragma once

#include <algorithm>

#include "parallel.hpp"
#include "params.hpp"
#include "simd.hpp"

namespace hf {

HF_INLINE uint32_t mix(uint32_t x) {  // MurmurHash3's finaliser (A. Appleby, public domain)
    x = (x ^ (x >> 16)) * 2246822507u;
    x = (x ^ (x >> 13)) * 3266489909u;
    return x ^ (x >> 16);
}
HF_INLINE uint32_t fold(uint32_t key, uint32_t counter) { return mix((key ^ (counter * 2654435769u)) + 1); }

// ln x for x in (0, 1]: ln(2^e m) = e ln 2 + 2 artanh(s), s = (m - 1) / (m + 1), m within [sqrt(1/2), sqrt(2)).
HF_INLINE float log_of_share(float x) {
    int32_t bits;
    std::memcpy(&bits, &x, 4);
    int32_t exponent = (bits - 0x3f3504f3) >> 23, mantissa = bits - exponent * (1 << 23);
    float m;
    std::memcpy(&m, &mantissa, 4);
    float s = (m - 1) / (m + 1), t = s * s;
    float series = 2 + t * (2.0f / 3 + t * (2.0f / 5 + t * (2.0f / 7 + t * (2.0f / 9))));
    return static_cast<float>(exponent) * 0.69314718056f + s * series;
}
// cos(2 pi x) for x in [0, 1) = sin(2 pi (|x - 1/2| - 1/4)), by the sine's series on [-pi / 2, pi / 2].
HF_INLINE float cos_of_turn(float x) {
    float angle = (std::fabs(x - 0.5f) - 0.25f) * 6.28318530718f, t = angle * angle;
    return angle * (1 + t * (-1.0f / 6 + t * (1.0f / 120 + t * (-1.0f / 5040 + t * (1.0f / 362880 + t * (-1.0f / 39916800))))));
}
// Box and Muller 1958.
HF_INLINE float normal(uint32_t key) {
    float radius = static_cast<float>(static_cast<int32_t>(fold(key, 1) >> 8) + 1) * 0x1p-24f;
    float turn = static_cast<float>(static_cast<int32_t>(fold(key, 2) >> 8)) * 0x1p-24f;
    return std::sqrt(-2 * log_of_share(radius)) * cos_of_turn(turn);
}

inline void run_normals(const NormalParams& n) {
    constexpr int64_t kPiece = 4096;
    int64_t pieces = (n.count + kPiece - 1) / kPiece;
    parallel_for(n.rows * pieces, n.threads, [&](int64_t task, int) {
        int64_t row = task / pieces, begin = task % pieces * kPiece, end = std::min(begin + kPiece, n.count);
        uint32_t key = fold(static_cast<uint32_t>(*n.key), static_cast<uint32_t>(row));
        float* values = n.values + row * n.count;
        for (int64_t i = begin; i < end; i++) values[i] = normal(fold(key, static_cast<uint32_t>(i)));
    });
}

}  // namespace hf

// Rotary position embeddings (Su et al. 2021): x * cos + (-second half, first half) * sin.
#pragma once

#include <cstring>
#include <vector>

#include "parallel.hpp"
#include "rows.hpp"

namespace hf {

inline void rotate(const float* x, const float* cosines, const float* sines, int64_t size, float* out) {
    const int64_t half = size / 2;
    for (int64_t i = 0; i < half; i++) {
        out[i] = x[i] * cosines[i] - x[i + half] * sines[i];
        out[i + half] = x[i + half] * cosines[i + half] + x[i] * sines[i + half];
    }
}

// Rounds to nearest, ties to even; NaN stays NaN.
inline uint16_t to_bfloat16(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    const uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    return static_cast<uint16_t>((bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded);
}

// Turns the first `turned_heads` heads of every token, back where `inverse` is set, and copies the others.
inline void run_rotation(const RotateParams& p) {
    constexpr int64_t kTokens = 64;
    const int64_t blocks = (p.length + kTokens - 1) / kTokens, bytes = p.size * (p.bfloat16 ? 2 : 4);
    parallel_for(p.batch * blocks, p.threads, [&](int64_t task, int) {
        const int64_t batch = task / blocks, first = task % blocks * kTokens, last = std::min(first + kTokens, p.length);
        std::vector<float> row(p.size), turned(p.size), sines(p.size);
        for (int64_t token = first; token < last; token++) {
            const int64_t table = ((p.tables > 1 ? batch * p.length : 0) + token) * p.size;
            for (int64_t i = 0; i < p.size; i++) sines[i] = p.inverse ? -p.sines[table + i] : p.sines[table + i];
            for (int64_t head = 0; head < p.heads; head++) {
                const Source source(p.x, batch, head, p.bfloat16, p.size);
                const char* from = source.row(static_cast<int>(token));
                char* to = static_cast<char*>(p.out) + ((batch * p.length + token) * p.heads + head) * bytes;
                if (head >= p.turned_heads) {
                    std::memcpy(to, from, bytes);
                } else if (!p.bfloat16) {
                    rotate(reinterpret_cast<const float*>(from), p.cosines + table, sines.data(), p.size, reinterpret_cast<float*>(to));
                } else {
                    for (int64_t i = 0; i < p.size; i++) row[i] = source.element(from, static_cast<int>(i));
                    rotate(row.data(), p.cosines + table, sines.data(), p.size, turned.data());
                    for (int64_t i = 0; i < p.size; i++) reinterpret_cast<uint16_t*>(to)[i] = to_bfloat16(turned[i]);
                }
            }
        }
    });
}

}  // namespace hf

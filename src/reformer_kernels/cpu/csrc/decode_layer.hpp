// One new token through a whole layer: norm, projections, attention over the cache, and the feed-forward branch. It takes
// as long as reading the weights once.
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "decode_attention.hpp"
#include "parallel.hpp"
#include "params.hpp"
#include "rotary.hpp"
#include "simd.hpp"

namespace hf {

struct Dense {  // y = x W' + b; W is (outs, ins), x (rows, ins), y (rows, outs)
    const float *weight, *bias;
    float* out;
    int64_t outs;
};

// Four rows of a weight with one x.
inline void four_products(const float* weight, const float* x, int64_t ins, float* out) {
    Float sums[4] = {zero(), zero(), zero(), zero()};
    int64_t k = 0;
    for (; k + kWidth <= ins; k += kWidth) {
        const Float part = load(x + k);
        for (int i = 0; i < 4; i++) sums[i] = fma(load(weight + i * ins + k), part, sums[i]);
    }
    for (int i = 0; i < 4; i++) {
        out[i] = sum(sums[i]);
        for (int64_t rest = k; rest < ins; rest++) out[i] += weight[i * ins + rest] * x[rest];
    }
}

constexpr int64_t kOuts = 32;  // of one task

// Several matrices with the same x, which lies in (rows, ins).
inline void run_dense(const Dense* matrices, int64_t count, const float* x, int64_t rows, int64_t ins, int64_t threads) {
    int64_t most = 0;
    for (int64_t i = 0; i < count; i++) most = std::max(most, (matrices[i].outs + kOuts - 1) / kOuts);
    parallel_for(count * most, threads, [&](int64_t task, int) {
        const Dense& d = matrices[task / most];
        const int64_t first = task % most * kOuts, end = std::min(d.outs, first + kOuts);
        for (int64_t o = first; o < end; o += 4) {  // `outs` is a multiple of 4
            for (int64_t row = 0; row < rows; row++) {
                float* out = d.out + row * d.outs + o;
                four_products(d.weight + o * ins, x + row * ins, ins, out);
                if (d.bias)
                    for (int i = 0; i < 4; i++) out[i] += d.bias[o + i];
            }
        }
    });
}

template <typename T> void normalize(const T* x, const float* weight, const float* bias, int64_t size, double epsilon, float* out) {
    double mean = 0, squares = 0;
    for (int64_t i = 0; i < size; i++) mean += out[i] = static_cast<float>(x[i]);
    mean /= size;
    for (int64_t i = 0; i < size; i++) squares += (out[i] - mean) * (out[i] - mean);
    const double scale = 1 / std::sqrt(squares / size + epsilon);
    for (int64_t i = 0; i < size; i++) out[i] = static_cast<float>((out[i] - mean) * scale) * weight[i] + bias[i];
}

template <typename T> void run_decode_layer(const LayerParams& p) {
    DecodeParams s = *p.attention;
    const int64_t rows = s.batch, hidden = p.hidden, inner = s.heads * s.size, wide = p.feed_forward;
    const bool shared = !p.key_proj;
    std::vector<float> normed(rows * hidden), query(rows * inner), key(rows * inner), value(rows * inner), rotated(2 * rows * inner),
        mixed(rows * inner), branch(rows * hidden), activations(rows * wide);
    T *x1 = static_cast<T*>(p.x1), *x2 = static_cast<T*>(p.x2);

    for (int64_t row = 0; row < rows; row++)
        normalize(x2 + row * hidden, p.attention_norm, p.attention_norm_bias, hidden, p.epsilon, normed.data() + row * hidden);
    Dense projections[3] = {{p.query_proj, nullptr, query.data(), inner}, {p.value_proj, nullptr, value.data(), inner},
                            {p.key_proj, nullptr, key.data(), inner}};
    run_dense(projections, shared ? 2 : 3, normed.data(), rows, hidden, s.threads);

    auto heads_of = [&](const float* x) { return Strided{x, inner, s.size, 0}; };
    const float *rotated_query = query.data(), *rotated_key = shared ? query.data() : key.data();
    if (p.cosines) {
        for (int64_t head_index = 0; head_index < rows * s.heads; head_index++) {
            const int64_t at = p.rotary_rows > 1 ? head_index / s.heads * s.size : 0;
            auto turn = [&](const float* from, float* to) {
                from += head_index * s.size, to += head_index * s.size;
                if (head_index % s.heads < p.turned_heads)
                    rotate(from, p.cosines + at, p.sines + at, s.size, to);
                else
                    std::copy(from, from + s.size, to);
            };
            turn(query.data(), rotated.data());
            if (!shared) turn(key.data(), rotated.data() + rows * inner);
        }
        rotated_query = rotated.data();
        rotated_key = shared ? rotated_query : rotated.data() + rows * inner;
    }
    s.query = heads_of(rotated_query);
    s.key = heads_of(rotated_key);
    s.value = heads_of(value.data());
    s.vectors = heads_of(s.sums ? rotated_query : query.data());
    s.out = mixed.data();
    run_decode_attention(s);

    Dense merge{p.out_proj, nullptr, branch.data(), hidden};
    run_dense(&merge, 1, mixed.data(), rows, inner, s.threads);
    for (int64_t i = 0; i < rows * hidden; i++) x1[i] += branch[i];

    for (int64_t row = 0; row < rows; row++)
        normalize(x1 + row * hidden, p.feed_forward_norm, p.feed_forward_norm_bias, hidden, p.epsilon, normed.data() + row * hidden);
    Dense up{p.up_proj, p.up_bias, activations.data(), wide}, down{p.down_proj, p.down_bias, branch.data(), hidden};
    run_dense(&up, 1, normed.data(), rows, hidden, s.threads);
    for (float& x : activations) x = p.gelu ? 0.5f * x * (1 + std::erf(x * 0.70710678f)) : (x < 0 ? 0.0f : x);
    run_dense(&down, 1, activations.data(), rows, wide, s.threads);
    for (int64_t i = 0; i < rows * hidden; i++) x2[i] += branch[i];
}

}  // namespace hf

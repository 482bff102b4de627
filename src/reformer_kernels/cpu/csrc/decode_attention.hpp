// Attention of new tokens on top of a cache, one token after the other: hash it, store it, attend to its buckets and its
// neighborhood.
#pragma once

#include <algorithm>
#include <cmath>
#include <memory>
#include <vector>

#include "centering.hpp"
#include "parallel.hpp"
#include "params.hpp"
#include "rows.hpp"
#include "simd.hpp"

namespace hf {

struct DecodeScratch {
    std::vector<float> query, row, projected, scores, centered;
    std::vector<int32_t> tokens, merged, chains;
    std::vector<int64_t> buckets;
    DecodeScratch(const DecodeParams& s)
        : query(s.size + kWidth), row(s.size + kWidth), projected(s.rounds * s.columns + kWidth), centered(s.size + kWidth), chains(s.rounds * s.window), buckets(s.rounds) {}
};

// A row as floats with zeros up to a whole vector behind it; not copied if it is stored like that.
inline const float* floats_of(const Source& source, int64_t slot, float* buffer) {
    const char* row = source.base + slot * source.stride;
    if (!source.bfloat16 && source.size % kWidth == 0) return reinterpret_cast<const float*>(row);
    for (int i = 0; i < source.size; i++) buffer[i] = source.element(row, i);
    std::fill(buffer + source.size, buffer + source.size + kWidth, 0.0f);
    return buffer;
}

// What is hashed of a token: its vector, or that at unit length less the mean of those so far, itself included.
inline const float* hashed_row(const DecodeParams& s, int64_t row, const Source& vectors, int token, int64_t index, DecodeScratch& w) {
    if (!s.sums) return floats_of(vectors, token, w.row.data());
    const float factor = share_of(s.share, index + 1);
    center_row(floats_of(vectors, token, w.row.data()), static_cast<int>(s.size), s.sums + row * s.size, factor, w.centered.data());
    return w.centered.data();
}

// A token's bucket in every round. Sums run in the order of `project`, so that near-ties fall the same way.
inline void hash_token(const DecodeParams& s, int64_t head, const float* vector, DecodeScratch& w) {
    const int64_t columns = s.rounds * s.columns;
    const float* rotations = s.rotations + head * s.size * columns;
    for (int64_t c = 0; c < columns; c += kWidth) {
        const int64_t there = std::min<int64_t>(kWidth, columns - c);
        Float sums = zero();
        alignas(64) float part[kWidth] = {};
        for (int64_t k = 0; k < s.size; k++) {
            const float* from = rotations + k * columns + c;
            if (there < kWidth) {
                std::memcpy(part, from, there * sizeof(float));
                from = part;
            }
            sums = fma(splat(vector[k]), load(from), sums);
        }
        store(w.projected.data() + c, sums);
    }
    for (int64_t round = 0; round < s.rounds; round++) {
        int64_t stride = 1, bucket = 0;
        const float* x = w.projected.data() + round * s.columns;
        for (int64_t f = 0; f < s.num_factors; f++) {
            int64_t half = s.factors[f] / 2, index = 0;
            float best = -1.0f;
            for (int64_t c = 0; c < half; c++)
                if (std::fabs(x[c]) > best) {
                    best = std::fabs(x[c]);
                    index = x[c] < 0 ? c + half : c;
                }
            bucket += index * stride;
            stride *= s.factors[f];
            x += half;
        }
        w.buckets[round] = bucket;
    }
}

// Write a token to its slot of the cache and to the head of its buckets' chains.
inline void store_token(const DecodeParams& s, int64_t row, const char* key, const char* value, int64_t index, DecodeScratch& w) {
    const int64_t bytes = s.size * (s.bfloat16 ? 2 : 4), slot = row * s.capacity + index % s.capacity;
    std::memcpy(static_cast<char*>(s.keys) + slot * bytes, key, bytes);
    std::memcpy(static_cast<char*>(s.values) + slot * bytes, value, bytes);
    for (int64_t round = 0; round < s.rounds; round++) {
        const int64_t table = row * s.rounds + round;
        int32_t& newest = s.newest[table * s.num_buckets + w.buckets[round]];
        s.buckets[table * s.capacity + index] = static_cast<int32_t>(w.buckets[round]);
        s.previous[table * (1 + s.capacity) + 1 + index] = newest;
        newest = static_cast<int32_t>(1 + index);
    }
}

// Collect the newest members of a token's buckets. The rounds' chains are followed side by side: they wait for memory together.
inline void follow_chains(const DecodeParams& s, int64_t row, DecodeScratch& w) {
    int32_t any_left = 1;
    for (int64_t i = 0; i < s.window && any_left; i++) {
        any_left = 0;
        for (int64_t round = 0; round < s.rounds; round++) {
            const int64_t table = row * s.rounds + round;
            int32_t* chain = w.chains.data() + round * s.window + i;
            *chain = i ? s.previous[table * (1 + s.capacity) + chain[-1]] : s.newest[table * s.num_buckets + w.buckets[round]];
            any_left |= *chain;
        }
    }
}

// All tokens that are visible to a token, newest first, each once.
inline void find_tokens(const DecodeParams& s, int64_t index, DecodeScratch& w) {
    w.tokens.clear();
    for (int64_t t = index; t >= 0 && t > index - s.local_window; t--) w.tokens.push_back(static_cast<int32_t>(t));
    for (int64_t round = 0; round < s.rounds; round++) {
        const int32_t* chain = w.chains.data() + round * s.window;
        w.merged.clear();
        size_t at = 0;
        for (int64_t i = 0; i < s.window && chain[i] > 0; i++) {
            const int32_t token = chain[i] - 1;
            while (at < w.tokens.size() && w.tokens[at] > token) w.merged.push_back(w.tokens[at++]);
            if (at < w.tokens.size() && w.tokens[at] == token) at++;
            w.merged.push_back(token);
        }
        w.merged.insert(w.merged.end(), w.tokens.begin() + at, w.tokens.end());
        w.tokens.swap(w.merged);
    }
}

inline void attend(const DecodeParams& s, int64_t row, int64_t index, float* out, DecodeScratch& w) {
    const int64_t count = w.tokens.size(), bytes = s.size * (s.bfloat16 ? 2 : 4);
    auto cached = [&](void* rows) {
        return Source({static_cast<char*>(rows) + row * s.capacity * bytes, 0, 0, s.size}, 0, 0, s.bfloat16, s.size);
    };
    const Source keys = cached(s.keys), values = cached(s.values);
    w.scores.assign(count + kWidth, -INFINITY);
    auto fetch = [&](const Source& source, int64_t i) {
        if (i < count)
            for (int64_t at = 0; at < bytes; at += 64) __builtin_prefetch(source.base + w.tokens[i] % s.capacity * bytes + at);
    };
    float row_max = -INFINITY;
    for (int64_t i = 0; i < count; i++) {
        fetch(keys, i + 8);
        const float* key = floats_of(keys, w.tokens[i] % s.capacity, w.row.data());
        Float products = zero(), squares = zero();
        for (int64_t k = 0; k < s.size; k += kWidth) {
            Float x = load(key + k);
            products = fma(x, load(w.query.data() + k), products);
            squares = fma(x, x, squares);
        }
        float scale = static_cast<float>(s.scale);
        if (s.rounds) scale /= std::sqrt(sum(squares) / s.size + 1e-6f);  // shared: keys of unit length
        w.scores[i] = s.rounds && w.tokens[i] == index ? -1e5f : sum(products) * scale;
        row_max = std::max(row_max, w.scores[i]);
    }
    float row_sum = 0;
    const Float log2_e = splat(1.4426950408889634f), highest = splat(row_max);
    for (int64_t i = 0; i < count; i += kWidth) store(w.scores.data() + i, exp2((load(w.scores.data() + i) - highest) * log2_e));
    for (int64_t i = 0; i < count; i++) row_sum += w.scores[i];
    std::vector<float>& sums = w.query;  // no longer needed
    std::fill(sums.begin(), sums.end(), 0.0f);
    for (int64_t i = 0; i < count; i++) {
        fetch(values, i + 8);
        const float* value = floats_of(values, w.tokens[i] % s.capacity, w.row.data());
        const Float weight = splat(w.scores[i] / row_sum);
        for (int64_t k = 0; k < s.size; k += kWidth) store(sums.data() + k, fma(weight, load(value + k), load(sums.data() + k)));
    }
    std::copy(sums.begin(), sums.begin() + s.size, out);
}

inline void run_decode_attention(const DecodeParams& s) {
    std::vector<std::unique_ptr<DecodeScratch>> scratch(std::max<int64_t>(1, s.threads));
    parallel_for(s.batch * s.heads, s.threads, [&](int64_t row, int worker) {
        if (!scratch[worker]) scratch[worker] = std::make_unique<DecodeScratch>(s);
        DecodeScratch& w = *scratch[worker];
        const int64_t batch = row / s.heads, head = row % s.heads;
        auto source = [&](const Strided& x) { return Source(x, batch, head, s.bfloat16, s.size); };
        const Source queries = source(s.query), keys = source(s.key), values = source(s.value), vectors = source(s.vectors);
        for (int64_t t = 0; t < s.length; t++) {
            const int64_t index = s.indices[batch * s.length + t];
            float* out = s.out + (row * s.length + t) * s.size;
            if (index < 0) {  // padding is not stored and gives 0
                std::fill(out, out + s.size, 0.0f);
                continue;
            }
            const int token = static_cast<int>(t);
            if (s.rounds) hash_token(s, head, hashed_row(s, row, vectors, token, index, w), w);
            store_token(s, row, keys.row(token), values.row(token), index, w);
            const float* query = floats_of(queries, token, w.row.data());
            std::copy(query, query + s.size, w.query.begin());
            std::fill(w.query.begin() + s.size, w.query.end(), 0.0f);
            follow_chains(s, row, w);
            find_tokens(s, index, w);
            attend(s, row, index, out, w);
        }
    });
}

}  // namespace hf

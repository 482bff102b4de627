// What one call works on. The Python side fills this structure, field by field (kernels/cpu.py).
#pragma once

#include <cstdint>

namespace hf {

struct Strided {  // a tensor (B, H, T, D) or (B, H, R * T) whose last dimension is contiguous; strides in elements
    const void* data;
    int64_t batch, head, token;
};

struct Problem {
    Strided query, key, value;          // (B, H, T, D); key.data null: shared query/key attention
    Strided line, lo, hi;               // (B, H, R * T) int32
    Strided inverse;                    // (B, H, (R - 1) * T) int32: places of tokens within each round but the last; window rule
    const uint8_t* mask;                // (B, T), chunk rule only, or null
    const int32_t* query_draw;          // (B, H, T) random numbers for dropout, or null
    const int32_t* key_draw;            // (T)
    int64_t batch, heads, length, rounds, size, value_size;
    int64_t tile, before, after;        // as hashing.AttentionLayout counts: chunk rule from the ends of tiles, window rule from every place
    int64_t bfloat16, dedup_pairs, causal, threads;
    int64_t keep_threshold;             // a pair is kept where its draw is at least this
    double dropout_scale;               // 1 / (1 - p); 0 for p = 1
    double key_scale;                   // of scores with keys of their own
    float* out;                         // (B, T, H, D) contiguous, like the gradients
    float *top, *mass;                  // (B, H, T): maximum (in units of log 2) and sum of every row's softmax
    Strided grad;                       // (B, H, T, D) float32, gradient of out
    float* drift;                       // (B, H, T): rowsum(grad * out), filled by the backward pass
    float *query_grad, *key_grad, *value_grad;
    // Attention received: received[j] = sum over queries i of paid[i] * P[i][j]; push is the gradient of it.
    const float *paid, *push;           // (B, T), or null
    float* pushed;                      // (B, H, T): sum over keys j of P[i][j] * push[j]
    float* received;                    // (B, H, T)
};

struct Hashing {
    Strided vectors;                    // (B, H, T, D)
    const float* rotations;             // (H, D, R * columns) contiguous
    const int64_t* factors;             // bucket factors; columns = sum of their halves
    int64_t batch, heads, length, rounds, size, columns, num_factors, bfloat16, threads;
    int32_t* buckets;                   // (B, H, R, T) contiguous
};

struct Normals {
    const int32_t* keys;                // (rows)
    int64_t rows, count, threads;
    float* values;                      // (rows, count)
};

struct Sorting {
    Strided buckets;                    // (B, H, R * T) int32, below count
    const uint8_t* mask;                // (B, T) or null: padding goes behind all buckets
    int64_t batch, heads, length, rounds, count, threads;
    int64_t back, on;                   // window: places ahead and behind
    int32_t *line, *lo, *hi;            // (B, H, R, T) contiguous, lo and hi counted within the round; hi or both may be null
};

struct Step {
    Strided query, key, value;          // of the new tokens, (B, H, T, D); query and key turned by position
    Strided vectors;                    // what is hashed
    const float* rotations;             // (H, D, R * columns) contiguous
    const int64_t* factors;
    const int64_t* numbers;             // (B, T) the tokens' numbers in their rows, rising; or -1: padding
    void *keys, *values;                // (B, H, room, D) contiguous, by number modulo room
    int32_t* buckets;                   // (B, H, R, room)
    int32_t *newest, *previous;         // (B, H, R, count) and (B, H, R, 1 + room): bucket_tables.BucketChains
    int64_t batch, heads, length, size, rounds, columns, num_factors, count, window, local_window, room, bfloat16, threads;
    double scale;                       // of scores; rounds > 0: shared query/key attention
    float* out;                         // (B, H, T, D)
};

struct LayerStep {                      // one token through a layer; all weights float32, (outs, ins) contiguous
    const float *attention_norm, *attention_norm_bias, *feed_forward_norm, *feed_forward_norm_bias;
    const float *query_proj, *key_proj, *value_proj, *out_proj;  // key_proj null: shared query/key attention
    const float *up_proj, *up_bias, *down_proj, *down_bias;
    const float *cosines, *sines;       // (turns, D) of rotary positions, or null
    const Step* step;                   // but for the new token's vectors and `out`
    int64_t hidden, feed_forward, gelu, float64, turns;
    double epsilon;
    void *x1, *x2;                      // (B, hidden) streams, float64 or float32, which become those behind the layer
};

struct LayerSteps {                     // the layers of a stack, one after the other
    const LayerStep* layers;
    int64_t count;
};

}  // namespace hf

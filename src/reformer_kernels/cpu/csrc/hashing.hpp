// Angular LSH (Andoni et al. 2015) and sorting by bucket: projections, argmax over [x; -x], counting sort.
#pragma once

#include <stdexcept>

#include "centering.hpp"
#include "parallel.hpp"
#include "tiles.hpp"

namespace hf {

struct HashScratch {
    std::vector<float> rows, columns, projected;
    HashScratch(const HashParams& h, int64_t padded)
        : rows(panels_of(h.size) * kPanel * kTile), columns(rows.size()), projected(padded * kTile) {}
};

// Projections of one tile, transposed: projected[column][token].
inline void project(const float* rotations, int64_t padded, const float* columns, int size, float* projected) {
    const int height = (size + kWidth - 1) / kWidth * kWidth;
    for (int panel = 0; panel < kTile / kPanel; panel++)
        for (int64_t at = 0; at < padded; at += kRows) {
            Block<kRows, 2> sums;
            sums.clear();
            for (int k = 0; k < size; k++) {  // rotations: [padded / kRows][size][kRows]
                const float* b = columns + (panel * height + k) * kPanel;
                Float first = load(b), second = load(b + kWidth);
                for (int m = 0; m < kRows; m++) {
                    Float x = splat(rotations[(at * size) + k * kRows + m]);
                    sums.at[m][0] = fma(x, first, sums.at[m][0]);
                    sums.at[m][1] = fma(x, second, sums.at[m][1]);
                }
            }
            sums.write(projected + at * kTile + panel * kPanel, kTile);
        }
}

// Buckets of kWidth tokens of one round: per factor the column of the largest |x|, then its sign.
inline Int buckets_of(const float* projected, const HashParams& h) {
    Int bucket = splat(0);
    int64_t stride = 1, column = 0;
    for (int64_t f = 0; f < h.num_factors; f++) {
        int64_t half = h.factors[f] / 2;
        Float best = splat(-1.0f);
        Int index = splat(0);
        for (int64_t c = 0; c < half; c++) {
            Float x = load(projected + (column + c) * kTile), size = abs(x);
            Int own = select(greater(zero(), x), splat(static_cast<int>((c + half) * stride)), splat(static_cast<int>(c * stride)));
            Mask better = greater(size, best);
            index = select(better, own, index);
            best = select(better, size, best);
        }
        bucket = add(bucket, index);
        stride *= h.factors[f];
        column += half;
    }
    return bucket;
}

// One head's rotations as [padded / kRows][size][kRows], zeros behind the last column.
inline void pack_rotations(const HashParams& h, int64_t head, int64_t padded, float* to) {
    const int64_t columns = h.rounds * h.columns;
    for (int64_t c = 0; c < padded; c++)
        for (int64_t k = 0; k < h.size; k++)
            to[(c / kRows * h.size + k) * kRows + c % kRows] =
                c < columns ? h.rotations[(head * h.size + k) * columns + c] : 0.0f;
}

// The rows of a tile in `w.rows` → their buckets.
inline void hash_rows(const HashParams& h, int64_t head_index, int64_t first, int count, const float* rotations, int64_t padded,
                      HashScratch& w) {
    transpose_panels(w.rows.data(), static_cast<int>(h.size), w.columns.data());
    project(rotations, padded, w.columns.data(), static_cast<int>(h.size), w.projected.data());
    for (int64_t round = 0; round < h.rounds; round++) {
        int32_t* to = h.buckets + (head_index * h.rounds + round) * h.length + first;
        for (int i = 0; i < count; i += kWidth) {
            alignas(64) int part[kWidth];
            store(part, buckets_of(w.projected.data() + round * h.columns * kTile + i, h));
            std::memcpy(to + i, part, std::min(kWidth, count - i) * sizeof(int));
        }
    }
}

inline void run_hashing(const HashParams& h) {
    const int64_t padded = (h.rounds * h.columns + kRows - 1) / kRows * kRows, all_heads = h.batch * h.heads;
    std::vector<float> rotations(h.heads * h.size * padded);
    for (int64_t head = 0; head < h.heads; head++) pack_rotations(h, head, padded, rotations.data() + head * h.size * padded);
    std::vector<std::unique_ptr<HashScratch>> scratch(std::max<int64_t>(1, h.threads));
    auto hash_tile = [&](int64_t head_index, int64_t first, int64_t end, int worker, auto&& read) {
        if (!scratch[worker]) scratch[worker] = std::make_unique<HashScratch>(h, padded);
        HashScratch& w = *scratch[worker];
        const int count = static_cast<int>(std::min<int64_t>(kTile, end - first));
        read(first, count, w.rows.data());
        hash_rows(h, head_index, first, count, rotations.data() + head_index % h.heads * h.size * padded, padded, w);
    };
    const int64_t tiles = (h.length + kTile - 1) / kTile;
    if (!h.centered) {  // heads of a tile one after the other: in a projection's own layout they lie side by side
        parallel_for(h.batch * tiles, h.threads, [&](int64_t task, int worker) {
            for (int64_t head = 0; head < h.heads; head++) {
                const int64_t batch = task / tiles, begin = task % tiles * kTile;
                const Source rows(h.vectors, batch, head, h.bfloat16, h.size);
                auto read = [&](int64_t first, int count, float* panels) {
                    for (int i = 0; i < count; i++) gather(rows, static_cast<int>(first) + i, panels, i);
                };
                hash_tile(batch * h.heads + head, begin, h.length, worker, read);
            }
        });
        return;
    }
    // Heads in groups, a tile of all of them at a time. Where there are fewer heads than threads, in segments; what comes before a
    // segment has to be added up first.
    if (!tiles || !all_heads) return;
    const int64_t groups = std::min(all_heads, std::max<int64_t>(1, h.threads));
    const int64_t wanted = std::min(tiles, (h.threads + groups - 1) / groups);
    const int64_t segment = (tiles + wanted - 1) / wanted * kTile, segments = (h.length + segment - 1) / segment;
    const int64_t counted = h.causal ? (segments - 1) * segment : h.length;
    std::vector<Centering> centers;
    for (int64_t head_index = 0; head_index < all_heads; head_index++) centers.emplace_back(h, head_index);
    auto heads_of = [&](int64_t group, auto&& each) {
        for (int64_t at = group * all_heads / groups; at < (group + 1) * all_heads / groups; at++) each(at);
    };
    parallel_for(groups, h.threads, [&](int64_t group, int) {
        std::vector<float> panels(panels_of(h.size) * kPanel * kTile);
        for (int64_t first = 0; first < counted; first += kTile)
            heads_of(group, [&](int64_t head_index) {
                if (first % segment == 0) centers[head_index].keep();
                centers[head_index].count_in(first, panels.data());
            });
        heads_of(group, [&](int64_t head_index) {
            centers[head_index].keep();
            centers[head_index].add_mean();
        });
    });
    parallel_for(groups * segments, h.threads, [&](int64_t task, int worker) {
        const int64_t begin = task % segments * segment, end = std::min(h.length, begin + segment), last = (end - 1 - begin) / kTile;
        std::vector<Centering::State> states;
        heads_of(task / segments, [&](int64_t head_index) { states.push_back(centers[head_index].before(task % segments)); });
        for (int64_t i = 0; i <= last; i++) {  // not causal: from the end, which was read last
            auto state = states.begin();
            heads_of(task / segments, [&](int64_t head_index) {
                auto read = [&](int64_t first, int count, float* panels) { centers[head_index].write(*state++, first, count, panels); };
                hash_tile(head_index, begin + (h.causal ? i : last - i) * kTile, end, worker, read);
            });
        }
    });
}

// One round of one head: a stable counting sort by bucket, padding last; windows end where their bucket does.
inline void sort_round(const SortParams& s, int64_t head_index, int64_t round) {
    int64_t batch = head_index / s.heads, head = head_index % s.heads, length = s.length;
    const int32_t* buckets =
        static_cast<const int32_t*>(s.buckets.data) + batch * s.buckets.batch + head * s.buckets.head + round * length;
    const uint8_t* mask = s.mask ? s.mask + batch * length : nullptr;
    int64_t before = (s.first_round + round) * length, at = head_index * s.all_rounds * length + before;
    std::vector<int32_t> ends(s.num_buckets + 2, 0);  // ends[b + 1]: tokens in bucket b; summed, the position behind its last
    auto bucket_of = [&](int64_t t) { return mask && !mask[t] ? s.num_buckets : buckets[t]; };
    for (int64_t t = 0; t < length; t++) {
        int64_t bucket = bucket_of(t);
        if (bucket < 0 || bucket > s.num_buckets) throw std::out_of_range("bucket");
        ends[bucket + 1]++;
    }
    for (int64_t b = 0; b <= s.num_buckets; b++) ends[b + 1] += ends[b];
    std::vector<int32_t> next(ends.begin(), ends.end() - 1);
    for (int64_t t = 0; t < length; t++) s.perm[at + next[bucket_of(t)]++] = static_cast<int32_t>(t);
    if (!s.window_start) return;
    for (int64_t b = 0; b <= s.num_buckets; b++)
        for (int64_t pos = ends[b]; pos < ends[b + 1]; pos++) {
            bool padding = b == s.num_buckets;
            int64_t start = padding ? pos + 1 : std::max<int64_t>(ends[b], pos - s.left_reach);
            s.window_start[at + pos] = static_cast<int32_t>(before + start);
            if (!s.window_end) continue;
            int64_t end = padding ? pos : std::min<int64_t>(ends[b + 1] - 1, pos + s.right_reach);
            s.window_end[at + pos] = static_cast<int32_t>(before + end);
        }
}

inline void run_sorting(const SortParams& s) {
    parallel_for(s.batch * s.heads * s.rounds, s.threads,
                 [&](int64_t task, int) { sort_round(s, task / s.rounds, task % s.rounds); });
}

}  // namespace hf

// The C interface: no torch, no Python, so that one build serves every version of either.
#include <exception>
#include <stdexcept>

#include "backward.hpp"
#include "hashing.hpp"
#include "layer.hpp"
#include "normals.hpp"
#include "step.hpp"
#include "sweep.hpp"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace {

using hf::Problem;

// Returns 0; 1 when memory ran out, 2 for a number out of its range. Exceptions do not cross the C interface.
template <typename F> int guarded(F&& f) {
    try {
        f();
        return 0;
    } catch (const std::out_of_range&) {
        return 2;
    } catch (const std::exception&) {
        return 1;
    }
}

// Large outputs written row by row in random order: huge pages save most of the address translation.
void prefer_huge_pages(void* data, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    constexpr int64_t kHuge = 2 << 20;
    if (!data || bytes < 2 * kHuge) return;
    uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + 4095) & ~uintptr_t{4095};
    uintptr_t end = (reinterpret_cast<uintptr_t>(data) + bytes) & ~uintptr_t{4095};
    madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
    (void)data, (void)bytes;
#endif
}

void invert_lines(const Problem& p) {
    if (!p.inverse.data) return;
    int64_t groups = p.inverse.head ? p.heads : 1, rounds = p.rounds - 1;
    hf::parallel_for(p.batch * groups * rounds, p.threads, [&](int64_t task, int) {
        int64_t round = task % rounds, group = task / rounds % groups, batch = task / rounds / groups;
        const int32_t* line = hf::Head::ints(p.line, batch, group) + round * p.length;
        int32_t* inverse = const_cast<int32_t*>(hf::Head::ints(p.inverse, batch, group)) + round * p.length;
        for (int64_t place = 0; place < p.length; place++) inverse[line[place]] = static_cast<int32_t>(place);
    });
}

}  // namespace

extern "C" {

const char* hf_variant() { return hf::kVariant; }

int hf_hash(const hf::Hashing* h) {
    return guarded([&] { hf::run_hashing(*h); });
}

int hf_normals(const hf::Normals* n) {
    return guarded([&] { hf::run_normals(*n); });
}

int hf_sort(const hf::Sorting* s) {
    return guarded([&] { hf::run_sorting(*s); });
}

int hf_step(const hf::Step* s) {
    return guarded([&] { hf::run_step(*s); });
}

int hf_layers(const hf::LayerSteps* p) {
    return guarded([&] {
        for (const hf::LayerStep* layer = p->layers; layer < p->layers + p->count; layer++)
            layer->float64 ? hf::run_layer<double>(*layer) : hf::run_layer<float>(*layer);
    });
}

int hf_forward(const Problem* p) {
    return guarded([&] {
        prefer_huge_pages(p->out, p->batch * p->heads * p->length * p->value_size * 4);
        invert_lines(*p);
        bool shared = p->key.data == nullptr;
        auto run = shared ? (p->dedup_pairs ? hf::run_forward<true, true> : hf::run_forward<true, false>)
                          : (p->dedup_pairs ? hf::run_forward<false, true> : hf::run_forward<false, false>);
        run(*p);
    });
}

int hf_backward(const Problem* p) {
    return guarded([&] {
        int64_t rows = p->batch * p->heads * p->length * 4;
        prefer_huge_pages(p->query_grad, rows * p->size);
        prefer_huge_pages(p->key_grad, rows * p->size);
        prefer_huge_pages(p->value_grad, rows * p->value_size);
        invert_lines(*p);
        bool shared = p->key.data == nullptr;
        auto run = shared ? (p->dedup_pairs ? hf::run_backward<true, true> : hf::run_backward<true, false>)
                          : (p->dedup_pairs ? hf::run_backward<false, true> : hf::run_backward<false, false>);
        run(*p);
    });
}

// Fills `pushed` where `push` is given, else `received`; both begin at 0.
int hf_sweep(const Problem* p) {
    return guarded([&] {
        invert_lines(*p);
        bool shared = p->key.data == nullptr;
        auto run = shared ? (p->dedup_pairs ? hf::run_sweep<true, true> : hf::run_sweep<true, false>)
                          : (p->dedup_pairs ? hf::run_sweep<false, true> : hf::run_sweep<false, false>);
        run(*p);
    });
}

}  // extern "C"

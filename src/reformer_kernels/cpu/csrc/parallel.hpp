// Independent tasks over threads: OpenMP, so that torch's own pool is used, or plain threads where there is none.
#pragma once

#include <cstdint>
#include <exception>
#include <mutex>

#ifdef _OPENMP
#include <omp.h>
#else
#include <atomic>
#include <thread>
#include <vector>
#endif

namespace hf {

// The first exception of any thread, for its caller: none may leave the thread itself.
class ExceptionSlot {
  public:
    template <typename F> void guard(F&& f) noexcept {
        try {
            f();
        } catch (...) {
            std::lock_guard<std::mutex> lock(mutex_);
            if (!first_) first_ = std::current_exception();
        }
    }
    void rethrow() {
        if (first_) std::rethrow_exception(first_);
    }

  private:
    std::mutex mutex_;
    std::exception_ptr first_;
};

// Calls body(task, worker) for tasks 0 … tasks - 1; worker < threads.
template <typename F> void parallel_for(int64_t tasks, int64_t threads, F&& body) {
    if (threads > tasks) threads = tasks;
    if (threads <= 1) {
        for (int64_t task = 0; task < tasks; task++) body(task, 0);
        return;
    }
    ExceptionSlot slot;
#ifdef _OPENMP
#pragma omp parallel for num_threads(static_cast<int>(threads)) schedule(dynamic, 1)
    for (int64_t task = 0; task < tasks; task++) slot.guard([&] { body(task, omp_get_thread_num()); });
#else
    std::atomic<int64_t> next{0};
    auto work = [&](int worker) {
        for (int64_t task; (task = next.fetch_add(1)) < tasks;) slot.guard([&] { body(task, worker); });
    };
    std::vector<std::thread> pool;
    slot.guard([&] {
        for (int worker = 1; worker < threads; worker++) pool.emplace_back(work, worker);
    });
    work(0);
    for (auto& thread : pool) thread.join();
#endif
    slot.rethrow();
}

}  // namespace hf

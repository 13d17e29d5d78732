#include "runtime/parallel.h"

#include <pthread.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <deque>
#include <exception>
#include <memory>
#include <mutex>
#include <system_error>
#include <thread>

#include "runtime/stop.h"

namespace fastrerank::cpu {
namespace {

struct Job {
    const std::function<void(int)>* f;
    int n;
    std::atomic<int> next{0};
    std::atomic<bool> failed{false};
    int wanted;                  // workers that may still join; guarded by Pool::mutex
    std::atomic<int> active{0};  // workers inside work(); changed under Pool::mutex
    std::exception_ptr error;
    std::once_flag error_once;
    Call* call;  // the call to which the tasks belong

    void work() {
        const WorksFor whom(call);
        for (int i; (i = next.fetch_add(1)) < n;) {
            if (failed.load(std::memory_order_relaxed)) continue;
            try {
                check_stop();
                (*f)(i);
            } catch (...) {
                std::call_once(error_once, [this] { error = std::current_exception(); });
                failed.store(true);
            }
        }
    }
};

// Sleeping and waking takes some 50 us, often as long as the time between two jobs of a call. So an idle thread polls
// for a while before it sleeps, and yields to others in between.
template <class Ready>
void await(const Ready& ready) {
    const auto end = std::chrono::steady_clock::now() + std::chrono::microseconds(100);
    while (!ready() && std::chrono::steady_clock::now() < end) std::this_thread::yield();
}

class Pool {
public:
    void run(Job& job) {
        {
            std::lock_guard<std::mutex> lock(mutex_);
            try {
                while (workers_ < job.wanted) {
                    std::thread([this] { loop(); }).detach();
                    ++workers_;
                }
            } catch (const std::system_error&) {
                // The system has no thread left. The existing ones do the work, at least the caller.
            }
            jobs_.push_back(&job);
            ++pushed_;
        }
        wake_.notify_all();
        job.work();
        {
            std::lock_guard<std::mutex> lock(mutex_);
            job.wanted = 0;
            for (auto it = jobs_.begin(); it != jobs_.end(); ++it)
                if (*it == &job) {
                    jobs_.erase(it);
                    break;
                }
        }
        await([&] { return job.active.load() == 0; });
        std::unique_lock<std::mutex> lock(mutex_);
        const auto done = [&] { return job.active == 0; };
        if (!job.call) return done_.wait(lock, done);
        while (!done_.wait_for(lock, std::chrono::milliseconds(50), done)) {
            lock.unlock();
            job.call->look();
            lock.lock();
        }
    }

private:
    void loop() {
        std::unique_lock<std::mutex> lock(mutex_);
        bool worked = false;  // since it last polled for a job
        for (;;) {
            Job* job = nullptr;
            for (Job* candidate : jobs_)
                if (candidate->wanted > 0 && candidate->next.load() < candidate->n) {
                    job = candidate;
                    break;
                }
            if (!job) {
                if (worked) {
                    worked = false;
                    const unsigned seen = pushed_.load();
                    lock.unlock();
                    await([&] { return pushed_.load() != seen; });
                    lock.lock();
                    if (pushed_.load() != seen) continue;
                }
                wake_.wait(lock);
                continue;
            }
            worked = true;
            --job->wanted;
            ++job->active;
            lock.unlock();
            job->work();
            lock.lock();
            if (--job->active == 0) done_.notify_all();
        }
    }

    std::mutex mutex_;
    std::condition_variable wake_, done_;
    std::deque<Job*> jobs_;
    std::atomic<unsigned> pushed_{0};  // jobs so far; changed under mutex_
    int workers_ = 0;
};

// The pool is never destroyed, because detached workers may outlive static destruction. A forked child has none of its
// parent's workers, and may have inherited a locked mutex, so it starts a new pool.
std::atomic<Pool*> current{nullptr};
std::atomic<StartOpenMp> openmp{nullptr};
thread_local bool on_openmp = false;

// Registered at load time: if a thread forked during a guarded initialisation by another thread, the child would wait
// for it forever.
[[maybe_unused]] const int registered = pthread_atfork(nullptr, nullptr, [] {
    current.store(nullptr);
    openmp.store(nullptr);
});

Pool& pool() {
    Pool* p = current.load();
    if (!p) {
        Pool* fresh = new Pool;
        if (current.compare_exchange_strong(p, fresh))
            p = fresh;
        else
            delete fresh;  // another thread was first
    }
    return *p;
}

}  // namespace

void run_parallel(int n, int threads, const std::function<void(int)>& f) {
    if (threads <= 1 || n <= 1) {
        for (int i = 0; i < n; ++i) {
            check_stop();
            f(i);
        }
        return;
    }
    Job job;
    job.f = &f;
    job.n = n;
    job.call = current_call();
    const int lanes = threads < n ? threads : n;
    job.wanted = lanes - 1;
    if (const StartOpenMp start = on_openmp ? openmp.load() : nullptr)
        start([](void* data) { static_cast<Job*>(data)->work(); }, &job, static_cast<unsigned>(lanes), 0);
    else
        pool().run(job);
    if (job.error) std::rethrow_exception(job.error);
}

void set_openmp(StartOpenMp start) { openmp.store(start); }

OnOpenMp::OnOpenMp() : before_(on_openmp) { on_openmp = true; }
OnOpenMp::~OnOpenMp() { on_openmp = before_; }

}  // namespace fastrerank::cpu

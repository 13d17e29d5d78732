// Long calls release the GIL, stop on Ctrl-C, and do no harm while the interpreter shuts down.
#pragma once
#include <pybind11/pybind11.h>

#include <exception>

#include "runtime/stop.h"

#if defined(__GLIBCXX__)
#include <cxxabi.h>
#include <unistd.h>
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#elif defined(__APPLE__)
#include <pthread.h>
#endif

namespace fastrerank::python {

// Python's thread that runs signal handlers is the process's first, also in a forked child.
inline bool is_main_thread() {
#if defined(__linux__)
    return syscall(SYS_gettid) == getpid();
#elif defined(__APPLE__)
    return pthread_main_np() != 0;
#else
    return false;
#endif
}

// A call without the GIL. It takes the GIL back now and then to run signal handlers, so that Ctrl-C raises.
class PythonCall : public cpu::Call {
public:
    PythonCall() : state_(PyEval_SaveThread()) {}

    // While the interpreter shuts down, no other thread gets the GIL. Before Python 3.14, a thread that asks for it is
    // ended by unwinding its stack: a destructor may not let that through (std::terminate), and it would release Python
    // objects that others use. Such a thread sleeps here until the process ends, as it does in Python 3.14.
    void take_gil() {
#if defined(__GLIBCXX__)
        try {
            PyEval_RestoreThread(state_);
        } catch (abi::__forced_unwind&) {
            for (;;) pause();
        }
#else
        PyEval_RestoreThread(state_);
#endif
    }

private:
    Answer ask() override {
        if (!is_main_thread()) return Answer::kNeverAskAgain;
        take_gil();
        const bool raised = PyErr_CheckSignals() != 0;  // the exception stays set in the thread
        state_ = PyEval_SaveThread();
        return raised ? Answer::kStop : Answer::kGoOn;
    }

    PyThreadState* state_;
};

// Calls f without the GIL. Rethrows its exception, or the one that a signal handler raised meanwhile.
template <class F>
void without_gil(const F& f) {
    PythonCall call;
    std::exception_ptr error;
    try {
        f();
    } catch (...) {
        error = std::current_exception();
    }
    call.take_gil();
    if (call.stopped()) throw pybind11::error_already_set();
    if (error) std::rethrow_exception(error);
}

}  // namespace fastrerank::python

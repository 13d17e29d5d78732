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

// A call without the GIL. Takes it back to run the handlers of signals that have come, which is how Ctrl-C raises.
class PythonCall : public cpu::Call {
public:
    PythonCall() : state_(PyEval_SaveThread()) {}

    // An interpreter that ends lets no other thread have the GIL: before Python 3.14 it ends a thread that asks for it
    // by unwinding its stack, which a destructor may not let through (std::terminate), and which would let go of Python
    // objects that others use. Such a thread sleeps here instead until the process is gone, as from 3.14 on.
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
        const bool raised = PyErr_CheckSignals() != 0;  // what it raised stays with the thread
        state_ = PyEval_SaveThread();
        return raised ? Answer::kStop : Answer::kGoOn;
    }

    PyThreadState* state_;
};

// Calls f without the GIL, and raises what it throws, or what a signal's handler raised meanwhile.
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

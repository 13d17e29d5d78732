#include "encoder/row_table.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <new>
#include <stdexcept>
#include <vector>

namespace fastrerank::cpu {
namespace {

int64_t change_time(const struct stat& s) {
#ifdef __APPLE__
    const struct timespec& t = s.st_mtimespec;
#else
    const struct timespec& t = s.st_mtim;
#endif
    return static_cast<int64_t>(t.tv_sec) * 1000000000 + t.tv_nsec;
}

}  // namespace

RowTable::RowTable(int fd, const std::string& path, int64_t offset, int64_t rows, int64_t row_bytes, int64_t size,
                   int64_t changed)
    : path_(path), offset_(offset), rows_(rows), row_bytes_(row_bytes), size_(size), changed_(changed) {
    if (offset < 0 || rows < 1 || row_bytes < 4 || row_bytes % 2 || size < offset || rows > (size - offset) / row_bytes)
        throw std::invalid_argument("the table of rows does not fit in its file");
    present_ = std::make_unique<std::atomic<uint8_t>[]>((rows + 7) / 8);
    fd_ = fcntl(fd, F_DUPFD_CLOEXEC, 0);
    if (fd_ < 0) throw std::runtime_error(path_ + " cannot be kept open: too many open files");
    bytes_ = static_cast<size_t>(rows) * row_bytes + 64;  // slack for whole-vector reads past the end
    // A page takes memory once it is written to.
    void* p = mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (p == MAP_FAILED) {
        close(fd_);
        throw std::bad_alloc();
    }
    data_ = static_cast<char*>(p);
#ifdef MADV_NOHUGEPAGE
    madvise(data_, bytes_, MADV_NOHUGEPAGE);  // a huge page for one row would bring hundreds of rows into memory
#endif
}

RowTable::~RowTable() {
    munmap(data_, bytes_);
    close(fd_);
}

void RowTable::read(int64_t r) const {
    const auto changed = [&] {
        throw std::runtime_error(path_ +
                                 " was changed since it was loaded, so its weights may be two models'; load it again, "
                                 "and replace a model's files by renaming new ones into their place");
    };
    std::vector<uint16_t> row(row_bytes_ / 2);
    char* to = reinterpret_cast<char*>(row.data());
    for (int64_t done = 0; done < row_bytes_;) {
        const ssize_t got = pread(fd_, to + done, row_bytes_ - done, offset_ + r * row_bytes_ + done);
        if (got < 0 && errno == EINTR) continue;
        if (got <= 0) changed();
        done += got;
    }
    // Checked after reading: a row that was read before the change belongs to the old file.
    struct stat now;
    if (fstat(fd_, &now) || now.st_size != size_ || change_time(now) != changed_) changed();
    // Another thread may write the same values at the same time while a third one reads them, hence the atomic stores.
    // There is no lock: a child that is forked while it is held could never read a row again.
    uint16_t* row_data = reinterpret_cast<uint16_t*>(data_ + r * row_bytes_);
    for (size_t i = 0; i < row.size(); ++i) __atomic_store_n(row_data + i, row[i], __ATOMIC_RELAXED);
    present_[r / 8].fetch_or(static_cast<uint8_t>(1u << (r % 8)), std::memory_order_release);
}

}  // namespace fastrerank::cpu

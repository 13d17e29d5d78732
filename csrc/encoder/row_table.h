// A stored matrix whose rows are read from the file when they are first needed. If the file was truncated or rewritten
// in the meantime, that raises an error; a mapped page of a truncated file would raise SIGBUS.
#pragma once
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>

namespace fastrerank::cpu {

class RowTable {
public:
    // Rows of row_bytes bytes, the first at byte `offset` of the file. The file has `size` bytes and was last changed
    // at `changed` ns. The descriptor is duplicated. Throws std::invalid_argument if the rows do not fit in the file.
    RowTable(int fd, const std::string& path, int64_t offset, int64_t rows, int64_t row_bytes, int64_t size,
             int64_t changed);
    ~RowTable();
    RowTable(const RowTable&) = delete;
    RowTable& operator=(const RowTable&) = delete;

    // Row r is at data() + r * row_bytes once need(r) has returned.
    const char* data() const { return data_; }
    int64_t rows() const { return rows_; }
    int64_t row_bytes() const { return row_bytes_; }

    // Reads row r if it is missing; r must be in [0, rows). Any number of threads may call it at once. Throws
    // std::runtime_error if the file has changed.
    void need(int64_t r) const {
        if (!(present_[r / 8].load(std::memory_order_acquire) >> (r % 8) & 1)) read(r);
    }

private:
    void read(int64_t r) const;

    std::string path_;
    int fd_;
    int64_t offset_, rows_, row_bytes_, size_, changed_;
    char* data_ = nullptr;
    size_t bytes_ = 0;
    std::unique_ptr<std::atomic<uint8_t>[]> present_;  // one bit for each row
};

}  // namespace fastrerank::cpu

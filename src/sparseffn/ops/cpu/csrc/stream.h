// Memory in the order in which one thread will read it, fetched a line at a time some way ahead of the reading. The hardware
// follows one line after the other within a page; a product reads several rows side by side. Measured on two cores (Zen 5) over
// 1 GiB: in order 51 GB/s, 47 without fetching, 28 to 43 by 2 to 8 rows side by side.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace sparseffn {

constexpr int64_t kLine = 64;

class Stream {
  public:
    // So many bytes are on their way: what the memory's latency needs, and no more than the second-level cache has room for.
    static constexpr int64_t kAheadBytes = 64 << 10;

    Stream() = default;

    // Lines of `bytes` each, `stride` bytes from one to the next.
    void add(const void* first, int64_t lines, int64_t bytes, int64_t stride) {
        const char* at = static_cast<const char*>(first);
        if (bytes == stride) pieces_.push_back({at, 1, lines * bytes, 0});
        else pieces_.push_back({at, lines, bytes, stride});
    }

    // So many bytes are about to be read: as many may be fetched.
    void take(int64_t bytes) { budget_ += bytes / kLine; }

    bool may_fetch() const { return budget_ > 0; }

    // The next `n` lines, if they lie one after the other: the caller fetches them. Else null.
    const char* claim(int64_t n) {
        if (at_ >= end_ && !advance()) return nullptr;
        if (end_ - at_ < n * kLine) return nullptr;
        const char* first = at_;
        at_ += n * kLine;
        budget_ -= n;
        return first;
    }

    void next() {
        if (budget_ <= 0 || (at_ >= end_ && !advance())) return;
        --budget_;
        __builtin_prefetch(at_, 0, 2);
        at_ += kLine;
    }

  private:
    struct Piece {
        const char* at;
        int64_t lines, bytes, stride;
    };

    bool advance() {
        while (next_ < pieces_.size() && pieces_[next_].lines == 0) ++next_;
        if (next_ == pieces_.size()) return false;
        Piece& piece = pieces_[next_];
        at_ = piece.at;
        end_ = piece.at + piece.bytes;
        piece.at += piece.stride;
        --piece.lines;
        return true;
    }

    std::vector<Piece> pieces_;
    std::size_t next_ = 0;
    const char *at_ = nullptr, *end_ = nullptr;
    int64_t budget_ = kAheadBytes / kLine;
};

}  // namespace sparseffn

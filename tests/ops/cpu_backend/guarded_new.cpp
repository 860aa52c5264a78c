// Memory that a kernel takes within a team of threads ends the process: what a thread cannot get would do so in use.
#include <dlfcn.h>
#include <omp.h>
#include <unistd.h>

#include <cstddef>
#include <cstdio>
#include <cstdlib>
#include <new>

namespace {

// Of this library, that is: PyTorch's threads may do as they like.
bool is_ours(void* caller) {
    static Dl_info here{};
    if (!here.dli_fbase) dladdr(reinterpret_cast<void*>(&is_ours), &here);
    Dl_info info{};
    return dladdr(caller, &info) && info.dli_fbase == here.dli_fbase;
}

void* taken(size_t bytes, size_t alignment, void* caller) {
    if (omp_in_parallel() && is_ours(caller)) {
        std::fprintf(stderr, "wrong: a thread takes %zu bytes\n", bytes);
        _exit(3);
    }
    void* found = nullptr;
    if (posix_memalign(&found, alignment, bytes ? bytes : 1)) throw std::bad_alloc();
    return found;
}

}  // namespace

void* operator new(size_t bytes) { return taken(bytes, alignof(std::max_align_t), __builtin_return_address(0)); }
void* operator new[](size_t bytes) { return taken(bytes, alignof(std::max_align_t), __builtin_return_address(0)); }
void* operator new(size_t bytes, std::align_val_t alignment) {
    return taken(bytes, static_cast<size_t>(alignment), __builtin_return_address(0));
}
// Asked for by what can do without, as a stable sort.
void* operator new(size_t bytes, const std::nothrow_t&) noexcept {
    return taken(bytes, alignof(std::max_align_t), __builtin_return_address(0));
}
void operator delete(void* p, const std::nothrow_t&) noexcept { std::free(p); }
void operator delete(void* p) noexcept { std::free(p); }
void operator delete[](void* p) noexcept { std::free(p); }
void operator delete(void* p, size_t) noexcept { std::free(p); }
void operator delete[](void* p, size_t) noexcept { std::free(p); }
void operator delete(void* p, std::align_val_t) noexcept { std::free(p); }
void operator delete(void* p, size_t, std::align_val_t) noexcept { std::free(p); }

// Functions of OpenMP's runtime that the kernels and PyTorch's headers call. Apple's compiler brings no omp.h; on macOS this
// folder is on its path, and the library is PyTorch's own libomp.
#pragma once
extern "C" {
int omp_get_max_threads();
int omp_get_num_threads();
int omp_get_thread_num();
int omp_in_parallel();
void omp_set_num_threads(int);
}

#include "experts_inner.h"

namespace sparseffn {

template void forward<double>(const Problem<double>&, double*);
template void backward<double>(const Problem<double>&, const Gradients<double>&);
template void forward_inner<double>(Problem<double>, const Inner<double>&, double*);
template void backward_inner<double>(Problem<double>, const Inner<double>&, const Gradients<double>&);

}  // namespace sparseffn

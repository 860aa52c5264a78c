#include "experts_inner.h"

namespace sparseffn {

template void forward<float>(const Problem<float>&, float*);
template void backward<float>(const Problem<float>&, const Gradients<float>&);
template void forward_inner<float>(Problem<float>, const Inner<float>&, float*);
template void backward_inner<float>(Problem<float>, const Inner<float>&, const Gradients<float>&);

}  // namespace sparseffn

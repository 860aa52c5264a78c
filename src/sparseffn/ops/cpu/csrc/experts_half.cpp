#include "experts_inner.h"

namespace sparseffn {

template void forward<half>(const Problem<half>&, half*);
template void backward<half>(const Problem<half>&, const Gradients<half>&);
template void forward_inner<half>(Problem<half>, const Inner<half>&, half*);
template void backward_inner<half>(Problem<half>, const Inner<half>&, const Gradients<half>&);

}  // namespace sparseffn

#include "experts_inner.h"

namespace sparseffn {

template void forward<bf16>(const Problem<bf16>&, bf16*);
template void backward<bf16>(const Problem<bf16>&, const Gradients<bf16>&);
template void forward_inner<bf16>(Problem<bf16>, const Inner<bf16>&, bf16*);
template void backward_inner<bf16>(Problem<bf16>, const Inner<bf16>&, const Gradients<bf16>&);

}  // namespace sparseffn

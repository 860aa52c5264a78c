// Blocks of key-value pairs in bfloat16 and float16.
#include "product_keys.h"
#include "topk_backward.h"

namespace sparseffn {

template void sum_rows<bf16>(const Table<bf16>&, bf16*);
template void row_gradients<bf16>(const Table<bf16>&, const bf16*, bf16*, compute_t<bf16>*);
template void topk_forward<bf16>(const TopK<bf16>&, bf16*);
template void topk_backward<bf16>(const TopK<bf16>&, const TopKGradients<bf16>&);
template void product_keys_forward<bf16>(const ProductKeys<bf16>&, bf16*);
template void product_keys_backward<bf16>(const ProductKeys<bf16>&, const bf16*, const bf16*, bf16*, compute_t<bf16>*, compute_t<bf16>*);

template void sum_rows<half>(const Table<half>&, half*);
template void row_gradients<half>(const Table<half>&, const half*, half*, compute_t<half>*);
template void topk_forward<half>(const TopK<half>&, half*);
template void topk_backward<half>(const TopK<half>&, const TopKGradients<half>&);
template void product_keys_forward<half>(const ProductKeys<half>&, half*);
template void product_keys_backward<half>(const ProductKeys<half>&, const half*, const half*, half*, compute_t<half>*, compute_t<half>*);

}  // namespace sparseffn

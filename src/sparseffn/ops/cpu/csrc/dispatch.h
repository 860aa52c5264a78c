// How an operation of the library `sparseffn` is differentiated and cast, for all of them alike. Its schemas, defined in
// ops/library.py, say what there is to do:
//
//     NAME(arguments) -> outputs
//     NAME_plain(arguments) -> outputs                    a composition of PyTorch's operations
//     NAME_eager(arguments) -> outputs                    another, for devices without kernels
//     NAME_kept(arguments) -> (outputs..., kept...)       what a step of training runs forward
//     NAME_backward(grad_OUTPUT..., what it needs of arguments, outputs and kept, by name) -> gradients named as arguments
#pragma once

#include <torch/library.h>

#include <string>
#include <vector>

namespace sparseffn {

// The autograd kernel of an operation. Under transforms of torch.func, forward-mode AD and where gradients are differentiated
// or batched, NAME_plain is what runs, and differentiates itself.
torch::CppFunction differentiated(const std::string& name);

// The autocast kernel: the named arguments are cast as those of nn.Linear are.
torch::CppFunction autocast(const std::string& name, at::DeviceType device, std::vector<std::string> arguments);

}  // namespace sparseffn

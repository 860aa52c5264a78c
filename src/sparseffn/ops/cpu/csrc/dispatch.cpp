// How an operation of the library `sparseffn` is differentiated and cast, for all of them alike. Its schemas, defined in
// ops/library.py, say what there is to do:
//
//     NAME(arguments) -> outputs
//     NAME_plain(arguments) -> outputs                    a composition of PyTorch's operations
//     NAME_eager(arguments) -> outputs                    another, for devices without kernels
//     NAME_kept(arguments) -> (outputs..., kept...)       what a step of training runs forward
//     NAME_backward(grad_OUTPUT..., what it needs of arguments, outputs and kept, by name) -> gradients named as arguments
//
// An argument `needed` of NAME_backward gets which of these gradients somebody waits for; the others are left out. An argument
// `joint` gets whether gradients may share one memory: not in a graph, whose compiler believes what fakes say of them.
//
// Under transforms of torch.func, forward-mode AD and where gradients are differentiated or batched, NAME_plain is what runs, and
// differentiates itself. ops/library.py has `sparseffn_differentiate` called for each operation once this is loaded.
#include <ATen/autocast_mode.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <map>
#include <sstream>
#include <string>
#include <vector>

namespace sparseffn {
namespace {

using at::Tensor;
using c10::IValue;
using c10::OperatorHandle;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;
using torch::jit::Stack;

constexpr c10::DispatchKeySet kTransforms(
    {c10::DispatchKey::FuncTorchGradWrapper, c10::DispatchKey::FuncTorchBatched, c10::DispatchKey::Batched});

bool is_watched(const Tensor& t) {
    return t.defined() && (t.key_set().has_any(kTransforms) || t._fw_grad(0).defined());
}
bool is_watched(const variable_list& tensors) {
    return std::any_of(tensors.begin(), tensors.end(), [](const Tensor& t) { return is_watched(t); });
}

bool has_empty(const variable_list& tensors) {
    return std::any_of(tensors.begin(), tensors.end(), [](const Tensor& t) {
        return t.defined() && !t.unsafeGetTensorImpl()->has_symbolic_sizes_strides() && t.numel() == 0;
    });
}

OperatorHandle find(const std::string& name) {
    return c10::Dispatcher::singleton().findSchemaOrThrow(("sparseffn::" + name).c_str(), "");
}

bool is_tensor(const c10::Argument& argument) {
    return argument.type()->isSubtypeOf(*c10::OptionalType::ofTensor());
}

// Where an argument of NAME_backward comes from.
struct Source {
    enum Kind { kGradient, kArgument, kOutput, kNeeded, kJoint } kind;
    size_t index = 0;
};

// An operation's five schemas, and how they fit together.
struct Family {
    OperatorHandle op, plain, eager, kept, backward;
    std::vector<size_t> tensors;       // arguments of NAME that are tensors, which are the inputs of its autograd node
    std::vector<Source> sources;       // of each argument of NAME_backward
    std::vector<size_t> saved_outputs; // outputs of NAME_kept that NAME_backward needs
    std::vector<size_t> gradients;     // the place in `tensors` that each result of NAME_backward belongs to
    size_t n_arguments, n_outputs;

    explicit Family(const std::string& name)
        : op(find(name)), plain(find(name + "_plain")), eager(find(name + "_eager")), kept(find(name + "_kept")),
          backward(find(name + "_backward")) {
        const auto& schema = op.schema();
        const auto& outputs = kept.schema().returns();
        n_arguments = schema.arguments().size();
        n_outputs = schema.returns().size();
        for (size_t i = 0; i < n_arguments; ++i)
            if (is_tensor(schema.arguments()[i])) tensors.push_back(i);
        for (const auto& argument : backward.schema().arguments()) {
            const std::string& wanted = argument.name();
            if (wanted == "needed" || wanted == "joint") {
                sources.push_back({wanted == "needed" ? Source::kNeeded : Source::kJoint});
                continue;
            }
            const bool gradient = wanted.rfind("grad_", 0) == 0;
            const auto output = place(outputs, gradient ? wanted.substr(5) : wanted);
            if (gradient) {
                TORCH_INTERNAL_ASSERT(output >= 0, name, ": ", wanted, " is the gradient of no output");
                sources.push_back({Source::kGradient, static_cast<size_t>(output)});
            } else if (output >= 0) {
                sources.push_back({Source::kOutput, saved_outputs.size()});
                saved_outputs.push_back(static_cast<size_t>(output));
            } else {
                const auto own = place(schema.arguments(), wanted);
                TORCH_INTERNAL_ASSERT(own >= 0, name, "_backward: nothing is called ", wanted);
                sources.push_back({Source::kArgument, static_cast<size_t>(own)});
            }
        }
        for (const auto& result : backward.schema().returns()) {
            const auto own = place(schema.arguments(), result.name());
            const auto at = std::find(tensors.begin(), tensors.end(), static_cast<size_t>(own));
            TORCH_INTERNAL_ASSERT(own >= 0 && at != tensors.end(), name, "_backward: no tensor is called ", result.name());
            gradients.push_back(at - tensors.begin());
        }
    }

    // Triton has no double, and may not be there.
    bool has_kernel(const Tensor& t) const {
        return !t.is_cuda() || (t.scalar_type() != at::kDouble && kept.hasKernelForDispatchKey(c10::DispatchKey::CUDA)) ||
               kept.hasKernelForDispatchKey(c10::DispatchKey::CompositeExplicitAutograd);
    }

    static int64_t place(const std::vector<c10::Argument>& among, const std::string& name) {
        for (size_t i = 0; i < among.size(); ++i)
            if (among[i].name() == name) return static_cast<int64_t>(i);
        return -1;
    }
};

Tensor tensor_of(const IValue& value) { return value.isTensor() ? value.toTensor() : Tensor(); }
IValue value_of(const Tensor& tensor) { return tensor.defined() ? IValue(tensor) : IValue(); }

variable_list tensors_of(const Family& family, const IValue* arguments) {
    variable_list tensors;
    tensors.reserve(family.tensors.size());
    for (const size_t i : family.tensors) tensors.push_back(tensor_of(arguments[i]));
    return tensors;
}

// The last `count` values of a stack, taken off.
std::vector<IValue> pop(Stack& stack, size_t count) {
    std::vector<IValue> values(std::make_move_iterator(stack.end() - count), std::make_move_iterator(stack.end()));
    stack.erase(stack.end() - count, stack.end());
    return values;
}

Stack with_tensors(const Family& family, const std::vector<IValue>& arguments, const variable_list& tensors) {
    Stack stack(arguments);
    for (size_t i = 0; i < tensors.size(); ++i) stack[family.tensors[i]] = value_of(tensors[i]);
    return stack;
}

variable_list defined_of(const variable_list& tensors) {
    variable_list defined;
    std::copy_if(tensors.begin(), tensors.end(), std::back_inserter(defined), [](const Tensor& t) { return t.defined(); });
    return defined;
}

class WithoutAutocast {
  public:
    explicit WithoutAutocast(at::DeviceType device)
        : device_(device), was_on_(device != at::kMeta && at::autocast::is_autocast_enabled(device)) {
        if (was_on_) at::autocast::set_autocast_enabled(device_, false);
    }
    WithoutAutocast(const WithoutAutocast&) = delete;
    ~WithoutAutocast() {
        if (was_on_) at::autocast::set_autocast_enabled(device_, true);
    }

  private:
    at::DeviceType device_;
    bool was_on_;
};

// Whether values cannot be read: a compiler or a mode is at work, or the tensors are fakes.
bool is_traced(const Tensor& t) {
    return c10::impl::dispatch_mode_enabled() || t.is_meta() || t.key_set().has(c10::DispatchKey::Python);
}

// A node of autograd. Its inputs are the tensors among the arguments that are there.
struct Recorded : torch::autograd::Function<Recorded> {
    // `inputs` are in `arguments` too: PyTorch looks for them among what it is called with.
    static variable_list forward(AutogradContext* ctx, at::TensorList inputs, const Family* family,
                                 const std::vector<IValue>& arguments) {
        const variable_list tensors = tensors_of(*family, arguments.data());
        Stack stack(arguments);
        {
            at::AutoDispatchBelowADInplaceOrView below;
            family->kept.callBoxed(stack);
        }
        variable_list outputs, saved(tensors), constant;
        for (size_t i = 0; i < family->n_outputs; ++i) {
            outputs.push_back(stack[i].toTensor());
            if (!outputs.back().is_floating_point()) constant.push_back(outputs.back());
        }
        for (const size_t i : family->saved_outputs) saved.push_back(stack[i].toTensor());
        ctx->save_for_backward(std::move(saved));
        ctx->mark_non_differentiable(constant);
        // Else zeros are made for every output that nobody differentiates.
        ctx->set_materialize_grads(false);
        // Tensors are saved above, where PyTorch looks for them.
        std::vector<IValue> rest(arguments);
        for (const size_t i : family->tensors) rest[i] = IValue();
        ctx->saved_data["family"] = reinterpret_cast<int64_t>(family);
        ctx->saved_data["arguments"] = c10::ivalue::Tuple::create(std::move(rest));
        return outputs;
    }

    static variable_list backward(AutogradContext* ctx, variable_list grads) {
        const auto& family = *reinterpret_cast<const Family*>(ctx->saved_data["family"].toInt());
        const auto& arguments = ctx->saved_data["arguments"].toTupleRef().elements();
        const std::vector<IValue> rest(arguments.begin(), arguments.end());
        const variable_list saved = ctx->get_saved_variables();
        const variable_list tensors(saved.begin(), saved.begin() + family.tensors.size());
        const std::vector<bool> needed = needed_of(*ctx, tensors);
        variable_list results(tensors.size());
        if (std::any_of(grads.begin(), grads.end(), [](const Tensor& g) { return g.defined(); })) {
            if (at::GradMode::is_enabled() || is_watched(grads)) differentiably(family, rest, tensors, needed, grads, results);
            else by_kernel(family, rest, tensors, needed, saved, grads, results);
        }
        variable_list given;
        for (size_t i = 0; i < tensors.size(); ++i)
            if (tensors[i].defined()) given.push_back(results[i]);
        // Of the other two arguments of forward.
        given.resize(given.size() + 2);
        return given;
    }

    // Which of the arguments' gradients this pass wants: not those of frozen ones, nor of ones beside those it was asked for.
    static std::vector<bool> needed_of(const AutogradContext& ctx, const variable_list& tensors) {
        std::vector<bool> needed;
        size_t input = 0;
        for (const Tensor& t : tensors) needed.push_back(t.defined() && ctx.needs_input_grad(input++));
        return needed;
    }

    static void by_kernel(const Family& family, const std::vector<IValue>& arguments, const variable_list& tensors,
                          const std::vector<bool>& needed, const variable_list& saved, const variable_list& grads,
                          variable_list& results) {
        c10::List<bool> asked;
        for (const size_t at : family.gradients) asked.push_back(needed[at]);
        const Stack whole = with_tensors(family, arguments, tensors);
        Stack stack;
        for (const Source& source : family.sources) {
            const size_t i = source.index;
            if (source.kind == Source::kGradient) stack.push_back(value_of(grads[i]));
            else if (source.kind == Source::kOutput) stack.push_back(saved[tensors.size() + i]);
            else if (source.kind == Source::kNeeded) stack.emplace_back(asked);
            else if (source.kind == Source::kJoint) stack.emplace_back(!is_traced(tensors[0]));
            else stack.push_back(whole[i]);
        }
        at::AutoDispatchBelowADInplaceOrView below;
        family.backward.callBoxed(stack);
        for (size_t i = 0; i < stack.size(); ++i) {
            const size_t at = family.gradients[i];
            if (needed[at]) results[at] = stack[i].toTensor();
        }
    }

    // By the composition, computed again: its gradients can themselves be differentiated, and batched.
    static void differentiably(const Family& family, const std::vector<IValue>& arguments, const variable_list& tensors,
                               const std::vector<bool>& needed, const variable_list& grads, variable_list& results) {
        const bool create_graph = at::GradMode::is_enabled();
        const at::AutoGradMode recorded(true);
        // Its arguments are those that the kernels had, cast or not.
        const WithoutAutocast as_they_are(tensors[0].device().type());
        variable_list inputs(tensors), wanted, outputs, given;
        std::vector<size_t> places;
        for (size_t i = 0; i < inputs.size(); ++i) {
            if (!needed[i] || !inputs[i].requires_grad()) continue;
            // Its alias: one input may have been computed from another, whose gradient must not come through it.
            inputs[i] = inputs[i].view_as(inputs[i]);
            wanted.push_back(inputs[i]);
            places.push_back(i);
        }
        Stack stack = with_tensors(family, arguments, inputs);
        family.plain.callBoxed(stack);
        for (size_t i = 0; i < stack.size(); ++i) {
            const Tensor output = stack[i].toTensor();
            if (!grads[i].defined() || !output.requires_grad()) continue;
            outputs.push_back(output);
            given.push_back(grads[i]);
        }
        if (outputs.empty()) return;
        const variable_list found = torch::autograd::grad(outputs, wanted, given, true, create_graph, true);
        for (size_t i = 0; i < found.size(); ++i) results[places[i]] = found[i];
    }
};

struct Differentiated : c10::OperatorKernel {
    Family family;
    explicit Differentiated(const std::string& name) : family(name) {}

    void operator()(const OperatorHandle&, c10::DispatchKeySet, Stack* stack) {
        const IValue* arguments = stack->data() + (stack->size() - family.n_arguments);
        const variable_list tensors = tensors_of(family, arguments);
        // Kernels take weights that have elements.
        if (is_watched(tensors) || has_empty(tensors)) return family.plain.callBoxed(stack);
        if (!family.has_kernel(tensors[0])) return (is_traced(tensors[0]) ? family.plain : family.eager).callBoxed(stack);
        const bool recorded = at::GradMode::is_enabled() && std::any_of(tensors.begin(), tensors.end(), [](const Tensor& t) {
                                  return t.defined() && t.requires_grad();
                              });
        if (!recorded) {
            at::AutoDispatchBelowADInplaceOrView below;
            return family.op.callBoxed(stack);
        }
        const std::vector<IValue> values = pop(*stack, family.n_arguments);
        for (Tensor& output : Recorded::apply(at::TensorList(defined_of(tensors)), static_cast<const Family*>(&family), values))
            stack->push_back(std::move(output));
    }
};

struct Autocast : c10::OperatorKernel {
    OperatorHandle op;
    at::DeviceType device;
    std::vector<size_t> cast;

    Autocast(const std::string& name, at::DeviceType on, const std::vector<std::string>& arguments) : op(find(name)), device(on) {
        for (const auto& argument : arguments) {
            const auto at = Family::place(op.schema().arguments(), argument);
            TORCH_INTERNAL_ASSERT(at >= 0, name, ": no argument is called ", argument);
            cast.push_back(static_cast<size_t>(at));
        }
    }

    void operator()(const OperatorHandle&, c10::DispatchKeySet, Stack* stack) {
        const c10::impl::ExcludeDispatchKeyGuard off(at::autocast::get_autocast_dispatch_key_from_device_type(device));
        const at::ScalarType to = at::autocast::get_autocast_dtype(device);
        IValue* arguments = stack->data() + (stack->size() - op.schema().arguments().size());
        for (const size_t i : cast)
            if (arguments[i].isTensor()) arguments[i] = at::autocast::cached_cast(to, arguments[i].toTensor(), device);
        op.callBoxed(stack);
    }
};

// What is registered for a key; it lasts as long as the process.
torch::Library& registrations(c10::DispatchKey key) {
    static auto& libraries = *new std::map<c10::DispatchKey, torch::Library>;
    auto found = libraries.find(key);
    if (found == libraries.end())
        found = libraries.emplace(key, torch::Library(torch::Library::IMPL, "sparseffn", key, __FILE__, __LINE__)).first;
    return found->second;
}

// `cast`: the arguments that autocast casts, as those of nn.Linear.
void differentiate(const std::string& name, const std::vector<std::string>& cast) {
    using c10::DispatchKey;
    for (const auto key : {DispatchKey::AutogradCPU, DispatchKey::AutogradCUDA, DispatchKey::AutogradMeta})
        registrations(key).impl(name.c_str(), torch::CppFunction::makeFromBoxedFunctor(std::make_unique<Differentiated>(name)));
    for (const auto& [key, device] : {std::pair(DispatchKey::AutocastCPU, at::kCPU), std::pair(DispatchKey::AutocastCUDA, at::kCUDA)})
        registrations(key).impl(name.c_str(), torch::CppFunction::makeFromBoxedFunctor(std::make_unique<Autocast>(name, device, cast)));
}

}  // namespace
}  // namespace sparseffn

// No operation: a compiler that traces the first call of a process would write it into its graph. `cast` has commas between the
// names. Returns what went wrong, or nullptr.
extern "C" const char* sparseffn_differentiate(const char* name, const char* cast) {
    static std::string error;
    try {
        std::vector<std::string> names;
        std::istringstream list(cast);
        for (std::string one; std::getline(list, one, ',');) names.push_back(one);
        sparseffn::differentiate(name, names);
        return nullptr;
    } catch (const std::exception& caught) {
        error = caught.what();
        return error.c_str();
    }
}

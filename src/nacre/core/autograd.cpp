// Autograd's part of a call whose kernels are compiled: what the torch.autograd.Function of core/op.py does, without
// Python between the kernel and the engine, which takes 10 us of a forward and 20 us of a backward there.
//
// It uses interfaces of torch that differ between versions, so it is a library of its own, built for one version and
// loaded beside that version alone; with any other the Function in core/op.py records.
#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/saved_variable.h>
#include <torch/csrc/dynamo/compiled_autograd.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>
#include <iterator>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <utility>
#include <vector>

namespace {

using torch::autograd::SavedVariable;
using torch::autograd::variable_list;
using torch::dynamo::autograd::CompiledNodeArgs;
using torch::dynamo::autograd::SwapSavedVariables;
using torch::jit::Stack;

// An op as core/op.py declares it. A place counts the arguments of the forward, then its results.
struct Op {
  std::string name;
  c10::OperatorHandle backward;          // through Python, which chooses and which everybody may watch
  c10::OperatorHandle backward_kernel;   // the kernel at once
  c10::OperatorHandle backward_formula;  // plain operations, which autograd follows
  std::vector<bool> is_tensor;           // each argument of the forward, whether there is one or None
  size_t outputs;
  std::vector<int64_t> saved;      // places
  std::vector<int64_t> gradients;  // arguments
  std::vector<int64_t> passes;     // pairs: an argument, and the output or argument whose gradient is its own as well
};

// Whether Python is to choose every kernel itself: somebody records which ones run, or sizes do not count
// (core/choice.py).
std::atomic<bool> python_chooses{false};

// Whether a mode, a transform, autocast, a tracer, or a subclass of a tensor is about: then the dispatcher asks it.
bool observed(const variable_list& grads) {
  constexpr c10::DispatchKeySet usual = c10::default_included_set;
  if (python_chooses || !(c10::impl::tls_local_dispatch_key_set().included_ - usual).empty()) return true;
  for (const auto& grad : grads) {
    if (!grad.defined()) continue;
    if (grad.layout() != at::kStrided || grad.key_set().has(c10::DispatchKey::Python)) return true;
  }
  return false;
}

// A value that the backward needs: autograd looks after tensors, their versions, hooks and cycles.
struct Saved {
  std::optional<SavedVariable> tensor;
  c10::IValue other;
};

bool none_defined(const variable_list& grads) {
  return std::none_of(grads.begin(), grads.end(), [](const at::Tensor& grad) { return grad.defined(); });
}

// The gradient of each argument, from those of the outputs and the values that the backward takes after them.
variable_list gradients_of(
    const Op& op,
    const c10::OperatorHandle& run,
    const variable_list& grads,
    Stack values,
    const std::vector<bool>& needed) {
  variable_list gradients(op.is_tensor.size());
  if (none_defined(grads)) return gradients;

  Stack stack;
  stack.reserve(grads.size() + values.size() + 1);
  for (const auto& grad : grads) stack.push_back(grad.defined() ? c10::IValue(grad) : c10::IValue());
  std::move(values.begin(), values.end(), std::back_inserter(stack));
  c10::List<bool> needs;
  needs.reserve(op.gradients.size());
  for (const auto argument : op.gradients) needs.push_back(needed[argument]);
  stack.emplace_back(std::move(needs));
  run.callBoxed(stack);

  for (size_t index = 0; index < op.gradients.size(); ++index) {
    if (stack[index].isTensor()) gradients[op.gradients[index]] = std::move(stack[index]).toTensor();
  }
  for (size_t pair = 0; pair < op.passes.size(); pair += 2) {
    const size_t argument = op.passes[pair], place = op.passes[pair + 1];
    if (gradients[argument].defined() || !needed[argument]) continue;
    gradients[argument] = place < op.outputs ? grads[place] : gradients[place - op.outputs];
  }
  return gradients;
}

// What the compiler of a graph knows of the nodes that these edges lead to.
c10::IValue metadata_of(const torch::autograd::edge_list& edges) {
  using torch::dynamo::autograd::IValuePacker;
  using Metadata = std::vector<std::optional<torch::autograd::InputMetadata>>;
  return IValuePacker<Metadata>::pack(torch::dynamo::autograd::get_input_metadata(edges));
}

struct KernelNode final : torch::autograd::Node {
  explicit KernelNode(std::shared_ptr<const Op> op) : op(std::move(op)) {}

  std::string name() const override { return "Nacre_" + op->name + "Backward"; }

  void save(const c10::IValue& value, bool is_output) {
    Saved kept;
    if (value.isTensor()) {
      kept.tensor.emplace(value.toTensor(), is_output);
    } else {
      kept.other = value;
    }
    saved.push_back(std::move(kept));
  }

  void release_variables() override {
    std::lock_guard<std::mutex> lock(mutex_);
    for (auto& value : saved) {
      if (value.tensor) value.tensor->reset_data();
    }
  }

  variable_list apply(variable_list&& grads) override {
    std::lock_guard<std::mutex> lock(mutex_);
    if (none_defined(grads)) return variable_list(op->is_tensor.size());
    const bool differentiated = torch::autograd::GradMode::is_enabled();
    Stack values;
    values.reserve(saved.size() + settings.size());
    for (const auto& value : saved) {
      if (value.tensor) {
        values.emplace_back(value.tensor->unpack(getptr()));
      } else {
        values.push_back(value.other);
      }
    }
    if (differentiated) values.insert(values.end(), settings.begin(), settings.end());
    const auto& run = differentiated ? op->backward_formula : observed(grads) ? op->backward : op->backward_kernel;
    return gradients_of(*op, run, grads, std::move(values), needed());
  }

  // What tells this node's graph from another's where torch compiles the backward of a graph that ran eagerly.
  void compiled_args(CompiledNodeArgs& args) const override {
    args.collect(op->name);
    for (size_t index = 0; index < saved.size(); ++index) {
      const auto& value = saved[index];
      if (value.tensor) {
        args.collect(*value.tensor, op->saved[index] >= static_cast<int64_t>(op->is_tensor.size()));
      } else {
        args.collect(value.other, /*nested=*/true);  // part of the key, not an input of the graph
      }
    }
    for (const bool need : needed()) args.collect(need);
  }

  // Puts the backward into that graph as one operation, which its compiler traces.
  variable_list apply_with_saved(const variable_list& grads, SwapSavedVariables& swap) override {
    std::vector<size_t> places;  // of the tensors among the values
    std::vector<c10::IValue> others, tensors;
    std::vector<c10::TypePtr> types;
    for (auto& value : saved) {
      if (value.tensor) {
        swap.before(*value.tensor);
        places.push_back(others.size());
        tensors.emplace_back(value.tensor->unpack(getptr()));
        types.push_back(c10::TensorType::get());
      }
      others.push_back(value.other);
    }
    const auto backward = [op = op, places, others, needed = needed()](
                              const variable_list& grads, const std::vector<c10::IValue>& tensors) {
      Stack values = others;
      for (size_t index = 0; index < places.size(); ++index) values[places[index]] = tensors[index];
      return gradients_of(*op, op->backward, grads, std::move(values), needed);
    };
    const auto& compiler = torch::dynamo::autograd::getPyCompilerInterface();
    const auto bound = compiler->bind_function(
        swap.get_py_compiler(), name(), backward, types, /*is_custom_function=*/true, /*is_traceable=*/true);
    auto gradients = compiler->call_function(
        swap.get_py_compiler(), "apply_functional", bound, grads, tensors, metadata_of(next_edges()));
    for (auto& value : saved) {
      if (value.tensor) swap.after(*value.tensor);
    }
    return gradients;
  }

  // Which arguments' gradients this backward is to compute.
  std::vector<bool> needed() const {
    std::vector<bool> arguments(op->is_tensor.size());
    for (size_t index = 0; index < arguments.size(); ++index) arguments[index] = task_should_compute_output(index);
    return arguments;
  }

  std::shared_ptr<const Op> op;
  std::vector<Saved> saved;           // in the order of the op's declaration
  std::vector<c10::IValue> settings;  // the forward's arguments which are not tensors
};

// What the dispatcher calls for autograd: runs the kernel below it and records a node where a gradient is asked for.
struct Recorder final : c10::OperatorKernel {
  explicit Recorder(std::shared_ptr<const Op> op) : op(std::move(op)) {}

  void operator()(const c10::OperatorHandle& handle, c10::DispatchKeySet keys, Stack* stack) {
    const size_t first = stack->size() - op->is_tensor.size();
    const auto argument = [&](size_t index) -> const c10::IValue& { return (*stack)[first + index]; };
    bool needed = false;
    if (torch::autograd::GradMode::is_enabled()) {
      for (size_t index = 0; index < op->is_tensor.size(); ++index) {
        needed |= argument(index).isTensor() && argument(index).toTensor().requires_grad();
      }
    }
    if (!needed) {
      handle.redispatchBoxed(keys & c10::after_autograd_keyset, stack);
      return;
    }

    auto node = c10::make_intrusive<KernelNode>(op);
    torch::autograd::edge_list edges(op->is_tensor.size());
    for (size_t index = 0; index < op->is_tensor.size(); ++index) {
      if (argument(index).isTensor()) {
        edges[index] = torch::autograd::impl::gradient_edge(argument(index).toTensor());
      } else if (!op->is_tensor[index]) {
        node->settings.push_back(argument(index));
      }
    }
    node->set_next_edges(std::move(edges));
    const std::vector<c10::IValue> arguments(stack->begin() + static_cast<std::ptrdiff_t>(first), stack->end());

    {
      at::AutoDispatchBelowADInplaceOrView below;
      handle.redispatchBoxed(keys & c10::after_ADInplaceOrView_keyset, stack);
    }

    for (size_t output = 0; output < op->outputs; ++output) {
      torch::autograd::set_history((*stack)[first + output].toTensor(), node);
    }
    for (const size_t place : op->saved) {
      const bool is_result = place >= op->is_tensor.size();
      node->save(is_result ? (*stack)[first + place - op->is_tensor.size()] : arguments[place], is_result);
    }
  }

  std::shared_ptr<const Op> op;
};

torch::Library& library() {
  static torch::Library implementations(torch::Library::IMPL, "nacre", c10::DispatchKey::Autograd, __FILE__, __LINE__);
  return implementations;
}

// Has the kernels of nacre::<name>, which is defined already, recorded by this library.
void record(
    std::string name,
    int64_t outputs,
    std::vector<int64_t> saved,
    std::vector<int64_t> gradients,
    std::vector<int64_t> passes) {
  const auto find = [](const std::string& of, const char* overload) {
    return c10::Dispatcher::singleton().findSchemaOrThrow(("nacre::" + of).c_str(), overload);
  };
  std::vector<bool> is_tensor;
  for (const auto& argument : find(name, "kernel").schema().arguments()) {
    is_tensor.push_back(argument.type()->isSubtypeOf(*c10::OptionalType::ofTensor()));
  }
  auto op = std::make_shared<const Op>(Op{
      name,
      find(name + "_backward", ""),
      find(name + "_backward", "kernel"),
      find(name + "_backward_formula", ""),
      std::move(is_tensor),
      static_cast<size_t>(outputs),
      std::move(saved),
      std::move(gradients),
      std::move(passes)});
  library().impl((name + ".kernel").c_str(), torch::CppFunction::makeFromBoxedFunctor(std::make_unique<Recorder>(op)));
}

}  // namespace

TORCH_LIBRARY(nacre_autograd, m) {
  m.def("record(str name, int outputs, int[] saved, int[] gradients, int[] passes) -> ()", &record);
  m.def("python_chooses(bool always) -> ()", [](bool always) { python_chooses = always; });
}

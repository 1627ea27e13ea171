// fastconv._C: what the package can tell about its kernels without touching a tensor. No torch in here.
//
// A plan asks the selection that the host functions ask (conv2d/select.h), so the two cannot disagree.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <string>
#include <vector>

#include "common/isa.h"
#include "common/registry.h"
#include "conv2d/cuda_select.h"
#include "conv2d/select.h"
#include "conv2d/tile_shape.h"

namespace py = pybind11;
using namespace fastconv;

namespace {

using Shape = std::vector<int64_t>;

std::string full_name(const KernelName& name) { return std::string(name.op) + "/" + name.algo; }
std::string full_name(Kernel kernel) { return full_name(kKernelNames[static_cast<int32_t>(kernel)]); }
std::string full_name(CudaKernel kernel) { return full_name(kCudaKernelNames[static_cast<int32_t>(kernel)]); }

bool is_cuda(const std::string& device) {
  if (device != "cpu" && device != "cuda") throw py::value_error("device is " + device + ", expected cpu or cuda");
  return device == "cuda";
}

std::vector<std::string> kernel_names(const std::string& device) {
  std::vector<std::string> names;
  if (is_cuda(device))
    for (const KernelName& name : kCudaKernelNames) names.push_back(full_name(name));
  else
    for (const KernelName& name : kKernelNames) names.push_back(full_name(name));
  return names;
}

/// True if dicts[i] has just the object values[i] at keys[i], and sized[i] has sizes[i] entries. Values are compared
/// and not touched: a thousand of them would be a thousand more cache lines.
bool same_entries(const py::tuple& dicts, const py::tuple& keys, const py::tuple& values, const py::tuple& sized,
                  const py::tuple& sizes) {
  if (dicts.size() != keys.size() || dicts.size() != values.size() || sized.size() != sizes.size())
    throw py::value_error("same_entries: the tuples have different lengths");
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(dicts.ptr()); ++i) {
    PyObject* found = PyDict_GetItemWithError(PyTuple_GET_ITEM(dicts.ptr(), i), PyTuple_GET_ITEM(keys.ptr(), i));
    if (found == nullptr && PyErr_Occurred()) throw py::error_already_set();
    if (found != PyTuple_GET_ITEM(values.ptr(), i)) return false;
  }
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(sized.ptr()); ++i) {
    const Py_ssize_t size = PyDict_Size(PyTuple_GET_ITEM(sized.ptr(), i));
    if (size != PyLong_AsSsize_t(PyTuple_GET_ITEM(sizes.ptr(), i))) return false;
  }
  return true;
}

std::vector<std::string> supported_isas() {
  std::vector<std::string> names;
  for (Isa isa : kIsas)
    if (cpu_supports(isa)) names.push_back(name_of(isa));
  return names;
}

DType dtype_named(const std::string& name) {
  if (name == "float32") return DType::f32;
  if (name == "float64") return DType::f64;
  if (name == "float16") return DType::f16;
  if (name == "bfloat16") return DType::bf16;
  throw py::value_error("dtype is " + name + ", expected float32, float64, float16 or bfloat16");
}

ConvPass pass_named(const std::string& name) {
  if (name == "forward") return ConvPass::forward;
  if (name == "input_grad") return ConvPass::input_grad;
  if (name == "weight_grad") return ConvPass::weight_grad;
  throw py::value_error("pass is " + name + ", expected forward, input_grad or weight_grad");
}

void require_length(const char* name, const Shape& values, size_t wanted) {
  if (values.size() != wanted)
    throw py::value_error(std::string(name) + " has " + std::to_string(values.size()) + " numbers, expected " +
                          std::to_string(wanted));
}

ConvProblem conv_problem(const Shape& input, const Shape& weight, const Shape& stride, const Shape& padding,
                         const Shape& dilation, int64_t groups) {
  require_length("input_shape", input, 4);
  require_length("weight_shape", weight, 4);
  require_length("stride", stride, 2);
  require_length("padding", padding, 4);
  require_length("dilation", dilation, 2);
  if (groups < 1 || stride[0] < 1 || stride[1] < 1 || dilation[0] < 1 || dilation[1] < 1)
    throw py::value_error("groups, stride and dilation are expected to be at least 1");
  if (weight[1] * groups != input[1])
    throw py::value_error("weight_shape[1] is " + std::to_string(weight[1]) + ", expected in_channels / groups with " +
                          std::to_string(input[1]) + " channels and " + std::to_string(groups) + " groups");
  ConvProblem p{};
  p.n = input[0], p.c = input[1], p.h = input[2], p.w = input[3];
  p.k = weight[0], p.r = weight[2], p.s = weight[3];
  p.stride = {stride[0], stride[1]}, p.dilation = {dilation[0], dilation[1]};
  p.padding = {padding[0], padding[1], padding[2], padding[3]};
  p.groups = groups;
  return p;
}

/// The register tile of the kernels that end in conv2d/cpu_tile.h; None for those that have none.
py::object tile_of(const std::string& algo, const ConvProblem& p, ConvPass pass) {
  if (algo != "tiled" && algo != "rows" && algo != "pairs") return py::none();
  const TileShape shape = tile_shape(active_isa());
  const char* channels = pass == ConvPass::input_grad ? "input channels" : "output channels";
  py::dict tile;
  tile["rows"] = shape.rows;
  tile["columns"] = shape.columns(p.dtype);
  if (pass == ConvPass::weight_grad) {
    tile["rows_are"] = "weights of one output channel";
    tile["columns_are"] = channels;
  } else {
    tile["rows_are"] = p.layout == Layout::nchw ? channels : "pixels";
    tile["columns_are"] = p.layout == Layout::nchw ? "pixels" : channels;
  }
  return tile;
}

/// The kernel chosen from a device's candidates, those that could serve as well and those that refuse.
template <class Id, size_t count, class Tile>
void add_choice(py::dict& plan, const ConvCandidate<Id> (&candidates)[count], Id chosen, const ConvProblem& p,
                ConvPass pass, const Tile& tile) {
  py::dict refused;
  py::list able;
  for (const ConvCandidate<Id>& candidate : candidates) {
    const std::string name(candidate.algo);
    if (const char* reason = candidate.refuse(p, pass)) refused[py::str(name)] = reason;
    else able.append(name);
    if (candidate.kernel(pass) != chosen) continue;
    plan["algo"] = name;
    plan["tile"] = tile(name);
  }
  plan["kernel"] = full_name(chosen);
  plan["able"] = able;
  plan["refused"] = refused;
}

py::dict plan_conv2d(const Shape& input, const Shape& weight, const Shape& stride, const Shape& padding,
                     const Shape& dilation, int64_t groups, bool channels_last, const std::string& dtype,
                     const std::string& pass_name, const std::optional<std::string>& algo, const std::string& device,
                     bool packed) {
  ConvProblem p = conv_problem(input, weight, stride, padding, dilation, groups);
  p.layout = channels_last ? Layout::nhwc : Layout::nchw;
  p.dtype = dtype_named(dtype);
  const ConvPass pass = pass_named(pass_name);
  const std::string_view asked = algo ? std::string_view(*algo) : "";
  py::dict plan;
  plan["condition"] = py::none();
  plan["keeps_weight"] = false;
  plan["winograd_tile"] = py::none();
  if (is_cuda(device)) {
    add_choice(plan, kCudaConvCandidates, select_cuda_conv2d(p, pass, asked), p, pass,
               [](auto&) { return py::none(); });
  } else {
    const bool kept = packed && asked.empty() && pass == ConvPass::forward;
    const Kernel chosen = kept ? select_packed_conv2d(p) : select_conv2d(p, pass, asked);
    add_choice(plan, kConvCandidates, chosen, p, pass, [&](auto& name) { return tile_of(name, p, pass); });
    const WinogradForm form = WinogradCost(p, pass, kept).form();
    if (const char* condition = winograd_condition(chosen, form)) {
      plan["winograd_tile"] = winograd_outputs(form);
      if (asked.empty()) plan["condition"] = condition;
    }
    plan["keeps_weight"] = kept && refuse_keeping(p, chosen) == nullptr;
  }
  plan["output_shape"] = py::make_tuple(p.n, p.k, p.p(), p.q());
  plan["flops"] = p.flops();
  plan["bytes"] = p.bytes();
  return plan;
}

void require_at_least_one(const char* name, const Shape& values) {
  require_length(name, values, 2);
  if (values[0] < 1 || values[1] < 1)
    throw py::value_error(std::string(name) + " has a number below 1, expected at least 1");
}

/// Max and average pooling, forward and backward: `op` is any of the ops on windows.
py::dict plan_pool(const std::string& op, const Shape& input, const Shape& kernel, const Shape& stride,
                   const Shape& padding, const Shape& dilation, bool ceil_mode, bool divisor_override,
                   const std::string& dtype, const std::string& device) {
  require_length("input_shape", input, 4);
  require_at_least_one("kernel", kernel);
  require_at_least_one("stride", stride);
  require_at_least_one("dilation", dilation);
  require_length("padding", padding, 2);
  PoolProblem p{};
  p.n = input[0], p.c = input[1], p.h = input[2], p.w = input[3];
  p.r = kernel[0], p.s = kernel[1];
  p.stride = {stride[0], stride[1]}, p.dilation = {dilation[0], dilation[1]}, p.padding = {padding[0], padding[1]};
  p.ceil_mode = ceil_mode;
  p.dtype = dtype_named(dtype);
  const bool whole_plane = p.r == p.h && p.s == p.w && p.padding.h == 0 && p.padding.w == 0 && !divisor_override;
  std::string name = op + (is_cuda(device) ? "/windows" : "/rows");
  if (op == "avg_pool2d" && whole_plane) name = full_name(Kernel::global_avg_pool2d);
  if (op == "avg_pool2d_backward" && whole_plane) name = full_name(Kernel::global_avg_pool2d_backward);
  py::dict plan;
  plan["kernel"] = name;
  plan["output_shape"] = py::make_tuple(p.n, p.c, p.p(), p.q());
  plan["flops"] = p.flops();
  plan["bytes"] = p.bytes();
  return plan;
}

py::dict build_info() {
  py::dict info;
#if defined(__clang__)
  info["compiler"] = "clang " __clang_version__;
#elif defined(__GNUC__)
  info["compiler"] = "gcc " __VERSION__;
#else
  info["compiler"] = "unknown";
#endif
  info["cxx_standard"] = static_cast<int64_t>(__cplusplus);
#if defined(__OPTIMIZE__)
  info["optimized"] = true;
#else
  info["optimized"] = false;
#endif
#if defined(NDEBUG)
  info["asserts"] = false;
#else
  info["asserts"] = true;
#endif
#if defined(__SANITIZE_ADDRESS__)
  info["sanitized"] = true;
#else
  info["sanitized"] = false;
#endif
  info["pybind11"] = std::to_string(PYBIND11_VERSION_MAJOR) + "." + std::to_string(PYBIND11_VERSION_MINOR);
  // Both macros come from setup.py.
  info["flags"] = FASTCONV_COMPILE_FLAGS;
  info["torch_target"] =
      std::to_string((TORCH_TARGET_VERSION >> 56) & 0xff) + "." + std::to_string((TORCH_TARGET_VERSION >> 48) & 0xff);
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Kernels, plans and build information of fastconv";
  m.def("kernel_names", &kernel_names, py::arg("device") = "cpu",
        "Every kernel of a device, cpu or cuda, as op/algo, in the order of torch.ops.fastconv.kernel_counts() or "
        "cuda_kernel_counts()");
  m.def("same_entries", &same_entries, "Whether dicts hold what they held: by identity, and as many entries");
  m.def("supported_isas", &supported_isas, "Instruction sets that this CPU has and fastconv has kernels for");
  m.def("active_isa", [] { return std::string(name_of(active_isa())); }, "The instruction set in use");
  m.def("build_info", &build_info, "How the native code was compiled");
  m.def(
      "plan_conv2d", &plan_conv2d, py::arg("input_shape"), py::arg("weight_shape"), py::kw_only(), py::arg("stride"),
      py::arg("padding"), py::arg("dilation"), py::arg("groups"), py::arg("channels_last"), py::arg("dtype"),
      py::arg("pass_name"), py::arg("algo") = py::none(), py::arg("device") = "cpu", py::arg("packed") = false,
      "The kernel that serves a convolution and on what condition, why others do not, its tile, FLOPs and bytes. "
      "`packed`: on the CPU, where the caller may keep conv2d_pack's result, and keeps_weight whether the kernel reads "
      "one. Raises RuntimeError if `algo` refuses.");
  m.def("plan_pool", &plan_pool, py::arg("op"), py::arg("input_shape"), py::kw_only(), py::arg("kernel"),
        py::arg("stride"), py::arg("padding"), py::arg("dilation"), py::arg("ceil_mode"), py::arg("divisor_override"),
        py::arg("dtype"), py::arg("device") = "cpu",
        "The kernel that serves a pooling op, its output shape, operations and bytes");
}

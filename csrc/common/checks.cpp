#include "common/checks.h"

namespace fastconv {

using torch::headeronly::MemoryFormat;
using torch::headeronly::ScalarType;

std::ostream& operator<<(std::ostream& out, ShapeText shape) {
  out << '(';
  for (int64_t d = 0; d < shape.tensor.dim(); ++d) out << (d > 0 ? ", " : "") << shape.tensor.size(d);
  return out << ')';
}

void require_rank(const char* op, const char* name, const Tensor& tensor, int64_t rank) {
  require(tensor.dim() == rank, op, ": ", name, " has shape ", ShapeText{tensor}, ", expected ", rank, " dimensions");
}

namespace {

struct DeviceText {
  const Tensor& tensor;
};

std::ostream& operator<<(std::ostream& out, DeviceText text) {
  if (text.tensor.is_cpu()) return out << "the CPU";
  if (text.tensor.is_cuda()) return out << "CUDA device " << text.tensor.get_device_index();
  return out << "another device";
}

}  // namespace

void require_same_device(const char* op, const Tensor& first, const char* name, const Tensor& tensor) {
  const bool same = first.is_cpu() ? tensor.is_cpu()
                                   : first.is_cuda() == tensor.is_cuda() && !tensor.is_cpu() &&
                                         first.get_device_index() == tensor.get_device_index();
  require(same, op, ": ", name, " is on ", DeviceText{tensor}, ", expected ", DeviceText{first},
          ", where the other operands are; move all tensors of the call to one device");
}

void require_same_dtype(const char* op, const Tensor& input, const char* name, const Tensor& other) {
  require(dtype_of(op, input) == dtype_of(op, other), op, ": input and ", name,
          " have different dtypes; convert one of them, or run under torch.autocast");
}

void require_shape(const char* op, const char* name, const Tensor& tensor, std::initializer_list<int64_t> wanted) {
  bool same = tensor.dim() == static_cast<int64_t>(wanted.size());
  int64_t d = 0;
  for (int64_t size : wanted) same = same && tensor.size(d++) == size;
  if (same) return;
  std::ostringstream text;
  for (int64_t size : wanted) text << (text.tellp() > 0 ? ", " : "") << size;
  require(false, op, ": ", name, " has shape ", ShapeText{tensor}, ", expected (", text.str(), ")");
}

DType dtype_of(const char* op, const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return DType::f32;
    case ScalarType::Double:
      return DType::f64;
    case ScalarType::Half:
      return DType::f16;
    case ScalarType::BFloat16:
      return DType::bf16;
    default:
      throw std::runtime_error(
          message(op, ": expected float32, float64, float16 or bfloat16; convert the tensor with .to()"));
  }
}

bool suggests_channels_last(const Tensor& tensor) {
  if (tensor.dim() != 4) return false;
  const auto sizes = tensor.sizes();
  const auto strides = tensor.strides();
  if (strides[1] == 0) return false;
  int64_t smallest = 0;
  for (int d : {1, 3, 2, 0}) {
    if (sizes[d] == 0 || strides[d] < smallest) return false;
    // An (N, 1, 1, 1) or fully ambiguous tensor counts as contiguous, not channels_last.
    if (d == 0 && smallest == strides[1]) return false;
    smallest = strides[d] * (sizes[d] > 1 ? sizes[d] : 1);
  }
  return true;
}

bool is_dense(const Tensor& tensor, Layout layout) {
  const Strides4 wanted = strides_of(layout, tensor.size(1), tensor.size(2), tensor.size(3));
  const int64_t expected[4] = {wanted.n, wanted.c, wanted.h, wanted.w};
  const auto sizes = tensor.sizes();
  const auto strides = tensor.strides();
  bool matches = true;
  for (int d = 0; d < 4; ++d) matches = matches && (sizes[d] <= 1 || strides[d] == expected[d]);
  return matches || tensor.numel() == 0;
}

Tensor dense(const Tensor& tensor, Layout layout) {
  if (is_dense(tensor, layout)) return tensor;
  return torch::stable::contiguous(tensor,
                                   layout == Layout::nhwc ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous);
}

Tensor empty_output(const Tensor& like, int64_t n, int64_t c, int64_t h, int64_t w, Layout layout) {
  return empty_output(like, like.scalar_type(), n, c, h, w, layout);
}

Tensor empty_output(const Tensor& like, ScalarType dtype, int64_t n, int64_t c, int64_t h, int64_t w, Layout layout) {
  const int64_t sizes[4] = {n, c, h, w};
  std::optional<torch::stable::Device> device;  // none: the CPU
  if (!like.is_cpu()) device = like.device();
  return torch::stable::empty({sizes, 4}, dtype, std::nullopt, device, std::nullopt,
                              layout == Layout::nhwc ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous);
}

Size2 size2(const char* op, const char* name, const IntList& values, int64_t at_least, int64_t at_most) {
  require(values.size() == 2, op, ": ", name, " has ", values.size(), " values, expected 2");
  for (int64_t value : values)
    require(value >= at_least && value <= at_most, op, ": ", name, " is (", values[0], ", ", values[1],
            "), expected values of at least ", at_least, " and at most ", at_most);
  return {values[0], values[1]};
}

Pad4 pad4(const char* op, const IntList& values) {
  require(values.size() == 4, op, ": padding has ", values.size(), " values, expected 4 (top, left, bottom, right)");
  for (int64_t value : values)
    require(value >= 0 && value <= kLargestStep, op, ": padding is ", value, ", expected 0 to ", kLargestStep,
            " (negative padding is not supported; crop the input)");
  return {values[0], values[1], values[2], values[3]};
}

}  // namespace fastconv

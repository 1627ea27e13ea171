// What every host function does first: look at the tensors, refuse with a reason, allocate the output.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <initializer_list>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "common/problem.h"

namespace fastconv {

using torch::stable::Tensor;
using IntList = std::vector<int64_t>;

/// Prints a tensor's shape, if it comes to printing: checks pass on every call, and their texts must not cost anything.
struct ShapeText {
  const Tensor& tensor;
};
std::ostream& operator<<(std::ostream& out, ShapeText shape);

template <class... Parts>
std::string message(const Parts&... parts) {
  std::ostringstream text;
  ((text << parts), ...);
  return text.str();
}

/// Raises RuntimeError with a message that says what was got, what is wanted and the remedy.
template <class... Parts>
void require(bool condition, const Parts&... parts) {
  if (!condition) [[unlikely]]
    throw std::runtime_error(message(parts...));
}

/// Raises unless the tensor is of `rank` dimensions.
void require_rank(const char* op, const char* name, const Tensor& tensor, int64_t rank);
/// Raises unless the tensor is on the device of `first`, the operand that the dispatcher went by.
void require_same_device(const char* op, const Tensor& first, const char* name, const Tensor& tensor);
void require_same_dtype(const char* op, const Tensor& input, const char* name, const Tensor& other);
void require_shape(const char* op, const char* name, const Tensor& tensor, std::initializer_list<int64_t> wanted);

DType dtype_of(const char* op, const Tensor& tensor);

/// torch's rule for a four-dimensional tensor: channels_last exactly if its strides say so unambiguously.
bool suggests_channels_last(const Tensor& tensor);
inline Layout layout_of(const Tensor& tensor) { return suggests_channels_last(tensor) ? Layout::nhwc : Layout::nchw; }

bool is_dense(const Tensor& tensor, Layout layout);
/// The tensor itself if it is dense in `layout`, else a copy that is.
Tensor dense(const Tensor& tensor, Layout layout);

/// Uninitialised (n, c, h, w) tensor of the dtype and on the device of `like`, dense in `layout`.
Tensor empty_output(const Tensor& like, int64_t n, int64_t c, int64_t h, int64_t w, Layout layout);
/// The same in another dtype.
Tensor empty_output(const Tensor& like, torch::headeronly::ScalarType dtype, int64_t n, int64_t c, int64_t h, int64_t w,
                    Layout layout);

/// Strides, paddings, dilations and kernel sizes beyond it have no use, and sums of their products would overflow.
inline constexpr int64_t kLargestStep = (int64_t{1} << 31) - 1;

Size2 size2(const char* op, const char* name, const IntList& values, int64_t at_least, int64_t at_most = kLargestStep);
Pad4 pad4(const char* op, const IntList& values);

/// Calls body(T{}) with the storage type of `dtype`.
template <class Body>
void dispatch(DType dtype, const Body& body) {
  switch (dtype) {
    case DType::f32:
      return body(float{});
    case DType::f64:
      return body(double{});
    case DType::f16:
      return body(Half{});
    case DType::bf16:
      return body(BFloat16{});
  }
  throw std::logic_error("unknown dtype");
}

}  // namespace fastconv

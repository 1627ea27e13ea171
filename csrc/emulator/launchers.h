// The launchers of a library by name, callable with plain pointers (from Python through ctypes).
#pragma once

#include <string>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include "emulator/language.h"

namespace fastconv::emulator {

struct Launcher {
  std::string op, algo;
  /// One word per argument, streams left out: r<bytes> a struct by reference, p a pointer, i<bytes> and u<bytes>
  /// integers (enums and bool too), f<bytes> floating point.
  std::string signature;
  bool returns_number;  // int64_t, else nothing
  /// arguments[i] points to the struct, to the pointer, or to the number. 0 if the launcher returns nothing.
  int64_t (*call)(void (*function)(), void* const* arguments);
  void (*function)();
};

std::vector<Launcher>& launchers();

template <class T>
std::string argument_word() {
  using Value = std::remove_cvref_t<T>;
  if constexpr (std::is_same_v<Value, cudaStream_t>) return "";
  else if constexpr (std::is_reference_v<T>) return "r" + std::to_string(sizeof(Value)) + " ";
  else if constexpr (std::is_pointer_v<Value>) return "p ";
  else if constexpr (std::is_floating_point_v<Value>) return "f" + std::to_string(sizeof(Value)) + " ";
  else if constexpr (std::is_enum_v<Value>) return "i" + std::to_string(sizeof(Value)) + " ";
  else if constexpr (std::is_integral_v<Value>)
    return (std::is_signed_v<Value> ? "i" : "u") + std::to_string(sizeof(Value)) + " ";
  else static_assert(std::is_reference_v<T>, "launchers take structs by const reference, and numbers and pointers");
}

template <class T>
T take_argument(void* const*& arguments) {
  if constexpr (std::is_same_v<T, cudaStream_t>) return nullptr;
  else return *static_cast<std::remove_reference_t<T>*>(*arguments++);
}

template <class Result, class... Arguments>
bool add_launcher(const char* op, const char* algo, Result (*function)(Arguments...)) {
  constexpr bool kReturnsNumber = std::is_same_v<Result, int64_t>;
  static_assert(kReturnsNumber || std::is_void_v<Result>, "launchers return nothing or an int64_t");
  const auto call = [](void (*erased)(), void* const* arguments) -> int64_t {
    // Braces, because only they fix the order in which the arguments are taken.
    std::tuple<Arguments...> taken{take_argument<Arguments>(arguments)...};
    const auto typed = reinterpret_cast<Result (*)(Arguments...)>(erased);
    if constexpr (kReturnsNumber) return std::apply(typed, taken);
    else std::apply(typed, taken);
    return 0;
  };
  launchers().push_back({op, algo, (std::string() + ... + argument_word<Arguments>()), kReturnsNumber, call,
                         reinterpret_cast<void (*)()>(function)});
  return true;
}

}  // namespace fastconv::emulator

#define FASTCONV_JOIN_NAMES(a, b) a##b
#define FASTCONV_LAUNCHER_AT(line, op, algo, function)                         \
  [[maybe_unused]] static const bool FASTCONV_JOIN_NAMES(launcher_at_, line) = \
      ::fastconv::emulator::add_launcher(op, algo, function)
#define FASTCONV_LAUNCHER_LINE(line, op, algo, function) FASTCONV_LAUNCHER_AT(line, op, algo, function)
#define FASTCONV_LAUNCHER(op, algo, function) FASTCONV_LAUNCHER_LINE(__LINE__, op, algo, function)

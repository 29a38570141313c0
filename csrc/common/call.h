// A call of an op: its arguments, looked up by name. The names are those of the op's public function
// (kbfgs_ext/ops/<family>/api.py) and stand in no other list.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>
#include <string_view>
#include <utility>
#include <variant>
#include <vector>

#include "tensor.h"

namespace kbfgs {

using Tensors = std::vector<Tensor>;

class Call {
 public:
  using Numbers = std::vector<double>;
  using Value =
      std::variant<std::monostate, Tensors, Tensor, double, int64_t, std::string, Numbers>;
  using Named = std::pair<std::string_view, Value>;

  // Names are not copied: what they point into must outlive this.
  explicit Call(std::vector<Named> arguments) : arguments_(std::move(arguments)) {}

  const Tensors& tensors(std::string_view name) const {
    return get<Tensors>(name, "a list of tensors");
  }
  const Tensor& tensor(std::string_view name) const { return get<Tensor>(name, "a tensor"); }
  int64_t integer(std::string_view name) const { return get<int64_t>(name, "an integer"); }
  const std::string& text(std::string_view name) const { return get<std::string>(name, "a string"); }
  const Numbers& numbers(std::string_view name) const {
    return get<Numbers>(name, "a list of numbers");
  }
  double number(std::string_view name) const {
    const int64_t* whole = std::get_if<int64_t>(&find(name));
    return whole ? static_cast<double>(*whole) : get<double>(name, "a number");
  }
  // Whether it is not None.
  bool has(std::string_view name) const {
    return !std::holds_alternative<std::monostate>(find(name));
  }

 private:
  // A call has some twenty arguments: comparing them in turn is faster than a hash.
  const Value& find(std::string_view name) const {
    for (const auto& [known, value] : arguments_)
      if (known == name) return value;
    throw std::invalid_argument("the call has no argument " + std::string(name));
  }

  template <typename Wanted>
  const Wanted& get(std::string_view name, const char* kind) const {
    const Wanted* found = std::get_if<Wanted>(&find(name));
    if (found == nullptr) throw std::invalid_argument(std::string(name) + " must be " + kind);
    return *found;
  }

  std::vector<Named> arguments_;
};

}  // namespace kbfgs

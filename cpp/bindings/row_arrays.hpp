// Arrays of the operators of rows as views (outer, column, inner). Everything was validated by
// spec.py; the checks guard memory where _core is called directly.
#pragma once
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>

#include <optional>
#include <stdexcept>
#include <string>

#include "runtime/views.hpp"

namespace nb = nanobind;

namespace tilewise {

using In = nb::ndarray<nb::ro, nb::device::cpu>;
using Out = nb::ndarray<nb::device::cpu>;
template <class A>
using Maybe = std::optional<A>;

template <class A>
int64_t dim(const A& x, size_t i) {
  return static_cast<int64_t>(x.shape(i));
}

// The sizes and dtypes of a call, which those of x and `storage` are, and its arrays as views.
class RowArrays {
 public:
  int64_t outer, columns, inner;
  Storage storage = Storage::kFloat32, computed = Storage::kFloat32;

  RowArrays(const char* name, const In& x, const Maybe<std::string>& bits) : operator_(name) {
    if (x.ndim() != 3) refuse("x", "must have 3 dimensions");
    if (!bits) {
      if (x.dtype() == nb::dtype<double>())
        storage = computed = Storage::kFloat64;
      else if (x.dtype() != nb::dtype<float>())
        refuse("x", "must be float32 or float64 where no storage is given");
    } else if (*bits == "bfloat16") {
      storage = Storage::kBfloat16;
    } else if (*bits == "float16") {
      storage = Storage::kFloat16;
    } else {
      refuse("storage", "must be bfloat16 or float16");
    }
    outer = dim(x, 0), columns = dim(x, 1), inner = dim(x, 2);
  }

  [[noreturn]] void refuse(const char* name, const char* why) const {
    throw std::invalid_argument(std::string(operator_) + ": " + name + " " + why);
  }

  template <class A>
  bool is_computed(const A& x) const {
    return x.dtype() == (computed == Storage::kFloat64 ? nb::dtype<double>() : nb::dtype<float>());
  }
  // An array with the shape of x, of any dtype.
  template <class A>
  View3 view(const A& x, const char* name) const {
    if (x.ndim() != 3 || dim(x, 0) != outer || dim(x, 1) != columns || dim(x, 2) != inner)
      refuse(name, "has another shape than x");
    return {x.data(), x.stride(0), x.stride(1), x.stride(2)};
  }
  template <class A>
  View3 entries(const A& x, const char* name) const {
    View3 v = view(x, name);
    if (bytes_of(storage) == 2 && x.dtype() == nb::dtype<uint16_t>())
      v.storage = storage;
    else if (is_computed(x))
      v.storage = computed;
    else
      refuse(name, "has another dtype than the call");
    return v;
  }
  template <class A>
  View3 entries(const Maybe<A>& x, const char* name) const {
    return x ? entries(*x, name) : View3{};
  }
  // One number for each row.
  template <class A>
  View3 numbers(const A& x, const char* name) const {
    if (x.ndim() != 2 || dim(x, 0) != outer || dim(x, 1) != inner)
      refuse(name, "has another shape than the rows");
    if (!is_computed(x)) refuse(name, "has another dtype than the call");
    View3 v{x.data(), x.stride(0), 0, x.stride(1)};
    v.storage = computed;
    return v;
  }
  template <class A>
  View3 numbers(const Maybe<A>& x, const char* name) const {
    return x ? numbers(*x, name) : View3{};
  }

 private:
  const char* operator_;
};

}  // namespace tilewise

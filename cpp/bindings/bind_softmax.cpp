#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>

#include <optional>
#include <stdexcept>
#include <string>

#include "ops/softmax.hpp"

namespace nb = nanobind;

namespace tilewise {
namespace {

using In = nb::ndarray<nb::ro, nb::device::cpu>;
using Out = nb::ndarray<nb::device::cpu>;
template <class A>
using Maybe = std::optional<A>;

// Everything was validated by spec.py; this guards memory where _core is called directly.
[[noreturn]] void refuse(const char* name, const char* why) {
  throw std::invalid_argument(std::string("softmax: ") + name + " " + why);
}

template <class A>
int64_t dim(const A& x, size_t i) {
  return static_cast<int64_t>(x.shape(i));
}

// A call as it is put together from arrays.
class Call {
 public:
  SoftmaxProblem problem;

  Call(const In& x, double scale, const Maybe<In>& where, const Maybe<In>& sink,
       const Maybe<std::string>& storage) {
    if (x.ndim() != 3) refuse("x", "must have 3 dimensions");
    if (!storage) {
      if (x.dtype() == nb::dtype<double>())
        storage_ = computed_ = Storage::kFloat64;
      else if (x.dtype() != nb::dtype<float>())
        refuse("x", "must be float32 or float64 where no storage is given");
    } else if (*storage == "bfloat16") {
      storage_ = Storage::kBfloat16;
    } else if (*storage == "float16") {
      storage_ = Storage::kFloat16;
    } else {
      refuse("storage", "must be bfloat16 or float16");
    }
    if (!(scale > 0)) refuse("scale", "must be above 0");
    problem.outer = dim(x, 0), problem.columns = dim(x, 1), problem.inner = dim(x, 2);
    problem.scale = scale;
    problem.x = entries(x, "x");
    if (where) {
      if (where->dtype() != nb::dtype<uint8_t>()) refuse("where", "must be uint8");
      problem.where = view(*where, "where");
    }
    problem.sink = numbers(sink, "sink");
  }

  template <class A>
  View3 entries(const A& x, const char* name) const {
    View3 v = view(x, name);
    if (bytes_of(storage_) == 2 ? x.dtype() == nb::dtype<uint16_t>() : is_computed(x))
      v.storage = storage_;
    else if (is_computed(x))
      v.storage = computed_;
    else
      refuse(name, "has another dtype than the call");
    return v;
  }
  template <class A>
  View3 entries(const Maybe<A>& x, const char* name) const {
    return x ? entries(*x, name) : View3{};
  }
  template <class A>
  View3 numbers(const A& x, const char* name) const {
    if (x.ndim() != 2 || dim(x, 0) != problem.outer || dim(x, 1) != problem.inner)
      refuse(name, "has another shape than the rows");
    if (!is_computed(x)) refuse(name, "has another dtype than the call");
    View3 v{x.data(), x.stride(0), 0, x.stride(1)};
    v.storage = computed_;
    return v;
  }
  template <class A>
  View3 numbers(const Maybe<A>& x, const char* name) const {
    return x ? numbers(*x, name) : View3{};
  }

  // Without the interpreter's lock.
  void run(void (*SoftmaxFunctions::*function)(const SoftmaxProblem&)) const {
    const SoftmaxFunctions& functions = softmax_functions(computed_);
    nb::gil_scoped_release released;
    (functions.*function)(problem);
  }

 private:
  Storage storage_ = Storage::kFloat32, computed_ = Storage::kFloat32;

  template <class A>
  bool is_computed(const A& x) const {
    return x.dtype() == (computed_ == Storage::kFloat64 ? nb::dtype<double>() : nb::dtype<float>());
  }
  template <class A>
  View3 view(const A& x, const char* name) const {
    if (x.ndim() != 3 || dim(x, 0) != problem.outer || dim(x, 1) != problem.columns ||
        dim(x, 2) != problem.inner)
      refuse(name, "has another shape than x");
    return {x.data(), x.stride(0), x.stride(1), x.stride(2)};
  }
};

#define TW_OPTIONS double scale, Maybe<In> where, Maybe<In> sink, Maybe<std::string> storage
#define TW_OPTION_NAMES \
  nb::arg("scale"), nb::arg("where").none(), nb::arg("sink").none(), nb::arg("storage") = nb::none()

void forward(In x, Maybe<Out> y, Maybe<Out> log_y, Maybe<Out> lse, Maybe<Out> m, Maybe<Out> log_l,
             TW_OPTIONS) {
  Call call(x, scale, where, sink, storage);
  SoftmaxProblem& p = call.problem;
  p.y = call.entries(y, "y");
  p.log_y = call.entries(log_y, "log_y");
  p.lse = call.numbers(lse, "lse");
  p.m = call.numbers(m, "m");
  p.log_l = call.numbers(log_l, "log_l");
  call.run(&SoftmaxFunctions::forward);
}

void vjp(In x, In m, In log_l, Maybe<In> gy, Maybe<In> gz, Maybe<In> gl, Maybe<Out> dx,
         Maybe<Out> dsink, TW_OPTIONS) {
  Call call(x, scale, where, sink, storage);
  SoftmaxProblem& p = call.problem;
  p.m = call.numbers(m, "m");
  p.log_l = call.numbers(log_l, "log_l");
  p.gy = call.entries(gy, "gy");
  p.gz = call.entries(gz, "gz");
  p.gl = call.numbers(gl, "gl");
  p.dx = call.entries(dx, "dx");
  p.dsink = call.numbers(dsink, "dsink");
  call.run(&SoftmaxFunctions::vjp);
}

void jvp(In x, In m, In log_l, Maybe<In> tx, Maybe<In> tsink, Maybe<Out> ty, Maybe<Out> tz,
         Maybe<Out> tl, TW_OPTIONS) {
  Call call(x, scale, where, sink, storage);
  SoftmaxProblem& p = call.problem;
  p.m = call.numbers(m, "m");
  p.log_l = call.numbers(log_l, "log_l");
  p.tx = call.entries(tx, "tx");
  p.tsink = call.numbers(tsink, "tsink");
  p.ty = call.entries(ty, "ty");
  p.tz = call.entries(tz, "tz");
  p.tl = call.numbers(tl, "tl");
  call.run(&SoftmaxFunctions::jvp);
}

void vjp_jvp(In x, In m, In log_l, Maybe<In> gy, Maybe<In> gz, Maybe<In> gl, Maybe<In> tx,
             Maybe<In> tsink, Maybe<In> tgy, Maybe<In> tgz, Maybe<In> tgl, Maybe<Out> dx,
             Maybe<Out> dsink, TW_OPTIONS) {
  Call call(x, scale, where, sink, storage);
  SoftmaxProblem& p = call.problem;
  p.m = call.numbers(m, "m");
  p.log_l = call.numbers(log_l, "log_l");
  p.gy = call.entries(gy, "gy");
  p.gz = call.entries(gz, "gz");
  p.gl = call.numbers(gl, "gl");
  p.tx = call.entries(tx, "tx");
  p.tsink = call.numbers(tsink, "tsink");
  p.tgy = call.entries(tgy, "tgy");
  p.tgz = call.entries(tgz, "tgz");
  p.tgl = call.numbers(tgl, "tgl");
  p.dx = call.entries(dx, "dx");
  p.dsink = call.numbers(dsink, "dsink");
  call.run(&SoftmaxFunctions::vjp_jvp);
}

}  // namespace

void bind_softmax(nb::module_& m) {
  m.def("softmax_forward", forward, nb::arg("x"), nb::kw_only(), nb::arg("y").none(),
        nb::arg("log_y").none(), nb::arg("lse").none(), nb::arg("m").none(),
        nb::arg("log_l").none(), TW_OPTION_NAMES, "Write what is given.");
  m.def("softmax_vjp", vjp, nb::arg("x"), nb::arg("m"), nb::arg("log_l"), nb::kw_only(),
        nb::arg("gy").none(), nb::arg("gz").none(), nb::arg("gl").none(), nb::arg("dx").none(),
        nb::arg("dsink").none(), TW_OPTION_NAMES, "Write dx and dsink.");
  m.def("softmax_jvp", jvp, nb::arg("x"), nb::arg("m"), nb::arg("log_l"), nb::kw_only(),
        nb::arg("tx").none(), nb::arg("tsink").none(), nb::arg("ty").none(), nb::arg("tz").none(),
        nb::arg("tl").none(), TW_OPTION_NAMES, "Write ty, tz and tl.");
  m.def("softmax_vjp_jvp", vjp_jvp, nb::arg("x"), nb::arg("m"), nb::arg("log_l"), nb::kw_only(),
        nb::arg("gy").none(), nb::arg("gz").none(), nb::arg("gl").none(), nb::arg("tx").none(),
        nb::arg("tsink").none(), nb::arg("tgy").none(), nb::arg("tgz").none(),
        nb::arg("tgl").none(), nb::arg("dx").none(), nb::arg("dsink").none(), TW_OPTION_NAMES,
        "Write the tangents of dx and dsink.");
}

}  // namespace tilewise

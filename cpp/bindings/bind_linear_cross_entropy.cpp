#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>

#include <optional>
#include <stdexcept>
#include <string>

#include "ops/linear_cross_entropy.hpp"

namespace nb = nanobind;

namespace tilewise {
namespace {

using In = nb::ndarray<nb::ro, nb::device::cpu>;
using Out = nb::ndarray<nb::device::cpu>;
template <class A>
using Maybe = std::optional<A>;

// Everything was validated by spec.py; this guards memory where _core is called directly.
[[noreturn]] void refuse(const char* name, const char* why) {
  throw std::invalid_argument(std::string("linear_cross_entropy: ") + name + " " + why);
}

struct Options {
  Maybe<In> bias, class_weight;
  double label_smoothing, z_loss, softcap;
  int64_t ignore_index, v_start, v_total, token_chunk, vocab_chunk;
  Maybe<std::string> storage;
};

// A call as it is put together from arrays.
class Call {
 public:
  LinearCrossEntropyProblem problem;

  Call(const In& hidden, const In& weight, const In& targets, const Options& options) {
    take_storage(hidden, options.storage);
    if (hidden.ndim() != 2 || weight.ndim() != 2 || hidden.shape(1) != weight.shape(1))
      refuse("weight", "must have shape (V, C), with C from hidden");
    problem.T = static_cast<int64_t>(hidden.shape(0));
    problem.C = static_cast<int64_t>(hidden.shape(1));
    problem.V = static_cast<int64_t>(weight.shape(0));
    problem.hidden = matrix(hidden, "hidden", problem.T, problem.C);
    problem.weight = matrix(weight, "weight", problem.V, problem.C);
    if (problem.hidden.storage != storage_ || problem.weight.storage != storage_)
      refuse("weight", "has another dtype than the call");
    problem.bias = vector(options.bias, "bias");
    if (targets.dtype() != nb::dtype<int64_t>()) refuse("targets", "must be int64");
    problem.targets = static_cast<const int64_t*>(numbers_of(targets, "targets", problem.T));
    problem.class_weight = numbers(options.class_weight, "class_weight", problem.V);
    CrossEntropyOptions& o = problem.options;
    o.label_smoothing = options.label_smoothing;
    o.z_loss = options.z_loss;
    o.softcap = options.softcap;
    o.ignore_index = options.ignore_index;
    o.v_start = options.v_start;
    o.v_total = options.v_total > 0 ? options.v_total : problem.V;
    o.token_chunk = options.token_chunk;
    o.vocab_chunk = options.vocab_chunk;
    if (o.token_chunk < 0) refuse("token_chunk", "must not be negative");
    if (o.vocab_chunk < 0) refuse("vocab_chunk", "must not be negative");
  }

  template <class A>
  Matrix matrix(const A& x, const char* name, int64_t rows, int64_t columns) const {
    if (x.ndim() != 2 || static_cast<int64_t>(x.shape(0)) != rows ||
        static_cast<int64_t>(x.shape(1)) != columns)
      refuse(name, "has another shape than the call");
    if (rows > 0 && columns > 1 && x.stride(1) != 1) refuse(name, "must have contiguous rows");
    return {x.data(), x.stride(0), storage_of(x, name)};
  }
  template <class A>
  Matrix hidden_like(const Maybe<A>& x, const char* name) const {
    return x ? matrix(*x, name, problem.T, problem.C) : Matrix{};
  }
  template <class A>
  Matrix weight_like(const Maybe<A>& x, const char* name) const {
    return x ? matrix(*x, name, problem.V, problem.C) : Matrix{};
  }
  template <class A>
  Matrix vector(const Maybe<A>& x, const char* name) const {
    if (!x) return {};
    return {numbers_of(*x, name, problem.V), problem.V, storage_of(*x, name)};
  }
  // Numbers of the type that is computed with.
  template <class A>
  auto numbers(const Maybe<A>& x, const char* name, int64_t n) const
      -> decltype(std::declval<A>().data()) {
    if (!x) return nullptr;
    if (!is_computed(*x)) refuse(name, "has another dtype than what is computed with");
    return numbers_of(*x, name, n);
  }
  template <class A>
  auto row_numbers(const Maybe<A>& x, const char* name) const {
    return numbers(x, name, problem.T);
  }
  int64_t* indices(const Maybe<Out>& x, const char* name) const {
    if (!x) return nullptr;
    if (x->dtype() != nb::dtype<int64_t>()) refuse(name, "must be int64");
    return static_cast<int64_t*>(numbers_of(*x, name, problem.T));
  }

  void take_gradients(const Maybe<Out>& dhidden, const Maybe<Out>& dweight, const Maybe<Out>& dbias,
                      bool accumulate_dweight) {
    problem.dhidden = hidden_like(dhidden, "dhidden");
    problem.dweight = weight_like(dweight, "dweight");
    problem.dbias = vector(dbias, "dbias");
    problem.options.accumulate_dweight = accumulate_dweight;
  }
  void take_tangents(const Maybe<In>& thidden, const Maybe<In>& tweight, const Maybe<In>& tbias) {
    problem.thidden = hidden_like(thidden, "thidden");
    problem.tweight = weight_like(tweight, "tweight");
    problem.tbias = vector(tbias, "tbias");
  }
  void take_saved(const Maybe<In>& m, const Maybe<In>& log_l, const Maybe<In>& mass,
                  const Maybe<In>& entropy) {
    problem.rows.m = row_numbers(m, "m");
    problem.rows.log_l = row_numbers(log_l, "log_l");
    problem.rows.mass = row_numbers(mass, "mass");
    problem.rows.entropy = row_numbers(entropy, "entropy");
  }

  // Without the interpreter's lock.
  void run(void (*LinearCrossEntropyFunctions::*function)(const LinearCrossEntropyProblem&)) const {
    const LinearCrossEntropyFunctions functions = linear_cross_entropy_functions(problem);
    nb::gil_scoped_release released;
    (functions.*function)(problem);
  }

 private:
  Storage storage_ = Storage::kFloat32, computed_ = Storage::kFloat32;

  void take_storage(const In& x, const Maybe<std::string>& storage) {
    if (!storage) {
      if (x.dtype() == nb::dtype<double>())
        storage_ = computed_ = Storage::kFloat64;
      else if (x.dtype() != nb::dtype<float>())
        refuse("hidden", "must be float32 or float64 where no storage is given");
    } else if (*storage == "bfloat16") {
      storage_ = Storage::kBfloat16;
    } else if (*storage == "float16") {
      storage_ = Storage::kFloat16;
    } else {
      refuse("storage", "must be bfloat16 or float16");
    }
  }
  template <class A>
  bool is_computed(const A& x) const {
    return x.dtype() == (computed_ == Storage::kFloat64 ? nb::dtype<double>() : nb::dtype<float>());
  }
  template <class A>
  Storage storage_of(const A& x, const char* name) const {
    if (is_computed(x)) return computed_;
    if (bytes_of(storage_) != 2 || x.dtype() != nb::dtype<uint16_t>())
      refuse(name, "has another dtype than the call");
    return storage_;
  }
  template <class A>
  static auto numbers_of(const A& x, const char* name, int64_t n) -> decltype(x.data()) {
    if (x.ndim() != 1 || static_cast<int64_t>(x.shape(0)) != n)
      refuse(name, "has another length than the call");
    if (n > 1 && x.stride(0) != 1) refuse(name, "must be contiguous");
    return x.data();
  }
};

#define TW_OPTIONS                                                                               \
  Maybe<In> bias, Maybe<In> class_weight, double label_smoothing, double z_loss, double softcap, \
      int64_t ignore_index, int64_t v_start, int64_t v_total, int64_t token_chunk,               \
      int64_t vocab_chunk, Maybe<std::string> storage
#define TW_OPTIONS_GIVEN                                                       \
  {bias,    class_weight, label_smoothing, z_loss,      softcap, ignore_index, \
   v_start, v_total,      token_chunk,     vocab_chunk, storage}
#define TW_OPTION_NAMES                                                                \
  nb::arg("bias") = nb::none(), nb::arg("class_weight") = nb::none(),                  \
  nb::arg("label_smoothing") = 0.0, nb::arg("z_loss") = 0.0, nb::arg("softcap") = 0.0, \
  nb::arg("ignore_index") = -100, nb::arg("v_start") = 0, nb::arg("v_total") = 0,      \
  nb::arg("token_chunk") = 0, nb::arg("vocab_chunk") = 0, nb::arg("storage") = nb::none()
#define TW_INPUTS nb::arg("hidden"), nb::arg("weight"), nb::arg("targets")
#define TW_MAYBE(name) nb::arg(name) = nb::none()

void forward(In hidden, In weight, In targets, Maybe<Out> loss, Maybe<Out> lse, Maybe<Out> m,
             Maybe<Out> log_l, Maybe<Out> picked, Maybe<Out> mass, Maybe<Out> z_loss_out,
             Maybe<Out> entropy, Maybe<Out> argmax, Maybe<In> g, Maybe<Out> dhidden,
             Maybe<Out> dweight, Maybe<Out> dbias, bool accumulate_dweight, double gradient_filter,
             TW_OPTIONS) {
  Call call(hidden, weight, targets, TW_OPTIONS_GIVEN);
  CrossEntropyResults& out = call.problem.out;
  out.loss = call.row_numbers(loss, "loss");
  out.lse = call.row_numbers(lse, "lse");
  out.m = call.row_numbers(m, "m");
  out.log_l = call.row_numbers(log_l, "log_l");
  out.picked = call.row_numbers(picked, "picked");
  out.mass = call.row_numbers(mass, "mass");
  out.z_loss = call.row_numbers(z_loss_out, "z_loss_out");
  out.entropy = call.row_numbers(entropy, "entropy");
  out.argmax = call.indices(argmax, "argmax");
  call.problem.rows.g = call.row_numbers(g, "g");
  call.take_gradients(dhidden, dweight, dbias, accumulate_dweight);
  call.problem.options.gradient_filter = gradient_filter;
  if ((dhidden || dweight || dbias) && !g) refuse("g", "is needed for gradients");
  call.run(&LinearCrossEntropyFunctions::forward);
}

void vjp(In hidden, In weight, In targets, In m, In log_l, Maybe<In> mass, Maybe<In> entropy,
         Maybe<In> g, Maybe<In> g_lse, Maybe<In> g_z, Maybe<In> g_entropy, Maybe<Out> dhidden,
         Maybe<Out> dweight, Maybe<Out> dbias, bool accumulate_dweight, double gradient_filter,
         TW_OPTIONS) {
  Call call(hidden, weight, targets, TW_OPTIONS_GIVEN);
  call.take_saved(m, log_l, mass, entropy);
  CrossEntropyRows& rows = call.problem.rows;
  rows.g = call.row_numbers(g, "g");
  rows.g_lse = call.row_numbers(g_lse, "g_lse");
  rows.g_z = call.row_numbers(g_z, "g_z");
  rows.g_entropy = call.row_numbers(g_entropy, "g_entropy");
  if (g_entropy && !entropy) refuse("entropy", "is needed for g_entropy");
  call.take_gradients(dhidden, dweight, dbias, accumulate_dweight);
  call.problem.options.gradient_filter = gradient_filter;
  call.run(&LinearCrossEntropyFunctions::vjp);
}

void jvp(In hidden, In weight, In targets, In m, Maybe<In> mass, Maybe<In> thidden,
         Maybe<In> tweight, Maybe<In> tbias, Maybe<Out> tloss, Maybe<Out> tlse, Maybe<Out> tz,
         Maybe<Out> tentropy, TW_OPTIONS) {
  Call call(hidden, weight, targets, TW_OPTIONS_GIVEN);
  call.take_saved(m, {}, mass, {});
  call.take_tangents(thidden, tweight, tbias);
  CrossEntropyResults& out = call.problem.out;
  out.loss = call.row_numbers(tloss, "tloss");
  out.lse = call.row_numbers(tlse, "tlse");
  out.z_loss = call.row_numbers(tz, "tz");
  out.entropy = call.row_numbers(tentropy, "tentropy");
  call.run(&LinearCrossEntropyFunctions::jvp);
}

void vjp_jvp(In hidden, In weight, In targets, In m, Maybe<In> mass, Maybe<In> g, Maybe<In> g_lse,
             Maybe<In> g_z, Maybe<In> g_entropy, Maybe<In> thidden, Maybe<In> tweight,
             Maybe<In> tbias, Maybe<In> tg, Maybe<In> tg_lse, Maybe<In> tg_z, Maybe<In> tg_entropy,
             Maybe<Out> tdhidden, Maybe<Out> tdweight, Maybe<Out> tdbias, TW_OPTIONS) {
  Call call(hidden, weight, targets, TW_OPTIONS_GIVEN);
  call.take_saved(m, {}, mass, {});
  call.take_tangents(thidden, tweight, tbias);
  CrossEntropyRows& rows = call.problem.rows;
  rows.g = call.row_numbers(g, "g");
  rows.g_lse = call.row_numbers(g_lse, "g_lse");
  rows.g_z = call.row_numbers(g_z, "g_z");
  rows.g_entropy = call.row_numbers(g_entropy, "g_entropy");
  rows.tg = call.row_numbers(tg, "tg");
  rows.tg_lse = call.row_numbers(tg_lse, "tg_lse");
  rows.tg_z = call.row_numbers(tg_z, "tg_z");
  rows.tg_entropy = call.row_numbers(tg_entropy, "tg_entropy");
  call.take_gradients(tdhidden, tdweight, tdbias, false);
  call.run(&LinearCrossEntropyFunctions::vjp_jvp);
}

}  // namespace

void bind_linear_cross_entropy(nb::module_& m) {
  m.def("linear_cross_entropy_forward", forward, TW_INPUTS, nb::kw_only(), TW_MAYBE("loss"),
        TW_MAYBE("lse"), TW_MAYBE("m"), TW_MAYBE("log_l"), TW_MAYBE("picked"), TW_MAYBE("mass"),
        TW_MAYBE("z_loss_out"), TW_MAYBE("entropy"), TW_MAYBE("argmax"), TW_MAYBE("g"),
        TW_MAYBE("dhidden"), TW_MAYBE("dweight"), TW_MAYBE("dbias"),
        nb::arg("accumulate_dweight") = false, nb::arg("gradient_filter") = 0.0, TW_OPTION_NAMES,
        "Write the numbers of tokens that are given, and gradients for cotangents g of the loss.");
  m.def("linear_cross_entropy_vjp", vjp, TW_INPUTS, nb::kw_only(), nb::arg("m"), nb::arg("log_l"),
        TW_MAYBE("mass"), TW_MAYBE("entropy"), TW_MAYBE("g"), TW_MAYBE("g_lse"), TW_MAYBE("g_z"),
        TW_MAYBE("g_entropy"), TW_MAYBE("dhidden"), TW_MAYBE("dweight"), TW_MAYBE("dbias"),
        nb::arg("accumulate_dweight") = false, nb::arg("gradient_filter") = 0.0, TW_OPTION_NAMES,
        "Write the gradients that are given; dweight is added to where accumulate_dweight.");
  m.def("linear_cross_entropy_jvp", jvp, TW_INPUTS, nb::kw_only(), nb::arg("m"), TW_MAYBE("mass"),
        TW_MAYBE("thidden"), TW_MAYBE("tweight"), TW_MAYBE("tbias"), TW_MAYBE("tloss"),
        TW_MAYBE("tlse"), TW_MAYBE("tz"), TW_MAYBE("tentropy"), TW_OPTION_NAMES,
        "Write the tangents of the results.");
  m.def("linear_cross_entropy_vjp_jvp", vjp_jvp, TW_INPUTS, nb::kw_only(), nb::arg("m"),
        TW_MAYBE("mass"), TW_MAYBE("g"), TW_MAYBE("g_lse"), TW_MAYBE("g_z"), TW_MAYBE("g_entropy"),
        TW_MAYBE("thidden"), TW_MAYBE("tweight"), TW_MAYBE("tbias"), TW_MAYBE("tg"),
        TW_MAYBE("tg_lse"), TW_MAYBE("tg_z"), TW_MAYBE("tg_entropy"), TW_MAYBE("tdhidden"),
        TW_MAYBE("tdweight"), TW_MAYBE("tdbias"), TW_OPTION_NAMES,
        "Write the tangents of the gradients that are given.");
}

}  // namespace tilewise

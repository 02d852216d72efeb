#include "ops/cross_entropy.hpp"

#include "bindings/row_arrays.hpp"

namespace tilewise {
namespace {

struct Options {
  int64_t ignore_index;
  double label_smoothing, z_loss, softcap;
};

// A call as it is put together from arrays.
class Call : public RowArrays {
 public:
  CrossEntropyProblem problem;

  Call(const In& x, const Maybe<In>& targets, const Maybe<In>& probabilities,
       const Maybe<In>& weight, const Options& options, const Maybe<std::string>& bits)
      : RowArrays("cross_entropy", x, bits) {
    if (columns == 0) refuse("x", "must have a column");
    problem.outer = outer, problem.columns = columns, problem.inner = inner;
    problem.ignore_index = options.ignore_index;
    problem.label_smoothing = options.label_smoothing;
    problem.z_loss = options.z_loss;
    problem.softcap = options.softcap;
    problem.x = entries(x, "x");
    problem.probabilities = entries(probabilities, "probabilities");
    if (targets.has_value() == probabilities.has_value())
      refuse("targets", "must be given where probabilities are not, and only there");
    if (targets) take_targets(*targets);
    if (!weight) return;
    if (weight->ndim() != 1 || dim(*weight, 0) != problem.columns || !is_computed(*weight) ||
        (weight->stride(0) != 1 && problem.columns > 1))
      refuse("weight", "must be contiguous, one number for each column");
    problem.weight = weight->data();
  }

  void take_saved(const In& m, const In& log_l, const In& total) {
    problem.m = numbers(m, "m");
    problem.log_l = numbers(log_l, "log_l");
    problem.total = numbers(total, "total");
  }

  // Without the interpreter's lock.
  void run(void (*CrossEntropyFunctions::*function)(const CrossEntropyProblem&)) const {
    const CrossEntropyFunctions& functions = cross_entropy_functions(computed);
    nb::gil_scoped_release released;
    (functions.*function)(problem);
  }

 private:
  void take_targets(const In& targets) {
    if (targets.ndim() != 2 || dim(targets, 0) != problem.outer || dim(targets, 1) != problem.inner)
      refuse("targets", "has another shape than the rows");
    // NumPy gives empty arrays strides of 0.
    const bool empty = problem.outer == 0 || problem.inner == 0;
    const bool contiguous = (targets.stride(1) == 1 || problem.inner <= 1) &&
                            (targets.stride(0) == problem.inner || problem.outer <= 1);
    if (targets.dtype() != nb::dtype<int64_t>() || !(contiguous || empty))
      refuse("targets", "must be contiguous int64");
    problem.targets = static_cast<const int64_t*>(targets.data());
  }
};

#define TW_INPUTS In x, Maybe<In> targets, Maybe<In> probabilities, Maybe<In> weight
#define TW_OPTIONS                                                             \
  int64_t ignore_index, double label_smoothing, double z_loss, double softcap, \
      Maybe<std::string> storage
#define TW_CALL \
  Call(x, targets, probabilities, weight, {ignore_index, label_smoothing, z_loss, softcap}, storage)
#define TW_INPUT_NAMES \
  nb::arg("x"), nb::arg("targets").none(), nb::arg("probabilities").none(), nb::arg("weight").none()
#define TW_SAVED_NAMES nb::arg("m"), nb::arg("log_l"), nb::arg("total"), nb::kw_only()
#define TW_OPTION_NAMES                                                                       \
  nb::arg("ignore_index"), nb::arg("label_smoothing"), nb::arg("z_loss"), nb::arg("softcap"), \
      nb::arg("storage") = nb::none()

void forward(TW_INPUTS, Maybe<Out> loss, Maybe<Out> lse, Maybe<Out> z, Maybe<Out> m,
             Maybe<Out> log_l, Maybe<Out> total, TW_OPTIONS) {
  Call call = TW_CALL;
  CrossEntropyProblem& p = call.problem;
  p.loss = call.numbers(loss, "loss");
  p.lse = call.numbers(lse, "lse");
  p.z = call.numbers(z, "z");
  p.m = call.numbers(m, "m");
  p.log_l = call.numbers(log_l, "log_l");
  p.total = call.numbers(total, "total");
  call.run(&CrossEntropyFunctions::forward);
}

void vjp(TW_INPUTS, In m, In log_l, In total, Maybe<In> g_loss, Maybe<In> g_lse, Maybe<In> g_z,
         Maybe<Out> dx, Maybe<Out> dprobabilities, TW_OPTIONS) {
  Call call = TW_CALL;
  call.take_saved(m, log_l, total);
  CrossEntropyProblem& p = call.problem;
  p.g_loss = call.numbers(g_loss, "g_loss");
  p.g_lse = call.numbers(g_lse, "g_lse");
  p.g_z = call.numbers(g_z, "g_z");
  p.dx = call.entries(dx, "dx");
  p.dprobabilities = call.entries(dprobabilities, "dprobabilities");
  call.run(&CrossEntropyFunctions::vjp);
}

void jvp(TW_INPUTS, In m, In log_l, In total, Maybe<In> tx, Maybe<In> tprobabilities,
         Maybe<Out> t_loss, Maybe<Out> t_lse, Maybe<Out> t_z, TW_OPTIONS) {
  Call call = TW_CALL;
  call.take_saved(m, log_l, total);
  CrossEntropyProblem& p = call.problem;
  p.tx = call.entries(tx, "tx");
  p.tprobabilities = call.entries(tprobabilities, "tprobabilities");
  p.t_loss = call.numbers(t_loss, "t_loss");
  p.t_lse = call.numbers(t_lse, "t_lse");
  p.t_z = call.numbers(t_z, "t_z");
  call.run(&CrossEntropyFunctions::jvp);
}

void vjp_jvp(TW_INPUTS, In m, In log_l, In total, Maybe<In> g_loss, Maybe<In> g_lse, Maybe<In> g_z,
             Maybe<In> tx, Maybe<In> tprobabilities, Maybe<In> tg_loss, Maybe<In> tg_lse,
             Maybe<In> tg_z, Maybe<Out> dx, Maybe<Out> dprobabilities, TW_OPTIONS) {
  Call call = TW_CALL;
  call.take_saved(m, log_l, total);
  CrossEntropyProblem& p = call.problem;
  p.g_loss = call.numbers(g_loss, "g_loss");
  p.g_lse = call.numbers(g_lse, "g_lse");
  p.g_z = call.numbers(g_z, "g_z");
  p.tx = call.entries(tx, "tx");
  p.tprobabilities = call.entries(tprobabilities, "tprobabilities");
  p.tg_loss = call.numbers(tg_loss, "tg_loss");
  p.tg_lse = call.numbers(tg_lse, "tg_lse");
  p.tg_z = call.numbers(tg_z, "tg_z");
  p.dx = call.entries(dx, "dx");
  p.dprobabilities = call.entries(dprobabilities, "dprobabilities");
  call.run(&CrossEntropyFunctions::vjp_jvp);
}

}  // namespace

void bind_cross_entropy(nb::module_& m) {
  m.def("cross_entropy_forward", forward, TW_INPUT_NAMES, nb::kw_only(), nb::arg("loss").none(),
        nb::arg("lse").none(), nb::arg("z").none(), nb::arg("m").none(), nb::arg("log_l").none(),
        nb::arg("total").none(), TW_OPTION_NAMES, "Write what is given, for each row.");
  m.def("cross_entropy_vjp", vjp, TW_INPUT_NAMES, TW_SAVED_NAMES, nb::arg("g_loss").none(),
        nb::arg("g_lse").none(), nb::arg("g_z").none(), nb::arg("dx").none(),
        nb::arg("dprobabilities").none(), TW_OPTION_NAMES,
        "Write dx, which may be x, and dprobabilities.");
  m.def("cross_entropy_jvp", jvp, TW_INPUT_NAMES, TW_SAVED_NAMES, nb::arg("tx").none(),
        nb::arg("tprobabilities").none(), nb::arg("t_loss").none(), nb::arg("t_lse").none(),
        nb::arg("t_z").none(), TW_OPTION_NAMES, "Write the tangents of loss, lse and z.");
  m.def("cross_entropy_vjp_jvp", vjp_jvp, TW_INPUT_NAMES, TW_SAVED_NAMES, nb::arg("g_loss").none(),
        nb::arg("g_lse").none(), nb::arg("g_z").none(), nb::arg("tx").none(),
        nb::arg("tprobabilities").none(), nb::arg("tg_loss").none(), nb::arg("tg_lse").none(),
        nb::arg("tg_z").none(), nb::arg("dx").none(), nb::arg("dprobabilities").none(),
        TW_OPTION_NAMES, "Write the tangents of dx and dprobabilities.");
}

}  // namespace tilewise

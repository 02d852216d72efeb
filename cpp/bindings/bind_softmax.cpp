#include "ops/softmax.hpp"

#include "bindings/row_arrays.hpp"

namespace tilewise {
namespace {

// A call as it is put together from arrays.
class Call : public RowArrays {
 public:
  SoftmaxProblem problem;

  Call(const In& x, double scale, const Maybe<In>& where, const Maybe<In>& sink,
       const Maybe<std::string>& bits)
      : RowArrays("softmax", x, bits) {
    if (!(scale > 0)) refuse("scale", "must be above 0");
    problem.outer = outer, problem.columns = columns, problem.inner = inner;
    problem.scale = scale;
    problem.x = entries(x, "x");
    if (where) {
      if (where->dtype() != nb::dtype<uint8_t>()) refuse("where", "must be uint8");
      problem.where = view(*where, "where");
    }
    problem.sink = numbers(sink, "sink");
  }

  // Without the interpreter's lock.
  void run(void (*SoftmaxFunctions::*function)(const SoftmaxProblem&)) const {
    const SoftmaxFunctions& functions = softmax_functions(computed);
    nb::gil_scoped_release released;
    (functions.*function)(problem);
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

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>

#include <algorithm>
#include <cmath>
#include <initializer_list>
#include <optional>
#include <stdexcept>
#include <string>

#include "ops/attention.hpp"

namespace nb = nanobind;

namespace tilewise {
namespace {

using In = nb::ndarray<nb::ro, nb::device::cpu>;
using Out = nb::ndarray<nb::device::cpu>;
template <class A>
using Maybe = std::optional<A>;

// Shapes and dtypes were validated by spec.py; this guards memory where _core is called directly.
template <class A>
void check(const A& x, const char* name, nb::dlpack::dtype dtype,
           std::initializer_list<int64_t> shape) {
  bool same = x.dtype() == dtype && x.ndim() == shape.size();
  size_t i = 0;
  for (int64_t n : shape) same = same && static_cast<int64_t>(x.shape(i++)) == n;
  if (!same)
    throw std::invalid_argument(std::string("attention: ") + name +
                                " has another shape or dtype than the call");
}

template <class A>
View4 rows(const A& x, const char* name, nb::dlpack::dtype dtype,
           std::initializer_list<int64_t> shape) {
  check(x, name, dtype, shape);
  if (x.size() > 0 && x.shape(3) > 1 && x.stride(3) != 1)
    throw std::invalid_argument(std::string("attention: ") + name +
                                " must have a contiguous last dimension");
  return {x.data(), x.stride(0), x.stride(1), x.stride(2), 1};
}

// A (B, H, N) or (H,) array of row values: contiguous.
template <class A>
auto* values(const Maybe<A>& x, const char* name, nb::dlpack::dtype dtype,
             std::initializer_list<int64_t> shape) {
  using Pointer = decltype(x->data());
  if (!x) return Pointer{nullptr};
  check(*x, name, dtype, shape);
  int64_t expected = 1;
  for (size_t i = x->ndim(); i-- > 0; expected *= static_cast<int64_t>(x->shape(i)))
    if (x->size() > 0 && x->shape(i) > 1 && x->stride(i) != expected)
      throw std::invalid_argument(std::string("attention: ") + name + " must be contiguous");
  return static_cast<Pointer>(x->data());
}

// A broadcast (B, H, N, Nk) array: stride 0 along dims of size 1.
template <class A>
View4 broadcast(const A& x, const char* name, nb::dlpack::dtype dtype,
                std::initializer_list<int64_t> full) {
  int64_t stride[4];
  bool good = x.dtype() == dtype && x.ndim() == 4;
  size_t i = 0;
  for (int64_t n : full) {
    if (!good) break;
    good = static_cast<int64_t>(x.shape(i)) == n || x.shape(i) == 1;
    stride[i] = x.shape(i) == 1 ? 0 : x.stride(i);
    i++;
  }
  if (!good)
    throw std::invalid_argument(std::string("attention: ") + name +
                                " must broadcast to (B, H, N, Nk)");
  return {x.data(), stride[0], stride[1], stride[2], stride[3]};
}

template <class A>
View4 maybe_rows(const Maybe<A>& x, const char* name, nb::dlpack::dtype dtype,
                 std::initializer_list<int64_t> shape) {
  return x ? rows(*x, name, dtype, shape) : View4{};
}

struct Arguments {
  In q, k, v;
  Maybe<In> mask_rows, mask_bits, mask_tiles, bias, slopes, sinks;
  double softmax_scale, softcap, dropout_p;
  uint64_t seed;

  AttentionInputs inputs() const {
    if (q.ndim() != 4 || k.ndim() != 4 || v.ndim() != 4)
      throw std::invalid_argument("attention: q, k and v must have 4 dimensions");
    const auto dtype = q.dtype();
    if (dtype != nb::dtype<float>() && dtype != nb::dtype<double>())
      throw std::invalid_argument("attention: q must be float32 or float64");
    AttentionInputs in;
    auto dim = [](const In& x, size_t i) { return static_cast<int64_t>(x.shape(i)); };
    in.B = dim(q, 0), in.H = dim(q, 1), in.N = dim(q, 2), in.D = dim(q, 3);
    in.Hk = dim(k, 1), in.Nk = dim(k, 2), in.Dv = dim(v, 3);
    if (in.Hk ? in.H % in.Hk != 0 : in.H != 0)
      throw std::invalid_argument("attention: Hk must divide H");
    if (in.D < 1 || in.D > 512 || in.Dv < 1 || in.Dv > 512 || in.Nk > INT32_MAX)
      throw std::invalid_argument("attention: D and Dv must be 1 to 512 and Nk below 2**31");
    in.q = rows(q, "q", dtype, {in.B, in.H, in.N, in.D});
    in.k = rows(k, "k", dtype, {in.B, in.Hk, in.Nk, in.D});
    in.v = rows(v, "v", dtype, {in.B, in.Hk, in.Nk, in.Dv});
    if (bias) in.bias = broadcast(*bias, "bias", dtype, {in.B, in.H, in.N, in.Nk});
    if (slopes) {
      check(*slopes, "alibi_slopes", dtype, {in.B, in.H});
      in.slopes = {slopes->data(), slopes->stride(0), slopes->stride(1), 0, 0};
    }
    if (sinks) {
      check(*sinks, "sinks", dtype, {in.H});
      in.sinks = {sinks->data(), 0, sinks->stride(0), 0, 0};
    }
    in.softmax_scale = softmax_scale;
    in.softcap = softcap;
    in.dropout = dropout();
    in.mask = mask(in);
    return in;
  }

 private:
  template <class T>
  static const T* masks(const In& x, const AttentionInputs& in, int64_t n0, int64_t n1,
                        int64_t* batch, int64_t* head) {
    const bool good = x.dtype() == nb::dtype<T>() && x.ndim() == 4 &&
                      (static_cast<int64_t>(x.shape(0)) == in.B || x.shape(0) == 1) &&
                      (static_cast<int64_t>(x.shape(1)) == in.H || x.shape(1) == 1) &&
                      static_cast<int64_t>(x.shape(2)) == n0 &&
                      static_cast<int64_t>(x.shape(3)) == n1;
    if (!good)
      throw std::invalid_argument("attention: mask has another shape or dtype than the call");
    *batch = x.shape(0) == 1 ? 0 : static_cast<int64_t>(x.shape(1)) * n0 * n1;
    *head = x.shape(1) == 1 ? 0 : n0 * n1;
    return static_cast<const T*>(x.data());
  }
  DropoutOptions dropout() const {
    if (!(dropout_p >= 0 && dropout_p <= 1))
      throw std::invalid_argument("attention: dropout_p must be from 0 to 1");
    DropoutOptions d;
    d.on = dropout_p > 0;
    d.threshold = static_cast<uint32_t>(std::min(std::nearbyint(dropout_p * 0x1p32), 0x1p32 - 1));
    d.kept = dropout_p < 1 ? 1 / (1 - dropout_p) : 0;
    d.seed = seed;
    return d;
  }
  MaskView mask(const AttentionInputs& in) const {
    MaskView view;
    const int64_t words = (in.N + 15) / 16;
    if (mask_rows) view.rows = masks<int32_t>(*mask_rows, in, in.N, 4, &view.batch, &view.head);
    if (!mask_bits) return view;
    if (!mask_tiles) throw std::invalid_argument("attention: mask_bits needs mask_tiles");
    view.bits = masks<uint16_t>(*mask_bits, in, in.Nk, words, &view.batch, &view.head);
    view.tiles = masks<uint8_t>(*mask_tiles, in, words, (in.Nk + 63) / 64, &view.tile_batch,
                                &view.tile_head);
    return view;
  }
};

// The types and names of the options that all functions take last.
#define TW_OPTIONS                                                                               \
  Maybe<In> mask_rows, Maybe<In> mask_bits, Maybe<In> mask_tiles, Maybe<In> bias,                \
      Maybe<In> slopes, Maybe<In> sinks, double softmax_scale, double softcap, double dropout_p, \
      uint64_t seed
#define TW_ARGUMENTS                                                                        \
  Arguments {                                                                               \
    q, k, v, mask_rows, mask_bits, mask_tiles, bias, slopes, sinks, softmax_scale, softcap, \
        dropout_p, seed                                                                     \
  }
#define TW_OPTION_NAMES                                                                   \
  nb::arg("mask_rows").none(), nb::arg("mask_bits").none(), nb::arg("mask_tiles").none(), \
      nb::arg("bias").none(), nb::arg("slopes").none(), nb::arg("sinks").none(),          \
      nb::arg("softmax_scale"), nb::arg("softcap"), nb::arg("dropout_p") = 0.0,           \
                                                    nb::arg("seed") = uint64_t{0}

// Calls `run` with the functions for the dtype of q, without the interpreter's lock.
template <class Run>
void with_functions(const In& q, const Run& run) {
  const AttentionKernels& kernels = attention_kernels();
  const bool single = q.dtype() == nb::dtype<float>();
  nb::gil_scoped_release released;
  if (single)
    run(kernels.f32);
  else
    run(kernels.f64);
}

AttentionSaved saved_of(const AttentionInputs& in, const In& q, const In& o, const In& m,
                        const In& log_l) {
  AttentionSaved saved;
  saved.o = rows(o, "o", q.dtype(), {in.B, in.H, in.N, in.Dv});
  saved.m = values(Maybe<In>(m), "m", q.dtype(), {in.B, in.H, in.N});
  saved.log_l = values(Maybe<In>(log_l), "log_l", q.dtype(), {in.B, in.H, in.N});
  return saved;
}

AttentionTangents tangents_of(const AttentionInputs& in, const In& q, const Maybe<In>& tq,
                              const Maybe<In>& tk, const Maybe<In>& tv, const Maybe<In>& tbias,
                              const Maybe<In>& tsinks) {
  AttentionTangents t;
  t.tq = maybe_rows(tq, "tq", q.dtype(), {in.B, in.H, in.N, in.D});
  t.tk = maybe_rows(tk, "tk", q.dtype(), {in.B, in.Hk, in.Nk, in.D});
  t.tv = maybe_rows(tv, "tv", q.dtype(), {in.B, in.Hk, in.Nk, in.Dv});
  if (tbias) t.tbias = broadcast(*tbias, "tbias", q.dtype(), {in.B, in.H, in.N, in.Nk});
  if (tsinks && !in.sinks) throw std::invalid_argument("attention: tsinks needs sinks");
  t.tsinks = values(tsinks, "tsinks", q.dtype(), {in.H});
  return t;
}

AttentionGradients gradients_of(const AttentionInputs& in, const In& q, const Maybe<Out>& dq,
                                const Maybe<Out>& dk, const Maybe<Out>& dv, const Maybe<Out>& dbias,
                                const Maybe<Out>& dsinks) {
  AttentionGradients grads;
  grads.dq = maybe_rows(dq, "dq", q.dtype(), {in.B, in.H, in.N, in.D});
  grads.dk = maybe_rows(dk, "dk", q.dtype(), {in.B, in.Hk, in.Nk, in.D});
  grads.dv = maybe_rows(dv, "dv", q.dtype(), {in.B, in.Hk, in.Nk, in.Dv});
  if (dbias) grads.dbias = broadcast(*dbias, "dbias", q.dtype(), {in.B, in.H, in.N, in.Nk});
  if (dsinks && !in.sinks) throw std::invalid_argument("attention: dsinks needs sinks");
  grads.dsinks = values(dsinks, "dsinks", q.dtype(), {in.H});
  return grads;
}

AttentionCotangents cotangents_of(const AttentionInputs& in, const In& q, const In& d_o,
                                  const Maybe<In>& dlse) {
  AttentionCotangents ct;
  ct.d_o = rows(d_o, "do", q.dtype(), {in.B, in.H, in.N, in.Dv});
  ct.dlse = values(dlse, "dlse", q.dtype(), {in.B, in.H, in.N});
  return ct;
}

AttentionResults results_of(const AttentionInputs& in, const In& q, const Out& o,
                            const Maybe<Out>& m, const Maybe<Out>& log_l, const Maybe<Out>& lse,
                            const Maybe<Out>& max_logit, const Maybe<Out>& entropy) {
  AttentionResults out;
  out.o = rows(o, "o", q.dtype(), {in.B, in.H, in.N, in.Dv});
  out.m = values(m, "m", q.dtype(), {in.B, in.H, in.N});
  out.log_l = values(log_l, "log_l", q.dtype(), {in.B, in.H, in.N});
  out.lse = values(lse, "lse", q.dtype(), {in.B, in.H, in.N});
  out.max_logit = values(max_logit, "max_logit", q.dtype(), {in.B, in.H, in.N});
  out.entropy = values(entropy, "entropy", q.dtype(), {in.B, in.H, in.N});
  return out;
}

AttentionOutputTangents output_tangents_of(const AttentionInputs& in, const In& q, const Out& to,
                                           const Out& tlse) {
  return {rows(to, "to", q.dtype(), {in.B, in.H, in.N, in.Dv}),
          values(Maybe<Out>(tlse), "tlse", q.dtype(), {in.B, in.H, in.N})};
}

void forward(In q, In k, In v, Out o, Maybe<Out> m, Maybe<Out> log_l, Maybe<Out> lse,
             Maybe<Out> max_logit, Maybe<Out> entropy, TW_OPTIONS) {
  const AttentionInputs in = TW_ARGUMENTS.inputs();
  const AttentionResults out = results_of(in, q, o, m, log_l, lse, max_logit, entropy);
  with_functions(q, [&](const auto& f) { f.forward(in, out, nullptr, {}); });
}

void forward_jvp(In q, In k, In v, Out o, Maybe<Out> m, Maybe<Out> log_l, Maybe<Out> lse,
                 Maybe<Out> max_logit, Maybe<Out> entropy, Maybe<In> tq, Maybe<In> tk, Maybe<In> tv,
                 Maybe<In> tbias, Maybe<In> tsinks, Out to, Out tlse, TW_OPTIONS) {
  const AttentionInputs in = TW_ARGUMENTS.inputs();
  const AttentionResults out = results_of(in, q, o, m, log_l, lse, max_logit, entropy);
  const AttentionTangents tangents = tangents_of(in, q, tq, tk, tv, tbias, tsinks);
  const AttentionOutputTangents moved = output_tangents_of(in, q, to, tlse);
  with_functions(q, [&](const auto& f) { f.forward(in, out, &tangents, moved); });
}
void jvp(In q, In k, In v, In o, In m, In log_l, Maybe<In> tq, Maybe<In> tk, Maybe<In> tv,
         Maybe<In> tbias, Maybe<In> tsinks, Out to, Out tlse, TW_OPTIONS) {
  const AttentionInputs in = TW_ARGUMENTS.inputs();
  const AttentionSaved saved = saved_of(in, q, o, m, log_l);
  const AttentionTangents tangents = tangents_of(in, q, tq, tk, tv, tbias, tsinks);
  const AttentionOutputTangents out = output_tangents_of(in, q, to, tlse);
  with_functions(q, [&](const auto& f) { f.jvp(in, saved, tangents, out); });
}

void vjp(In q, In k, In v, In d_o, In o, In m, In log_l, Maybe<In> dlse, Maybe<Out> dq,
         Maybe<Out> dk, Maybe<Out> dv, Maybe<Out> dbias, Maybe<Out> dsinks, TW_OPTIONS) {
  const AttentionInputs in = TW_ARGUMENTS.inputs();
  const AttentionSaved saved = saved_of(in, q, o, m, log_l);
  const AttentionCotangents ct = cotangents_of(in, q, d_o, dlse);
  const AttentionGradients grads = gradients_of(in, q, dq, dk, dv, dbias, dsinks);
  with_functions(q, [&](const auto& f) { f.vjp(in, saved, ct, nullptr, grads); });
}

void vjp_jvp(In q, In k, In v, In d_o, In o, In m, In log_l, Maybe<In> dlse, Maybe<In> tq,
             Maybe<In> tk, Maybe<In> tv, Maybe<In> tbias, Maybe<In> tsinks, In to, In tlse,
             Maybe<In> tdo, Maybe<In> tdlse, Maybe<Out> dq, Maybe<Out> dk, Maybe<Out> dv,
             Maybe<Out> dbias, Maybe<Out> dsinks, TW_OPTIONS) {
  const AttentionInputs in = TW_ARGUMENTS.inputs();
  const AttentionSaved saved = saved_of(in, q, o, m, log_l);
  const AttentionCotangents ct = cotangents_of(in, q, d_o, dlse);
  AttentionSecond second;
  second.inputs = tangents_of(in, q, tq, tk, tv, tbias, tsinks);
  second.outputs.to = rows(to, "to", q.dtype(), {in.B, in.H, in.N, in.Dv});
  second.outputs.tlse = const_cast<void*>(
      static_cast<const void*>(values(Maybe<In>(tlse), "tlse", q.dtype(), {in.B, in.H, in.N})));
  second.tdo = maybe_rows(tdo, "tdo", q.dtype(), {in.B, in.H, in.N, in.Dv});
  second.tdlse = values(tdlse, "tdlse", q.dtype(), {in.B, in.H, in.N});
  const AttentionGradients grads = gradients_of(in, q, dq, dk, dv, dbias, dsinks);
  with_functions(q, [&](const auto& f) { f.vjp(in, saved, ct, &second, grads); });
}

}  // namespace

void bind_attention(nb::module_& m) {
  m.def("attention_forward", forward, nb::arg("q"), nb::arg("k"), nb::arg("v"), nb::arg("o"),
        nb::kw_only(), nb::arg("m").none(), nb::arg("log_l").none(), nb::arg("lse").none(),
        nb::arg("max_logit").none(), nb::arg("entropy").none(), TW_OPTION_NAMES,
        "Write o and the row results that are given; softcap 0 is none.");
  m.def("attention_forward_jvp", forward_jvp, nb::arg("q"), nb::arg("k"), nb::arg("v"),
        nb::arg("o"), nb::kw_only(), nb::arg("m").none(), nb::arg("log_l").none(),
        nb::arg("lse").none(), nb::arg("max_logit").none(), nb::arg("entropy").none(),
        nb::arg("tq").none(), nb::arg("tk").none(), nb::arg("tv").none(), nb::arg("tbias").none(),
        nb::arg("tsinks").none(), nb::arg("to"), nb::arg("tlse"), TW_OPTION_NAMES,
        "Write what attention_forward writes, and to and tlse.");
  m.def("attention_jvp", jvp, nb::arg("q"), nb::arg("k"), nb::arg("v"), nb::arg("o"), nb::arg("m"),
        nb::arg("log_l"), nb::kw_only(), nb::arg("tq").none(), nb::arg("tk").none(),
        nb::arg("tv").none(), nb::arg("tbias").none(), nb::arg("tsinks").none(), nb::arg("to"),
        nb::arg("tlse"), TW_OPTION_NAMES, "Write to and tlse.");
  m.def("attention_vjp", vjp, nb::arg("q"), nb::arg("k"), nb::arg("v"), nb::arg("do"), nb::arg("o"),
        nb::arg("m"), nb::arg("log_l"), nb::kw_only(), nb::arg("dlse").none(), nb::arg("dq").none(),
        nb::arg("dk").none(), nb::arg("dv").none(), nb::arg("dbias").none(),
        nb::arg("dsinks").none(), TW_OPTION_NAMES,
        "Write the gradients that are given; dbias must hold zeros.");
  m.def("attention_vjp_jvp", vjp_jvp, nb::arg("q"), nb::arg("k"), nb::arg("v"), nb::arg("do"),
        nb::arg("o"), nb::arg("m"), nb::arg("log_l"), nb::kw_only(), nb::arg("dlse").none(),
        nb::arg("tq").none(), nb::arg("tk").none(), nb::arg("tv").none(), nb::arg("tbias").none(),
        nb::arg("tsinks").none(), nb::arg("to"), nb::arg("tlse"), nb::arg("tdo").none(),
        nb::arg("tdlse").none(), nb::arg("dq").none(), nb::arg("dk").none(), nb::arg("dv").none(),
        nb::arg("dbias").none(), nb::arg("dsinks").none(), TW_OPTION_NAMES,
        "Write the tangents of the gradients that are given; dbias must hold zeros.");
}

}  // namespace tilewise

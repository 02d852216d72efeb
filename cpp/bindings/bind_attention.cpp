#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>

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

struct Arguments {
  In q, k, v;
  Maybe<In> mask_rows, mask_bits, mask_tiles, bias, slopes, sinks;
  double softmax_scale, softcap;

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

void forward(In q, In k, In v, Out o, Maybe<Out> m, Maybe<Out> log_l, Maybe<Out> lse,
             Maybe<Out> max_logit, Maybe<Out> entropy, Maybe<In> mask_rows, Maybe<In> mask_bits,
             Maybe<In> mask_tiles, Maybe<In> bias, Maybe<In> slopes, Maybe<In> sinks,
             double softmax_scale, double softcap) {
  const Arguments args{q,    k,      v,     mask_rows,     mask_bits, mask_tiles,
                       bias, slopes, sinks, softmax_scale, softcap};
  const AttentionInputs in = args.inputs();
  const auto dtype = q.dtype();
  AttentionResults out;
  out.o = rows(o, "o", dtype, {in.B, in.H, in.N, in.Dv});
  out.m = values(m, "m", dtype, {in.B, in.H, in.N});
  out.log_l = values(log_l, "log_l", dtype, {in.B, in.H, in.N});
  out.lse = values(lse, "lse", dtype, {in.B, in.H, in.N});
  out.max_logit = values(max_logit, "max_logit", dtype, {in.B, in.H, in.N});
  out.entropy = values(entropy, "entropy", dtype, {in.B, in.H, in.N});
  const AttentionKernels& kernels = attention_kernels();
  nb::gil_scoped_release released;
  (dtype == nb::dtype<float>() ? kernels.forward_f32 : kernels.forward_f64)(in, out);
}

void vjp(In q, In k, In v, In d_o, In o, In m, In log_l, Maybe<In> dlse, Out dq, Out dk, Out dv,
         Maybe<Out> dbias, Maybe<Out> dsinks, Maybe<In> mask_rows, Maybe<In> mask_bits,
         Maybe<In> mask_tiles, Maybe<In> bias, Maybe<In> slopes, Maybe<In> sinks,
         double softmax_scale, double softcap) {
  const Arguments args{q,    k,      v,     mask_rows,     mask_bits, mask_tiles,
                       bias, slopes, sinks, softmax_scale, softcap};
  const AttentionInputs in = args.inputs();
  const auto dtype = q.dtype();
  AttentionCotangents ct;
  ct.d_o = rows(d_o, "do", dtype, {in.B, in.H, in.N, in.Dv});
  ct.o = rows(o, "o", dtype, {in.B, in.H, in.N, in.Dv});
  ct.m = values(Maybe<In>(m), "m", dtype, {in.B, in.H, in.N});
  ct.log_l = values(Maybe<In>(log_l), "log_l", dtype, {in.B, in.H, in.N});
  ct.dlse = values(dlse, "dlse", dtype, {in.B, in.H, in.N});
  AttentionGradients grads;
  grads.dq = rows(dq, "dq", dtype, {in.B, in.H, in.N, in.D});
  grads.dk = rows(dk, "dk", dtype, {in.B, in.Hk, in.Nk, in.D});
  grads.dv = rows(dv, "dv", dtype, {in.B, in.Hk, in.Nk, in.Dv});
  if (dbias) grads.dbias = broadcast(*dbias, "dbias", dtype, {in.B, in.H, in.N, in.Nk});
  if (dsinks && !sinks) throw std::invalid_argument("attention: dsinks needs sinks");
  grads.dsinks = values(dsinks, "dsinks", dtype, {in.H});
  const AttentionKernels& kernels = attention_kernels();
  nb::gil_scoped_release released;
  (dtype == nb::dtype<float>() ? kernels.vjp_f32 : kernels.vjp_f64)(in, ct, grads);
}

}  // namespace

void bind_attention(nb::module_& m) {
  m.def("attention_forward", forward, nb::arg("q"), nb::arg("k"), nb::arg("v"), nb::arg("o"),
        nb::kw_only(), nb::arg("m").none(), nb::arg("log_l").none(), nb::arg("lse").none(),
        nb::arg("max_logit").none(), nb::arg("entropy").none(), nb::arg("mask_rows").none(),
        nb::arg("mask_bits").none(), nb::arg("mask_tiles").none(), nb::arg("bias").none(),
        nb::arg("slopes").none(), nb::arg("sinks").none(), nb::arg("softmax_scale"),
        nb::arg("softcap"), "Write o and the row results that are given; softcap 0 is none.");
  m.def("attention_vjp", vjp, nb::arg("q"), nb::arg("k"), nb::arg("v"), nb::arg("do"), nb::arg("o"),
        nb::arg("m"), nb::arg("log_l"), nb::kw_only(), nb::arg("dlse").none(), nb::arg("dq"),
        nb::arg("dk"), nb::arg("dv"), nb::arg("dbias").none(), nb::arg("dsinks").none(),
        nb::arg("mask_rows").none(), nb::arg("mask_bits").none(), nb::arg("mask_tiles").none(),
        nb::arg("bias").none(), nb::arg("slopes").none(), nb::arg("sinks").none(),
        nb::arg("softmax_scale"), nb::arg("softcap"),
        "Write dq, dk, dv and what else is given; dbias must hold zeros.");
}

}  // namespace tilewise

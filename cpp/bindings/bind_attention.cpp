#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <initializer_list>
#include <optional>
#include <stdexcept>
#include <string>
#include <utility>

#include "ops/attention.hpp"

namespace nb = nanobind;

namespace tilewise {
namespace {

using In = nb::ndarray<nb::ro, nb::device::cpu>;
using Out = nb::ndarray<nb::device::cpu>;
template <class A>
using Maybe = std::optional<A>;
template <class A>
using Data = decltype(std::declval<const A&>().data());
using Shape = std::initializer_list<int64_t>;
using Shape4 = std::array<int64_t, 4>;

// Everything was validated by spec.py; this guards memory where _core is called directly.
[[noreturn]] void refuse(const char* name, const char* why) {
  throw std::invalid_argument(std::string("attention: ") + name + " " + why);
}

template <class A>
int64_t dim(const A& x, size_t i) {
  return static_cast<int64_t>(x.shape(i));
}

// The types and names of the options that all functions take last.
#define TW_OPTIONS                                                                               \
  Maybe<In> mask_rows, Maybe<In> mask_bits, Maybe<In> mask_tiles, Maybe<In> bias,                \
      Maybe<In> slopes, Maybe<In> sinks, double softmax_scale, double softcap, double dropout_p, \
      uint64_t seed, Maybe<std::string> storage, Maybe<In> q_starts, Maybe<In> k_starts,         \
      Maybe<In> block_table, Maybe<In> k_lengths
#define TW_OPTION_VALUES                                                                          \
  mask_rows, mask_bits, mask_tiles, bias, slopes, sinks, softmax_scale, softcap, dropout_p, seed, \
      storage, q_starts, k_starts, block_table, k_lengths
#define TW_OPTION_NAMES                                                                           \
  nb::arg("mask_rows").none(), nb::arg("mask_bits").none(), nb::arg("mask_tiles").none(),         \
      nb::arg("bias").none(), nb::arg("slopes").none(), nb::arg("sinks").none(),                  \
      nb::arg("softmax_scale"), nb::arg("softcap"),                                               \
      nb::arg("dropout_p") = 0.0, nb::arg("seed") = uint64_t{0}, nb::arg("storage") = nb::none(), \
      nb::arg("q_starts") = nb::none(), nb::arg("k_starts") = nb::none(),                         \
      nb::arg("block_table") = nb::none(), nb::arg("k_lengths") = nb::none()

// A call as it is put together from arrays.
class Call {
 public:
  AttentionProblem problem;

  Call(const In& q, const In& k, const In& v, TW_OPTIONS) {
    if (q.ndim() != 4 || k.ndim() != 4 || v.ndim() != 4)
      refuse("q, k and v", "must have 4 dimensions");
    set_storage(q, storage);
    in_.B = batches_ = dim(q, 0), in_.H = dim(q, 1), in_.N = queries_ = dim(q, 2);
    in_.D = dim(q, 3), in_.Hk = dim(k, 1), in_.Nk = keys_ = dim(k, 2), in_.Dv = dim(v, 3);
    if (in_.Hk ? in_.H % in_.Hk != 0 : in_.H != 0) refuse("Hk", "must divide H");
    set_sequences(q_starts, k_starts, block_table, k_lengths, k);
    if (in_.D < 1 || in_.D > 512 || in_.Dv < 1 || in_.Dv > 512 || in_.Nk > INT32_MAX)
      refuse("D and Dv", "must be 1 to 512 and Nk below 2**31");
    in_.row_batch = in_.sequences.q_starts ? 0 : in_.H * queries_;
    in_.row_head = queries_;
    in_.q = rows(q, "q", queries(in_.D), true);
    in_.k = keys_of(k, "k", in_.D);
    in_.v = keys_of(v, "v", in_.Dv);
    if (bias) in_.bias = broadcast(*bias, "bias");
    if (slopes) in_.slopes = numbers(*slopes, "alibi_slopes", {in_.B, in_.H});
    if (sinks) in_.sinks = numbers(*sinks, "sinks", {in_.H});
    if (sinks) in_.sinks.head = in_.sinks.batch, in_.sinks.batch = 0;
    in_.softmax_scale = softmax_scale;
    in_.softcap = softcap;
    set_dropout(dropout_p, seed);
    set_mask(mask_rows, mask_bits, mask_tiles);
  }

  Shape4 queries(int64_t columns) const { return {batches_, in_.H, queries_, columns}; }
  Shape4 keys(int64_t columns) const { return {batches_, in_.Hk, keys_, columns}; }

  void results(const Out& o, const Maybe<Out>& o_full, const Maybe<Out>& m, const Maybe<Out>& log_l,
               const Maybe<Out>& lse, const Maybe<Out>& max_logit, const Maybe<Out>& entropy) {
    AttentionResults& out = problem.out;
    out.o = rows(o, "o", queries(in_.Dv), false);
    out.o_full = maybe_rows(o_full, "o_full", queries(in_.Dv), false);
    if (out.o_full && out.o_full.storage != computed_) refuse("o_full", "has another dtype");
    out.m = row_numbers(m, "m");
    out.log_l = row_numbers(log_l, "log_l");
    out.lse = row_numbers(lse, "lse");
    out.max_logit = row_numbers(max_logit, "max_logit");
    out.entropy = row_numbers(entropy, "entropy");
  }

  void saved(const In& o, const In& m, const In& log_l) {
    problem.saved.o = rows(o, "o", queries(in_.Dv), false);
    problem.saved.m = row_numbers(Maybe<In>(m), "m");
    problem.saved.log_l = row_numbers(Maybe<In>(log_l), "log_l");
  }

  void cotangents(const In& d_o, const Maybe<In>& dlse) {
    problem.cotangents.d_o = rows(d_o, "do", queries(in_.Dv), true);
    problem.cotangents.dlse = row_numbers(dlse, "dlse");
  }

  AttentionTangents tangents(const Maybe<In>& tq, const Maybe<In>& tk, const Maybe<In>& tv,
                             const Maybe<In>& tbias, const Maybe<In>& tsinks) const {
    AttentionTangents t;
    t.tq = maybe_rows(tq, "tq", queries(in_.D), true);
    t.tk = maybe_rows(tk, "tk", keys(in_.D), true);
    t.tv = maybe_rows(tv, "tv", keys(in_.Dv), true);
    if (tbias) t.tbias = broadcast(*tbias, "tbias");
    if (tsinks && !in_.sinks) refuse("tsinks", "needs sinks");
    t.tsinks = contiguous(tsinks, "tsinks", {in_.H});
    return t;
  }

  template <class A>
  AttentionOutputTangents moved(const A& to, const A& tlse) const {
    return {rows(to, "to", queries(in_.Dv), false),
            const_cast<void*>(static_cast<const void*>(row_numbers(Maybe<A>(tlse), "tlse")))};
  }

  void second(const Maybe<In>& tdo, const Maybe<In>& tdlse) {
    problem.second.tdo = maybe_rows(tdo, "tdo", queries(in_.Dv), true);
    problem.second.tdlse = row_numbers(tdlse, "tdlse");
  }

  void gradients(const Maybe<Out>& dq, const Maybe<Out>& dk, const Maybe<Out>& dv,
                 const Maybe<Out>& dbias, const Maybe<Out>& dsinks) {
    AttentionGradients& grads = problem.gradients;
    grads.dq = maybe_rows(dq, "dq", queries(in_.D), false);
    grads.dk = maybe_rows(dk, "dk", keys(in_.D), false);
    grads.dv = maybe_rows(dv, "dv", keys(in_.Dv), false);
    if (dbias) grads.dbias = broadcast(*dbias, "dbias");
    if (grads.dbias && grads.dbias.storage != computed_) refuse("dbias", "has another dtype");
    if (dsinks && !in_.sinks) refuse("dsinks", "needs sinks");
    grads.dsinks = contiguous(dsinks, "dsinks", {in_.H});
  }

  // Without the interpreter's lock.
  void run(void (*AttentionFunctions::*function)(const AttentionProblem&)) const {
    if (in_.sequences.block_table && function != &AttentionFunctions::forward)
      refuse("block_table", "is for attention_forward");
    const AttentionFunctions functions = attention_functions(in_);
    nb::gil_scoped_release released;
    (functions.*function)(problem);
  }

 private:
  AttentionInputs& in_ = problem.in;
  Storage storage_ = Storage::kFloat32, computed_ = Storage::kFloat32;
  int64_t batches_ = 0, queries_ = 0, keys_ = 0;  // of the arrays

  void set_storage(const In& q, const Maybe<std::string>& storage) {
    if (!storage) {
      if (q.dtype() != nb::dtype<float>() && q.dtype() != nb::dtype<double>())
        refuse("q", "must be float32 or float64 where no storage is given");
      if (q.dtype() == nb::dtype<double>()) storage_ = computed_ = Storage::kFloat64;
    } else if (*storage == "bfloat16") {
      storage_ = Storage::kBfloat16;
    } else if (*storage == "float16") {
      storage_ = Storage::kFloat16;
    } else {
      refuse("storage", "must be bfloat16 or float16");
    }
  }

  void set_sequences(const Maybe<In>& q_starts, const Maybe<In>& k_starts,
                     const Maybe<In>& block_table, const Maybe<In>& k_lengths, const In& k) {
    Sequences& all = in_.sequences;
    if (q_starts.has_value() != k_starts.has_value()) refuse("q_starts", "needs k_starts");
    if (block_table.has_value() != k_lengths.has_value()) refuse("block_table", "needs k_lengths");
    if (q_starts && block_table) refuse("q_starts", "must not be given with a block_table");
    if (q_starts) {
      if (batches_ != 1 || q_starts->ndim() != 1 || dim(*q_starts, 0) < 1)
        refuse("q_starts", "must have 1 dimension, and packed arrays a batch of 1");
      in_.B = dim(*q_starts, 0) - 1;
      all.q_starts = starts(*q_starts, "q_starts", queries_, &in_.N);
      all.k_starts = starts(*k_starts, "k_starts", keys_, &in_.Nk);
    }
    if (!block_table) return;
    const In& table = *block_table;
    all.k_lengths = contiguous_as<int64_t>(*k_lengths, "k_lengths", {in_.B});
    if (table.ndim() != 2) refuse("block_table", "must have 2 dimensions");
    all.block_columns = dim(table, 1);
    all.block_table = contiguous_as<int32_t>(table, "block_table", {in_.B, all.block_columns});
    in_.Nk = 0;
    for (int64_t b = 0; b < in_.B; b++) {
      const int64_t length = all.k_lengths[b];
      if (length < 0 || length > all.block_columns * keys_)
        refuse("k_lengths", "must be from 0 to what the block table holds");
      in_.Nk = std::max(in_.Nk, length);
      for (int64_t p = 0; p * keys_ < length; p++)
        if (all.block_table[b * all.block_columns + p] >= dim(k, 0))
          refuse("block_table", "must hold numbers of pages");
    }
  }

  const int64_t* starts(const In& x, const char* name, int64_t total, int64_t* longest) const {
    const int64_t* at = contiguous_as<int64_t>(x, name, {in_.B + 1});
    *longest = 0;
    if (at[0] != 0 || at[in_.B] != total) refuse(name, "must begin at 0 and end at the total");
    for (int64_t s = 0; s < in_.B; s++) {
      if (at[s + 1] < at[s]) refuse(name, "must not decrease");
      *longest = std::max(*longest, at[s + 1] - at[s]);
    }
    return at;
  }

  void set_dropout(double p, uint64_t seed) {
    if (!(p >= 0 && p <= 1)) refuse("dropout_p", "must be from 0 to 1");
    DropoutOptions& d = in_.dropout;
    d.on = p > 0;
    d.threshold = static_cast<uint32_t>(std::min(std::nearbyint(p * 0x1p32), 0x1p32 - 1));
    d.kept = p < 1 ? 1 / (1 - p) : 0;
    d.seed = seed;
  }

  void set_mask(const Maybe<In>& mask_rows, const Maybe<In>& bits, const Maybe<In>& tiles) {
    MaskView& view = in_.mask;
    const int64_t words = (in_.N + 15) / 16;
    if (mask_rows) view.rows = masks<int32_t>(*mask_rows, queries_, 4, &view.batch, &view.head);
    if (!bits) return;
    if (in_.sequences) refuse("mask_bits", "must not be given with sequences");
    if (!tiles) refuse("mask_bits", "needs mask_tiles");
    view.bits = masks<uint16_t>(*bits, in_.Nk, words, &view.batch, &view.head);
    view.tiles =
        masks<uint8_t>(*tiles, words, (in_.Nk + 63) / 64, &view.tile_batch, &view.tile_head);
  }

  template <class T>
  const T* masks(const In& x, int64_t n0, int64_t n1, int64_t* batch, int64_t* head) const {
    const bool good = x.dtype() == nb::dtype<T>() && x.ndim() == 4 &&
                      (dim(x, 0) == batches_ || dim(x, 0) == 1) &&
                      (dim(x, 1) == in_.H || dim(x, 1) == 1) && dim(x, 2) == n0 && dim(x, 3) == n1;
    if (!good) refuse("mask", "has another shape or dtype than the call");
    *batch = dim(x, 0) == 1 ? 0 : dim(x, 1) * n0 * n1;
    *head = dim(x, 1) == 1 ? 0 : n0 * n1;
    return static_cast<const T*>(x.data());
  }

  // What an array holds: numbers as they are stored, or as they are computed with.
  template <class A>
  Storage stored(const A& x, const char* name, bool strictly) const {
    const bool half = bytes_of(storage_) == 2;
    if (half ? x.dtype() == nb::dtype<uint16_t>() : is_computed(x)) return storage_;
    if (strictly || !is_computed(x)) refuse(name, "has another dtype than the call");
    return computed_;
  }
  template <class A>
  bool is_computed(const A& x) const {
    return x.dtype() == (computed_ == Storage::kFloat64 ? nb::dtype<double>() : nb::dtype<float>());
  }

  template <class A, class S>
  void match(const A& x, const char* name, const S& shape) const {
    bool same = x.ndim() == shape.size();
    size_t i = 0;
    for (int64_t n : shape) same = same && dim(x, i++) == n;
    if (!same) refuse(name, "has another shape than the call");
  }

  template <class A>
  View4 rows(const A& x, const char* name, const Shape4& shape, bool strictly) const {
    match(x, name, shape);
    if (x.size() > 0 && x.shape(3) > 1 && x.stride(3) != 1)
      refuse(name, "must have a contiguous last dimension");
    View4 view{x.data(), x.stride(0), x.stride(1), x.stride(2), 1};
    view.storage = stored(x, name, strictly);
    return view;
  }
  template <class A>
  View4 maybe_rows(const Maybe<A>& x, const char* name, const Shape4& shape, bool strictly) const {
    return x ? rows(*x, name, shape, strictly) : View4{};
  }

  // Keys or values; pages of them with a block table.
  View4 keys_of(const In& x, const char* name, int64_t columns) const {
    if (!in_.sequences.block_table) return rows(x, name, keys(columns), true);
    View4 view = rows(x, name, {dim(x, 0), in_.Hk, keys_, columns}, true);
    view.pages = in_.sequences.block_table;
    view.page_rows = keys_;
    view.page = view.batch;
    view.batch = 0;
    return view;
  }

  // An array that broadcasts to (B, H, N, Nk): stride 0 along dims of size 1. Of packed sequences,
  // (1, H, total queries, longest keys), every query with a row of its own.
  template <class A>
  View4 broadcast(const A& x, const char* name) const {
    const int64_t full[] = {batches_, in_.H, queries_, in_.Nk};
    int64_t stride[4] = {};
    bool good = x.ndim() == 4;
    for (size_t i = 0; good && i < 4; i++) {
      good = dim(x, i) == full[i] || dim(x, i) == 1;
      stride[i] = dim(x, i) == 1 ? 0 : x.stride(i);
    }
    if (good && in_.sequences.q_starts) {
      good = dim(x, 2) == queries_;
      stride[2] = x.stride(2);
    }
    if (!good) refuse(name, "must broadcast to (B, H, N, Nk)");
    View4 view{x.data(), stride[0], stride[1], stride[2], stride[3]};
    view.storage = stored(x, name, false);
    return view;
  }

  View4 numbers(const In& x, const char* name, Shape shape) const {
    match(x, name, shape);
    if (!is_computed(x)) refuse(name, "has another dtype than the call");
    View4 view{x.data(), x.stride(0), x.ndim() > 1 ? x.stride(1) : 0, 0, 0};
    view.storage = computed_;
    return view;
  }

  template <class T>
  static const T* contiguous_as(const In& x, const char* name, Shape shape) {
    bool good = x.dtype() == nb::dtype<T>() && x.ndim() == shape.size();
    int64_t expected = 1;
    for (size_t i = shape.size(); good && i-- > 0; expected *= dim(x, i))
      good = dim(x, i) == shape.begin()[i] &&
             (x.stride(i) == expected || dim(x, i) == 1 || x.size() == 0);
    if (!good) refuse(name, "has another shape or dtype than the call");
    return static_cast<const T*>(x.data());
  }

  template <class A>
  Data<A> contiguous(const Maybe<A>& x, const char* name, Shape shape) const {
    if (!x) return nullptr;
    match(*x, name, shape);
    if (!is_computed(*x)) refuse(name, "has another dtype than the call");
    int64_t expected = 1;
    for (size_t i = x->ndim(); i-- > 0; expected *= dim(*x, i))
      if (x->size() > 0 && x->shape(i) > 1 && x->stride(i) != expected)
        refuse(name, "must be contiguous");
    return x->data();
  }
  template <class A>
  Data<A> row_numbers(const Maybe<A>& x, const char* name) const {
    return contiguous(x, name, {batches_, in_.H, queries_});
  }
};

void forward(In q, In k, In v, Out o, Maybe<Out> m, Maybe<Out> log_l, Maybe<Out> lse,
             Maybe<Out> max_logit, Maybe<Out> entropy, Maybe<Out> o_full, TW_OPTIONS) {
  Call call(q, k, v, TW_OPTION_VALUES);
  call.results(o, o_full, m, log_l, lse, max_logit, entropy);
  call.run(&AttentionFunctions::forward);
}

void forward_jvp(In q, In k, In v, Out o, Maybe<Out> m, Maybe<Out> log_l, Maybe<Out> lse,
                 Maybe<Out> max_logit, Maybe<Out> entropy, Maybe<Out> o_full, Maybe<In> tq,
                 Maybe<In> tk, Maybe<In> tv, Maybe<In> tbias, Maybe<In> tsinks, Out to, Out tlse,
                 TW_OPTIONS) {
  Call call(q, k, v, TW_OPTION_VALUES);
  call.results(o, o_full, m, log_l, lse, max_logit, entropy);
  call.problem.tangents = call.tangents(tq, tk, tv, tbias, tsinks);
  call.problem.moved = call.moved(to, tlse);
  call.run(&AttentionFunctions::forward_jvp);
}

void jvp(In q, In k, In v, In o, In m, In log_l, Maybe<In> tq, Maybe<In> tk, Maybe<In> tv,
         Maybe<In> tbias, Maybe<In> tsinks, Out to, Out tlse, TW_OPTIONS) {
  Call call(q, k, v, TW_OPTION_VALUES);
  call.saved(o, m, log_l);
  call.problem.tangents = call.tangents(tq, tk, tv, tbias, tsinks);
  call.problem.moved = call.moved(to, tlse);
  call.run(&AttentionFunctions::jvp);
}

void vjp(In q, In k, In v, In d_o, In o, In m, In log_l, Maybe<In> dlse, Maybe<Out> dq,
         Maybe<Out> dk, Maybe<Out> dv, Maybe<Out> dbias, Maybe<Out> dsinks, TW_OPTIONS) {
  Call call(q, k, v, TW_OPTION_VALUES);
  call.saved(o, m, log_l);
  call.cotangents(d_o, dlse);
  call.gradients(dq, dk, dv, dbias, dsinks);
  call.run(&AttentionFunctions::vjp);
}

void vjp_jvp(In q, In k, In v, In d_o, In o, In m, In log_l, Maybe<In> dlse, Maybe<In> tq,
             Maybe<In> tk, Maybe<In> tv, Maybe<In> tbias, Maybe<In> tsinks, In to, In tlse,
             Maybe<In> tdo, Maybe<In> tdlse, Maybe<Out> dq, Maybe<Out> dk, Maybe<Out> dv,
             Maybe<Out> dbias, Maybe<Out> dsinks, TW_OPTIONS) {
  Call call(q, k, v, TW_OPTION_VALUES);
  call.saved(o, m, log_l);
  call.cotangents(d_o, dlse);
  call.problem.second.inputs = call.tangents(tq, tk, tv, tbias, tsinks);
  call.problem.second.outputs = call.moved(to, tlse);
  call.second(tdo, tdlse);
  call.gradients(dq, dk, dv, dbias, dsinks);
  call.run(&AttentionFunctions::vjp_jvp);
}

}  // namespace

void bind_attention(nb::module_& m) {
  m.def("attention_forward", forward, nb::arg("q"), nb::arg("k"), nb::arg("v"), nb::arg("o"),
        nb::kw_only(), nb::arg("m").none(), nb::arg("log_l").none(), nb::arg("lse").none(),
        nb::arg("max_logit").none(), nb::arg("entropy").none(), nb::arg("o_full") = nb::none(),
        TW_OPTION_NAMES, "Write o and the row results that are given; softcap 0 is none.");
  m.def("attention_forward_jvp", forward_jvp, nb::arg("q"), nb::arg("k"), nb::arg("v"),
        nb::arg("o"), nb::kw_only(), nb::arg("m").none(), nb::arg("log_l").none(),
        nb::arg("lse").none(), nb::arg("max_logit").none(), nb::arg("entropy").none(),
        nb::arg("o_full") = nb::none(), nb::arg("tq").none(), nb::arg("tk").none(),
        nb::arg("tv").none(), nb::arg("tbias").none(), nb::arg("tsinks").none(), nb::arg("to"),
        nb::arg("tlse"), TW_OPTION_NAMES, "Write what attention_forward writes, and to and tlse.");
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

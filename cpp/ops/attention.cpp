#include "ops/attention.hpp"

#include "simd/targets.hpp"

namespace tilewise {

const AttentionKernels* attention_kernels_avx512();
const AttentionKernels* attention_kernels_avx2();
const AttentionKernels* attention_kernels_portable();
const AttentionFunctions* attention_pairs_avx512bf16();
const AttentionFunctions* attention_tiles_amx();
const AttentionFunctions* attention_tiles_emulated();

const AttentionKernels& attention_kernels() {
  switch (active_target()) {
#if defined(TILEWISE_X86)
    case Target::kAmx:
    case Target::kAmxEmulated:
    case Target::kAvx512Bf16:
    case Target::kAvx512:
      return *attention_kernels_avx512();
    case Target::kAvx2:
      return *attention_kernels_avx2();
#endif
    default:
      return *attention_kernels_portable();
  }
}

AttentionFunctions attention_functions(const AttentionInputs& in) {
  const AttentionKernels& kernels = attention_kernels();
  AttentionFunctions functions = in.q.storage == Storage::kFloat64 ? kernels.f64 : kernels.f32;
#if defined(TILEWISE_X86)
  auto rows_of = [&](int64_t n) {
    return in.q.storage == Storage::kBfloat16 && in.D % n == 0 && in.Dv % n == 0;
  };
  const Target target = active_target();
  const AttentionFunctions* pairs = nullptr;
  if (target == Target::kAvx512Bf16 && rows_of(2)) pairs = attention_pairs_avx512bf16();
  if (target == Target::kAmx && rows_of(32)) pairs = attention_tiles_amx();
  if (target == Target::kAmxEmulated && rows_of(32)) pairs = attention_tiles_emulated();
  if (pairs) functions.forward = pairs->forward, functions.vjp = pairs->vjp;
#endif
  return functions;
}

namespace {

// Moves everything to the first row of a sequence.
struct Mover {
  const Sequences& all;
  int64_t s, element, row_batch;

  void queries(View4* x) const {
    *x = all.q_starts ? x->from_row(all.q_starts[s]) : x->from_batch(s);
  }
  void keys(View4* x) const { *x = all.k_starts ? x->from_row(all.k_starts[s]) : x->from_batch(s); }
  template <class P>
  void numbers(P** x) const {
    const int64_t at = all.q_starts ? all.q_starts[s] : s * row_batch;
    if (*x) *x = reinterpret_cast<P*>(uintptr_t(*x) + uintptr_t(at * element));
  }
};

}  // namespace

AttentionProblem AttentionProblem::sequence(int64_t s, int64_t element) const {
  AttentionProblem p = *this;
  const Sequences& all = in.sequences;
  const Mover move{all, s, element, in.row_batch};
  p.in.sequences = {};
  p.in.B = 1;
  p.in.first_batch = s;
  if (all.q_starts) {
    p.in.N = all.q_starts[s + 1] - all.q_starts[s];
    p.in.Nk = all.k_starts[s + 1] - all.k_starts[s];
    move.keys(&p.in.k);
    move.keys(&p.in.v);
    if (in.mask.rows) p.in.mask.rows += 4 * all.q_starts[s];
  } else {
    p.in.Nk = all.k_lengths[s];
    p.in.k.pages = p.in.v.pages = all.block_table + s * all.block_columns;
    if (in.mask.rows) p.in.mask.rows += s * in.mask.batch;
  }
  p.in.slopes = in.slopes.from_batch(s);
  AttentionTangents* tangents[] = {&p.tangents, &p.second.inputs};
  for (AttentionTangents* t : tangents) {
    move.queries(&t->tq);
    move.keys(&t->tk);
    move.keys(&t->tv);
    move.queries(&t->tbias);
  }
  for (View4* x :
       {&p.in.q, &p.in.bias, &p.out.o, &p.out.o_full, &p.saved.o, &p.cotangents.d_o,
        &p.gradients.dq, &p.gradients.dbias, &p.moved.to, &p.second.outputs.to, &p.second.tdo})
    move.queries(x);
  for (View4* x : {&p.gradients.dk, &p.gradients.dv, &p.gradients.dk_sum, &p.gradients.dv_sum})
    move.keys(x);
  for (void** x : {&p.out.m, &p.out.log_l, &p.out.lse, &p.out.max_logit, &p.out.entropy,
                   &p.moved.tlse, &p.second.outputs.tlse})
    move.numbers(x);
  for (const void** x : {&p.saved.m, &p.saved.log_l, &p.cotangents.dlse, &p.second.tdlse})
    move.numbers(x);
  return p;
}

}  // namespace tilewise

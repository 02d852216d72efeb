"""Attention in its process: memory that it reads and takes, threads, forks, settings."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import tilewise as tw
from tilewise.verify import Case
from tilewise.verify.cases.attention import Dims, Problem
from tilewise.verify.metrics import same_bits

_core = pytest.importorskip("tilewise._core")
cpu = pytest.importorskip("tilewise.ops.attention.cpu")

Results = dict[str, NDArray[Any]]
Evaluate = Callable[[Problem], Results]
Run = Callable[..., str]

linux = pytest.mark.skipif(sys.platform != "linux", reason="reads or limits memory as Linux does")
DIMS = Dims(B=3, H=4, Hk=2, N=101, Nk=211, D=13, Dv=17)


def causal(dims: Dims, batch: slice) -> tw.Mask:
    return tw.causal()


# Inputs


@pytest.mark.parametrize("N", [3, 101])
@pytest.mark.parametrize("layout", ["bhnd", "bnhd"])
@pytest.mark.parametrize("memory", ["padded", "transposed", "broadcast", "readonly", "reversed"])
def test_inputs_are_read_in_place_and_left_alone(
    memory: str, layout: str, N: int, results: Evaluate, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = Case("in place", replace(DIMS, N=N), mask=causal, bias="B H N Nk", sinks="normal")
    plain = replace(case, memory=memory).problem()
    contiguous = {name: x.copy() for name, x in plain.arrays.items()}
    if layout == "bnhd":
        for name in ("q", "k", "v", "do"):
            plain.arrays[name] = plain.arrays[name].swapaxes(1, 2)
    problem = replace(plain, case=replace(case, layout=layout))
    for x in problem.arrays.values():
        x.setflags(write=False)
    seen: dict[str, NDArray[Any]] = {}

    def forward(q: Any, k: Any, v: Any, o: Any, **options: Any) -> None:
        seen.update(q=q, k=k, v=v, bias=options["bias"])
        _core.attention_forward(q, k, v, o, **options)

    def vjp(q: Any, k: Any, v: Any, do: Any, *rest: Any, **options: Any) -> None:
        seen.update(do=do, dlse=options["dlse"])
        _core.attention_vjp(q, k, v, do, *rest, **options)

    patched = SimpleNamespace(attention_forward=forward, attention_vjp=vjp)
    monkeypatch.setattr(cpu, "_core", patched)
    got = results(problem)
    for name, x in seen.items():
        given = problem.arrays[name]
        assert np.shares_memory(x, given), name
        assert x.ctypes.data == given.ctypes.data, name
        assert x.nbytes == given.nbytes, name
    monkeypatch.undo()
    wanted = results(replace(plain, arrays=contiguous))
    for name, x in wanted.items():
        laid_out = layout == "bnhd" and name in ("o", "dq", "dk", "dv")
        assert same_bits(got[name], x.swapaxes(1, 2) if laid_out else x), name
    assert all(same_bits(plain.arrays[name], x) for name, x in contiguous.items() if x.ndim < 4)


def test_core_refuses_arrays_that_do_not_fit() -> None:
    x = np.zeros((1, 2, 3, 5), np.float32)
    rows = ("m", "log_l", "lse", "max_logit", "entropy")
    given = ("mask_rows", "mask_bits", "mask_tiles", "bias", "slopes", "sinks")
    options: dict[str, Any] = dict.fromkeys(rows + given)
    options.update(softmax_scale=1.0, softcap=0.0)
    good = {"q": x, "k": x, "v": x, "o": np.zeros_like(x), **options}
    _core.attention_forward(**good)
    bad: dict[str, Any] = {
        "k": x[:, :, :, :4],
        "v": np.zeros((1, 2, 4, 5), np.float32),
        "o": np.zeros((1, 2, 3, 5)),
        "lse": np.zeros((1, 2, 4), np.float32),
        "mask_rows": np.zeros((1, 1, 2, 4), np.int32),
        "mask_bits": np.zeros((1, 1, 3, 1), np.uint16),
        "bias": np.zeros((1, 2, 3, 4), np.float32),
        "sinks": np.zeros(3, np.float32),
    }
    for name, value in bad.items():
        with pytest.raises(ValueError, match="attention: "):
            _core.attention_forward(**{**good, name: value})


HUGE_STRIDES = """
import itertools, mmap, sys
import numpy as np
import tilewise as tw
from tilewise.ops.attention import cpu

N = int(sys.argv[1])
B, H, Hk, Nk, D, Dv = 2, 2, 1, N + 2, 7, 5
step = 2**31 // (N - 1) + 1021          # elements between rows: the last is beyond 2**31
reach = step * (Nk + 1) * B * H * 4
flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000  # MAP_NORESERVE
try:
    pages = mmap.mmap(-1, reach, flags=flags)
    pages.madvise(mmap.MADV_NOHUGEPAGE)
except (OSError, ValueError) as error:
    print("skip", error)
    sys.exit()
memory = np.frombuffer(pages, np.float32)
slot = itertools.count(64, 64)

def spread(B, H, rows, columns, by_column=False):
    row = step
    shape = (B, H, rows, columns)
    strides = (H * rows * row, rows * row, row, 1)
    if by_column:  # a bias alone may be spread along its last dimension
        strides = (0, 0, 1, row)
    return np.lib.stride_tricks.as_strided(
        memory[next(slot):], shape, [4 * n for n in strides], writeable=True)

rng = np.random.default_rng(3)
def both(shape):
    x = rng.standard_normal(shape, np.float32)
    far = spread(*shape)
    far[...] = x
    return x, far

pairs = [both(s) for s in ((B, H, N, D), (B, Hk, Nk, D), (B, Hk, Nk, Dv), (B, H, N, Dv))]
bias = rng.standard_normal((1, 1, N, Nk), np.float32)
far_bias = spread(1, 1, N, Nk, by_column=True)
far_bias[...] = bias

def run(q, k, v, do, bias):
    made = tw.numpy.attention(q, k, v, bias=bias, return_stats=True, implementation="cpu")
    grads = tw.numpy.attention_vjp(
        do, q, k, v, made.o, made.stats, bias=bias, implementation="cpu")
    return [made.o, *made.stats, *grads[:4]]

near = run(*(x for x, _ in pairs), bias)
cpu._empty = lambda call, heads, rows, entries: spread(call.B, heads, rows, entries)
far = run(*(x for _, x in pairs), far_bias)
assert far[0].strides[0] > 2**33
for a, b in zip(near, far, strict=True):
    assert np.array_equal(a, b)
print("same")
"""


@linux
@pytest.mark.parametrize("N", [5, 23])
def test_offsets_beyond_two_to_the_31_elements_work(N: int, run_script: Run) -> None:
    said = run_script(HUGE_STRIDES, str(N))
    if said.startswith("skip"):
        pytest.skip(said)
    assert said == "same\n"


HUGE_MASK = """
import mmap
import numpy as np
from tilewise import _core

H, N, Nk = 3, 2**15, 2**19
words = N // 16
flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000  # MAP_NORESERVE
pages = mmap.mmap(-1, 2 * H * Nk * words, flags=flags)
pages.madvise(mmap.MADV_NOHUGEPAGE)
bits = np.frombuffer(pages, np.uint16).reshape(1, H, Nk, words)
tiles = np.zeros((1, H, words, Nk // 64), np.uint8)
assert bits.size > 2**31
bits[0, 2, Nk - 3, words - 1] = 0x8000  # the last query of the last head sees one key
tiles[0, 2, words - 1, -1] = 1
rng = np.random.default_rng(5)
q = rng.standard_normal((1, H, N, 1), np.float32)
k = rng.standard_normal((1, 1, Nk, 1), np.float32)
o = np.full_like(q, np.nan)
none = dict.fromkeys("m log_l lse max_logit entropy mask_rows bias slopes sinks".split())
_core.attention_forward(
    q, k, k, o, **none, mask_bits=bits, mask_tiles=tiles, softmax_scale=1.0, softcap=0.0)
assert o[0, 2, -1, 0] == k[0, 0, Nk - 3, 0]
o[0, 2, -1, 0] = 0
assert not o.any()
"""


@linux
def test_mask_of_more_than_two_to_the_31_words_works(run_script: Run) -> None:
    run_script(HUGE_MASK)


GUARDED = """
import ctypes, mmap, sys
import numpy as np
import tilewise as tw

mask_name, N, grain, backward = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4] == "1"
B, H, Nk, D = 2, 2, 7680, 16
libc = ctypes.CDLL(None, use_errno=True)

masks = {
    "lengths": tw.lengths([Nk, 900]) & tw.causal(),
    "documents": tw.documents(
        ids=np.stack([np.full(N, 1), np.full(N, 3)]), ids_k=np.arange(Nk) // 1920),
    "window": tw.window(300, 0),
    "sink tokens and window": tw.causal() & (tw.sink_tokens(256) | tw.window(300, 0)),
    "bits": tw.dense((np.arange(Nk) // 1920 % 2 == 1) & (np.arange(Nk) % 3 != 0)),
}
mask = masks[mask_name]
seen = np.broadcast_to(mask.to_bool(B, H, N, Nk), (B, H, N, Nk))
empty = ~seen.any(axis=(1, 2)).reshape(B, Nk // grain, grain).any(axis=2)  # of batch entry b
assert empty.any()

def forbid(x):
    '''Forbid the pages of x, (B, Nk, ...), that hold nothing but keys of empty tiles.'''
    for b, t in np.argwhere(empty):
        start = x[b, t * grain:].ctypes.data
        size = grain * x.strides[1]
        first, last = -(-start // 4096) * 4096, (start + size) // 4096 * 4096
        if last > first:
            assert libc.mprotect(ctypes.c_void_p(first), ctypes.c_size_t(last - first), 0) == 0

rng = np.random.default_rng(3)
def keys():
    pages = mmap.mmap(-1, B * Nk * D * 4)
    x = np.frombuffer(pages, np.float32).reshape(B, Nk, D)
    x[...] = rng.standard_normal(x.shape, np.float32)
    return x

k, v = keys(), keys()
q = rng.standard_normal((B, H, N, D), np.float32)
pages = mmap.mmap(-1, B * N * Nk * 4)  # a bias of (B, 1, N, Nk)
bias = np.frombuffer(pages, np.float32).reshape(B, 1, N, Nk)
bias[...] = rng.standard_normal(bias.shape, np.float32)
options = dict(mask=mask, bias=bias, implementation="cpu", softcap=9.0)

def run(k, v, options):
    made = tw.numpy.attention(q, k[:, None], v[:, None], return_stats=True, **options)
    if not backward:
        return [made.o]
    grads = tw.numpy.attention_vjp(
        made.o, q, k[:, None], v[:, None], made.o, made.stats, **options)
    return [made.o, *grads[:4]]

wanted = [x.copy() for x in run(k, v, options)]
forbid(k)
forbid(v)
for i in range(N):
    forbid(bias[:, 0, i, :, None])
for a, b in zip(wanted, run(k, v, options), strict=True):
    assert np.array_equal(a, b)
print("untouched")
"""
GUARDED_MASKS = ["lengths", "documents", "window", "sink tokens and window", "bits"]


@linux
@pytest.mark.parametrize("N", [3, 67])
@pytest.mark.parametrize("mask", GUARDED_MASKS)
def test_forward_does_not_touch_tiles_that_no_query_sees(
    mask: str, N: int, run_script: Run
) -> None:
    assert run_script(GUARDED, mask, str(N), "256", "0") == "untouched\n"


@linux
@pytest.mark.parametrize("mask", GUARDED_MASKS)
def test_gradients_do_not_touch_chunks_that_no_query_sees(mask: str, run_script: Run) -> None:
    assert run_script(GUARDED, mask, "67", "960", "1") == "untouched\n"


# Memory

PEAK = """
import sys
import numpy as np
import tilewise as tw

def status(name):
    for line in open("/proc/self/status"):
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024

N = 8192
rng = np.random.default_rng(3)
q, k, v, do = (rng.standard_normal((1, 2, N, 16), np.float32) for _ in range(4))
options = dict(mask=tw.causal(), implementation="cpu")
short = [x[:, :, :7] for x in (q, k, v, do)]
tw.numpy.attention(*short[:3], **options)  # what is imported late
before = status("VmRSS")
made = tw.numpy.attention(q, k, v, return_lse=True, return_stats=True, return_entropy=True,
                          return_max_logit=True, **options)
grads = tw.numpy.attention_vjp(do, q, k, v, made.o, made.stats, **options)
peak = status("VmHWM")
arrays = [made.o, made.lse, *made.stats, made.entropy, made.max_logit, *grads[:3]]
extra = peak - before - sum(x.nbytes for x in arrays)
assert extra < 16 << 20, extra
print(extra)
"""


@linux
def test_memory_is_linear_in_the_number_of_queries(run_script: Run) -> None:
    assert int(run_script(PEAK)) < 16 << 20


SCARCE = """
import resource
import numpy as np
import tilewise as tw
from tilewise import _core

def mapped():
    return int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()

def within(extra, call):
    '''Run with so many bytes more than there are now; None where that is too little.'''
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (mapped() + extra, hard))
    try:
        return call()
    except MemoryError:
        return None
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (hard, hard))

rng = np.random.default_rng(3)
q, k, v, do = (rng.standard_normal((1, 2, n, 509), np.float32) for n in (193, 97, 97, 193))
made = tw.numpy.attention(q, k, v, return_stats=True, implementation="cpu")
row, key = np.zeros((1, 16, 1, 1), np.float32), np.zeros((1, 1, 1, 1), np.float32)
many = np.broadcast_to(key, (1, 1, 2**21, 1))
wide = np.broadcast_to(key, (1, 1, 2**21, 512))
wide = np.lib.stride_tricks.as_strided(np.zeros(512, np.float32), wide.shape, (0, 0, 0, 4))

def gradients():
    grads = tw.numpy.attention_vjp(do, q, k, v, made.o, made.stats, implementation="cpu")
    return [x.copy() for x in grads[:3]]

def decode():
    return [tw.numpy.attention(row, many, wide, mask=tw.prefix(0), implementation="cpu")]

for call in (gradients, decode):
    for threads in (1, 2):
        _core.set_num_threads(threads)
        found = [within(extra << 20, call) for extra in (0, 1, 2, 3, 4, 6, 8, 12, 20)]
        # 4 MiB are enough for what is returned, not for the working memory.
        assert threads == 2 or found[4] is None, "was not scarce"
        wanted = call()
        for got in found:
            assert got is None or all(map(np.array_equal, got, wanted))
print("usable")
"""


@linux
def test_failed_allocation_raises_and_leaves_the_process_usable(run_script: Run) -> None:
    assert run_script(SCARCE) == "usable\n"


# Threads and processes


def test_global_lock_is_free_during_a_call() -> None:
    rng = np.random.default_rng(3)
    q = rng.standard_normal((1, 2, 1511, 64), np.float32)
    inside, stop, looks = threading.Event(), threading.Event(), 0

    def look() -> None:
        nonlocal looks
        while not stop.is_set():
            looks += inside.is_set()
            time.sleep(1e-5)

    thread = threading.Thread(target=look)
    thread.start()
    try:
        most = 0
        for _ in range(200):
            looks = 0
            inside.set()
            tw.numpy.attention(q, q, q, implementation="cpu")
            inside.clear()
            # With the lock held the thread could look before and after the call, not during it.
            most = max(most, looks)
            if most > 10:
                break
    finally:
        stop.set()
        thread.join()
    assert most > 10


def test_unlike_calls_at_once_have_the_bits_of_calls_alone(
    results: Evaluate, setting: Callable[..., Any]
) -> None:
    dims = Dims(B=1, H=4, Hk=2, N=5, Nk=1009, D=16, Dv=37)
    cases = [
        Case("at once/decode", dims),
        Case("at once/causal", replace(dims, N=211, D=31), mask=causal),
        Case("at once/one", replace(dims, N=1, Dv=3), alibi="H"),
        Case("at once/bias", replace(dims, N=997, D=7), bias="1 1 N Nk"),
    ]
    problems = [case.problem() for case in cases]
    with setting(threads=2):
        wanted = [results(problem) for problem in problems]
        with ThreadPoolExecutor(4) as pool:
            found = list(pool.map(results, problems * 4))
    for i, got in enumerate(found):
        alone = wanted[i % 4]
        assert all(same_bits(got[name], x) for name, x in alone.items())


FORK = """
import os, signal, threading
import numpy as np
import tilewise as tw
from tilewise import _core

_core.set_num_threads(3)
rng = np.random.default_rng(3)
q, k, v, do = (rng.standard_normal((1, 2, 1009, 32), np.float32) for _ in range(4))

def run():
    made = tw.numpy.attention(q, k, v, mask=tw.causal(), return_stats=True, implementation="cpu")
    grads = tw.numpy.attention_vjp(
        do, q, k, v, made.o, made.stats, mask=tw.causal(), implementation="cpu")
    return [made.o, *grads[:3]]

wanted = run()
stop = threading.Event()
def keep_busy():
    while not stop.is_set():
        run()

busy = threading.Thread(target=keep_busy)
for beside_a_call in (False, True):
    if beside_a_call:
        busy.start()
    for _ in range(4):
        child = os.fork()
        if not child:
            signal.alarm(20)
            code = 1
            try:
                same = all(map(np.array_equal, run(), wanted))
                os.closerange(0, 3)
                code = 0 if same else 2
            finally:
                os._exit(code)
        _, status = os.waitpid(child, 0)
        assert status == 0, status
stop.set()
busy.join()
assert all(map(np.array_equal, run(), wanted))
print("forked")
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_calls_work_after_fork(run_script: Run) -> None:
    assert run_script(FORK) == "forked\n"


# Settings of the environment

ASK = "from tilewise import _core; print(_core.target(), _core.num_threads())"
ATTEND = """
import numpy as np, tilewise as tw
x = np.zeros((1, 1, 9, 2), np.float32)
for _ in range(2):
    try:
        tw.attention(x, x, x, implementation="cpu")
    except ValueError as error:
        print(error)
"""


def test_environment_sets_target_and_threads(run_script: Run) -> None:
    target = _core.targets()[-1]
    env = {**os.environ, "TILEWISE_TARGET": target, "TILEWISE_NUM_THREADS": "7"}
    assert run_script(ASK, env=env) == f"{target} 7\n"
    empty = {**os.environ, "TILEWISE_TARGET": "", "TILEWISE_NUM_THREADS": ""}
    best, threads = run_script(ASK, env=empty).split()
    assert best == _core.targets()[0]
    assert int(threads) >= 1


@pytest.mark.parametrize("text", ["0", "-1", "1025", "two", "2.5", "99999999999999999999"])
def test_bad_number_of_threads_in_the_environment_is_named(text: str, run_script: Run) -> None:
    said = run_script(ATTEND, env={**os.environ, "TILEWISE_NUM_THREADS": text}).splitlines()
    assert len(said) == 2
    for line in said:
        assert line.startswith("TILEWISE_NUM_THREADS must be an integer from 1 to 1024, got")


@pytest.mark.parametrize("text", ["sse9", "AVX2", "portable "])
def test_bad_target_in_the_environment_is_named(text: str, run_script: Run) -> None:
    said = run_script(ATTEND, env={**os.environ, "TILEWISE_TARGET": text}).splitlines()
    names = ", ".join(_core.targets())
    assert said == [f"TILEWISE_TARGET must be one of {names}, got '{text}'"] * 2

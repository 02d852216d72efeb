// The handlers through which XLA runs every operator: typed, made from the headers of XLA's foreign
// function interface alone; nothing of jaxlib is linked. One calls Python, for the CPU, one
// launches compiled kernels on a GPU of NVIDIA.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <xla/ffi/api/c_api.h>
#include <xla/ffi/api/ffi.h>

#include <cstddef>
#include <cstdint>
#include <exception>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "cuda_program.hpp"

namespace nb = nanobind;
namespace ffi = xla::ffi;

namespace tilewise {
namespace {

// What Python hands over once. Never freed: a thread of XLA may outlive the interpreter.
struct Callee {
  nb::object run, ndarray;
  nb::dict dtypes;
};
Callee* callee = nullptr;

const char* name_of(ffi::DataType type) {
  switch (type) {
    case ffi::DataType::F64:
      return "float64";
    case ffi::DataType::F32:
      return "float32";
    case ffi::DataType::F16:
      return "float16";
    case ffi::DataType::BF16:
      return "bfloat16";
    case ffi::DataType::PRED:
      return "bool";
    case ffi::DataType::U8:
      return "uint8";
    case ffi::DataType::U16:
      return "uint16";
    case ffi::DataType::U32:
      return "uint32";
    case ffi::DataType::S32:
      return "int32";
    case ffi::DataType::S64:
      return "int64";
    default:
      throw nb::type_error("an array has a dtype that no operator takes");
  }
}

// A buffer of XLA as a NumPy array over the same memory.
nb::object array(const ffi::AnyBuffer& buffer, int access) {
  nb::list shape;
  for (const int64_t size : buffer.dimensions()) shape.append(size);
  char* data = static_cast<char*>(buffer.untyped_data());
  static char nothing[1];
  const auto bytes = static_cast<Py_ssize_t>(buffer.size_bytes());
  const nb::object memory =
      nb::steal(PyMemoryView_FromMemory(bytes ? data : nothing, bytes, access));
  if (!memory.is_valid()) nb::raise_python_error();
  return callee->ndarray(shape, callee->dtypes[name_of(buffer.element_type())], memory);
}

ffi::Error failure(nb::python_error& error) {
  ffi::ErrorCode code = ffi::ErrorCode::kInternal;
  if (error.matches(PyExc_TypeError) || error.matches(PyExc_ValueError))
    code = ffi::ErrorCode::kInvalidArgument;
  else if (error.matches(PyExc_NotImplementedError))
    code = ffi::ErrorCode::kUnimplemented;
  else if (error.matches(PyExc_MemoryError))
    code = ffi::ErrorCode::kResourceExhausted;
  return ffi::Error(code, nb::str(error.value()).c_str());
}

// `call` says which function of which operator this is, and what it takes besides arrays.
ffi::Error evaluate(std::string_view call, ffi::RemainingArgs args, ffi::RemainingRets rets) {
  if (!callee || !Py_IsInitialized()) return ffi::Error::Internal("tilewise.jax is not imported");
  const nb::gil_scoped_acquire locked;
  try {
    nb::list inputs, outputs;
    for (size_t i = 0; i < args.size(); i++)
      inputs.append(array(*args.get<ffi::AnyBuffer>(i), PyBUF_READ));
    for (size_t i = 0; i < rets.size(); i++)
      outputs.append(array(**rets.get<ffi::AnyBuffer>(i), PyBUF_WRITE));
    callee->run(nb::str(call.data(), call.size()), inputs, outputs);
  } catch (nb::python_error& error) {
    return failure(error);
  } catch (const std::exception& error) {
    return ffi::Error::Internal(error.what());
  }
  return ffi::Error::Success();
}

XLA_FFI_DEFINE_HANDLER(
    handler, evaluate,
    ffi::Ffi::Bind().Attr<std::string_view>("call").RemainingArgs().RemainingRets());

// Nothing of Python is used here.
ffi::Error launch(cuda::Stream stream, ffi::Span<const int64_t> numbers, std::string_view kernels,
                  std::string_view code, ffi::RemainingArgs args, ffi::RemainingRets rets) {
  std::vector<void*> buffers;
  for (size_t i = 0; i < args.size(); i++)
    buffers.push_back(args.get<ffi::AnyBuffer>(i)->untyped_data());
  for (size_t i = 0; i < rets.size(); i++)
    buffers.push_back((*rets.get<ffi::AnyBuffer>(i))->untyped_data());
  try {
    cuda::run({{numbers.begin(), numbers.size()}, kernels, code}, buffers, stream);
  } catch (const std::exception& error) {
    return ffi::Error::Internal(std::string("tilewise: ") + error.what());
  }
  return ffi::Error::Success();
}

ffi::Error launch_on_the_host(ffi::Span<const int64_t> numbers, std::string_view kernels,
                              std::string_view code, ffi::RemainingArgs args,
                              ffi::RemainingRets rets) {
  return launch(nullptr, numbers, kernels, code, args, rets);
}

template <typename Binding>
auto with_program(Binding binding) {
  return std::move(binding)
      .template Attr<ffi::Span<const int64_t>>("numbers")
      .template Attr<std::string_view>("kernels")
      .template Attr<std::string_view>("code")
      .RemainingArgs()
      .RemainingRets();
}

XLA_FFI_DEFINE_HANDLER(launcher, launch,
                       with_program(ffi::Ffi::Bind().Ctx<ffi::PlatformStream<cuda::Stream>>()));
XLA_FFI_DEFINE_HANDLER(host_launcher, launch_on_the_host, with_program(ffi::Ffi::Bind()));

}  // namespace
}  // namespace tilewise

NB_MODULE(_xla, m) {
  using namespace tilewise;
  m.doc() = "The handlers for XLA. Private: use tilewise.jax.";
  m.attr("API") = nb::make_tuple(XLA_FFI_API_MAJOR, XLA_FFI_API_MINOR);
  m.def(
      "handler", [] { return nb::capsule(reinterpret_cast<void*>(handler)); },
      "The handler, as jax.ffi.register_ffi_target takes it.");
  m.def(
      "launcher",
      [](bool on_host) {
        return nb::capsule(reinterpret_cast<void*>(on_host ? host_launcher : launcher));
      },
      nb::arg("on_host") = false,
      "The handler that launches kernels; on_host for memory of the host, and without a stream.");
  m.def("open_driver", &cuda::open_driver, nb::arg("path"),
        "Let kernels be launched by another driver than libcuda.so.1.");
  m.def(
      "set_run",
      [](nb::object run, nb::object ndarray, nb::dict dtypes) {
        if (!callee) callee = new Callee;
        *callee = {std::move(run), std::move(ndarray), std::move(dtypes)};
      },
      nb::arg("run"), nb::arg("ndarray"), nb::arg("dtypes"),
      "Let the handler call run(call, inputs, outputs) with arrays of the type ndarray.");
}

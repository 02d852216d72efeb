// The handler through which XLA runs every operator: typed, made from the headers of XLA's foreign
// function interface alone; nothing of jaxlib is linked.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <xla/ffi/api/c_api.h>
#include <xla/ffi/api/ffi.h>

#include <cstdint>
#include <exception>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace nb = nanobind;
namespace ffi = xla::ffi;

namespace tilewise {
namespace {

// What Python hands over once. Never freed: a thread of XLA may outlive the interpreter.
struct Callee {
  nb::object run, bfloat16;
};
Callee* callee = nullptr;

std::optional<nb::dlpack::dtype> element(ffi::DataType type) {
  switch (type) {
    case ffi::DataType::F64:
      return nb::dtype<double>();
    case ffi::DataType::F32:
      return nb::dtype<float>();
    case ffi::DataType::F16:
      return nb::dlpack::dtype{static_cast<uint8_t>(nb::dlpack::dtype_code::Float), 16, 1};
    case ffi::DataType::BF16:  // as bits, which `view` gives their meaning
    case ffi::DataType::U16:
      return nb::dtype<uint16_t>();
    case ffi::DataType::PRED:
      return nb::dtype<bool>();
    case ffi::DataType::U8:
      return nb::dtype<uint8_t>();
    case ffi::DataType::S32:
      return nb::dtype<int32_t>();
    case ffi::DataType::U32:
      return nb::dtype<uint32_t>();
    case ffi::DataType::S64:
      return nb::dtype<int64_t>();
    default:
      return std::nullopt;
  }
}

// A buffer of XLA as a NumPy array over the same memory.
template <class... Access>
nb::object array(const ffi::AnyBuffer& buffer) {
  const std::optional<nb::dlpack::dtype> dtype = element(buffer.element_type());
  if (!dtype) throw nb::type_error("an array has a dtype that no operator takes");
  const auto dims = buffer.dimensions();
  const std::vector<size_t> shape(dims.begin(), dims.end());
  static char nothing[64];
  void* data = buffer.element_count() ? buffer.untyped_data() : nothing;
  nb::ndarray<nb::numpy, nb::device::cpu, Access...> view(data, shape.size(), shape.data(),
                                                          nb::handle(), nullptr, *dtype);
  nb::object found = nb::cast(view, nb::rv_policy::reference);
  return buffer.element_type() == ffi::DataType::BF16 ? found.attr("view")(callee->bfloat16)
                                                      : found;
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
      inputs.append(array<nb::ro>(*args.get<ffi::AnyBuffer>(i)));
    for (size_t i = 0; i < rets.size(); i++) outputs.append(array(**rets.get<ffi::AnyBuffer>(i)));
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

}  // namespace
}  // namespace tilewise

NB_MODULE(_xla, m) {
  using namespace tilewise;
  m.doc() = "The handler for XLA. Private: use tilewise.jax.";
  m.attr("API") = nb::make_tuple(XLA_FFI_API_MAJOR, XLA_FFI_API_MINOR);
  m.def(
      "handler", [] { return nb::capsule(reinterpret_cast<void*>(handler)); },
      "The handler, as jax.ffi.register_ffi_target takes it.");
  m.def(
      "set_run",
      [](nb::object run, nb::object bfloat16) {
        if (!callee) callee = new Callee;
        *callee = {std::move(run), std::move(bfloat16)};
      },
      nb::arg("run"), nb::arg("bfloat16"),
      "Let the handler call run(call, inputs, outputs); bfloat16 is the dtype of such arrays.");
}

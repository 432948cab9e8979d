// Converts Python's arrays to the memory and the structs of emulated kernels.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <map>
#include <optional>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

#include "cuda/gru/types.h"
#include "machine.h"

namespace emulation {

namespace py = pybind11;
using fastgru::cuda::GruBackwardLoop;
using fastgru::cuda::GruForwardLoop;
using fastgru::cuda::Precision;

using Array = std::optional<py::array>;

inline Precision precision_of(const std::string& name) {
  const std::map<std::string, Precision> all = {
      {"bf16", Precision::bf16}, {"f16", Precision::f16}, {"tf32", Precision::tf32}};
  return all.at(name);
}

// Calls run(precision), a constant.
template <typename Run>
void with_precision(Precision precision, Run run) {
  if (precision == Precision::bf16) run(std::integral_constant<Precision, Precision::bf16>());
  if (precision == Precision::f16) run(std::integral_constant<Precision, Precision::f16>());
  if (precision == Precision::tf32) run(std::integral_constant<Precision, Precision::tf32>());
}

// Calls run(precision, column tiles), both constants.
template <typename Run>
void with_constants(Precision precision, int column_tiles, Run run) {
  with_precision(precision, [&](auto p) {
    if (column_tiles == 1)
      run(p, std::integral_constant<int, 1>());
    else
      run(p, std::integral_constant<int, 2>());
  });
}

// The arrays of a call: the memory that the kernel may access.
class Memory {
 public:
  const void* add(const Array& array) { return pointer(array, false); }
  void* add_output(const Array& array) { return pointer(array, true); }
  std::vector<Region> regions;

 private:
  void* pointer(const Array& array, bool written) {
    if (!array) return nullptr;
    if (!(array->flags() & py::array::c_style)) throw std::invalid_argument("arrays must be contiguous");
    const uintptr_t begin = reinterpret_cast<uintptr_t>(array->data());
    regions.push_back({begin, begin + size_t(array->nbytes()), written});
    return const_cast<void*>(array->data());
  }
};

inline GruForwardLoop forward_loop(Memory& memory, const std::string& precision, int T, const Array& i,
                                   const Array& w_hh, const Array& b_ih, const Array& b_hh, const py::array& hx,
                                   const Array& table, const py::array& output, const Array& h_n, const Array& gates) {
  GruForwardLoop loop{};
  loop.precision = precision_of(precision);
  loop.T = T, loop.B = int(hx.shape(1)), loop.H = int(hx.shape(2)), loop.D = int(hx.shape(0));
  loop.N = int(output.shape(0));
  loop.i = memory.add(i), loop.w_hh = memory.add(w_hh), loop.b_ih = memory.add(b_ih), loop.b_hh = memory.add(b_hh);
  loop.hx = memory.add(hx), loop.table = static_cast<const int32_t*>(memory.add(table));
  loop.output = memory.add_output(output), loop.h_n = memory.add_output(h_n), loop.gates = memory.add_output(gates);
  return loop;
}

inline GruBackwardLoop backward_loop(Memory& memory, const std::string& precision, int T, const Array& grad_output,
                                     const Array& grad_h_n, const Array& w_hh, const py::array& previous,
                                     const Array& gates, const Array& table, const Array& grad_gates,
                                     const py::array& grad_hx) {
  GruBackwardLoop loop{};
  loop.precision = precision_of(precision);
  loop.T = T, loop.B = int(grad_hx.shape(1)), loop.H = int(grad_hx.shape(2)), loop.D = int(grad_hx.shape(0));
  loop.N = int(previous.shape(0));
  loop.grad_output = memory.add(grad_output), loop.grad_h_n = memory.add(grad_h_n), loop.w_hh = memory.add(w_hh);
  loop.previous = memory.add(previous), loop.gates = memory.add(gates);
  loop.table = static_cast<const int32_t*>(memory.add(table));
  loop.grad_gates = memory.add_output(grad_gates), loop.grad_hx = memory.add_output(grad_hx);
  return loop;
}

}  // namespace emulation

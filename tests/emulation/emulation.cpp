// The persistent GRU kernels of csrc/cuda on the CPU, for Python: arrays in, arrays filled.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <map>
#include <optional>
#include <string>

#include "cuda/gru_cluster_bwd.cuh"
#include "cuda/gru_cluster_fwd.cuh"

namespace py = pybind11;
using namespace fastgru::cuda;

namespace {

using Array = std::optional<py::array>;

Precision precision_of(const std::string& name) {
  const std::map<std::string, Precision> all = {
      {"bf16", Precision::bf16}, {"f16", Precision::f16}, {"tf32", Precision::tf32}};
  return all.at(name);
}

emulation::Fault fault_of(const std::string& name) {
  using emulation::Fault;
  const std::map<std::string, Fault> all = {
      {"none", Fault::none},
      {"wrong phase", Fault::wrong_phase},
      {"missing wait", Fault::missing_wait},
      {"lost message", Fault::lost_message},
      {"early delivery", Fault::early_delivery},
      {"no block barrier", Fault::no_block_barrier},
      {"no cluster start", Fault::no_cluster_start},
  };
  return all.at(name);
}

// The arrays of a call: what the kernel may touch.
class Memory {
 public:
  const void* add(const Array& array) { return pointer(array, false); }
  void* add_output(const Array& array) { return pointer(array, true); }
  std::vector<emulation::Region> regions;

 private:
  void* pointer(const Array& array, bool written) {
    if (!array) return nullptr;
    if (!(array->flags() & py::array::c_style)) throw std::invalid_argument("arrays must be contiguous");
    const uintptr_t begin = reinterpret_cast<uintptr_t>(array->data());
    regions.push_back({begin, begin + size_t(array->nbytes()), written});
    return const_cast<void*>(array->data());
  }
};

// Calls run(precision, column tiles) with both as constants.
template <typename Run>
void with_constants(Precision precision, int column_tiles, Run run) {
  const auto with_columns = [&](auto p) {
    if (column_tiles == 1)
      run(p, std::integral_constant<int, 1>());
    else
      run(p, std::integral_constant<int, 2>());
  };
  if (precision == Precision::bf16) with_columns(std::integral_constant<Precision, Precision::bf16>());
  if (precision == Precision::f16) with_columns(std::integral_constant<Precision, Precision::f16>());
  if (precision == Precision::tf32) with_columns(std::integral_constant<Precision, Precision::tf32>());
}

emulation::Grid grid_of(int B, int D, int cluster, int column_tiles, int bytes) {
  if (bytes == 0) throw std::invalid_argument("no such shape");
  emulation::Grid grid;
  grid.x = ceil_div(B, COLUMNS * column_tiles) * cluster;
  grid.y = D;
  grid.cluster = cluster;
  grid.threads = CLUSTER_THREADS;
  grid.shared_bytes = bytes;
  return grid;
}

void forward(const std::string& precision, int T, const Array& i, const Array& w_hh, const Array& b_ih,
             const Array& b_hh, const py::array& hx, const Array& rows, const py::array& output, const Array& h_n,
             const Array& gates, int cluster, int column_tiles, uint64_t seed, const std::string& fault) {
  Memory memory;
  GruForwardLoop loop{};
  loop.precision = precision_of(precision);
  loop.T = T, loop.B = int(hx.shape(1)), loop.H = int(hx.shape(2)), loop.D = int(hx.shape(0));
  loop.N = int(output.shape(0));
  loop.i = memory.add(i), loop.w_hh = memory.add(w_hh), loop.b_ih = memory.add(b_ih), loop.b_hh = memory.add(b_hh);
  loop.hx = memory.add(hx), loop.rows = static_cast<const int32_t*>(memory.add(rows));
  loop.output = memory.add_output(output), loop.h_n = memory.add_output(h_n), loop.gates = memory.add_output(gates);
  const ForwardShape shape = forward_shape(loop.H, loop.precision, cluster, column_tiles);
  const emulation::Grid grid = grid_of(loop.B, loop.D, cluster, column_tiles, shape.bytes);
  with_constants(loop.precision, column_tiles, [&](auto p, auto tiles) {
    emulation::Machine(grid, {seed, fault_of(fault)}, memory.regions).run([&] {
      gru_cluster_forward_block<decltype(p)::value, decltype(tiles)::value>(loop, shape);
    });
  });
}

void backward(const std::string& precision, int T, const Array& grad_output, const Array& grad_h_n, const Array& w_hh,
              const py::array& previous, const Array& gates, const Array& rows, const Array& grad_gates,
              const py::array& grad_hx, int cluster, int column_tiles, uint64_t seed, const std::string& fault) {
  Memory memory;
  GruBackwardLoop loop{};
  loop.precision = precision_of(precision);
  loop.T = T, loop.B = int(grad_hx.shape(1)), loop.H = int(grad_hx.shape(2)), loop.D = int(grad_hx.shape(0));
  loop.N = int(previous.shape(0));
  loop.grad_output = memory.add(grad_output), loop.grad_h_n = memory.add(grad_h_n), loop.w_hh = memory.add(w_hh);
  loop.previous = memory.add(previous), loop.gates = memory.add(gates);
  loop.rows = static_cast<const int32_t*>(memory.add(rows));
  loop.grad_gates = memory.add_output(grad_gates), loop.grad_hx = memory.add_output(grad_hx);
  const BackwardShape shape = backward_shape(loop.H, loop.precision, cluster, column_tiles);
  const emulation::Grid grid = grid_of(loop.B, loop.D, cluster, column_tiles, shape.bytes);
  with_constants(loop.precision, column_tiles, [&](auto p, auto tiles) {
    emulation::Machine(grid, {seed, fault_of(fault)}, memory.regions).run([&] {
      gru_cluster_backward_block<decltype(p)::value, decltype(tiles)::value>(loop, shape);
    });
  });
}

// 0: there is no such shape.
int shared_bytes(const std::string& direction, const std::string& precision, int H, int cluster, int column_tiles) {
  return direction == "forward" ? forward_shape(H, precision_of(precision), cluster, column_tiles).bytes
                                : backward_shape(H, precision_of(precision), cluster, column_tiles).bytes;
}

}  // namespace

PYBIND11_MODULE(_emulation, m) {
  m.def("shared_bytes", shared_bytes);
  m.def("forward", forward, py::kw_only(), py::arg("precision"), py::arg("T"), py::arg("i"), py::arg("w_hh"),
        py::arg("b_ih"), py::arg("b_hh"), py::arg("hx"), py::arg("rows"), py::arg("output"), py::arg("h_n"),
        py::arg("gates"), py::arg("cluster"), py::arg("column_tiles"), py::arg("seed"), py::arg("fault") = "none");
  m.def("backward", backward, py::kw_only(), py::arg("precision"), py::arg("T"), py::arg("grad_output"),
        py::arg("grad_h_n"), py::arg("w_hh"), py::arg("previous"), py::arg("gates"), py::arg("rows"),
        py::arg("grad_gates"), py::arg("grad_hx"), py::arg("cluster"), py::arg("column_tiles"), py::arg("seed"),
        py::arg("fault") = "none");
}

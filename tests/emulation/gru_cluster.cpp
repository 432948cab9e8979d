// Runs the cluster kernels of csrc/cuda/gru on the emulated machine, for Python: reads arrays and fills others.
#include "arrays.h"
#include "cuda/gru/cluster_backward.cuh"
#include "cuda/gru/cluster_forward.cuh"

namespace py = pybind11;
using namespace fastgru::cuda;
using emulation::Array;
using emulation::Memory;
using emulation::precision_of;

namespace {

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
             const Array& b_hh, const py::array& hx, const Array& table, const py::array& output, const Array& h_n,
             const Array& gates, int cluster, int column_tiles, uint64_t seed, const std::string& fault) {
  Memory memory;
  const GruForwardLoop loop =
      emulation::forward_loop(memory, precision, T, i, w_hh, b_ih, b_hh, hx, table, output, h_n, gates);
  const ForwardShape shape = forward_shape(loop.H, loop.precision, cluster, column_tiles);
  const emulation::Grid grid = grid_of(loop.B, loop.D, cluster, column_tiles, shape.bytes);
  emulation::with_constants(loop.precision, column_tiles, [&](auto p, auto tiles) {
    emulation::Machine(grid, {seed, fault_of(fault)}, memory.regions).run([&] {
      gru_cluster_forward_block<decltype(p)::value, decltype(tiles)::value>(loop, shape);
    });
  });
}

void backward(const std::string& precision, int T, const Array& grad_output, const Array& grad_h_n, const Array& w_hh,
              const py::array& previous, const Array& gates, const Array& table, const Array& grad_gates,
              const py::array& grad_hx, int cluster, int column_tiles, uint64_t seed, const std::string& fault) {
  Memory memory;
  const GruBackwardLoop loop = emulation::backward_loop(memory, precision, T, grad_output, grad_h_n, w_hh, previous,
                                                        gates, table, grad_gates, grad_hx);
  const BackwardShape shape = backward_shape(loop.H, loop.precision, cluster, column_tiles);
  const emulation::Grid grid = grid_of(loop.B, loop.D, cluster, column_tiles, shape.bytes);
  emulation::with_constants(loop.precision, column_tiles, [&](auto p, auto tiles) {
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

PYBIND11_MODULE(_gru_cluster, m) {
  m.def("shared_bytes", shared_bytes);
  m.def("forward", forward, py::kw_only(), py::arg("precision"), py::arg("T"), py::arg("i"), py::arg("w_hh"),
        py::arg("b_ih"), py::arg("b_hh"), py::arg("hx"), py::arg("table"), py::arg("output"), py::arg("h_n"),
        py::arg("gates"), py::arg("cluster"), py::arg("column_tiles"), py::arg("seed"), py::arg("fault") = "none");
  m.def("backward", backward, py::kw_only(), py::arg("precision"), py::arg("T"), py::arg("grad_output"),
        py::arg("grad_h_n"), py::arg("w_hh"), py::arg("previous"), py::arg("gates"), py::arg("table"),
        py::arg("grad_gates"), py::arg("grad_hx"), py::arg("cluster"), py::arg("column_tiles"), py::arg("seed"),
        py::arg("fault") = "none");
}

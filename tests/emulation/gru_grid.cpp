// Runs the kernels of csrc/cuda/gru/grid.cuh and tokens.cuh on the emulated machine, for Python: reads arrays and fills
// others.
#include "arrays.h"
#include "cuda/gru/grid.cuh"
#include "cuda/gru/tokens.cuh"

namespace py = pybind11;
using namespace fastgru::cuda;
using emulation::Array;
using emulation::Memory;
using emulation::precision_of;

namespace {

GridFault fault_of(const std::string& name) {
  const std::map<std::string, GridFault> all = {
      {"none", GridFault::none},
      {"missing wait", GridFault::missing_wait},
      {"lost word", GridFault::lost_word},
      {"never cleared", GridFault::never_cleared},
      {"no fence after setting", GridFault::no_fence_after_setting},
      {"no fence before looking", GridFault::no_fence_before_looking},
      {"no block barrier", GridFault::none},
      {"stale workspace", GridFault::none},
  };
  return all.at(name);
}

struct Run {
  uint64_t seed;
  std::string fault;
};

// Runs body(precision, column tiles, shape, exchange), the first two as constants, one launch per direction or one for
// all.
template <int LEFTS, typename Body>
void launch(Precision precision, int H, int B, int D, int column_tiles, bool each_direction, const Run& run,
            Memory& memory, Body body) {
  const auto with_both = [&](auto p, auto tiles) {
    const GridShape shape = grid_shape<LEFTS, decltype(tiles)::value>(H, B, precision);
    if (shape.bytes == 0) throw std::invalid_argument("no such shape");
    // The words of another run, or the initial value that a launch gives them.
    std::vector<uint32_t> exchange(size_t(D) * shape.groups * BUFFERS * shape.operand_words,
                                   run.fault == "stale workspace" ? 0x3c003c00 : EMPTY);
    const uintptr_t begin = reinterpret_cast<uintptr_t>(exchange.data());
    memory.regions.push_back({begin, begin + exchange.size() * 4, true});
    for (int first = 0; first < D; first += each_direction ? 1 : D) {
      emulation::Grid grid;
      grid.x = shape.groups * shape.tiles;
      grid.y = each_direction ? 1 : D;
      grid.threads = GRID_THREADS;
      grid.shared_bytes = shape.bytes;
      Exchange words(run.seed, fault_of(run.fault), exchange, grid.x, grid.x * grid.y * grid.threads, grid.threads);
      Exchange::current() = &words;
      const auto fault = run.fault == "no block barrier" ? emulation::Fault::no_block_barrier : emulation::Fault::none;
      emulation::Machine(grid, {run.seed, fault}, memory.regions).run([&] {
        body(p, tiles, shape, first, exchange.data());
      });
    }
  };
  emulation::with_constants(precision, column_tiles, with_both);
}

void forward(const std::string& precision, int T, const Array& i, const Array& w_hh, const Array& b_ih,
             const Array& b_hh, const py::array& hx, const Array& table, const py::array& output, const Array& h_n,
             const Array& gates, int column_tiles, bool each_direction, uint64_t seed, const std::string& fault) {
  Memory memory;
  const GruForwardLoop loop =
      emulation::forward_loop(memory, precision, T, i, w_hh, b_ih, b_hh, hx, table, output, h_n, gates);
  launch<3>(loop.precision, loop.H, loop.B, loop.D, column_tiles, each_direction, {seed, fault}, memory,
            [&](auto p, auto tiles, const GridShape& shape, int first, uint32_t* exchange) {
              gru_grid_forward_block<decltype(p)::value, decltype(tiles)::value>(loop, shape, first, exchange);
            });
}

void backward(const std::string& precision, int T, const Array& grad_output, const Array& grad_h_n, const Array& w_hh,
              const py::array& previous, const Array& gates, const Array& table, const Array& grad_gates,
              const py::array& grad_hx, int column_tiles, bool each_direction, uint64_t seed,
              const std::string& fault) {
  Memory memory;
  const GruBackwardLoop loop = emulation::backward_loop(memory, precision, T, grad_output, grad_h_n, w_hh, previous,
                                                        gates, table, grad_gates, grad_hx);
  launch<1>(loop.precision, loop.H, loop.B, loop.D, column_tiles, each_direction, {seed, fault}, memory,
            [&](auto p, auto tiles, const GridShape& shape, int first, uint32_t* exchange) {
              gru_grid_backward_block<decltype(p)::value, decltype(tiles)::value>(loop, shape, first, exchange);
            });
}

void run_tokens(int x, int y, const Memory& memory, const std::function<void()>& body) {
  emulation::Grid grid;
  grid.x = x, grid.y = y, grid.threads = TOKEN_THREADS;
  emulation::Machine(grid, {}, memory.regions).run(body);
}

// With the widest word that divides a token's H elements, as the launch does.
void previous_states(int T, const py::array& output, const py::array& hx, const Array& table,
                     const py::array& previous) {
  Memory memory;
  GruTokens s{T, int(hx.shape(1)), int(hx.shape(2)), int(hx.shape(0)), int(output.shape(0)), nullptr};
  s.table = static_cast<const int32_t*>(memory.add(table));
  const void* from[] = {memory.add(output), memory.add(hx)};
  void* to = memory.add_output(previous);
  const int row_bytes = s.H * int(hx.itemsize());
  const auto run = [&](auto word) {
    using Word = decltype(word);
    run_tokens(T * ((s.B + ROWS_PER_BLOCK - 1) / ROWS_PER_BLOCK), s.D, memory, [&] {
      gru_previous_states_block(s, row_bytes / int(sizeof(Word)), static_cast<const Word*>(from[0]),
                                static_cast<const Word*>(from[1]), static_cast<Word*>(to));
    });
  };
  if (row_bytes % 16 == 0)
    run(SixteenBytes());
  else if (row_bytes % 4 == 0)
    run(uint32_t());
  else
    run(uint16_t());
}

void gates_of_tokens(const std::string& precision, const py::array& i, const py::array& g, const Array& b_ih,
                     const Array& b_hh, const py::array& gates) {
  Memory memory;
  const GruTokens s{0, 0, int(i.shape(2)) / 3, int(i.shape(1)), int(i.shape(0)), nullptr};
  const void* from[] = {memory.add(i), memory.add(g), memory.add(b_ih), memory.add(b_hh)};
  void* to = memory.add_output(gates);
  const auto run = [&](auto p) {
    using Stored = typename Numbers<decltype(p)::value>::Stored;
    run_tokens(s.N, s.D, memory, [&] {
      gru_gates_block<decltype(p)::value>(s, static_cast<const Stored*>(from[0]), static_cast<const Stored*>(from[1]),
                                          static_cast<const Stored*>(from[2]), static_cast<const Stored*>(from[3]),
                                          static_cast<Stored*>(to));
    });
  };
  emulation::with_precision(precision_of(precision), run);
}

int shared_bytes(const std::string& direction, const std::string& precision, int H, int B, int column_tiles) {
  const Precision p = precision_of(precision);
  if (direction == "forward")
    return column_tiles == 1 ? grid_shape<3, 1>(H, B, p).bytes : grid_shape<3, 2>(H, B, p).bytes;
  return column_tiles == 1 ? grid_shape<1, 1>(H, B, p).bytes : grid_shape<1, 2>(H, B, p).bytes;
}

}  // namespace

PYBIND11_MODULE(_gru_grid, m) {
  m.def("forward", forward, py::kw_only(), py::arg("precision"), py::arg("T"), py::arg("i"), py::arg("w_hh"),
        py::arg("b_ih"), py::arg("b_hh"), py::arg("hx"), py::arg("table"), py::arg("output"), py::arg("h_n"),
        py::arg("gates"), py::arg("column_tiles"), py::arg("each_direction"), py::arg("seed"),
        py::arg("fault") = "none");
  m.def("shared_bytes", shared_bytes);
  m.def("previous_states", previous_states);
  m.def("gates", gates_of_tokens);
  m.def("backward", backward, py::kw_only(), py::arg("precision"), py::arg("T"), py::arg("grad_output"),
        py::arg("grad_h_n"), py::arg("w_hh"), py::arg("previous"), py::arg("gates"), py::arg("table"),
        py::arg("grad_gates"), py::arg("grad_hx"), py::arg("column_tiles"), py::arg("each_direction"), py::arg("seed"),
        py::arg("fault") = "none");
}

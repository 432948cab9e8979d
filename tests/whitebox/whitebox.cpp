// White-box access to the torch-free CPU kernels for tests and micro-benchmarks. Built by build.py, never shipped.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <atomic>
#include <chrono>
#include <cmath>
#include <cstring>
#include <map>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "cpu/isa.h"
#include "cpu/threads/backoff.h"
#include "cpu/threads/phases.h"

namespace py = pybind11;
using fastgru::Engine;

namespace {

const Engine& engine(const std::string& name) {
  fastgru::set_engine(name);
  return fastgru::current_engine();
}

std::vector<std::string> engines() {
  std::vector<std::string> names;
  const std::string all = fastgru::usable_engines() + ",";
  for (size_t from = 0, to; (to = all.find(',', from)) != std::string::npos; from = to + 1)
    names.push_back(all.substr(from, to - from));
  return names;
}

template <class C>
using Array = py::array_t<C, py::array::c_style | py::array::forcecast>;

template <class C>
using Map = void (*)(int64_t, const C*, C*);

template <class C>
Map<C> function(const Engine& e, const std::string& name) {
  if constexpr (sizeof(C) == 4) {
    if (name == "exp") return e.whitebox->exp_f32;
    if (name == "sigmoid") return e.whitebox->sigmoid_f32;
    if (name == "tanh") return e.whitebox->tanh_f32;
  } else {
    if (name == "exp") return e.whitebox->exp_f64;
    if (name == "sigmoid") return e.whitebox->sigmoid_f64;
    if (name == "tanh") return e.whitebox->tanh_f64;
  }
  throw std::invalid_argument("no function " + name);
}

template <class C>
Array<C> apply(const std::string& isa, const std::string& name, const Array<C>& x) {
  Array<C> y(x.size());
  function<C>(engine(isa), name)(x.size(), x.data(), y.mutable_data());
  return y;
}

template <class Wide>
Wide exact(const std::string& name, Wide x) {
  if (name == "exp") return std::exp(x);
  if (name == "tanh") return std::tanh(x);
  return x < 0 ? std::exp(x) / (1 + std::exp(x)) : 1 / (1 + std::exp(-x));
}

// Distance from the exact value in units of the last place of the result's binade (of the smallest subnormal below the
// normal numbers). Infinite where one is finite and the other is not, or where the sign of a zero is wrong.
template <class C, class Wide>
double ulp_error(C got, Wide want, C x) {
  if (std::isnan(x)) return std::isnan(got) ? 0 : INFINITY;
  const C rounded = C(want);
  if (std::isinf(rounded) || std::isinf(got)) return rounded == got ? 0 : INFINITY;
  if (std::isnan(got)) return INFINITY;
  if (rounded == 0 && got == 0 && std::signbit(got) != std::signbit(rounded)) return INFINITY;
  int exponent;
  std::frexp(rounded, &exponent);
  const int digits = std::numeric_limits<C>::digits, lowest = std::numeric_limits<C>::min_exponent;
  const Wide ulp = std::ldexp(Wide(1), (exponent < lowest ? lowest : exponent) - digits);
  return double(std::fabs(Wide(got) - want) / ulp);
}

struct Worst {
  double error = 0, x = 0;
};

// Every `stride`-th of the 2^32 floats, infinities and NaN included.
Worst sweep_f32(const std::string& isa, const std::string& name, uint64_t stride) {
  const Map<float> f = function<float>(engine(isa), name);
  constexpr int kThreads = 2, kBatch = 4096;
  Worst worst[kThreads];
  std::vector<std::thread> threads;
  py::gil_scoped_release release;
  for (int t = 0; t < kThreads; ++t)
    threads.emplace_back([&, t] {
      std::vector<float> x(kBatch), y(kBatch);
      const uint64_t end = uint64_t(1) << 32;
      for (uint64_t first = t * kBatch * stride; first < end; first += kThreads * kBatch * stride) {
        int n = 0;
        for (uint64_t bits = first; n < kBatch && bits < end; bits += stride, ++n) {
          const uint32_t word = uint32_t(bits);
          std::memcpy(&x[n], &word, 4);
        }
        f(n, x.data(), y.data());
        for (int i = 0; i < n; ++i) {
          const double error = ulp_error<float, double>(y[i], exact<double>(name, x[i]), x[i]);
          if (!(error <= worst[t].error)) worst[t] = {error, x[i]};
        }
      }
    });
  for (std::thread& t : threads) t.join();
  return worst[0].error >= worst[1].error ? worst[0] : worst[1];
}

// `count` doubles with random bits, and as many in the range where the functions are not constant.
Worst sweep_f64(const std::string& isa, const std::string& name, int64_t count) {
  const Map<double> f = function<double>(engine(isa), name);
  std::mt19937_64 random(1);
  Worst worst;
  for (int64_t i = 0; i < 2 * count; ++i) {
    uint64_t bits = random();
    if (i & 1) bits = (bits & 0x800fffffffffffffull) | ((960 + (bits >> 52) % 75) << 52);
    double x, y;
    std::memcpy(&x, &bits, 8);
    f(1, &x, &y);
    const double error = ulp_error<double, long double>(y, exact<long double>(name, x), x);
    if (!(error <= worst.error)) worst = {error, x};
  }
  return worst;
}

const std::map<std::string, fastgru::DType> kHalves = {{"bf16", fastgru::DType::bf16}, {"f16", fastgru::DType::f16}};

Array<float> widen(const std::string& isa, const std::string& dtype, const Array<uint16_t>& bits) {
  Array<float> y(bits.size());
  engine(isa).whitebox->to_f32[int(kHalves.at(dtype))](bits.size(), bits.data(), y.mutable_data());
  return y;
}

Array<uint16_t> narrow(const std::string& isa, const std::string& dtype, const Array<float>& x) {
  Array<uint16_t> y(x.size());
  engine(isa).whitebox->from_f32[int(kHalves.at(dtype))](x.size(), x.data(), y.mutable_data());
  return y;
}

// a [M, K] (transposed: [K, M]) times b [K, N].
Array<float> gemm(const std::string& isa, const Array<float>& a, const Array<float>& b, bool transposed) {
  const int64_t M = a.shape(transposed ? 1 : 0), K = b.shape(0), N = b.shape(1);
  Array<float> c({M, N});
  const Engine& e = engine(isa);
  (transposed ? e.whitebox->gemm_tn_f32 : e.whitebox->gemm_f32)(M, N, K, a.data(), b.data(), c.mutable_data());
  return c;
}

// Runs `count` phases of `items` items on `workers` threads. Those in `late` start only after `delay`; all of them now
// and then sleep in the middle of an item. Returns how many items ran out of order (an item of the phase before not yet
// complete) or not exactly once: zero.
int64_t phase_violations(int workers, int count, int items, const std::vector<int>& late, double delay, bool serial) {
  fastgru::Phases phases(workers);
  std::vector<std::atomic<int>> runs(size_t(count) * items);
  std::atomic<int64_t> violations{0};
  const auto body = [&](int index) {
    for (int w : late)
      if (w == index) std::this_thread::sleep_for(std::chrono::duration<double>(delay));
    fastgru::Worker worker(phases, index);
    std::mt19937 random(index);
    for (int s = 0; s < count; ++s)
      worker.phase(items, s & 1, [&](int64_t i) {
        if (s > 0)
          for (int j = 0; j < items; ++j)
            if (runs[size_t(s - 1) * items + j].load(std::memory_order_relaxed) != 1) ++violations;
        if (random() % 64 == 0) std::this_thread::sleep_for(std::chrono::microseconds(50));
        if (runs[size_t(s) * items + i].fetch_add(1, std::memory_order_relaxed) != 0) ++violations;
      });
  };
  py::gil_scoped_release release;
  if (serial) {
    for (int i = 0; i < workers; ++i) body(i);
  } else {
    std::vector<std::thread> threads;
    for (int i = 0; i < workers; ++i) threads.emplace_back(body, i);
    for (std::thread& t : threads) t.join();
  }
  for (const auto& r : runs)
    if (r.load() != 1) ++violations;
  return violations.load();
}

}  // namespace

PYBIND11_MODULE(_whitebox, m) {
  py::class_<Worst>(m, "Worst").def_readonly("error", &Worst::error).def_readonly("x", &Worst::x);
  py::class_<fastgru::Backoff>(m, "Backoff")
      .def(py::init<>())
      .def("alone", &fastgru::Backoff::alone)
      .def("region_ended", &fastgru::Backoff::region_ended)
      .def_static("count", &fastgru::Backoff::count);
  m.def("engines", engines);
  m.def("vector_bytes", [](const std::string& isa) { return engine(isa).vector_bytes; });
  m.def("apply_f32", apply<float>);
  m.def("apply_f64", apply<double>);
  m.def("sweep_f32", sweep_f32);
  m.def("sweep_f64", sweep_f64);
  m.def("widen", widen);
  m.def("narrow", narrow);
  m.def("gemm", gemm);
  m.def("phase_violations", phase_violations);
}

// fastgru._direct: small calls without torch's dispatcher, whose way from Python to a kernel and back takes longer than
// a step of a small GRU, or attention over a few keys.
//
// Every function takes the tensors as they are, and answers None where anything is not plain: a tensor that is not a
// dense one on the CPU, of another dtype, size or type than expected, or a mode of torch that wants to see operators.
// The caller then takes the way through the operators, whose checks have the words for what is wrong.
//
// Tensors are read through DLPack's exchange table, which torch has had since 2.10, and made by torch's own functions.
// Of Python, only the limited API of 3.10: one file for every later version (but not for builds without the GIL, which
// do not find it and take the operators).
#if Py_LIMITED_API != 0x030a0000
#error "compile with -DPy_LIMITED_API=0x030a0000"
#endif

#include "cpu/direct.h"

#include <ATen/dlpack.h>
#include <Python.h>

#include <cmath>
#include <cstdint>
#include <initializer_list>

namespace {

using namespace fastgru;

const DLPackExchangeAPI* exchange = nullptr;
const DirectCalls* calls = nullptr;

// What `setup` is given, for as long as the process runs.
PyTypeObject* tensor_type = nullptr;
PyTypeObject* parameter_type = nullptr;
PyObject* empty_like = nullptr;
PyObject* is_grad_enabled = nullptr;
PyObject* modes = nullptr;  // a tuple of functions, of which each is false in plain eager mode
Py_ssize_t mode_count = 0;

// The keys of a module's __dict__ that `infer` reads.
PyObject* key_parameters = nullptr;
PyObject* key_names = nullptr;
PyObject* key_num_layers = nullptr;
PyObject* key_input_size = nullptr;
PyObject* key_hidden_size = nullptr;
PyObject* key_proj_size = nullptr;
PyObject* key_bias = nullptr;
PyObject* key_batch_first = nullptr;
PyObject* key_bidirectional = nullptr;
PyObject* key_training = nullptr;
PyObject* key_dropout = nullptr;

PyObject* name_contiguous = nullptr;
PyObject* name_is_neg = nullptr;
PyObject* name_new_empty = nullptr;
PyObject* name_requires_grad = nullptr;

// A reference that is given back.
class Owned {
 public:
  explicit Owned(PyObject* object = nullptr) : object_(object) {}
  Owned(Owned&& other) noexcept : object_(other.release()) {}
  Owned& operator=(Owned&& other) noexcept {
    PyObject* old = object_;
    object_ = other.release();
    Py_XDECREF(old);
    return *this;
  }
  ~Owned() { Py_XDECREF(object_); }
  PyObject* get() const { return object_; }
  PyObject* release() {
    PyObject* object = object_;
    object_ = nullptr;
    return object;
  }
  explicit operator bool() const { return object_ != nullptr; }

 private:
  PyObject* object_;
};

Owned hold(PyObject* object) {
  Py_INCREF(object);
  return Owned(object);
}

// The answer where the operators have to do it.
PyObject* not_plain() {
  PyErr_Clear();
  Py_RETURN_NONE;
}

bool truth(PyObject* result) {
  const Owned owned(result);
  return !owned || PyObject_IsTrue(owned.get()) != 0;  // an error counts as true
}

bool any_mode() {
  for (Py_ssize_t i = 0; i < mode_count; ++i)
    if (truth(PyObject_CallNoArgs(PyTuple_GetItem(modes, i)))) return true;
  return false;
}

struct View {
  DLTensor t;

  // False where the object is not a strided tensor on the CPU whose memory holds its elements as they are.
  bool read(PyObject* object) {
    PyTypeObject* type = Py_TYPE(object);
    if (type != tensor_type && type != parameter_type) return false;
    if (exchange->dltensor_from_py_object_no_sync(object, &t) != 0) return false;
    if (t.device.device_type != kDLCPU || t.data == nullptr) return false;
    return !truth(PyObject_CallMethodObjArgs(object, name_is_neg, nullptr));
  }
  int64_t size(int dim) const { return t.shape[dim]; }
  int64_t stride(int dim) const { return t.strides[dim]; }
  void* data() const { return static_cast<char*>(t.data) + t.byte_offset; }
  int64_t bytes() const { return t.dtype.bits / 8; }

  bool is(const DLDataType& other) const { return t.dtype.code == other.code && t.dtype.bits == other.bits; }
  bool dense() const {
    int64_t elements = 1;
    for (int i = t.ndim; i-- > 0; elements *= t.shape[i])
      if (t.shape[i] != 1 && t.strides[i] != elements) return false;
    return true;
  }
  bool has(std::initializer_list<int64_t> sizes) const {
    if (t.ndim != int(sizes.size())) return false;
    int dim = 0;
    for (const int64_t size : sizes)
      if (t.shape[dim++] != size) return false;
    return true;
  }
};

bool find_dtype(const DLDataType& t, DType* found) {
  if (t.lanes != 1) return false;
  if (t.code == kDLFloat && (t.bits == 16 || t.bits == 32 || t.bits == 64))
    *found = t.bits == 16 ? DType::f16 : t.bits == 32 ? DType::f32 : DType::f64;
  else if (t.code == kDLBfloat && t.bits == 16)
    *found = DType::bf16;
  else
    return false;
  return true;
}

bool requires_grad(PyObject* tensor) { return truth(PyObject_GetAttr(tensor, name_requires_grad)); }

Owned like(PyObject* tensor) { return Owned(PyObject_CallFunctionObjArgs(empty_like, tensor, nullptr)); }

Owned make(PyObject* prototype, std::initializer_list<int64_t> sizes) {
  const Owned shape(PyTuple_New(Py_ssize_t(sizes.size())));
  Py_ssize_t at = 0;
  for (const int64_t size : sizes) {
    PyObject* number = shape ? PyLong_FromLongLong(size) : nullptr;
    if (!number) return Owned();
    PyTuple_SetItem(shape.get(), at++, number);
  }
  return Owned(PyObject_CallMethodObjArgs(prototype, name_new_empty, shape.get(), nullptr));
}

// Of a fresh tensor, or null.
void* data_of(const Owned& tensor) {
  View view;
  if (!tensor || exchange->dltensor_from_py_object_no_sync(tensor.get(), &view.t) != 0) return nullptr;
  int64_t bytes = view.bytes();
  for (int i = 0; i < view.t.ndim; ++i) bytes *= view.t.shape[i];
  calls->fresh(view.data(), size_t(bytes));
  return view.data();
}

// The problem of one layer: what the operators check with words.
struct Layer {
  GruShape s{};
  DType dtype{};
  View input;

  // `weights`: for each direction w_ih, w_hh, b_ih, b_hh; None in the place of a bias that is not there. The input is
  // [T, B, I], where `time` and `batch` are 0 and 1 or the other way round, or [B, I] of one step: `time` is -1.
  bool read(PyObject* input_object, int time, int batch, PyObject* const* weights, int directions) {
    const int last = time < 0 ? 1 : 2;
    if (!input.read(input_object) || input.t.ndim != last + 1 || !find_dtype(input.t.dtype, &dtype)) return false;
    s.D = directions;
    s.T = time < 0 ? 1 : input.size(time);
    s.B = input.size(batch);
    s.I = input.size(last);
    s.N = s.T * s.B;
    if (s.N == 0 || s.I == 0 || (s.I > 1 && input.stride(last) != 1)) return false;
    s.x = input.data();
    s.x_stride_t = time < 0 ? 0 : input.stride(time);
    s.x_stride_b = input.stride(batch);
    View w_hh;
    if (!w_hh.read(weights[1]) || w_hh.t.ndim != 2) return false;
    s.H = w_hh.size(1);
    for (int d = 0; d < directions; ++d) {
      PyObject* const* own = weights + 4 * d;
      if (!weight(own[0], {3 * s.H, s.I}, &s.w[d].w_ih) || !weight(own[1], {3 * s.H, s.H}, &s.w[d].w_hh)) return false;
      if (!weight(own[2], {3 * s.H}, &s.w[d].b_ih) || !weight(own[3], {3 * s.H}, &s.w[d].b_hh)) return false;
    }
    return true;
  }

  bool weight(PyObject* object, std::initializer_list<int64_t> sizes, const void** found) const {
    *found = nullptr;
    View view;
    if (object == Py_None) return sizes.size() == 1;
    if (!view.read(object) || !view.is(input.t.dtype) || !view.has(sizes) || !view.dense()) return false;
    *found = view.data();
    return true;
  }

  // A dense tensor of the layer's dtype; where it is not dense, `copy` keeps one that is.
  bool operand(PyObject* object, std::initializer_list<int64_t> sizes, Owned* copy, const void** found) const {
    View view;
    if (!view.read(object) || !view.is(input.t.dtype) || !view.has(sizes)) return false;
    if (!view.dense()) {
      *copy = Owned(PyObject_CallMethodObjArgs(object, name_contiguous, nullptr));
      if (!*copy || !view.read(copy->get())) return false;
    }
    *found = view.data();
    return true;
  }
};

template <class Problem>
bool run(bool (*call)(const Problem&, DType), const Problem& problem, DType dtype) {
  PyThreadState* state = PyEval_SaveThread();
  const bool done = call(problem, dtype);
  PyEval_RestoreThread(state);
  return done;
}

// What a module says of itself, which may have been edited since it was made. False where a value is not of the type
// that the constructor gives it, or is missing.
struct Settings {
  PyObject *parameters, *names;
  Py_ssize_t layers, input_size, hidden_size, proj_size;
  bool bias, batch_first, bidirectional, training;

  bool read(PyObject* module) {
    parameters = PyDict_GetItem(module, key_parameters);
    names = PyDict_GetItem(module, key_names);
    const PyObject* dropout = PyDict_GetItem(module, key_dropout);
    return parameters && names && dropout && PyFloat_CheckExact(dropout) && number(module, key_num_layers, &layers) &&
           number(module, key_input_size, &input_size) && number(module, key_hidden_size, &hidden_size) &&
           number(module, key_proj_size, &proj_size) && flag(module, key_bias, &bias) &&
           flag(module, key_batch_first, &batch_first) && flag(module, key_bidirectional, &bidirectional) &&
           flag(module, key_training, &training);
  }
  static bool number(PyObject* module, PyObject* key, Py_ssize_t* found) {
    PyObject* value = PyDict_GetItem(module, key);
    if (!value || !PyLong_CheckExact(value)) return false;
    *found = PyLong_AsSsize_t(value);
    return *found >= 0;
  }
  static bool flag(PyObject* module, PyObject* key, bool* found) {
    const PyObject* value = PyDict_GetItem(module, key);
    *found = value == Py_True;
    return *found || value == Py_False;
  }
};

bool takes(Py_ssize_t count, Py_ssize_t expected) {
  if (count == expected) return true;
  PyErr_Format(PyExc_TypeError, "expected %zd arguments, got %zd", expected, count);
  return false;
}

// infer(module, input, hx): the layers of a module, given as its __dict__; hx a tensor or None. Dropout is the
// caller's. Returns (output, h_n), or True if all is plain but there is a gradient to record.
PyObject* infer(PyObject*, PyObject* const* args, Py_ssize_t count) {
  if (!takes(count, 3)) return nullptr;
  PyObject *input = args[1], *hx = args[2];
  Settings module;
  if (any_mode() || !module.read(args[0]) || module.proj_size != 0) return not_plain();
  PyObject *parameters = module.parameters, *names = module.names;
  const Py_ssize_t layers = module.layers, own = module.bias ? 4 : 2;
  const int directions = module.bidirectional ? 2 : 1;
  if (layers < 1 || PyList_Size(names) != layers * directions * own) return not_plain();

  const bool grad = truth(PyObject_CallNoArgs(is_grad_enabled));
  bool record = grad && (requires_grad(input) || (hx != Py_None && requires_grad(hx)));
  Owned x = hold(input), h_n;
  const char* h0 = nullptr;
  char* last = nullptr;
  for (Py_ssize_t layer = 0; layer < layers; ++layer) {
    PyObject* weights[8] = {Py_None, Py_None, Py_None, Py_None, Py_None, Py_None, Py_None, Py_None};
    Owned held[8];  // another thread may replace a weight while the kernel runs
    for (Py_ssize_t i = 0; i < directions * own; ++i) {
      PyObject* weight = PyDict_GetItem(parameters, PyList_GetItem(names, layer * directions * own + i));
      if (!weight || weight == Py_None) return not_plain();
      weights[i / own * 4 + i % own] = weight;
      held[i] = hold(weight);
      record = record || (grad && requires_grad(weight));
    }
    Layer problem;
    const int time = module.batch_first && layer == 0 ? 1 : 0;
    if (!problem.read(x.get(), time, 1 - time, weights, directions)) return not_plain();
    const GruShape& s = problem.s;
    if (s.H != module.hidden_size || (layer == 0 && s.I != module.input_size)) return not_plain();
    const int64_t states = int64_t(layers) * directions, state_bytes = directions * s.B * s.H * problem.input.bytes();
    if (layer == 0) {
      if (hx != Py_None) {
        View view;
        if (!view.read(hx) || !view.is(problem.input.t.dtype) || !view.dense()) return not_plain();
        if (!view.has({states, s.B, s.H})) return not_plain();
        h0 = static_cast<const char*>(view.data());
      }
      if (record) return layers == 1 ? hold(Py_True).release() : not_plain();
      h_n = hx != Py_None ? like(hx) : make(input, {states, s.B, s.H});
      if (!(last = static_cast<char*>(data_of(h_n)))) return not_plain();
    } else if (record) {
      return not_plain();
    }
    const bool as_state = s.T == 1 && states == 1;
    Owned output = as_state ? like(h_n.get()) : make(input, {s.T, s.B, directions * s.H});
    void* y = data_of(output);
    if (!y) return not_plain();
    GruForward forward{s, y, last + layer * state_bytes, nullptr};
    forward.s.h0 = h0 ? h0 + layer * state_bytes : nullptr;
    if (!run(calls->gru_forward, forward, problem.dtype)) return not_plain();
    x = static_cast<Owned&&>(output);
  }
  return PyTuple_Pack(2, x.get(), h_n.get());
}

// cell(input, hx, w_ih, w_hh, b_ih, b_hh): one step, input [B, I], hx [B, H]; None in the place of a bias that is not
// there. Returns the new state.
PyObject* cell(PyObject*, PyObject* const* args, Py_ssize_t count) {
  if (!takes(count, 6)) return nullptr;
  if (any_mode()) return not_plain();
  Layer problem;
  View hx;
  if (!problem.read(args[0], -1, 0, args + 2, 1) || !hx.read(args[1])) return not_plain();
  const GruShape& s = problem.s;
  if (!hx.is(problem.input.t.dtype) || !hx.dense() || !hx.has({s.B, s.H})) return not_plain();
  if (truth(PyObject_CallNoArgs(is_grad_enabled)))
    for (int i = 0; i < 6; ++i)
      if (args[i] != Py_None && requires_grad(args[i])) return not_plain();
  Owned state = like(args[1]);
  GruForward forward{s, data_of(state), nullptr, nullptr};
  forward.s.h0 = hx.data();
  if (!forward.y || !run(calls->gru_forward, forward, problem.dtype)) return not_plain();
  return state.release();
}

constexpr int kLayerTensors = 6;  // input, hx, w_ih, w_hh, b_ih, b_hh

// One layer in one direction, [T, B, I]; None in the place of a bias that is not there.
struct TimeMajor : Layer {
  Owned copy;
  PyObject* hx = nullptr;  // dense

  bool read(PyObject* const* args) {
    if (!Layer::read(args[0], 0, 1, args + 2, 1) || !operand(args[1], {1, s.B, s.H}, &copy, &s.h0)) return false;
    hx = copy ? copy.get() : args[1];
    return true;
  }
};

// train(input, hx, w_ih, w_hh, b_ih, b_hh): returns (output, h_n, gates).
PyObject* train(PyObject*, PyObject* const* args, Py_ssize_t count) {
  if (!takes(count, kLayerTensors)) return nullptr;
  TimeMajor layer;
  if (any_mode() || !layer.read(args)) return not_plain();
  const GruShape& s = layer.s;
  const Owned h_n = like(layer.hx), output = s.T == 1 ? like(layer.hx) : make(args[0], {s.T, s.B, s.H});
  const Owned gates = make(args[0], {1, s.N, 4 * saved_units(s.H)});
  const GruForward forward{s, data_of(output), data_of(h_n), data_of(gates)};
  if (!forward.y || !forward.h_n || !forward.gates || !run(calls->gru_forward, forward, layer.dtype))
    return not_plain();
  return PyTuple_Pack(3, output.get(), h_n.get(), gates.get());
}

// backward(grad_output, grad_h_n, input, hx, w_ih, w_hh, b_ih, b_hh, output, gates, need_input, need_weights): of a
// layer that `train` ran; either gradient may be None. Returns (grad_input, grad_hx, grad_w_ih, grad_w_hh, grad_b_ih,
// grad_b_hh), with None for grad_input and those of the weights where they are not needed.
PyObject* backward(PyObject*, PyObject* const* args, Py_ssize_t count) {
  if (!takes(count, 2 + kLayerTensors + 4)) return nullptr;
  PyObject* const* tensors = args + 2;
  const bool need_input = args[count - 2] == Py_True, need_weights = args[count - 1] == Py_True;
  TimeMajor layer;
  if (any_mode() || !layer.read(tensors)) return not_plain();
  const GruShape& s = layer.s;
  GruBackward b{};
  b.s = s;
  Owned copies[4];
  if (args[0] != Py_None && !layer.operand(args[0], {s.T, s.B, s.H}, &copies[0], &b.dy)) return not_plain();
  if (args[1] != Py_None && !layer.operand(args[1], {1, s.B, s.H}, &copies[1], &b.dh_n)) return not_plain();
  if (!layer.operand(tensors[kLayerTensors], {s.T, s.B, s.H}, &copies[2], &b.y)) return not_plain();
  const int64_t width = 4 * saved_units(s.H);
  if (!layer.operand(tensors[kLayerTensors + 1], {1, s.N, width}, &copies[3], &b.gates)) return not_plain();

  void** const wanted[] = {&b.dx, &b.dh0, &b.dw_ih, &b.dw_hh, &b.db_ih, &b.db_hh};
  Owned grads[kLayerTensors];
  if (need_input) grads[0] = make(tensors[0], {s.T, s.B, s.I});
  grads[1] = like(layer.hx);
  // The engine writes the gradients of biases even where there are none.
  for (int i = 2; need_weights && i < kLayerTensors; ++i)
    grads[i] = tensors[i] != Py_None ? like(tensors[i]) : make(tensors[0], {3 * s.H});
  for (int i = 0; i < kLayerTensors; ++i)
    if (i == 0 ? need_input : i == 1 || need_weights)
      if (!(*wanted[i] = data_of(grads[i]))) return not_plain();
  if (!run(calls->gru_backward, b, layer.dtype)) return not_plain();
  Owned result(PyTuple_New(kLayerTensors));
  if (!result) return nullptr;
  for (int i = 0; i < kLayerTensors; ++i) {
    const bool present = grads[i] && tensors[i] != Py_None;
    PyTuple_SetItem(result.get(), i, present ? grads[i].release() : hold(Py_None).release());
  }
  return result.release();
}

// Attention without options: query [B, Hq, Lq, D], key and value [B, Hk, Lk, D], each contiguous or with positions
// before heads in memory, and a mask of bool.
struct Attention {
  static constexpr int kArguments = 8;  // query, key, value, mask, scale, causal, bottom_right, grouped
  AttentionShape s{};
  DType dtype{};
  View query;

  // False where it is not plain, or not sound.
  bool read(PyObject* const* args) {
    if (!query.read(args[0]) || query.t.ndim != 4 || !find_dtype(query.t.dtype, &dtype)) return false;
    View key;
    if (!key.read(args[1]) || key.t.ndim != 4) return false;
    s.B = query.size(0), s.Hq = query.size(1), s.Lq = query.size(2), s.D = s.Dv = query.size(3);
    s.Hk = key.size(1), s.Lk = key.size(2);
    if (!heads(args[0], s.Hq, s.Lq, &s.q) || !heads(args[1], s.Hk, s.Lk, &s.k) || !heads(args[2], s.Hk, s.Lk, &s.v))
      return false;
    if (s.Hq % s.Hk != 0 || (s.Hq != s.Hk && args[7] != Py_True)) return false;
    if (args[3] != Py_None && !read_mask(args[3])) return false;
    s.scale = args[4] == Py_None ? 1 / std::sqrt(double(s.D)) : PyFloat_AsDouble(args[4]);
    s.window_left = -1;
    s.window_right = args[5] == Py_True ? 0 : -1;
    s.bottom_right = args[6] == Py_True;
    return !PyErr_Occurred();
  }

  bool heads(PyObject* object, int64_t H, int64_t L, Heads* found) const {
    View view;
    if (!view.read(object) || !view.is(query.t.dtype) || !view.has({s.B, H, L, s.D})) return false;
    const int64_t* stride = view.t.strides;
    const bool heads_first = stride[1] == L * s.D && stride[2] == s.D,
               heads_last = stride[1] == s.D && stride[2] == H * s.D;
    if (stride[3] != 1 || stride[0] != H * L * s.D || !(heads_first || heads_last)) return false;
    *found = {view.data(), stride[0], stride[1], stride[2]};
    return true;
  }

  bool read_mask(PyObject* object) {
    View view;
    if (!view.read(object) || view.t.dtype.code != kDLBool || view.t.ndim < 1 || view.t.ndim > 4) return false;
    const int64_t whole[4] = {s.B, s.Hq, s.Lq, s.Lk};
    int64_t stride[4] = {};
    for (int d = 4 - view.t.ndim, i = 0; d < 4; ++d, ++i) {
      if (view.size(i) != 1 && view.size(i) != whole[d]) return false;
      stride[d] = view.size(i) == 1 ? 0 : view.stride(i);
    }
    if (stride[3] > 1) return false;
    s.mask = {view.data(), stride[0], stride[1], stride[2], stride[3]};
    return true;
  }

  // A fresh tensor like `tensor`, and where it lies.
  Owned fresh(PyObject* tensor, const Heads& as, Heads* found) const {
    Owned result = like(tensor);
    *found = as;
    found->data = data_of(result);
    return found->data ? static_cast<Owned&&>(result) : Owned();
  }
};

// attention(query, key, value, mask, scale, causal, bottom_right, grouped): mask and scale may be None. Returns the
// output, or True if all is plain but there is a gradient to record.
PyObject* attention(PyObject*, PyObject* const* args, Py_ssize_t count) {
  if (!takes(count, Attention::kArguments)) return nullptr;
  Attention problem;
  if (any_mode() || !problem.read(args)) return not_plain();
  if (truth(PyObject_CallNoArgs(is_grad_enabled)) &&
      (requires_grad(args[0]) || requires_grad(args[1]) || requires_grad(args[2])))
    Py_RETURN_TRUE;
  AttentionForward f{};
  f.s = problem.s;
  Owned output = problem.fresh(args[0], problem.s.q, &f.out);
  if (!output || !run(calls->attention_forward, f, problem.dtype)) return not_plain();
  return output.release();
}

// attention_train(query, key, value, mask, scale, causal, bottom_right, grouped): float32 and float64. Returns (output,
// statistics).
PyObject* attention_train(PyObject*, PyObject* const* args, Py_ssize_t count) {
  if (!takes(count, Attention::kArguments)) return nullptr;
  Attention problem;
  if (any_mode() || !problem.read(args) || problem.query.bytes() < 4) return not_plain();
  const AttentionShape& s = problem.s;
  AttentionForward f{};
  f.s = s;
  const Owned output = problem.fresh(args[0], s.q, &f.out), statistics = make(args[0], {2, s.B, s.Hq, s.Lq});
  if (!output || !(f.statistics = data_of(statistics)) || !run(calls->attention_forward, f, problem.dtype))
    return not_plain();
  return PyTuple_Pack(2, output.get(), statistics.get());
}

// attention_backward(grad_output, query, key, value, mask, scale, causal, bottom_right, grouped, output, statistics):
// of what attention_train returned. Returns (grad_query, grad_key, grad_value).
PyObject* attention_backward(PyObject*, PyObject* const* args, Py_ssize_t count) {
  if (!takes(count, Attention::kArguments + 3)) return nullptr;
  PyObject* const* tensors = args + 1;
  Attention problem;
  if (any_mode() || !problem.read(tensors) || problem.query.bytes() < 4) return not_plain();
  const AttentionShape& s = problem.s;
  AttentionBackward b{};
  b.s = s;
  View statistics;
  if (!problem.heads(args[0], s.Hq, s.Lq, &b.d_out) || !problem.heads(args[count - 2], s.Hq, s.Lq, &b.out) ||
      !statistics.read(args[count - 1]) || !statistics.is(problem.query.t.dtype) ||
      !statistics.has({2, s.B, s.Hq, s.Lq}) || !statistics.dense())
    return not_plain();
  b.statistics = statistics.data();
  const Owned dq = problem.fresh(tensors[0], s.q, &b.dq), dk = problem.fresh(tensors[1], s.k, &b.dk),
              dv = problem.fresh(tensors[2], s.v, &b.dv);
  if (!dq || !dk || !dv || !run(calls->attention_backward, b, problem.dtype)) return not_plain();
  return PyTuple_Pack(3, dq.get(), dk.get(), dv.get());
}

// setup(capsule, calls, Tensor, Parameter, empty_like, is_grad_enabled, modes): once, before all else. `capsule` is
// torch.Tensor.__dlpack_c_exchange_api__, `calls` the address that fastgru_direct_calls() returned. Returns None, or a
// sentence that says why nothing here can be used.
PyObject* setup(PyObject*, PyObject* const* args, Py_ssize_t count) {
  if (!takes(count, 7)) return nullptr;
  const auto* table = static_cast<const DLPackExchangeAPI*>(PyCapsule_GetPointer(args[0], "dlpack_exchange_api"));
  if (!table) return nullptr;
  if (table->header.version.major != DLPACK_MAJOR_VERSION || !table->dltensor_from_py_object_no_sync)
    return PyUnicode_FromFormat("torch's DLPack is of version %u, not %d", table->header.version.major,
                                DLPACK_MAJOR_VERSION);
  const auto* found = static_cast<const DirectCalls*>(PyLong_AsVoidPtr(args[1]));
  if (!found) return nullptr;
  mode_count = PyTuple_Size(args[6]);
  if (mode_count < 0) return nullptr;
  for (Py_ssize_t i = 2; i < count; ++i) Py_INCREF(args[i]);
  tensor_type = reinterpret_cast<PyTypeObject*>(args[2]);
  parameter_type = reinterpret_cast<PyTypeObject*>(args[3]);
  empty_like = args[4];
  is_grad_enabled = args[5];
  modes = args[6];
  key_parameters = PyUnicode_InternFromString("_parameters");
  key_names = PyUnicode_InternFromString("_flat_weights_names");
  key_num_layers = PyUnicode_InternFromString("num_layers");
  key_input_size = PyUnicode_InternFromString("input_size");
  key_hidden_size = PyUnicode_InternFromString("hidden_size");
  key_proj_size = PyUnicode_InternFromString("proj_size");
  key_bias = PyUnicode_InternFromString("bias");
  key_batch_first = PyUnicode_InternFromString("batch_first");
  key_bidirectional = PyUnicode_InternFromString("bidirectional");
  key_training = PyUnicode_InternFromString("training");
  key_dropout = PyUnicode_InternFromString("dropout");
  name_contiguous = PyUnicode_InternFromString("contiguous");
  name_is_neg = PyUnicode_InternFromString("is_neg");
  name_new_empty = PyUnicode_InternFromString("new_empty");
  name_requires_grad = PyUnicode_InternFromString("requires_grad");
  exchange = table;
  calls = found;
  Py_RETURN_NONE;
}

template <PyObject* (*Function)(PyObject*, PyObject* const*, Py_ssize_t)>
PyMethodDef method(const char* name) {
  return {name, reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(Function)), METH_FASTCALL, nullptr};
}

PyMethodDef methods[] = {method<setup>("setup"),
                         method<infer>("infer"),
                         method<cell>("cell"),
                         method<train>("train"),
                         method<backward>("backward"),
                         method<attention>("attention"),
                         method<attention_train>("attention_train"),
                         method<attention_backward>("attention_backward"),
                         {}};

PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_direct", nullptr, -1, methods};

}  // namespace

PyMODINIT_FUNC PyInit__direct() { return PyModule_Create(&definition); }

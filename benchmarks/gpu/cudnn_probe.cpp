// The GRU by each of cuDNN's algorithms, called directly: the best that cuDNN can do, not only what PyTorch picks.
//
//     cudnn_probe DTYPE STEPS HIDDEN:BATCH...        DTYPE: float32, tf32, float16, bfloat16
//
// One line of JSON per algorithm and problem. One layer, one direction, input size = hidden size, input projection
// included; times are medians, in microseconds of a whole call, -1 for a call that failed. An algorithm that cuDNN
// refuses says so.

#include <cuda_runtime.h>
#include <cudnn.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <random>
#include <vector>

namespace {

constexpr int kRounds = 30;

void check(cudaError_t status, const char* what) {
  if (status != cudaSuccess) {
    std::fprintf(stderr, "cudnn_probe: %s: %s\n", what, cudaGetErrorString(status));
    std::exit(1);
  }
}

void check(cudnnStatus_t status, const char* what) {
  if (status != CUDNN_STATUS_SUCCESS) {
    std::fprintf(stderr, "cudnn_probe: %s: %s\n", what, cudnnGetErrorString(status));
    std::exit(1);
  }
}

struct Precision {
  const char* name;
  cudnnDataType_t data;
  cudnnMathType_t math;
  int bytes;
};

constexpr Precision kPrecisions[] = {
    {"float32", CUDNN_DATA_FLOAT, CUDNN_FMA_MATH, 4},
    {"tf32", CUDNN_DATA_FLOAT, CUDNN_TENSOR_OP_MATH, 4},
    {"float16", CUDNN_DATA_HALF, CUDNN_TENSOR_OP_MATH, 2},
    {"bfloat16", CUDNN_DATA_BFLOAT16, CUDNN_TENSOR_OP_MATH, 2},
};

struct Algorithm {
  const char* name;
  cudnnRNNAlgo_t value;
};

constexpr Algorithm kAlgorithms[] = {
    {"STANDARD", CUDNN_RNN_ALGO_STANDARD},
    {"PERSIST_STATIC", CUDNN_RNN_ALGO_PERSIST_STATIC},
    {"PERSIST_STATIC_SMALL_H", CUDNN_RNN_ALGO_PERSIST_STATIC_SMALL_H},
    {"PERSIST_DYNAMIC", CUDNN_RNN_ALGO_PERSIST_DYNAMIC},
};

// Device memory that is freed at the end of its scope.
class Buffer {
 public:
  explicit Buffer(size_t bytes) { check(cudaMalloc(&data_, std::max<size_t>(bytes, 1)), "cudaMalloc"); }
  ~Buffer() { cudaFree(data_); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  void* get() const { return data_; }

  // Numbers of either sign between 1/128 and 1/64.
  void fill(size_t bytes, const Precision& precision) {
    std::mt19937 random(0);
    std::vector<unsigned char> host(bytes);
    for (size_t i = 0; i + precision.bytes <= bytes; i += precision.bytes) {
      const unsigned sign = random() & 1u, mantissa = random();
      if (precision.data == CUDNN_DATA_FLOAT) {
        const unsigned bits = sign << 31 | 0x3c000000u | (mantissa & 0x7fffffu);
        std::memcpy(&host[i], &bits, 4);
      } else {
        const bool half = precision.data == CUDNN_DATA_HALF;
        const auto bits = static_cast<unsigned short>(
            sign << 15 | (half ? 0x2000u | (mantissa & 0x3ffu) : 0x3c00u | (mantissa & 0x7fu)));
        std::memcpy(&host[i], &bits, 2);
      }
    }
    check(cudaMemcpy(data_, host.data(), bytes, cudaMemcpyHostToDevice), "cudaMemcpy");
  }

 private:
  void* data_ = nullptr;
};

// Median time of a call in microseconds, or a negative number if cuDNN refuses it.
double time_of(const std::function<cudnnStatus_t()>& call) {
  for (int i = 0; i < 3; ++i) {
    if (call() != CUDNN_STATUS_SUCCESS || cudaDeviceSynchronize() != cudaSuccess) return -1;
  }
  cudaEvent_t before, after;
  check(cudaEventCreate(&before), "cudaEventCreate");
  check(cudaEventCreate(&after), "cudaEventCreate");
  std::vector<float> milliseconds(kRounds);
  for (float& elapsed : milliseconds) {
    check(cudaEventRecord(before), "cudaEventRecord");
    if (call() != CUDNN_STATUS_SUCCESS) return -1;
    check(cudaEventRecord(after), "cudaEventRecord");
    check(cudaEventSynchronize(after), "cudaEventSynchronize");
    check(cudaEventElapsedTime(&elapsed, before, after), "cudaEventElapsedTime");
  }
  cudaEventDestroy(before);
  cudaEventDestroy(after);
  std::nth_element(milliseconds.begin(), milliseconds.begin() + kRounds / 2, milliseconds.end());
  return milliseconds[kRounds / 2] * 1e3;
}

void probe(cudnnHandle_t handle, const Precision& precision, const Algorithm& algorithm, int steps, int hidden,
           int batch) {
  cudnnDropoutDescriptor_t dropout;
  cudnnRNNDescriptor_t rnn;
  cudnnRNNDataDescriptor_t rows;
  cudnnTensorDescriptor_t state;
  check(cudnnCreateDropoutDescriptor(&dropout), "cudnnCreateDropoutDescriptor");
  check(cudnnSetDropoutDescriptor(dropout, handle, 0, nullptr, 0, 0), "cudnnSetDropoutDescriptor");
  check(cudnnCreateRNNDescriptor(&rnn), "cudnnCreateRNNDescriptor");
  check(cudnnCreateRNNDataDescriptor(&rows), "cudnnCreateRNNDataDescriptor");
  check(cudnnCreateTensorDescriptor(&state), "cudnnCreateTensorDescriptor");

  std::printf(R"({"algorithm": "%s", "precision": "%s", "H": %d, "B": %d, "T": %d, )", algorithm.name, precision.name,
              hidden, batch, steps);
  const cudnnStatus_t accepted = cudnnSetRNNDescriptor_v8(
      rnn, algorithm.value, CUDNN_GRU, CUDNN_RNN_DOUBLE_BIAS, CUDNN_UNIDIRECTIONAL, CUDNN_LINEAR_INPUT, precision.data,
      CUDNN_DATA_FLOAT, precision.math, hidden, hidden, hidden, 1, dropout, CUDNN_RNN_PADDED_IO_DISABLED);
  if (accepted != CUDNN_STATUS_SUCCESS) {
    std::printf("\"refused\": \"%s\"}\n", cudnnGetErrorString(accepted));
  } else {
    const std::vector<int> lengths(batch, steps);
    check(cudnnSetRNNDataDescriptor(rows, precision.data, CUDNN_RNN_DATA_LAYOUT_SEQ_MAJOR_PACKED, steps, batch, hidden,
                                    lengths.data(), nullptr),
          "cudnnSetRNNDataDescriptor");
    const int shape[] = {1, batch, hidden}, strides[] = {batch * hidden, hidden, 1};
    check(cudnnSetTensorNdDescriptor(state, precision.data, 3, shape, strides), "cudnnSetTensorNdDescriptor");
    size_t weight_bytes = 0, work_bytes = 0, reserve_bytes = 0, infer_bytes = 0, none = 0;
    check(cudnnGetRNNWeightSpaceSize(handle, rnn, &weight_bytes), "cudnnGetRNNWeightSpaceSize");
    check(cudnnGetRNNTempSpaceSizes(handle, rnn, CUDNN_FWD_MODE_TRAINING, rows, &work_bytes, &reserve_bytes),
          "cudnnGetRNNTempSpaceSizes");
    check(cudnnGetRNNTempSpaceSizes(handle, rnn, CUDNN_FWD_MODE_INFERENCE, rows, &infer_bytes, &none),
          "cudnnGetRNNTempSpaceSizes");
    work_bytes = std::max(work_bytes, infer_bytes);

    const size_t row_bytes = size_t(steps) * batch * hidden * precision.bytes;
    const size_t state_bytes = size_t(batch) * hidden * precision.bytes;
    Buffer x(row_bytes), y(row_bytes), dx(row_bytes), dy(row_bytes), weights(weight_bytes), dweights(weight_bytes);
    Buffer hx(state_bytes), hy(state_bytes), dhx(state_bytes), dhy(state_bytes), work(work_bytes);
    Buffer reserve(reserve_bytes), device_lengths(lengths.size() * sizeof(int));
    for (Buffer* rows_of : {&x, &dy}) rows_of->fill(row_bytes, precision);
    for (Buffer* states : {&hx, &dhy}) states->fill(state_bytes, precision);
    weights.fill(weight_bytes, precision);
    check(cudaMemcpy(device_lengths.get(), lengths.data(), lengths.size() * sizeof(int), cudaMemcpyHostToDevice),
          "cudaMemcpy");
    const int* when = static_cast<const int*>(device_lengths.get());

    const auto forward = [&](cudnnForwardMode_t mode, size_t reserved) {
      return cudnnRNNForward(handle, rnn, mode, when, rows, x.get(), rows, y.get(), state, hx.get(), hy.get(), state,
                             nullptr, nullptr, weight_bytes, weights.get(), work_bytes, work.get(), reserved,
                             reserved == 0 ? nullptr : reserve.get());
    };
    const auto train = [&] {
      cudnnStatus_t status = forward(CUDNN_FWD_MODE_TRAINING, reserve_bytes);
      if (status != CUDNN_STATUS_SUCCESS) return status;
      status = cudnnRNNBackwardData_v8(handle, rnn, when, rows, y.get(), dy.get(), rows, dx.get(), state, hx.get(),
                                       dhy.get(), dhx.get(), state, nullptr, nullptr, nullptr, weight_bytes,
                                       weights.get(), work_bytes, work.get(), reserve_bytes, reserve.get());
      if (status != CUDNN_STATUS_SUCCESS) return status;
      // Added to, so cleared first, as PyTorch does.
      if (cudaMemsetAsync(dweights.get(), 0, weight_bytes) != cudaSuccess) return CUDNN_STATUS_EXECUTION_FAILED;
      return cudnnRNNBackwardWeights_v8(handle, rnn, CUDNN_WGRAD_MODE_ADD, when, rows, x.get(), state, hx.get(), rows,
                                        y.get(), weight_bytes, dweights.get(), work_bytes, work.get(), reserve_bytes,
                                        reserve.get());
    };
    std::printf(R"("infer_us": %.2f, "train_us": %.2f, "reserve_bytes": %zu})"
                "\n",
                time_of([&] { return forward(CUDNN_FWD_MODE_INFERENCE, 0); }), time_of(train), reserve_bytes);
  }
  std::fflush(stdout);
  cudnnDestroyTensorDescriptor(state);
  cudnnDestroyRNNDataDescriptor(rows);
  cudnnDestroyRNNDescriptor(rnn);
  cudnnDestroyDropoutDescriptor(dropout);
}

}  // namespace

int main(int count, char** arguments) {
  const Precision* precision = nullptr;
  for (const Precision& one : kPrecisions) {
    if (count > 3 && std::strcmp(arguments[1], one.name) == 0) precision = &one;
  }
  const int steps = count > 3 ? std::atoi(arguments[2]) : 0;
  if (precision == nullptr || steps <= 0) {
    std::fprintf(stderr, "usage: cudnn_probe float32|tf32|float16|bfloat16 STEPS HIDDEN:BATCH...\n");
    return 2;
  }
  cudnnHandle_t handle;
  check(cudnnCreate(&handle), "cudnnCreate");
  for (int i = 3; i < count; ++i) {
    int hidden = 0, batch = 0;
    if (std::sscanf(arguments[i], "%d:%d", &hidden, &batch) != 2 || hidden <= 0 || batch <= 0) {
      std::fprintf(stderr, "cudnn_probe: HIDDEN:BATCH expected, got %s\n", arguments[i]);
      return 2;
    }
    for (const Algorithm& algorithm : kAlgorithms) probe(handle, *precision, algorithm, steps, hidden, batch);
  }
  cudnnDestroy(handle);
  return 0;
}

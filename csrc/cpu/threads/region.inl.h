// One parallel region per call: starts the workers, and measures how long the caller waited for cores it lacked.

template <class Call>
struct RegionArgs {
  Phases& phases;
  const Call& call;
  int64_t started_ns, finished_ns, waited_ns;  // of worker 0, which is the caller
  bool* preempted;                             // of every other worker
};

// Runs call(worker) on `workers` workers.
template <class Call>
static void run_region(const Parallel& parallel, int workers, const Call& call) {
  Phases phases(workers);
  bool preempted[kMaxWorkers] = {};
  RegionArgs<Call> args{phases, call, 0, 0, 0, preempted};
  const auto body = [](int index, void* arg) noexcept {
    auto* a = static_cast<RegionArgs<Call>*>(arg);
    Worker worker(a->phases, index);
    if (worker.workers() == 1) return a->call(worker);
    if (index > 0) {
      const int64_t before = preemptions();
      a->call(worker);
      a->preempted[index] = preemptions() > before;
      return;
    }
    a->started_ns = now_ns();
    a->call(worker);
    a->finished_ns = now_ns();
    a->waited_ns = worker.waited_ns();
  };
  if (workers == 1) return body(0, &args);
  const int64_t begin = now_ns();
  parallel.run(workers, body, &args);
  const int64_t end = now_ns();
  // A pool waits for its threads when a region ends, and for those still missing from the last one when the next
  // begins. A wait inside counts only where a worker lost its core: else it was for work that had to be done.
  bool taken = false;
  for (int i = 1; i < workers; ++i) taken = taken || preempted[i];
  parallel.waited((taken ? args.waited_ns : 0) + args.started_ns - begin + end - args.finished_ns, end - begin);
}

// Rates of one thread, rough on purpose: they decide only how many threads are worth waking.
constexpr double kFlopsPerMicrosecond = 50e3, kBytesPerMicrosecond = 50e3;
constexpr int64_t kMicrosecondsPerWorker = 60;

// Threads worth waking for `flops` of arithmetic over `bytes` of weights. A region costs some microseconds, and where
// another process holds a core it ends only when that core comes back: short calls stay on the caller's thread.
static int worth_workers(const Parallel& parallel, double flops, double bytes) {
  const double microseconds = flops / kFlopsPerMicrosecond + bytes / kBytesPerMicrosecond;
  const int most = parallel.threads < kMaxWorkers ? parallel.threads : kMaxWorkers;
  return int(imax(1, imin(most, int64_t(microseconds / kMicrosecondsPerWorker))));
}

// To spare atomics in shared_ptr, libstdc++ asks glibc, from 2.32 on, whether the process has one thread. Answered
// here, and with no: the library then also loads with the older glibc of manylinux_2_28, wherever it is built.
extern "C" {
__attribute__((visibility("hidden"))) char __libc_single_threaded = 0;
}

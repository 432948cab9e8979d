// Typed arrays from a call's scratch memory.

template <class T>
FASTGRU_INLINE T* take(const Scratch& scratch, int64_t elements) {
  return static_cast<T*>(scratch.allocate(scratch.context, size_t(imax(elements, 1)) * sizeof(T)));
}

// The product of rows with packed panels, each finished tile given to an epilogue.

// Rows [0, M) of A times panels [p0, p1). rows(segment, i) is the address of row i; `segments` products over their own
// K are summed, the first panels[0], and so on. epilogue(i, count, p, width, tile) gets tile[count][width][W] for rows
// i .. i + count of panel p; ahead(i, count, p, width) is called before that tile is computed.
template <class E, class Rows, class Ahead, class Epilogue>
FASTGRU_INLINE void panel_product(int64_t M, Rows&& rows, int segments, const Panels<E>* panels, int64_t p0, int64_t p1,
                                  Ahead&& ahead, Epilogue&& epilogue) {
  using C = compute_t<E>;
  constexpr int W = lanes<C>;
  const int64_t tiles = (M + kRows - 1) / kRows;
  for (int64_t p = p0; p < p1;) {
    // As many full panels as the widest kernel for this number of rows takes.
    const int most = panels_at_once(int(M < kRows ? M : kRows));
    int together = 1;
    const int width = panels[0].width(p);
    if (most > 1 && p + most <= p1 && panels[0].width(p + most - 1) == kPanel) together = most;
    for (int64_t t = 0; t < tiles; ++t) {
      // Tiles of nearly equal height rather than full ones and a thin rest, which would read the panel for little.
      const int64_t i0 = M * t / tiles, i1 = M * (t + 1) / tiles;
      const int count = int(i1 - i0);
      const E* row[kRows];
      alignas(64) C tile[kTileElements<C>];
      const bool wide = together > 1 && panels_at_once(count) == together;
      for (int64_t q = 0; q < together; q += wide ? together : 1) {
        for (int r = 0; r < (wide ? together : 1); ++r) ahead(i0, count, p + q + r, width);
        for (int g = 0; g < segments; ++g) {
          const Panels<E>& b = panels[g];
          for (int i = 0; i < count; ++i) row[i] = rows(g, i0 + i);
          const auto kernel =
              wide ? TileTable<E, false>::wide[count - 1] : TileTable<E, false>::narrow[width - 1][count - 1];
          for (int64_t k = 0; k < b.K; k += b.depth) {
            kernel(b.K - k < b.depth ? b.K - k : b.depth, row, 0, b.panel(p + q) + k / kPair<E> * b.row(width),
                   b.row(width), b.stride(), tile, g > 0 || k > 0);
            for (int i = 0; i < count; ++i) row[i] += b.depth;
          }
        }
        for (int r = 0; r < (wide ? together : 1); ++r)
          epilogue(i0, count, p + q + r, width, tile + int64_t(r) * count * width * W);
      }
    }
    p += together;
  }
}

template <class E, class Rows, class Epilogue>
FASTGRU_INLINE void panel_product(int64_t M, Rows&& rows, int segments, const Panels<E>* panels, int64_t p0, int64_t p1,
                                  Epilogue&& epilogue) {
  panel_product(M, rows, segments, panels, p0, p1, [](int64_t, int, int64_t, int) {}, epilogue);
}

//! Outputs cut into chunks, one for each task.

use super::Pool;

impl Pool {
    /// Cuts `out` into chunks of `chunk_len` (the last may be shorter) and calls `f(i, chunk, scratch)` for each.
    pub fn for_chunks<T: Send>(&self, out: &mut [T], chunk_len: usize, f: impl Fn(usize, &mut [T], &mut [f32]) + Sync) {
        let out = Chunks::new(out, chunk_len);
        // SAFETY: `run` calls with each number once.
        self.run(out.count(), &|i, scratch| f(i, unsafe { out.get(i) }, scratch));
    }

    /// [`for_chunks`](Self::for_chunks) over two outputs at once, each with its own chunk length. An output that is
    /// empty gives an empty chunk every time.
    ///
    /// # Panics
    /// When two outputs that are not empty have different numbers of chunks.
    pub fn for_chunks2<T: Send, U: Send>(
        &self,
        (out1, len1): (&mut [T], usize),
        (out2, len2): (&mut [U], usize),
        f: impl Fn(usize, &mut [T], &mut [U], &mut [f32]) + Sync,
    ) {
        let (out1, out2) = (Chunks::new(out1, len1), Chunks::new(out2, len2));
        let count = same_count(&[out1.count(), out2.count()]);
        // SAFETY: `run` calls with each number once.
        self.run(count, &|i, scratch| unsafe { f(i, out1.get(i), out2.get(i), scratch) });
    }

    /// [`for_chunks2`](Self::for_chunks2) over three outputs.
    ///
    /// # Panics
    /// When outputs that are not empty have different numbers of chunks.
    pub fn for_chunks3<T: Send, U: Send, V: Send>(
        &self,
        (out1, len1): (&mut [T], usize),
        (out2, len2): (&mut [U], usize),
        (out3, len3): (&mut [V], usize),
        f: impl Fn(usize, &mut [T], &mut [U], &mut [V], &mut [f32]) + Sync,
    ) {
        let (out1, out2, out3) = (Chunks::new(out1, len1), Chunks::new(out2, len2), Chunks::new(out3, len3));
        let count = same_count(&[out1.count(), out2.count(), out3.count()]);
        // SAFETY: `run` calls with each number once.
        self.run(count, &|i, scratch| unsafe { f(i, out1.get(i), out2.get(i), out3.get(i), scratch) });
    }
}

/// A slice cut into chunks that different threads may hold at the same time.
struct Chunks<T> {
    start: *mut T,
    len: usize,
    chunk: usize,
}

// SAFETY: chunks are disjoint, and each is handed to one thread at a time (see `get`).
unsafe impl<T: Send> Sync for Chunks<T> {}

impl<T> Chunks<T> {
    fn new(out: &mut [T], chunk: usize) -> Self {
        assert!(chunk > 0 || out.is_empty(), "the chunk length is 0");
        Chunks { start: out.as_mut_ptr(), len: out.len(), chunk: chunk.max(1) }
    }

    fn count(&self) -> usize {
        self.len.div_ceil(self.chunk)
    }

    /// # Safety
    /// The slice this was made from is still borrowed, and no two live results have the same `i`.
    #[allow(clippy::mut_from_ref)]
    unsafe fn get(&self, i: usize) -> &mut [T] {
        let from = (i * self.chunk).min(self.len);
        let to = (from + self.chunk).min(self.len);
        // SAFETY: `from <= to <= len`, and chunks of different numbers do not overlap.
        unsafe { std::slice::from_raw_parts_mut(self.start.add(from), to - from) }
    }
}

/// The number of chunks that all outputs which are not empty agree on.
fn same_count(counts: &[usize]) -> usize {
    let count = counts.iter().copied().max().unwrap_or(0);
    assert!(
        counts.iter().all(|&c| c == count || c == 0),
        "outputs are cut into different numbers of chunks: {counts:?}"
    );
    count
}

//! `kernels/tree_sum.cu`: parts of a sum that stand side by side, added up along the binary tree over their numbers.

use super::super::{Argument, Launch};
use std::ops::Range;

/// Parts that a block adds up, and its threads, which have four floats of each.
const PARTS: usize = 8;
const THREADS: usize = 256;
/// Parts in scratch memory, and slices that are not all as long, begin at multiples of this many floats.
const SLICE: usize = 16;

/// How `len` floats are divided among GPUs: each adds up a slice, all as long where their number divides `len`, else all but the last ones.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Slices {
    len: usize,
    /// Number of GPUs.
    pub size: usize,
    /// Floats of a slice.
    pub slice: usize,
    /// Floats from one to the next where one GPU has everybody's.
    pub stride: usize,
}

impl Slices {
    pub fn new(len: usize, size: usize) -> Slices {
        let stride = len.div_ceil(size).next_multiple_of(SLICE);
        let slice = if len.is_multiple_of(size) { len / size } else { stride };
        Slices { len, size, slice, stride }
    }

    /// The slice of that GPU, which may be empty.
    pub fn of(&self, rank: usize) -> Range<usize> {
        let cut = |rank: usize| (rank * self.slice).min(self.len);
        cut(rank)..cut(rank + 1)
    }

    /// Floats of memory for one slice of everybody.
    pub fn scratch(&self) -> usize {
        self.size * self.stride
    }
}

/// Launches after which the first of `count` parts is the sum of all: parts of `len` floats that stand `stride` apart.
pub fn tree_sum(count: usize, stride: usize, len: usize) -> Vec<Launch> {
    let launch = |count: usize, stride: usize| Launch {
        kernel: "tree_sum".into(),
        grid: [len.div_ceil(4 * THREADS), count.div_ceil(PARTS), 1],
        block: [THREADS, 1, 1],
        shared: 0,
        arguments: vec![
            Argument::Output(0),
            Argument::u32(count),
            Argument::u64(stride as u64),
            Argument::u64(len as u64),
        ],
    };
    let (mut count, mut stride, mut launches) = (count, stride, Vec::new());
    while count > 1 && len > 0 {
        launches.push(launch(count, stride));
        (count, stride) = (count.div_ceil(PARTS), PARTS * stride);
    }
    launches
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slices_make_up_the_whole() {
        for (len, size) in [(0, 2), (1, 4), (16, 3), (17, 2), (100_003, 8), (64, 4), (24, 4), (21, 3)] {
            let slices = Slices::new(len, size);
            let mut end = 0;
            for rank in 0..size {
                let slice = slices.of(rank);
                assert_eq!(slice.start, end);
                let is_equal = slice.len() * size == len;
                assert!(is_equal || !len.is_multiple_of(size), "{len} floats of {size}: {slice:?}");
                assert!(is_equal || slice.start.is_multiple_of(SLICE) || slice.is_empty());
                assert!(slice.len() <= slices.stride);
                end = slice.end;
            }
            assert_eq!(end, len);
            assert!((len..len + size * 2 * SLICE).contains(&slices.scratch()));
        }
    }
}

//! What ranks do together with a part of a buffer.

use std::ops::Range;

/// What becomes of a range of a buffer that all ranks have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exchange {
    /// Every rank gets the sum over all ranks, of floats.
    AllReduce,
    /// Of the sum's equal parts, one for each rank and in their order, a rank gets its own ([`slice_of`]); what stands in the others is not
    /// defined then. Of floats.
    ReduceScatter,
    /// Of the range's equal parts every rank gets each from the rank whose own it is. Of bytes.
    AllGather,
}

impl Exchange {
    /// Its name in messages.
    pub fn name(self) -> &'static str {
        match self {
            Exchange::AllReduce => "all-reduce",
            Exchange::ReduceScatter => "reduce-scatter",
            Exchange::AllGather => "all-gather",
        }
    }

    /// Whether ranks add up: floats, and otherwise bytes.
    pub fn is_sum(self) -> bool {
        self != Exchange::AllGather
    }

    /// The bytes of a range of elements.
    pub fn in_bytes(self, range: &Range<usize>) -> Range<usize> {
        let size = if self.is_sum() { size_of::<f32>() } else { 1 };
        range.start * size..range.end * size
    }
}

/// The part of `range` that is rank `rank`'s of `size`.
///
/// # Panics
/// If the range has no such parts.
pub fn slice_of(range: &Range<usize>, rank: usize, size: usize) -> Range<usize> {
    assert!(range.len().is_multiple_of(size), "{} elements for {size} ranks", range.len());
    let each = range.len() / size;
    let start = range.start + rank * each;
    start..start + each
}

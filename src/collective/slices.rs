//! The equal parts of a range, one for each rank.

use std::ops::Range;

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

//! Where each tensor stands in the flat buffers.

use std::collections::HashMap;
use std::ops::Range;

/// Elements to which tensors are aligned: 256 bytes of f32.
pub const ALIGN: usize = 64;

/// One named tensor in a flat f32 buffer, in our memory order (convolution weights are OHWI).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorSpec {
    /// The diffusers name, for example `down_blocks.0.resnets.0.conv1.weight`.
    pub name: String,
    /// Shape, slowest axis first.
    pub shape: Vec<usize>,
    /// First element in the buffer.
    pub offset: usize,
    /// Number of elements, the product of `shape`.
    pub len: usize,
}

impl TensorSpec {
    /// Its elements in the flat buffer.
    pub fn range(&self) -> Range<usize> {
        self.offset..self.offset + self.len
    }
}

/// A set of tensors that cannot stand in one flat buffer.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum LayoutError {
    /// Two tensors have one name.
    #[error("tensor {0:?} occurs twice")]
    Duplicate(String),
    /// A name that could not be written.
    #[error("{0:?} is no tensor name")]
    BadName(String),
    /// The number of elements is not the product of the shape, is 0, or overflows.
    #[error("tensor {name:?} of shape {shape:?} cannot have {len} elements")]
    BadLength {
        /// The tensor.
        name: String,
        /// Its shape.
        shape: Vec<usize>,
        /// The length given.
        len: usize,
    },
    /// Two tensors overlap, or the gap between them is larger than alignment needs.
    #[error("tensor {name:?} begins at element {offset}: expected {lowest} to {highest}, after the tensor before it")]
    BadOffset {
        /// The tensor.
        name: String,
        /// Its first element.
        offset: usize,
        /// The end of the tensor before it.
        lowest: usize,
        /// That end, aligned.
        highest: usize,
    },
}

/// The tensors of a flat buffer in ascending order of their offsets; gaps are zero.
#[derive(Clone, Debug)]
pub struct Layout {
    tensors: Vec<TensorSpec>,
    elements: usize,
    by_name: HashMap<String, usize>,
}

impl PartialEq for Layout {
    fn eq(&self, other: &Self) -> bool {
        self.tensors == other.tensors
    }
}

impl Layout {
    /// Takes the tensors in any order; they must not overlap, and no gap may reach [`ALIGN`] elements.
    pub fn new(mut tensors: Vec<TensorSpec>) -> Result<Layout, LayoutError> {
        tensors.sort_by_key(|t| t.offset);
        let mut by_name = HashMap::with_capacity(tensors.len());
        let mut end = 0usize;
        for (i, t) in tensors.iter().enumerate() {
            if t.name.is_empty() || t.name == "__metadata__" || t.name.chars().any(char::is_control) {
                return Err(LayoutError::BadName(t.name.clone()));
            }
            let bad_length = || LayoutError::BadLength { name: t.name.clone(), shape: t.shape.clone(), len: t.len };
            let product = t.shape.iter().try_fold(1usize, |p, &d| p.checked_mul(d)).ok_or_else(bad_length)?;
            if product != t.len || t.len == 0 {
                return Err(bad_length());
            }
            let aligned = end.checked_next_multiple_of(ALIGN).ok_or_else(bad_length)?;
            if t.offset < end || t.offset > aligned {
                let (lowest, highest) = (end, aligned);
                return Err(LayoutError::BadOffset { name: t.name.clone(), offset: t.offset, lowest, highest });
            }
            // A quarter of the address space keeps every later product with 4 groups and 4 bytes from overflowing.
            end = t.offset.checked_add(t.len).filter(|&e| e <= usize::MAX / 64).ok_or_else(bad_length)?;
            if by_name.insert(t.name.clone(), i).is_some() {
                return Err(LayoutError::Duplicate(t.name.clone()));
            }
        }
        Ok(Layout { tensors, elements: end.next_multiple_of(ALIGN), by_name })
    }

    /// Places tensors one after another in the given order, each aligned to [`ALIGN`] elements.
    pub fn packed<N: Into<String>>(tensors: impl IntoIterator<Item = (N, Vec<usize>)>) -> Result<Layout, LayoutError> {
        let mut specs = Vec::new();
        let mut offset = 0usize;
        for (name, shape) in tensors {
            let name = name.into();
            let len = shape.iter().try_fold(1usize, |p, &d| p.checked_mul(d));
            let next = len.and_then(|l| offset.checked_add(l)).and_then(|e| e.checked_next_multiple_of(ALIGN));
            let (Some(len), Some(next)) = (len, next) else {
                return Err(LayoutError::BadLength { name, shape, len: usize::MAX });
            };
            specs.push(TensorSpec { name, shape, offset, len });
            offset = next;
        }
        Layout::new(specs)
    }

    /// The tensors in ascending order of their offsets.
    pub fn tensors(&self) -> &[TensorSpec] {
        &self.tensors
    }

    /// The tensor of this name.
    pub fn get(&self, name: &str) -> Option<&TensorSpec> {
        self.by_name.get(name).map(|&i| &self.tensors[i])
    }

    /// Elements of a flat buffer, gaps included: a multiple of [`ALIGN`].
    pub fn elements(&self) -> usize {
        self.elements
    }

    /// Elements of all tensors, gaps excluded.
    pub fn parameters(&self) -> usize {
        self.tensors.iter().map(|t| t.len).sum()
    }

    /// The element range of shard `index` of `count`: aligned, contiguous, and as even as alignment allows.
    pub fn shard(&self, index: usize, count: usize) -> Range<usize> {
        let blocks = (self.elements / ALIGN) as u128;
        let cut = |i: usize| (blocks * i as u128 / count.max(1) as u128) as usize * ALIGN;
        cut(index)..cut(index + 1)
    }

    /// The tensors, or parts of tensors, inside an element range.
    pub fn pieces(&self, range: Range<usize>) -> impl Iterator<Item = Piece<'_>> {
        let first = self.tensors.partition_point(|t| t.offset + t.len <= range.start);
        self.tensors[first..]
            .iter()
            .take_while({
                let end = range.end;
                move |t| t.offset < end
            })
            .map(move |tensor| {
                let elements = tensor.offset.max(range.start)..(tensor.offset + tensor.len).min(range.end);
                Piece { tensor, elements }
            })
            .filter(|piece| !piece.elements.is_empty())
    }
}

/// A tensor's elements inside a shard.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Piece<'a> {
    /// The tensor.
    pub tensor: &'a TensorSpec,
    /// The elements of the flat buffer that are meant.
    pub elements: Range<usize>,
}

impl Piece<'_> {
    /// The shape it is stored with: the tensor's own where it is whole, else one axis.
    pub fn shape(&self) -> Vec<usize> {
        if self.elements.len() == self.tensor.len { self.tensor.shape.clone() } else { vec![self.elements.len()] }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(name: &str, shape: &[usize], offset: usize) -> TensorSpec {
        TensorSpec { name: name.into(), shape: shape.into(), offset, len: shape.iter().product() }
    }

    #[test]
    fn packed_tensors_are_aligned() {
        let layout = Layout::packed([("a", vec![3, 5]), ("b", vec![64]), ("c", vec![65])]).unwrap();
        assert_eq!(layout.tensors().iter().map(|t| t.offset).collect::<Vec<_>>(), [0, 64, 128]);
        assert_eq!((layout.elements(), layout.parameters()), (256, 15 + 64 + 65));
    }

    #[test]
    fn impossible_layouts_are_refused() {
        assert!(matches!(Layout::new(vec![spec("a", &[4], 0), spec("a", &[4], 64)]), Err(LayoutError::Duplicate(_))));
        assert!(matches!(
            Layout::new(vec![spec("a", &[4], 0), spec("b", &[4], 3)]),
            Err(LayoutError::BadOffset { .. })
        ));
        assert!(matches!(
            Layout::new(vec![spec("a", &[4], 0), spec("b", &[4], 65)]),
            Err(LayoutError::BadOffset { .. })
        ));
        assert!(matches!(Layout::new(vec![spec("a", &[0], 0)]), Err(LayoutError::BadLength { .. })));
        assert!(matches!(Layout::new(vec![spec("", &[1], 0)]), Err(LayoutError::BadName(_))));
        let huge = TensorSpec { name: "a".into(), shape: vec![usize::MAX, 2], offset: 0, len: 2 };
        assert!(matches!(Layout::new(vec![huge]), Err(LayoutError::BadLength { .. })));
        let far = TensorSpec { name: "a".into(), shape: vec![usize::MAX - 1], offset: 0, len: usize::MAX - 1 };
        assert!(matches!(Layout::new(vec![far]), Err(LayoutError::BadLength { .. })));
    }

    #[test]
    fn shards_partition_the_buffer_and_the_tensors() {
        let layout = Layout::packed((0..9).map(|i| (format!("t{i}"), vec![7 * i + 1, 11]))).unwrap();
        for count in 1..40 {
            let mut at = 0;
            let mut covered = HashMap::new();
            for i in 0..count {
                let range = layout.shard(i, count);
                assert_eq!(range.start, at);
                at = range.end;
                for piece in layout.pieces(range.clone()) {
                    assert!(range.start <= piece.elements.start && piece.elements.end <= range.end);
                    *covered.entry(piece.tensor.name.clone()).or_insert(0) += piece.elements.len();
                }
            }
            assert_eq!(at, layout.elements());
            assert!(layout.tensors().iter().all(|t| covered[&t.name] == t.len));
        }
    }
}

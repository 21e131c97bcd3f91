use super::Shape;
use crate::device::ALIGNMENT;
use std::collections::HashMap;
use std::ops::Range;

/// A named parameter, or one of several that ops read as one.
#[derive(Clone, Debug, PartialEq)]
pub struct Part {
    /// Full name, as in diffusers.
    pub name: String,
    /// Shape; convolution weights are `[O, H, W, I]`.
    pub shape: Shape,
}

/// What an op reads as one parameter.
#[derive(Clone, Debug, PartialEq)]
pub struct Param {
    /// Shape as the op sees it.
    pub shape: Shape,
    /// The named parameters in it, one after another.
    pub parts: Vec<Part>,
}

/// A named parameter and its place in the flat buffers.
#[derive(Clone, Debug, PartialEq)]
pub struct Placed {
    /// Full name.
    pub name: String,
    /// Shape.
    pub shape: Shape,
    /// Its elements in each of the flat buffers.
    pub range: Range<usize>,
}

/// The order of parameters in the flat buffers of weights, gradients, moments and averages.
///
/// Parameters stand in the order in which the backward pass completes their gradients, each at a multiple of 256 bytes; gaps are
/// zero.
#[derive(Clone, Debug, PartialEq)]
pub struct ParamLayout {
    placed: Vec<Placed>,
    len: usize,
    offsets: HashMap<String, usize>,
}

const ALIGNMENT_ELEMENTS: usize = ALIGNMENT / size_of::<f32>();

impl ParamLayout {
    /// Lays out `params` in the given order.
    pub fn new<'a>(params: impl Iterator<Item = &'a Param>) -> ParamLayout {
        let mut placed = Vec::new();
        let mut len = 0;
        for param in params {
            let mut start = len;
            for part in &param.parts {
                let range = start..start + part.shape.len();
                start = range.end;
                placed.push(Placed { name: part.name.clone(), shape: part.shape.clone(), range });
            }
            len = start.next_multiple_of(ALIGNMENT_ELEMENTS);
        }
        let offsets = placed.iter().map(|p| (p.name.clone(), p.range.start)).collect();
        ParamLayout { placed, len, offsets }
    }

    /// The same in flat buffers whose length is a multiple of `elements`: what follows the last parameter is a gap.
    pub fn padded_to(self, elements: usize) -> ParamLayout {
        ParamLayout { len: self.len.next_multiple_of(elements), ..self }
    }

    /// Number of elements of each flat buffer, gaps included.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are no parameters.
    pub fn is_empty(&self) -> bool {
        self.placed.is_empty()
    }

    /// Number of parameters, gaps not counted.
    pub fn parameters(&self) -> usize {
        self.placed.iter().map(|p| p.range.len()).sum()
    }

    /// Number of parameters in a range of a flat buffer.
    pub fn parameters_in(&self, range: &Range<usize>) -> usize {
        let inside = |p: &Placed| p.range.end.min(range.end).saturating_sub(p.range.start.max(range.start));
        self.placed.iter().map(inside).sum()
    }

    /// The named parameters in the order of their places.
    pub fn iter(&self) -> impl Iterator<Item = &Placed> {
        self.placed.iter()
    }

    /// The parameter of that name.
    pub fn get(&self, name: &str) -> Option<&Placed> {
        self.placed.iter().find(|p| p.name == name)
    }

    /// First element of a parameter (of its first part), if the layout has it whole.
    pub(super) fn offset_of(&self, param: &Param) -> Option<usize> {
        let mut next = None;
        for part in &param.parts {
            let offset = *self.offsets.get(&part.name)?;
            if next.is_some_and(|n| n != offset) {
                return None;
            }
            next = Some(offset + part.shape.len());
        }
        self.offsets.get(&param.parts.first()?.name).copied()
    }
}

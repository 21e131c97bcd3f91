use std::fmt;

/// Dimensions of a tensor, outermost first; the last one is contiguous.
#[derive(Clone, PartialEq, Eq, Hash, Debug, Default)]
pub struct Shape(Vec<usize>);

impl Shape {
    /// The dimensions.
    pub fn dims(&self) -> &[usize] {
        &self.0
    }

    /// Number of elements.
    pub fn len(&self) -> usize {
        self.0.iter().product()
    }

    /// Whether there is no element.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// `[N, H, W, C]` of an image tensor.
    ///
    /// # Panics
    /// If there are not four dimensions.
    pub fn nhwc(&self) -> [usize; 4] {
        match self.0[..] {
            [n, h, w, c] => [n, h, w, c],
            _ => panic!("expected [N, H, W, C], found {self}"),
        }
    }

    /// The tensor as a matrix: the product of all dimensions but the last, and the last.
    ///
    /// # Panics
    /// If there is no dimension.
    pub fn rows_and_columns(&self) -> (usize, usize) {
        let Some((&last, rest)) = self.0.split_last() else { panic!("expected at least one dimension") };
        (rest.iter().product(), last)
    }
}

impl<const N: usize> From<[usize; N]> for Shape {
    fn from(dims: [usize; N]) -> Self {
        Shape(dims.to_vec())
    }
}

impl From<&[usize]> for Shape {
    fn from(dims: &[usize]) -> Self {
        Shape(dims.to_vec())
    }
}

impl fmt::Display for Shape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let dims: Vec<String> = self.0.iter().map(usize::to_string).collect();
        write!(f, "[{}]", dims.join(", "))
    }
}

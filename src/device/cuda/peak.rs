//! What a card multiplies at best: the ceiling that a training step is compared with.

use super::{AlignedProduct, Cuda, CudaError, MatrixShape, Precision, ProductShape};
use std::time::Duration;

/// Rows and columns of the largest matrices: larger ones are not multiplied faster.
const LARGEST: usize = 8192;
/// A product that takes so long is large enough.
const ENOUGH: Duration = Duration::from_millis(1);

impl Cuda {
    /// FLOP/s of the fastest product of large matrices of that precision.
    ///
    /// # Errors
    /// Too little memory, or what a library refuses.
    pub fn product_peak(&mut self, precision: Precision) -> Result<f64, CudaError> {
        let mut size = 256;
        loop {
            let matrix = |is_transposed| MatrixShape { is_transposed, stride: size, precision };
            let shape = ProductShape {
                rows: size,
                columns: size,
                depth: size,
                a: matrix(false),
                b: matrix(true),
                c: matrix(false),
                has_bias: false,
                has_addend: false,
            };
            let (_, time) = self.blas.search(&mut self.gpu, &AlignedProduct { shape, alignments: [256; 4] })?;
            if size == LARGEST || time >= ENOUGH {
                return Ok(2.0 * (size as f64).powi(3) / time.as_secs_f64().max(f64::MIN_POSITIVE));
            }
            size *= 2;
        }
    }
}

//! What a card multiplies at best: the ceiling that a training step is compared with.

use super::blas::ProductAddresses;
use super::{Cuda, CudaError, MatrixShape, Memory, Precision, ProductShape};
use crate::rng::{Kind, Stream};
use std::time::Duration;

/// Rows and columns of the largest matrices: larger ones are not multiplied faster.
const LARGEST: usize = 8192;
/// A product that takes so long is large enough.
const ENOUGH: Duration = Duration::from_millis(1);
/// Products that are timed together, and how often.
const TOGETHER: usize = 10;
const ROUNDS: usize = 5;

impl Cuda {
    /// FLOP/s of the fastest large product of matrices of that precision.
    ///
    /// # Errors
    /// Too little memory, or what a library refuses.
    pub fn product_peak(&mut self, precision: Precision) -> Result<f64, CudaError> {
        let mut size = 256;
        loop {
            let time = self.time_product(size, precision)?;
            if size == LARGEST || time >= ENOUGH {
                return Ok(2.0 * (size as f64).powi(3) / time.as_secs_f64().max(f64::MIN_POSITIVE));
            }
            size *= 2;
        }
    }

    fn time_product(&mut self, size: usize, precision: Precision) -> Result<Duration, CudaError> {
        let mut matrices = Vec::new();
        let time = self.time_product_of(size, precision, &mut matrices);
        for matrix in matrices {
            self.gpu().free(matrix)?;
        }
        time
    }

    /// The same; what it allocates is in `matrices`.
    fn time_product_of(
        &mut self,
        size: usize,
        precision: Precision,
        matrices: &mut Vec<Memory>,
    ) -> Result<Duration, CudaError> {
        // Zeros would be multiplied faster: they take less power.
        let content = normals(size * size, precision);
        for _ in 0..3 {
            let matrix = self.gpu().allocate(content.len())?;
            matrices.push(matrix);
            self.gpu().upload(matrix, &content)?;
        }
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
        let [a, b, c] = [0, 1, 2].map(|i: usize| matrices[i].address);
        self.fastest_product(&shape, ProductAddresses { a, b, c, bias: 0, addend: c }, ROUNDS, TOGETHER)
    }
}

/// Normal numbers, over and over, as a device holds them.
fn normals(len: usize, precision: Precision) -> Vec<u8> {
    let mut period = vec![0.0f32; 65_536];
    Stream { seed: 0, kind: Kind::Sample, layer: 0, sample: 0, step: 0 }.fill_normal(0, &mut period);
    let bytes: Vec<u8> = match precision {
        Precision::F32 => period.iter().flat_map(|number| number.to_ne_bytes()).collect(),
        Precision::Bf16 => period.iter().flat_map(|number| half::bf16::from_f32(*number).to_ne_bytes()).collect(),
    };
    bytes.iter().copied().cycle().take(len * precision.bytes()).collect()
}

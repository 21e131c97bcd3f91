//! The fastest algorithm that computes what it should: those that cuBLASLt proposes are timed, and the first of them that passes a test is
//! taken.

use super::{Blas, Operation};
use crate::device::cuda::pattern::{Pattern, Sum, mixed, number};
use crate::device::cuda::{AlignedProduct, CudaError, Gpu, MatrixShape, Memory, ProductAddresses, ProductShape};
use cudarc::cublaslt::sys::cublasLtMatmulAlgo_t;
use serde::{Deserialize, Serialize};
use std::time::Duration;

/// Elements that are compared with what they should be.
const SAMPLES: u64 = 256;

/// What was chosen for a product, by one cuBLASLt on one GPU.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProductChoice {
    /// What is computed.
    pub product: AlignedProduct,
    /// `cublasLtMatmulAlgo_t`, which "can be trivially serialized and later restored for use with the same version".
    pub algorithm: [u64; 8],
}

impl Blas {
    /// The fastest algorithm that gives the right result, twice the same bits. Takes memory for the matrices, and gives it back.
    ///
    /// # Errors
    /// There is none, too little memory, or cuBLASLt fails.
    pub fn search(&self, gpu: &mut Gpu, product: &AlignedProduct) -> Result<(ProductChoice, Duration), CudaError> {
        let mut bench = Bench::new(self, product);
        let found = bench.fastest(gpu);
        // Both errors are the GPU's; the first says more.
        let given_back = bench.give_back(gpu);
        let found = found?;
        given_back?;
        Ok(found)
    }

    /// What is wrong with an algorithm that was chosen before: it is none here, does not run, or computes something else.
    ///
    /// # Errors
    /// Too little memory, or the GPU fails.
    pub fn fault_of(&self, gpu: &Gpu, choice: &ProductChoice) -> Result<Option<String>, CudaError> {
        let mut bench = Bench::new(self, &choice.product);
        let fault = bench.fault_of(gpu, choice);
        // Both errors are the GPU's; the first says more.
        let given_back = bench.give_back(gpu);
        let fault = fault?;
        given_back?;
        Ok(fault)
    }
}

/// The matrices of a product, filled with random numbers: zeros would run faster.
struct Bench<'a> {
    blas: &'a Blas,
    product: AlignedProduct,
    /// Of a, b, c before, and the bias.
    patterns: [Pattern; 4],
    memory: Vec<Memory>,
}

/// Rows of a matrix as it stands in memory.
fn rows(matrix: &MatrixShape, [rows, columns]: [usize; 2]) -> usize {
    if matrix.is_transposed { columns } else { rows }
}

impl<'a> Bench<'a> {
    fn new(blas: &'a Blas, product: &AlignedProduct) -> Bench<'a> {
        let ProductShape { a, b, c, .. } = product.shape;
        let mut seed = 0;
        let patterns = [a, b, c, c].map(|matrix| {
            seed += 1;
            Pattern::new(seed, matrix.precision)
        });
        Bench { blas, product: *product, patterns, memory: Vec::new() }
    }

    fn give_back(self, gpu: &Gpu) -> Result<(), CudaError> {
        self.memory.into_iter().try_for_each(|memory| gpu.free(memory))
    }

    /// What a, b, c and the bias hold before a run; a result to which nothing is added holds what would spoil every sum.
    fn content(&self, which: usize) -> Vec<u8> {
        let ProductShape { rows: m, columns: n, depth: k, a, b, c, has_addend, .. } = self.product.shape;
        let sizes = [
            rows(&a, [m, k]) * a.stride,
            rows(&b, [k, n]) * b.stride,
            m * c.stride,
            // The bias, of c's type.
            n,
        ];
        let precision = [a, b, c, c][which].precision;
        match which {
            2 if !has_addend => vec![0xFF; sizes[2] * precision.bytes()],
            _ => self.patterns[which].bytes(sizes[which], precision),
        }
    }

    /// The matrices in memory; what is added stands where the result does.
    fn places(&mut self, gpu: &Gpu) -> Result<(ProductAddresses, Memory), CudaError> {
        let mut places = Vec::new();
        for which in 0..4 {
            let content = self.content(which);
            let memory = gpu.allocate(content.len())?;
            self.memory.push(memory);
            gpu.upload(memory, &content)?;
            places.push(memory);
        }
        let [a, b, c, bias] = [0, 1, 2, 3].map(|which: usize| places[which].address);
        Ok((ProductAddresses { a, b, c, bias, addend: c }, places[2]))
    }

    fn fastest(&mut self, gpu: &mut Gpu) -> Result<(ProductChoice, Duration), CudaError> {
        let (at, result) = self.places(gpu)?;
        let mut operation = Operation::new(self.blas, &self.product.shape, at)?;
        let (mut timed, mut refusals) = (Vec::new(), Vec::new());
        for algorithm in self.blas.proposed(&operation, &self.product)? {
            operation.algorithm = algorithm;
            match self.time(gpu, &operation)? {
                Ok(time) => timed.push((time, algorithm)),
                Err(why) => refusals.push(why),
            }
        }
        timed.sort_by_key(|(time, _)| *time);
        for (time, algorithm) in timed {
            operation.algorithm = algorithm;
            let (first, second) = (self.result(gpu, &operation, result)?, self.result(gpu, &operation, result)?);
            let fault = match first == second {
                true => self.fault(&first),
                false => Some("two runs give other bits".into()),
            };
            match fault {
                None => return Ok((ProductChoice { product: self.product, algorithm: algorithm.data }, time)),
                Some(why) => refusals.push(why),
            }
        }
        refusals.dedup();
        Err(CudaError::NoPlan { library: "cuBLASLt".into(), what: self.product.shape.to_string(), refusals })
    }

    /// How long an algorithm takes, or why it does not run.
    fn time(&self, gpu: &mut Gpu, operation: &Operation) -> Result<Result<Duration, String>, CudaError> {
        // SAFETY: the matrices are as large as the shape says, and stay until all has ended.
        let run = || unsafe { self.blas.run(operation) };
        // The first run may load.
        match run() {
            Err(error @ CudaError::Library { .. }) => return Ok(Err(error.to_string())),
            other => other?,
        }
        Ok(Ok(gpu.median_time(run)?))
    }

    fn fault_of(&mut self, gpu: &Gpu, choice: &ProductChoice) -> Result<Option<String>, CudaError> {
        let (at, result) = self.places(gpu)?;
        let algorithm = cublasLtMatmulAlgo_t { data: choice.algorithm };
        let operation = Operation { algorithm, ..Operation::new(self.blas, &self.product.shape, at)? };
        match self.blas.must_have(&operation).and_then(|()| self.result(gpu, &operation, result)) {
            Ok(found) => Ok(self.fault(&found)),
            Err(error @ (CudaError::Library { .. } | CudaError::NoPlan { .. })) => Ok(Some(error.to_string())),
            Err(error) => Err(error),
        }
    }

    /// What an algorithm gives.
    fn result(&self, gpu: &Gpu, operation: &Operation, result: Memory) -> Result<Vec<u8>, CudaError> {
        gpu.upload(result, &self.content(2))?;
        // SAFETY: as in `time`.
        unsafe { self.blas.run(operation) }?;
        gpu.download(result)
    }

    /// The first element that differs from what the product must give, in words.
    fn fault(&self, found: &[u8]) -> Option<String> {
        let ProductShape { rows, columns, depth, a, b, c, has_bias, has_addend } = self.product.shape;
        let at = |matrix: &MatrixShape, row: usize, column: usize| match matrix.is_transposed {
            true => column * matrix.stride + row,
            false => row * matrix.stride + column,
        };
        let [of_a, of_b, before, bias] = &self.patterns;
        (0..SAMPLES).find_map(|sample| {
            let draw = |which: u64, size: usize| mixed(sample * 2 + which) as usize % size;
            let (i, j) = (draw(0, rows), draw(1, columns));
            let mut sum = Sum::default();
            (0..depth).for_each(|l| sum.add(of_a.at(at(&a, i, l)) * of_b.at(at(&b, l, j))));
            if has_addend {
                sum.add(before.at(at(&c, i, j)));
            }
            if has_bias {
                sum.add(bias.at(j));
            }
            let (is, bound) = (number(found, at(&c, i, j), c.precision), sum.bound(c.precision));
            // Also where it is not a number.
            let is_right = (is - sum.value).abs() <= bound;
            (!is_right).then(|| {
                format!("it computes something else: element ({i}, {j}) is {is}, expected {} ± {bound}", sum.value)
            })
        })
    }
}

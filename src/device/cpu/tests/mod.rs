//! Tests of the device, and what those of the matrix kernels share.

mod gemm;
mod memory;
mod pool;
mod winograd;

use crate::device::cpu::Pool;
use crate::simd::{self, Level};
use std::ops::Range;

/// A fixed sequence of numbers (Knuth's 64-bit linear congruence): each test draws its shapes and values from its own.
struct Numbers(pub u64);

impl Numbers {
    fn next(&mut self) -> u32 {
        self.0 = self.0.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (self.0 >> 33) as u32
    }

    /// In `range`.
    fn size(&mut self, range: Range<usize>) -> usize {
        range.start + self.next() as usize % range.len()
    }

    fn pick(&mut self, from: &[usize]) -> usize {
        from[self.next() as usize % from.len()]
    }

    /// In -1..1.
    fn floats(&mut self, n: usize) -> Vec<f32> {
        (0..n).map(|_| self.next() as f32 / (1u64 << 30) as f32 - 1.0).collect()
    }
}

fn levels() -> Vec<Level> {
    [Level::Portable, Level::Avx2, Level::Avx512].into_iter().filter(|&level| level <= simd::level()).collect()
}

/// A pool whose scratch holds NaN.
fn pool(threads: usize) -> Pool {
    let pool = Pool::new(threads);
    // Every worker is sure to have had a task when as many tasks as workers wait for each other.
    let barrier = std::sync::Barrier::new(threads);
    pool.run(threads, &|_, scratch| {
        scratch.fill(f32::NAN);
        barrier.wait();
    });
    pool.common().floats().fill(f32::NAN);
    pool
}

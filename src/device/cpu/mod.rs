//! The CPU device: a thread pool and the matrix products that all heavy operations are made of.

pub mod gemm;
pub mod pool;

#[cfg(test)]
mod tests;

pub use pool::Pool;

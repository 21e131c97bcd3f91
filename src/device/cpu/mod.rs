//! CPU cores: buffers, a thread pool, and matrix kernels.

pub mod gemm;
mod memory;
pub mod pool;

#[cfg(test)]
mod tests;

pub use memory::Launch;
pub use pool::Pool;

/// CPU cores of this machine with their buffers.
pub struct Cpu {
    pool: Pool,
    buffers: Vec<memory::Buffer>,
    pub(in crate::device) stagings: Vec<Vec<u32>>,
}

impl Cpu {
    /// A device with `threads` threads.
    pub fn new(threads: usize) -> Cpu {
        Cpu { pool: Pool::new(threads), buffers: Vec::new(), stagings: Vec::new() }
    }

    /// The threads.
    pub fn pool(&self) -> &Pool {
        &self.pool
    }

    /// Makes room for at least `floats` numbers in the workspace of each thread.
    pub fn reserve_scratch(&mut self, floats: usize) {
        self.pool.reserve_scratch(floats);
    }
}

mod gemm;
mod pool;

//! Each kernel of kernels/ against the CPU's op of the same name, on a machine made of software (tests/cuda-sim).

mod adam_ema;
mod attention;
mod cpu;
mod elementwise;
mod faults;
mod grad_norm;
mod loss;
mod p_sample;
mod q_sample;
mod sim;
mod timestep_embedding;
mod values;

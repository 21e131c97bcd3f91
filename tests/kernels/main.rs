//! Each kernel of kernels/ against the CPU's op of the same name, on a machine made of software (tests/cuda-sim), or with
//! `DDPM_DIST_KERNELS=gpu` on a GPU.

mod adam_ema;
mod attention;
mod benchmark;
#[path = "../cuda-sim/build.rs"]
mod build;
mod cpu;
mod driver;
mod elementwise;
mod faults;
mod gpu;
mod grad_norm;
mod group_norm;
mod loss;
mod machine;
mod p_sample;
mod q_sample;
mod sim;
mod timestep_embedding;
mod values;
mod weights;

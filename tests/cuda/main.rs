//! The libraries of a GPU, on a machine made of software (tests/cuda-sim), or with `DDPM_DIST_KERNELS=gpu` on the first GPU.

#[path = "../cuda-sim/build.rs"]
mod build;
#[path = "../common/mod.rs"]
mod common;
mod convolution;
mod cudnn;
mod cudnn_faults;
mod graph;
mod machine;
mod nccl;
mod nccl_graph;
mod nccl_train;
mod program;
mod steps;
#[path = "../kernels/values.rs"]
#[allow(dead_code, reason = "tests of kernels need more of it")]
mod values;

//! The libraries of a GPU, on a machine made of software (tests/cuda-sim), or with `DDPM_DIST_KERNELS=gpu` on the first GPU.

mod ahead;
#[path = "../cuda-sim/build.rs"]
mod build;
#[path = "../common/mod.rs"]
mod common;
mod conformance;
mod convolution;
#[path = "../kernels/cpu.rs"]
mod cpu;
mod cudnn;
mod cudnn_faults;
mod cudnn_without_gpu;
mod faults;
mod gpus;
mod graph;
mod machine;
mod memory;
mod nccl;
mod nccl_graph;
mod nccl_one;
mod nccl_slices;
mod nccl_train;
mod ops;
mod planned;
mod plans;
mod program;
mod pytorch;
mod pytorch_ops;
mod steps;
#[path = "../kernels/values.rs"]
#[allow(dead_code, reason = "tests of kernels need more of it")]
mod values;

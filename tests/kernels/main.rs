//! Each kernel of kernels/ against the CPU's op of the same name, on a machine made of software (tests/cuda-sim).

mod cpu;
mod faults;
mod q_sample;
mod sim;
mod values;

//! What a program runs on: memory, threads and the numerical libraries of each kind of device.

pub mod cpu;

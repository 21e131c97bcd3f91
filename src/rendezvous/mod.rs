//! Who this process is among the ranks of a run, and where they meet.
//!
//! [`detect`] reads the environment that a launcher gives its processes: torchrun, Open MPI, Slurm, MPICH, Kubernetes, our own, or anything
//! that sets `RANK` and `WORLD_SIZE`. It is a function of a map, so that recorded environments (`tests/launchers/`) say what it does.
//!
//! The ranks meet at a [`store`]: keys and values behind a socket, in the protocol of PyTorch's `TCPStore`, which torchrun's agent speaks.

mod ancestry;
mod environment;
mod interface;
mod launch;
mod meet;
mod slurm;
pub mod store;
#[cfg(test)]
pub(crate) mod testing;
mod world;

#[cfg(test)]
mod tests;

pub use environment::Environment;
pub use interface::{InterfaceError, address_of_interface};
pub use launch::Launch;
pub use world::{
    Detected, Launcher, MAX_RANKS, Node, OWN_ATTEMPT, OWN_RUN_ID, OWN_STARTED, StoreAddress, StoreHost, World,
    WorldError, detect,
};

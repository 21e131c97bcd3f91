//! Many processes as one run: starting them on this machine and others, watching them, ending and starting them again.

mod config;
pub mod launcher;
mod preemption;
pub mod requeue;
mod verdict;
pub mod watchdog;

pub use config::ClusterConfig;
pub use preemption::{Preemption, Request};
pub use verdict::{Slow, Stragglers, minority};

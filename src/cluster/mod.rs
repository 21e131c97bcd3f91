//! What keeps many ranks going: who is slow, who holds other weights than the rest.

mod config;
mod verdict;

pub use config::ClusterConfig;
pub use verdict::{Slow, Stragglers, minority};

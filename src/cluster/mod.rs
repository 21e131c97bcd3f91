//! Many processes as one run: starting them on this machine and others, watching them, ending and starting them again. And on paper: how
//! fast so many would be.

mod behind;
mod config;
mod cores;
mod interconnect;
pub mod launcher;
mod preemption;
pub mod requeue;
pub mod scaling;
mod verdict;
pub mod watchdog;

pub use behind::{Behind, Seen, behind};
pub use config::ClusterConfig;
pub use cores::Cores;
pub use interconnect::{Interconnect, UnknownInterconnect};
pub use preemption::{Preemption, StopRequest};
pub use verdict::{SpeedChange, Stragglers, minority};

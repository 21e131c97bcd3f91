//! Why ranks cannot be started.

use crate::rendezvous::store::StoreError;
use std::io;
use std::net::IpAddr;
use std::path::PathBuf;
use std::time::Duration;
use thiserror::Error;

/// What keeps a launcher from its work.
#[derive(Debug, Error)]
pub enum LaunchError {
    /// The folder for logs.
    #[error("cannot create the folder {} for the logs of ranks: {source}", .path.display())]
    Folder {
        /// The folder.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Another process listens on the port.
    #[error(
        "port {port} is in use on this machine: is another launcher running? End it, or choose another port with --rdzv (on all nodes)"
    )]
    PortTaken {
        /// The port.
        port: u16,
    },
    /// The store cannot listen for another reason.
    #[error("cannot listen on port {port}, where the nodes are to meet: {source}")]
    Listen {
        /// The port.
        port: u16,
        /// Why.
        source: io::Error,
    },
    /// The meeting place is on another network than the one that was chosen.
    #[error(
        "the nodes meet at {host}, which is {found} here, but --interface is {chosen}: name a host in --rdzv that is {chosen}, or the address itself"
    )]
    OtherNetwork {
        /// Host of the meeting place.
        host: String,
        /// Its address.
        found: IpAddr,
        /// The address of the interface.
        chosen: IpAddr,
    },
    /// The store of node 0.
    #[error("the launcher of node 0 cannot be reached: {0}")]
    Store(#[from] StoreError),
    /// Not all launchers are there.
    #[error(
        "of {count} nodes, {missing:?} did not join within {} s: start the same command there, with their --node-rank (--rdzv-timeout waits longer)",
        .after.as_secs()
    )]
    NodesMissing {
        /// Who is missing.
        missing: Vec<usize>,
        /// Number of nodes.
        count: usize,
        /// How long they were waited for.
        after: Duration,
    },
    /// Two launchers say that they are the same node.
    #[error(
        "node {node} has joined already, from {other}: give each node its own --node-rank, each run its own port (--rdzv)"
    )]
    Twice {
        /// The node.
        node: usize,
        /// Where the first one runs.
        other: String,
    },
    /// Launchers that were started differently.
    #[error(
        "node {node} ({host}) has {what} {theirs}, node 0 has {ours}: start the same program with the same options on all nodes"
    )]
    Disagree {
        /// The node.
        node: usize,
        /// Its name.
        host: String,
        /// What differs.
        what: &'static str,
        /// There.
        theirs: String,
        /// Here.
        ours: String,
    },
    /// The work cannot be shared among so many.
    #[error(
        "the work cannot be shared among {ranks} ranks{}",
        match .fits {
            Some(fits) => format!(": at most {fits} fit; take that many in all, or say --min-ranks {fits}"),
            None => " or fewer".to_string(),
        }
    )]
    NotAllowed {
        /// How many there would be.
        ranks: usize,
        /// The largest number below that is allowed.
        fits: Option<usize>,
    },
    /// More ranks than a run may have.
    #[error("{ranks} ranks on all nodes are too many: at most {most}")]
    TooMany {
        /// How many there would be.
        ranks: usize,
        /// How many there may be.
        most: usize,
    },
    /// More ranks are demanded than there are.
    #[error("--min-ranks {least} is more than the {ranks} ranks that are to be started")]
    TooFew {
        /// The number demanded.
        least: usize,
        /// How many there are.
        ranks: usize,
    },
    /// The launcher of node 0 went away.
    #[error(
        "the launcher of node 0 ({host}) is gone ({why}); it holds the store in which ranks meet, so that nothing can go on here"
    )]
    LeadLost {
        /// Its name.
        host: String,
        /// How that was noticed.
        why: String,
    },
    /// What another launcher said makes no sense.
    #[error("`{key}` in the store is not what a launcher of this version writes: is another program using the port?")]
    Garbled {
        /// The key.
        key: String,
    },
    /// A signal came before any rank was started, or a second one.
    #[error("stopped by signal {0}")]
    Stopped(i32),
}
